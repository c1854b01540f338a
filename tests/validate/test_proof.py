"""A proof on small random models: what is run when, against what, and what is kept."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastvlm_export.exporter.clock import Clock
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.exporter.progress import Silent
from fastvlm_export.exporter.samples import Sample
from fastvlm_export.exporter.tensor_names import Layout
from fastvlm_export.quantize.recipes import RECIPES, Float, LossLimits, Recipe
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.validate import proof
from fastvlm_export.validate.contract import Contract
from fastvlm_export.validate.latency import Plan
from fastvlm_export.validate.limits import FLOAT16, FLOAT32, INTEGER_ACTIVATIONS, NOTHING
from fastvlm_export.validate.parity import Stage
from fastvlm_export.validate.proof_types import Baseline, Reference
from fastvlm_export.validate.sessions import INTERPRETER, Runtime

from .fakes import IMAGE_TOKEN_ID, RESOLUTION, Altered, tiny_model

CONTEXT = 256
RIGHT = Contract(files=("manifest.json",), values=1, differences=())
INT8 = replace(RECIPES["int8"], limits=LossLimits(mean_kl=10.0, accuracy_points=100.0))
IMAGES = [
    Sample(
        name=f"{shade}.png",
        image=Image.new("RGB", (RESOLUTION, RESOLUTION), (shade, 90, 30)),
        question="What?",
    )
    for shade in (10, 200)
]


class Letters:
    """A token for every character."""

    def encode(self, text):
        return [1 + ord(character) % 80 for character in text]

    def decode(self, ids):
        return " ".join(map(str, ids))


def contract(**more):
    preprocessing = Preprocessing(strategy=Strategy.PAD, resolution=RESOLUTION)
    values = {
        "preprocessing": preprocessing,
        "image_token_id": IMAGE_TOKEN_ID,
        "image_tokens": 4,
        "eos_token_ids": (0,),
    }
    return SimpleNamespace(artifact={}, **(values | more))


class Watched:
    """Opens sessions and knows which of them are still alive, and which were when one opened."""

    def __init__(self):
        self.alive = weakref.WeakSet()
        self.before = []

    def open(self, model):
        gc.collect()
        self.before.append(len(self.alive))
        session = EagerSession(model, CONTEXT)
        self.alive.add(session)
        return session


@pytest.fixture
def watched(monkeypatch):
    found = Watched()
    monkeypatch.setattr(proof, "EagerSession", lambda model, context: found.open(model))
    monkeypatch.setattr(proof, "read_tokenizer", lambda path: Letters())
    monkeypatch.setattr(proof, "is_bundled_model", lambda checkpoint: False)
    monkeypatch.setattr(proof, "compare_contract", lambda bundle, reference: RIGHT)
    monkeypatch.setattr(proof, "STEPS", 4)
    monkeypatch.setattr(proof, "QUESTIONS", 3)
    return found


def reference(
    watched,
    recipe=RECIPES["fp32"],
    quantized=None,
    layout=Layout.APPLE,
    exact=None,
    context=CONTEXT,
):
    return Reference(
        checkpoint=SimpleNamespace(model=tiny_model, layout=layout),
        spec=contract(context=context, tokenizer=Letters()),
        recipe=recipe,
        quantized=quantized,
        exact=exact,
    )


def rounded():
    """The tiny model with coarser weights: another model than the original."""
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data = (parameter.data * 8).round() / 8
    return model


def examine(given):
    clock = Clock(Silent())
    return proof.examine(
        given, proof.run_original(given.checkpoint, given.spec, IMAGES, clock), clock
    )


def prove(given, session, monkeypatch, *, exact=None, plan=None):
    """`exact` opens the bundle for the comparison without rounding: then it is Core ML's."""
    openers = {False: session, True: exact}
    monkeypatch.setattr(proof, "open_session", lambda bundle, *, exact=False: openers[exact]())
    monkeypatch.setattr(proof, "has_exact", lambda bundle: exact is not None)
    target = "coreml" if exact else "onnx"
    recipe = given.reference.recipe.to_dict()
    bundle = SimpleNamespace(path=Path(), manifest=contract(target=target, recipe=recipe))
    return proof.prove(given, bundle, images=IMAGES, plan=plan, peer=None, clock=Clock(Silent()))


def test_a_float32_bundle_is_held_to_the_checkpoint(watched, monkeypatch):
    found = prove(
        examine(reference(watched)), lambda: EagerSession(tiny_model(), CONTEXT), monkeypatch
    )
    assert found.parity.passed
    assert found.parity.limits == FLOAT32
    assert found.parity.worst[1].value == 0
    assert found.quantization is found.accuracy is None
    assert [run.case for run in found.parity.free_runs] == ["10.png", "200.png"]


def test_a_quantized_bundle_is_held_to_the_quantized_model(watched, monkeypatch):
    baseline = examine(reference(watched, INT8, lambda: watched.open(rounded())))
    assert baseline.loss.mean_kl > 1e-3
    found = prove(baseline, lambda: EagerSession(rounded(), CONTEXT), monkeypatch)
    assert found.parity.worst[1].value == 0
    assert found.parity.limits == INTEGER_ACTIVATIONS
    assert found.quantization is baseline.loss
    original = prove(baseline, lambda: EagerSession(tiny_model(), CONTEXT), monkeypatch)
    assert not original.parity.passed


def test_one_baseline_serves_several_bundles_with_no_model_run_again(watched, monkeypatch):
    baseline = examine(reference(watched, INT8, lambda: watched.open(rounded())))
    assert len(watched.before) == 2
    for _ in range(2):
        prove(baseline, lambda: EagerSession(rounded(), CONTEXT), monkeypatch)
    assert len(watched.before) == 2


def test_models_are_freed_before_the_next_is_opened(watched, monkeypatch):
    open_bundle = lambda: watched.open(rounded())  # noqa: E731
    baseline = examine(reference(watched, INT8, lambda: watched.open(rounded())))
    prove(baseline, open_bundle, monkeypatch)
    assert watched.before == [0, 0, 0]


@pytest.mark.parametrize(
    ("recipe", "quantized"), [(INT8, None), (Recipe(name="plain"), tiny_model)]
)
def test_a_recipe_without_its_model_is_the_caller_s_error(watched, recipe, quantized):
    with pytest.raises(ValueError, match=recipe.name):
        reference(watched, recipe, quantized)


@pytest.fixture
def asked(watched, monkeypatch):
    monkeypatch.setattr(proof, "is_bundled_model", lambda checkpoint: True)
    return watched


def test_the_bundled_task_has_three_sides(asked, monkeypatch):
    baseline = examine(reference(asked, INT8, lambda: asked.open(rounded())))
    found = prove(baseline, lambda: EagerSession(rounded(), CONTEXT), monkeypatch)
    assert list(found.accuracy.references) == ["quantized PyTorch", "PyTorch"]
    assert found.accuracy.reference is baseline.loss.answers.quantized
    assert found.accuracy.original is baseline.loss.answers.original
    assert found.accuracy.limit == INTEGER_ACTIVATIONS.answers
    assert found.accuracy.check.value == 0
    wrote = [[s.got for s in side.samples] for side in found.accuracy.references.values()]
    assert wrote[0] != wrote[1]


def test_without_quantization_it_has_two(asked, monkeypatch):
    found = prove(
        examine(reference(asked)), lambda: EagerSession(tiny_model(), CONTEXT), monkeypatch
    )
    assert list(found.accuracy.references) == ["PyTorch"]
    assert found.accuracy.check.limit == 0
    assert found.accuracy.check.passed


def with_nan(x):
    return x * np.float32("nan")


def test_a_model_that_gives_nan_fails_with_a_report_instead_of_an_error(asked, monkeypatch):
    def broken():
        return Altered(EagerSession(tiny_model(), CONTEXT), decode=with_nan)

    baseline = examine(reference(asked, INT8, broken))
    assert isinstance(baseline, Baseline)
    assert not baseline.loss.passed
    assert baseline.answers is None
    found = prove(examine(reference(asked)), broken, monkeypatch)
    assert not found.parity.passed
    assert found.accuracy is None


def test_an_artifact_that_cannot_run_is_one_error_and_no_comparison(watched, monkeypatch):
    def refuse(_):
        raise ExportError("The decoder cannot be run.", "Export it again.")

    def opened():
        return Altered(EagerSession(tiny_model(), CONTEXT), decode=refuse)

    baseline = examine(reference(watched))
    compared = []
    monkeypatch.setattr(proof.parity, "compare", lambda *_: compared.append(1))
    with pytest.raises(ExportError, match="cannot be run"):
        prove(baseline, opened, monkeypatch)
    assert not compared


def test_a_session_that_breaks_otherwise_is_compared_and_the_stage_says_why(watched, monkeypatch):
    def break_down(_):
        raise RuntimeError("no such thing")

    def opened():
        return Altered(EagerSession(tiny_model(), CONTEXT), decode=break_down)

    found = prove(examine(reference(watched)), opened, monkeypatch)
    assert not found.parity.passed
    assert "no such thing" in str(found.parity.to_dict())


HALF = replace(INT8, float_format=Float.FP16)
"""What Core ML makes of int8: its limits leave room for a planted fault."""


def coarse():
    return EagerSession(rounded(), CONTEXT)


def slightly(factor=1.0003, **more):
    """The same as an artifact of half precision may be: within its limits, not within float32's."""
    scale = {part: (lambda x: x * np.float32(factor)) for part in ("image", "embed", "decode")}
    return Altered(coarse(), **(scale | more))


def exact_baseline(watched):
    return examine(reference(watched, HALF, lambda: watched.open(rounded()), exact=coarse))


def test_without_rounding_the_artifact_is_held_to_float32(watched, monkeypatch):
    baseline = exact_baseline(watched)
    assert [recording.case.name for recording in baseline.exact] == ["10.png"]
    assert baseline.exact[0].steps == proof.EXACT_STEPS
    noisy = lambda: slightly(embed=lambda x: x)  # noqa: E731
    found = prove(baseline, noisy, monkeypatch, exact=coarse)
    assert found.parity.passed  # the typed comparison has room for it
    assert found.parity.limits.logits == INTEGER_ACTIVATIONS.logits
    assert found.exact.passed
    assert (found.exact.limits.logits, found.exact.limits.features) == (4e-5, 4e-5)
    assert {m.stage for m in found.exact.measurements} == set(Stage)


@pytest.mark.parametrize(
    ("part", "stage"),
    [
        ("image", Stage.IMAGE_FEATURES),
        ("embed", Stage.EMBEDDINGS),
        ("decode", Stage.FIRST_TOKEN),
    ],
)
def test_a_fault_that_hides_in_rounding_noise_shows_without_it(watched, monkeypatch, part, stage):
    def faulty():
        return Altered(coarse(), **{part: lambda x: x * np.float32(1.001)})

    found = prove(exact_baseline(watched), coarse, monkeypatch, exact=faulty)
    assert found.parity.passed
    assert not found.exact.passed
    assert found.exact.first_broken is stage


@pytest.mark.parametrize(("factor", "opened"), [(1.02, True), (1.0003, False)])
def test_16_bit_floats_may_be_as_far_off_as_they_are_from_no_rounding(
    watched, monkeypatch, factor, opened
):
    """Three times that, where it is more than the least and than what moved inputs show."""
    monkeypatch.setattr(proof, "rounding_floor", lambda *_: NOTHING)
    half = replace(RECIPES["fp16"], limits=INT8.limits)
    exact = lambda: slightly(factor, embed=lambda x: x)  # noqa: E731
    found = examine(reference(watched, half, coarse, exact=exact)).limits
    assert (found == FLOAT16) == (not opened)
    if opened:
        assert found.statistics.features_rms == pytest.approx(0.06, rel=1e-3)
        assert found.statistics.logits_rms > 0.06
        assert found.embeddings == 0


def test_each_session_is_closed_before_the_next_is_opened(watched, monkeypatch):
    opened = lambda: watched.open(rounded())  # noqa: E731
    baseline = examine(reference(watched, HALF, opened, exact=opened))
    prove(baseline, opened, monkeypatch, exact=opened)
    assert watched.before == [0] * 5  # original, quantized, exact, artifact, exact artifact


def test_an_exact_bundle_without_an_exact_reference_is_the_caller_s_error(watched, monkeypatch):
    baseline = examine(reference(watched, HALF, lambda: watched.open(rounded())))
    assert baseline.exact is None
    with pytest.raises(ValueError, match="its reference was not asked"):
        prove(baseline, coarse, monkeypatch, exact=coarse)


def test_what_no_device_runs_is_not_timed(watched, monkeypatch):
    timed = []
    monkeypatch.setattr(proof, "time_bundle", lambda *_: timed.append(1) or "times")
    baseline = exact_baseline(watched)
    monkeypatch.setattr(proof, "runtime", lambda bundle: Runtime(name="chip", device=True))
    assert prove(baseline, coarse, monkeypatch, exact=coarse, plan=Plan()).latency == "times"
    monkeypatch.setattr(proof, "runtime", lambda bundle: INTERPRETER)
    assert prove(baseline, coarse, monkeypatch, exact=coarse, plan=Plan()).latency is None
    assert timed == [1]


@pytest.mark.parametrize(
    ("layout", "context", "asked", "expected"),
    [
        (Layout.APPLE, CONTEXT, None, 64),
        (Layout.RANDOM, CONTEXT, None, 24),
        (Layout.APPLE, CONTEXT, 3, 3),
        (Layout.APPLE, 130, None, 12),  # the prompt takes 118
    ],
)
def test_greedy_tokens_are_64_or_what_is_asked_for_or_has_room(
    watched, monkeypatch, layout, context, asked, expected
):
    monkeypatch.undo()
    monkeypatch.setattr(proof, "is_bundled_model", lambda checkpoint: False)
    given = reference(watched, layout=layout, context=context)
    found = proof.run_original(given.checkpoint, given.spec, IMAGES[:1], Clock(Silent()), asked)
    assert [recording.steps for recording in found.recordings] == [expected]
