"""What the pipeline does: when a gate fails, with several targets, and under each recipe."""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastvlm_export import targets
from fastvlm_export.exporter import pipeline
from fastvlm_export.exporter.bundle import Bundle, files_of, open_bundle
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.requests import Checked, Chosen
from fastvlm_export.exporter.source import SourceRequest
from fastvlm_export.quantize.recipes import RECIPES, Float
from fastvlm_export.targets import onnx
from fastvlm_export.targets.base import DEFAULTS, Array, Session, TokenIds
from fastvlm_export.validate import proof
from fastvlm_export.validate.proof_types import Reference

from .. import shared
from ..checkpoints import save_apple


class Louder:
    """A session whose image features are 0.1 % too large."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def encode_image(self, pixels: Array) -> Array:
        return self.session.encode_image(pixels) * np.float32(1.001)

    def embed(self, input_ids: TokenIds) -> Array:
        return self.session.embed(input_ids)

    def decode(self, inputs_embeds: Array) -> Array:
        return self.session.decode(inputs_embeds)

    def reset(self) -> None:
        self.session.reset()


class Spoiled:
    """The ONNX target, opened through `Louder`."""

    RUNTIME_PACKAGES = onnx.RUNTIME_PACKAGES
    availability = staticmethod(onnx.availability)
    adapt = staticmethod(onnx.adapt)
    option_problems = staticmethod(onnx.option_problems)
    problems = staticmethod(onnx.problems)
    contract_problems = staticmethod(onnx.contract_problems)
    lower = staticmethod(onnx.lower)
    statements = staticmethod(onnx.statements)

    def open(self, bundle: Bundle) -> Session:
        return Louder(onnx.open(bundle))


def test_what_fails_is_kept_apart_and_the_old_bundle_stays(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    folder = save_apple(tmp_path_factory.mktemp("small"))
    source = SourceRequest(checkpoint=folder)
    request = pipeline.ExportRequest(source=source, out=out, force=True, steps=4)
    (good,) = pipeline.export(request)
    assert good.passed
    before = files_of(out)

    monkeypatch.setattr(targets, "get", lambda _: Spoiled())
    (tmp_path / "out.failed").mkdir()
    (tmp_path / "out.failed" / "mine.txt").write_text("not an export's")
    for _ in range(2):
        (bad,) = pipeline.export(request)
        assert not bad.passed
        assert bad.report.parity is not None
        assert bad.report.parity.first_broken == "image_features"
        assert bad.path == tmp_path / "out.failed-1"
        open_bundle(bad.path)
        assert (bad.path / "report" / "report.html").is_file()
    assert files_of(out) == before
    assert (tmp_path / "out.failed" / "mine.txt").exists()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture
def exported(request: pytest.FixtureRequest) -> Path:
    """A bundle of the bundled model under the recipe."""
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("exported", "points"),
    [("onnx_fp16", 0), ("onnx_int8", 1), ("onnx_int4", 2)],
    indirect=["exported"],
)
def test_each_recipe_keeps_its_promise_on_the_bundled_task(exported: Path, points: float) -> None:
    report = json.loads((exported / "report" / "report.json").read_text("utf-8"))
    print(report["verdict"])
    assert report["passed"]
    assert report["quantization_loss"]["accuracy_points_lost"] <= points
    answers = report["accuracy"]
    lost = answers["original"]["right"] - answers["candidate"]["right"]
    assert answers["candidate"]["total"] == shared.QUESTIONS
    assert 100 * lost / shared.QUESTIONS <= points

    manifest = json.loads((exported / "manifest.json").read_text("utf-8"))
    assert f"onnx_{manifest['recipe']['name']}" == exported.name.replace("-", "_")
    assert len(manifest["quantization"]["calibration"]["images"]) == 14


def test_a_quantized_bundle_can_be_proven_anew(
    onnx_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe and the names of the images are in the manifest."""
    monkeypatch.setattr(proof, "QUESTIONS", 6)  # the export asked more of them
    out = Path(shutil.copytree(onnx_int4, tmp_path / "out"))
    again = pipeline.validate(out, steps=8)
    assert again.passed
    assert again.report.recipe == "int4"
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    manifest["quantization"]["calibration"]["images"].popitem()
    (out / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(ExportError, match="calibrated on 13 other images"):
        pipeline.validate(out)


class Model:
    """Stands for a quantized model that takes much memory."""


def test_targets_that_compute_alike_share_one_model_and_it_goes_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """quantize, lower, examine and prove are watched; nothing is computed."""
    half = replace(RECIPES["int4"], float_format=Float.FP16)
    chosen = tuple(
        Chosen(name=name, target=onnx, recipe=recipe, options=DEFAULTS)
        for name, recipe in (("a", RECIPES["int4"]), ("b", half), ("c", RECIPES["int4"]))
    )
    events: list[str] = []
    alive: weakref.WeakSet[Model] = weakref.WeakSet()

    def quantize(model: object, recipe: object, *_: object) -> SimpleNamespace:
        gc.collect()
        events.append(f"quantize with {len(alive)} before it")
        made = Model()
        alive.add(made)
        return SimpleNamespace(programs=made, record=SimpleNamespace(recipe=recipe))

    def lower(one: Chosen, quantized: object, work: object, place: Path) -> SimpleNamespace:
        events.append(f"lower {one.name}")
        (place / "manifest.json").write_text("{}")
        return SimpleNamespace(path=place, manifest=SimpleNamespace(target=one.name))

    def examine(reference: Reference, original: object, clock: object) -> str:
        events.append(f"examine with {original}, exact: {reference.exact is not None}")
        return "baseline"

    def prove(baseline: str, bundle: SimpleNamespace, **_: object) -> None:
        events.append(f"prove {bundle.manifest.target}")

    def report(_: object, bundle: SimpleNamespace, *__: object) -> SimpleNamespace:
        passed = bundle.manifest.target != "b"
        return SimpleNamespace(passed=passed, write=lambda folder: None)

    checkpoint = SimpleNamespace(config=None, model=lambda: None)
    fakes = {
        "check": lambda request: Checked(chosen=chosen, calibration=None),
        "check_layers": lambda *_: None,
        "load_source": lambda source: checkpoint,
        "contract": lambda *_: SimpleNamespace(decoder=None, context=1),
        "check_prompts": lambda *_: None,
        "reparameterize": lambda *_: SimpleNamespace(model=None, folds=(), difference=0, limit=1),
        "run_original": lambda *_: events.append("original") or "the original",
        "quantize": quantize,
        "_lower": lower,
        "has_exact": lambda bundle: bundle.manifest.target == "b",
        "examine": examine,
        "prove": prove,
        "_report": report,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(pipeline, name, fake)
    found = pipeline.export(pipeline.ExportRequest(source=SourceRequest(), out=tmp_path / "out"))
    assert events == [
        "quantize with 0 before it",
        "lower a",
        "lower c",
        "original",
        "examine with the original, exact: False",
        "prove a",
        "prove c",
        "quantize with 0 before it",
        "lower b",
        "examine with the original, exact: True",
        "prove b",
    ]
    # In the order that was asked for; one that failed keeps all of them apart.
    assert [outcome.path for outcome in found] == [tmp_path / "out.failed" / n for n in "abc"]
    assert [outcome.passed for outcome in found] == [True, False, True]
