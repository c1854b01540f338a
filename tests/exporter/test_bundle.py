import dataclasses
import json
from pathlib import Path

import pytest

from fastvlm_export.exporter import bundle as bundles
from fastvlm_export.exporter.bundle import check_current, open_bundle, reading
from fastvlm_export.exporter.errors import ExportError

from .bundles import made, write


def test_a_bundle_opens_as_it_was_written(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    assert open_bundle(tmp_path).manifest == manifest
    assert set(manifest.files) == {"config.json", "onnx/graph.onnx"}


def test_what_clients_must_know_of_the_artifact_is_kept(tmp_path: Path) -> None:
    details: dict[str, str | int] = {"layout": "apple-app", "prefill_chunk": 128}
    manifest = dataclasses.replace(write(tmp_path), artifact=details)
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert open_bundle(tmp_path).manifest.artifact == details


def test_a_manifest_of_an_earlier_version_says_so(tmp_path: Path) -> None:
    values = json.loads(write(tmp_path).to_json())
    del values["artifact"]
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ExportError, match="damaged: KeyError"):
        open_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"schema": 2}))
    with pytest.raises(ExportError, match="has schema 2; this version reads 3"):
        open_bundle(tmp_path)


def test_files_of_a_package_are_hashed_wherever_they_lie(tmp_path: Path) -> None:
    """A package is a folder, with a manifest of its own."""
    inner = tmp_path / "vision.mlpackage" / "Data" / "com.apple.CoreML" / "weights"
    inner.mkdir(parents=True)
    (inner / "weight.bin").write_bytes(bytes(64))
    (inner.parent / "model.mlmodel").write_bytes(b"program")
    (tmp_path / "vision.mlpackage" / "Manifest.json").write_text("{}")
    (tmp_path / "vision.mlpackage" / "manifest.json").write_text("{}")
    manifest = write(tmp_path)
    program = "vision.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    weights = "vision.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert set(manifest.files) == {
        "config.json",
        "onnx/graph.onnx",
        "vision.mlpackage/Manifest.json",
        "vision.mlpackage/manifest.json",
        program,
        weights,
    }
    (inner / "weight.bin").write_bytes(bytes(63) + b"1")
    (inner.parent / "model.mlmodel").unlink()
    with pytest.raises(ExportError) as caught:
        open_bundle(tmp_path)
    assert f"{weights} differs" in caught.value.message
    assert f"{program} is missing" in caught.value.message


def test_changed_and_missing_files_are_all_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "onnx" / "graph.onnx").write_text("weighty")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ExportError) as caught:
        open_bundle(tmp_path)
    assert "config.json is missing" in caught.value.message
    assert "onnx/graph.onnx differs" in caught.value.message


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "onnx/../../secret", "..\\secret"])
def test_a_manifest_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    manifest = write(folder)
    (tmp_path / "secret").write_text("x")
    hostile = dataclasses.replace(manifest, files={name: bundles.sha256_of(tmp_path / "secret")})
    (folder / "manifest.json").write_text(hostile.to_json())
    with pytest.raises(ExportError, match="points outside"):
        open_bundle(folder)


def test_a_link_out_of_the_bundle_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    write(folder)
    (tmp_path / "secret").write_text("{}")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ExportError, match="outside"):
        open_bundle(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 99},
        {"resolution": "big"},
        {"context": -1},
        {"preprocessing": {}},
        {"preprocessing": None},
        {"files": []},
        {"source": {"name": "x"}},
        {"eos_token_ids": "abc"},
        {"unheard_of": 1},
        {"artifact": []},
        {"artifact": {"layout": None}},
        {"artifact": {"prefill_chunk": 1.5}},
        {"artifact": {"capacity": True}},
        {"artifact": {"layout": {"name": "apple-app"}}},
    ],
)
def test_a_damaged_manifest_is_one_clear_error(tmp_path: Path, change: dict[str, object]) -> None:
    values = json.loads(write(tmp_path).to_json()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ExportError, match=r"manifest\.json"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "\x00"])
def test_a_manifest_that_is_no_object(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ExportError, match=r"manifest\.json"):
        open_bundle(tmp_path)


def test_a_reader_is_told_of_a_replacement_and_not_of_damage(tmp_path: Path) -> None:
    """Read the old manifest, then meet the new bundle's files."""
    out, new = made(tmp_path / "out", "old"), made(tmp_path / "new", "new")

    def replaced(name: str) -> None:
        if name == "onnx/graph.onnx":
            out.rename(tmp_path / "old")
            new.rename(out)

    with pytest.raises(ExportError) as caught:
        open_bundle(out, replaced)
    assert "was replaced or removed while it was being read" in caught.value.message
    assert "damaged" not in caught.value.message
    open_bundle(out)


def test_a_bundle_that_goes_while_it_is_read_is_not_damaged(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    with pytest.raises(ExportError, match="was replaced or removed"):
        open_bundle(out, lambda _: out.rename(tmp_path / "gone") if out.exists() else None)


def test_what_fails_in_a_bundle_that_was_replaced_is_told_as_that(tmp_path: Path) -> None:
    bundle = open_bundle(made(tmp_path / "out", "old"))
    with pytest.raises(RuntimeError, match="of its own"), reading(bundle):
        raise RuntimeError("of its own")
    check_current(bundle)
    write(bundle.path, "new")
    with pytest.raises(ExportError, match="was replaced"), reading(bundle):
        raise RuntimeError("a graph that does not fit its weights")
    with pytest.raises(ExportError, match="was replaced"), reading(bundle):
        pass
