"""What the pipeline does when a gate fails, with a target that spoils what it wrote."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastvlm_export import targets
from fastvlm_export.exporter import pipeline
from fastvlm_export.exporter.bundle import Bundle, files_of, open_bundle
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.source import SourceRequest
from fastvlm_export.targets import onnx
from fastvlm_export.targets.base import Array, Session, TokenIds


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
    lower = staticmethod(onnx.lower)

    def open(self, bundle: Bundle) -> Session:
        return Louder(onnx.open(bundle))


def test_what_fails_is_kept_apart_and_the_old_bundle_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    request = pipeline.ExportRequest(source=SourceRequest(), out=out, force=True)
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


@pytest.mark.parametrize(("recipe", "points"), [("fp16", 0), ("int8", 1), ("int4", 2)])
def test_each_recipe_keeps_its_promise_on_the_bundled_task(
    tmp_path: Path, recipe: str, points: float
) -> None:
    out = tmp_path / "out"
    request = pipeline.ExportRequest(source=SourceRequest(), out=out, recipe=recipe)
    (outcome,) = pipeline.export(request)
    report = outcome.report
    print(report.verdict)
    assert outcome.passed
    assert report.quantization is not None and report.quantization.answers is not None
    assert report.quantization.answers.points_lost <= points
    assert report.accuracy is not None
    lost = report.accuracy.original.total.right - report.accuracy.candidate.total.right
    assert 100 * lost / report.accuracy.candidate.total.total <= points

    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert manifest["recipe"]["name"] == recipe
    assert len(manifest["quantization"]["calibration"]["images"]) == 14
    if recipe == "int4":  # the recipe and images are in the manifest: it can be proven anew
        again = pipeline.validate(out)
        assert again.passed
        assert again.report.recipe == recipe
        manifest["quantization"]["calibration"]["images"].popitem()
        (out / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        with pytest.raises(ExportError, match="calibrated on 13 other images"):
            pipeline.validate(out)
