"""The rounding floor: what a moved input does to a model, and how far it opens the limits."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

from fastvlm_export.quantize.recipes import RECIPES, Activations, Float, Precision, Recipe
from fastvlm_export.quantize.runnable import runnable
from fastvlm_export.validate.floor import has_float_floor, has_floor, rounding_floor, widened
from fastvlm_export.validate.limits import FLOAT32, INTEGER_ACTIVATIONS, Limits
from fastvlm_export.validate.recording import record

from .fakes import Altered, case, tiny_session

STEPS = 4


def floor_of(session, cases=("a", "b"), recipe=RECIPES["int8"]):
    recordings = record(session, [case(name, seed=i) for i, name in enumerate(cases)], STEPS)
    return rounding_floor(recordings, session, FLOAT32, recipe)


def test_a_float_model_has_a_floor_of_float_rounding_and_keeps_its_limits():
    found = floor_of(tiny_session())
    assert found.passed
    assert found.worst[1].value > 0  # the input was moved indeed
    opened = widened(FLOAT32, found)
    assert opened == FLOAT32


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
    still, moved = seen[:2]
    assert np.std((moved / np.where(still > 0, still, 1) - 1)[still > 0]) == pytest.approx(
        size, rel=0.2
    )


def test_a_half_precision_model_has_a_floor_of_its_rounding():
    found = floor_of(tiny_session(), recipe=replace(RECIPES["int8"], float_format=Float.FP16))
    opened = widened(FLOAT32, found)
    for name in ("features", "features_rms", "features_noise", "logits", "logits_rms"):
        assert 1e-4 < getattr(opened, name) < 2e-2


def test_a_model_that_rounding_moves_opens_its_limits_by_twice_as_much():
    found = floor_of(Altered(tiny_session(), image=lambda x: x * np.float32(x.sum() % 1 + 1)))
    worst = max(
        check.value
        for m in found.measurements
        for check in m.checks
        if (m.stage, check.name) == ("image_features", "RMS relative")
    )
    assert worst > 1e-5
    opened = widened(FLOAT32, found)
    assert opened.features_rms == pytest.approx(max(2 * worst, FLOAT32.features_rms))
    for field in fields(Limits):
        assert getattr(opened, field.name) >= getattr(FLOAT32, field.name)
    assert (opened.embeddings, opened.pixels, opened.answers, opened.tie) == (
        FLOAT32.embeddings,
        FLOAT32.pixels,
        FLOAT32.answers,
        FLOAT32.tie,
    )


def test_nan_opens_nothing():
    broken = Altered(tiny_session(), decode=lambda x: np.full_like(x, np.nan))
    recordings = record(tiny_session(), [case("a")], STEPS)
    found = rounding_floor(recordings, broken, FLOAT32, RECIPES["int8"])
    assert not found.passed
    opened = widened(FLOAT32, found)
    assert opened == replace(FLOAT32, features=opened.features, features_rms=opened.features_rms)


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


def test_the_fixed_limits_are_the_least():
    found = floor_of(tiny_session())
    assert widened(INTEGER_ACTIVATIONS, found) == INTEGER_ACTIVATIONS


def test_tokens_that_the_moved_model_changes_are_allowed_twice():
    chance = np.random.default_rng(3)

    def undecided(logits):
        """Half of the calls prefer another token: by far, so that it is no tie."""
        out = np.array(logits)
        if chance.random() < 0.5:
            out[0, (logits[0].argmax() + 1) % logits.shape[1]] = 2 * np.abs(logits).max()
        return out

    found = floor_of(Altered(tiny_session(), decode=undecided))
    assert not found.passed
    assert widened(FLOAT32, found).tokens >= 2
    assert widened(FLOAT32, floor_of(tiny_session())).tokens == 0


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

    session = Rounding(tiny_session())
    opened = widened(FLOAT32, floor_of(session, ("a",)))
    assert opened.features > 0.1
    assert torch.equal(run(x)[0], still)
