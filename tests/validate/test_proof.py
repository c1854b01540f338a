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
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.exporter.progress import Silent
from fastvlm_export.exporter.samples import Sample
from fastvlm_export.exporter.tensor_names import Layout
from fastvlm_export.quantize.recipes import RECIPES, LossLimits, Recipe
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.validate import proof
from fastvlm_export.validate.limits import FLOAT32, INTEGER_ACTIVATIONS
from fastvlm_export.validate.proof import Baseline, Reference

from .fakes import IMAGE_TOKEN_ID, RESOLUTION, Altered, tiny_model

CONTEXT = 256
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
    return SimpleNamespace(**(values | more))


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
    monkeypatch.setattr(proof, "STEPS", 4)
    monkeypatch.setattr(proof, "QUESTIONS", 3)
    return found


def reference(watched, recipe=RECIPES["fp32"], quantized=None, layout=Layout.APPLE):
    return Reference(
        checkpoint=SimpleNamespace(model=tiny_model, layout=layout),
        spec=contract(context=CONTEXT, tokenizer=Letters()),
        recipe=recipe,
        quantized=quantized,
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


def prove(given, session, monkeypatch):
    monkeypatch.setattr(proof, "open_session", lambda bundle: session())
    bundle = SimpleNamespace(path=Path(), manifest=contract(target="onnx"))
    return proof.prove(given, bundle, images=IMAGES, plan=None, peer=None, clock=Clock(Silent()))


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
