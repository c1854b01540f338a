"""The rounding floor: what a moved input does to a model, and how far it opens the limits."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

from fastvlm_export.quantize.recipes import RECIPES, Activations, Float, Precision, Recipe
from fastvlm_export.quantize.runnable import runnable
from fastvlm_export.validate import parity
from fastvlm_export.validate.limits import FLOAT16, FLOAT32, INTEGER_ACTIVATIONS, Statistics
from fastvlm_export.validate.recording import record
from fastvlm_export.validate.rounding_floor import (
    DRAWS,
    ROOM,
    difference,
    has_float_floor,
    has_floor,
    rounding_floor,
    widened,
)

from .fakes import Altered, case, tiny_session

STEPS = 4


def recorded(session, cases=("a", "b")):
    return record(session, [case(name, seed=i) for i, name in enumerate(cases)], STEPS)


def floor_of(session, cases=("a", "b"), recipe=RECIPES["int8"]):
    return rounding_floor(recorded(session, cases), session, recipe)


def test_a_float_model_has_a_floor_of_float_rounding():
    found = floor_of(tiny_session())
    assert 0 < found.features_rms < 1e-4  # the input was moved indeed
    assert 0 < found.logits_rms < 1e-4
    assert widened(INTEGER_ACTIVATIONS, found) == INTEGER_ACTIVATIONS


def test_where_single_values_are_judged_nothing_is_widened():
    large = Statistics(
        features_rms=1.0, features_noise=1.0, logits_rms=1.0, mean_kl=1.0, tokens=1.0
    )
    assert widened(FLOAT32, large) == FLOAT32


@pytest.mark.parametrize(
    ("half", "size"), [(Float.FP32, 2e-7), (Float.FP16, 2.0**-11), (Float.BF16, 2.0**-8)]
)
def test_inputs_move_by_one_rounding_of_the_floats_in_between(half, size):
    seen = []

    class Watched(Altered):
        def encode_image(self, pixels):
            seen.append(pixels)
            return super().encode_image(pixels)

    floor_of(Watched(tiny_session()), ("a",), replace(RECIPES["int8"], float_format=half))
    still, *moved = seen
    assert len(moved) == DRAWS
    for one in moved:
        spread = np.std((one / np.where(still > 0, still, 1) - 1)[still > 0])
        assert spread == pytest.approx(size, rel=0.2)
    assert not np.array_equal(moved[0], moved[1])  # each draw has noise of its own


def test_a_half_precision_model_has_a_floor_of_its_rounding():
    found = floor_of(tiny_session(), recipe=replace(RECIPES["int8"], float_format=Float.FP16))
    assert 1e-4 < found.features_rms < 2e-2
    assert 1e-4 < found.logits_rms < 3e-2


def test_the_worst_draw_opens_the_limits_with_room():
    found = Statistics(
        features_rms=0.2, features_noise=0.2, logits_rms=0.01, mean_kl=0.02, tokens=0.1
    )
    opened = widened(INTEGER_ACTIVATIONS, found)
    assert replace(opened, statistics=INTEGER_ACTIVATIONS.statistics) == INTEGER_ACTIVATIONS
    assert opened.statistics == Statistics(
        features_rms=pytest.approx(ROOM * 0.2),
        features_noise=pytest.approx(ROOM * 0.2),
        logits_rms=INTEGER_ACTIVATIONS.statistics.logits_rms,
        mean_kl=pytest.approx(ROOM**2 * 0.02),
        tokens=pytest.approx(ROOM * 0.1),
    )


def test_a_floor_is_the_worst_of_its_draws():
    """One draw in four is off by far more than the others."""
    calls = []

    def shaken(features):
        calls.append(1)
        return features * np.float32(1.3 if len(calls) == 3 else 1)

    session = Altered(
        tiny_session(), image=shaken
    )  # recorded once, then drawn: the third is shaken
    found = rounding_floor(recorded(session, ("a",)), session, RECIPES["int8"])
    assert found.features_rms == pytest.approx(0.3, rel=1e-3)


def test_a_model_that_rounding_moves_passes_on_another_draw():
    """Features that jump by up to 100 % for a last bit: no maximum could hold them."""
    unstable = Altered(
        tiny_session(), image=lambda x: x * np.float32(1e6 * x.astype(np.float64).sum() % 1 + 1)
    )
    recordings = recorded(unstable)
    limits = widened(INTEGER_ACTIVATIONS, rounding_floor(recordings, unstable, RECIPES["int8"]))
    assert limits.statistics.features_rms > INTEGER_ACTIVATIONS.statistics.features_rms
    for seed in range(100, 120):
        noise = np.random.default_rng(seed)
        moved = Altered(unstable, image=lambda x, n=noise: x * np.float32(1 + n.normal(0, 1e-7)))
        cases = [recording.case for recording in recordings]
        assert parity.compare(recordings, cases, moved, limits).passed


def test_nan_opens_nothing():
    broken = Altered(tiny_session(), decode=lambda x: np.full_like(x, np.nan))
    recordings = recorded(tiny_session(), ("a",))
    found = rounding_floor(recordings, broken, RECIPES["int8"])
    assert all(map(math.isfinite, asdict(found).values()))
    assert widened(INTEGER_ACTIVATIONS, found) == INTEGER_ACTIVATIONS
    cases = [recording.case for recording in recordings]
    result = parity.compare(recordings, cases, broken, widened(INTEGER_ACTIVATIONS, found))
    assert not result.passed
    judged = [m for m in result.measurements if m.case == "all images"]
    assert any(check.message for m in judged for check in m.checks)


def test_the_difference_to_another_session_is_of_its_own_outputs():
    recordings = recorded(tiny_session())
    found = difference(recordings, Altered(tiny_session(), image=lambda x: x * np.float32(1.02)))
    assert found.features_rms == pytest.approx(0.02, rel=1e-3)
    assert found.logits_rms > 1e-4
    assert asdict(difference(recordings, tiny_session())) == dict.fromkeys(asdict(found), 0.0)
    assert FLOAT16.statistics.worst(found).features_rms == found.features_rms


@pytest.mark.parametrize(
    ("recipe", "integers", "floats"),
    [
        (RECIPES["fp32"], False, False),
        (RECIPES["fp16"], False, True),
        (RECIPES["int8"], True, False),
        (RECIPES["int4"], True, False),
        (RECIPES["bf16"], False, True),
        (RECIPES["fp8"], True, False),
        (replace(RECIPES["int8"], float_format=Float.FP16), True, False),
        (Recipe(name="weights", decoder=Precision(bits=4, group_size=32)), False, False),
        (Recipe(name="none", decoder=Precision(activations=Activations.DYNAMIC)), False, False),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_only_what_is_rounded_while_the_model_runs_has_a_floor(recipe, integers, floats):
    assert (has_floor(recipe), has_float_floor(recipe)) == (integers, floats)


def test_noise_reaches_what_the_first_rounding_would_take_it_from():
    """Values on the first rounding's own steps, half of them on the second one's boundaries."""

    class Twice(torch.nn.Module):
        def forward(self, x):
            quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
            dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
            for step in (1.0, 2.0):
                integers = quantize(x, step, 0, 0, 255, torch.uint8)
                x = dequantize(integers, step, 0, 0, 255, torch.uint8)
            return x

    x = torch.arange(200.0)
    run = runnable(torch.export.export(Twice(), (x,)))
    (still,) = run(x)
    assert torch.equal(run(x * (1 + 2e-7 * torch.randn(200)))[0], still)

    class Rounding(Altered):
        def encode_image(self, pixels):
            return super().encode_image(pixels) * (1 + float((run(x)[0] - still).abs().mean()))

    found = floor_of(Rounding(tiny_session()), ("a",))
    assert found.features_rms > 0.05
    assert torch.equal(run(x)[0], still)
