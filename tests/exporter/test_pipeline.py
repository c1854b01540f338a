"""What the pipeline does when a gate fails, with a target that spoils what it wrote."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from torch.export import ExportedProgram

from fastvlm_export.exporter import pipeline
from fastvlm_export.exporter.bundle import Bundle, files_of, open_bundle
from fastvlm_export.exporter.source import SourceRequest
from fastvlm_export.exporter.spec import ExportSpec
from fastvlm_export.targets import onnx
from fastvlm_export.targets.base import Array, Artifact, Session, TokenIds


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

    def lower(
        self, programs: Mapping[str, ExportedProgram], spec: ExportSpec, out: Path
    ) -> Artifact:
        return onnx.lower(programs, spec, out)

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

    monkeypatch.setattr(pipeline.targets, "get", lambda _: Spoiled())
    monkeypatch.setattr("fastvlm_export.validate.proof.targets.get", lambda _: Spoiled())
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
