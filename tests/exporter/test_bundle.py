import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvlm_export.exporter import bundle as bundles
from fastvlm_export.exporter.bundle import Manifest, Source, open_bundle, publish, staging
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.quantize import recipes


def write(folder: Path, content: str = "weights") -> Manifest:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "graph.onnx").write_text(content)
    (folder / "config.json").write_text("{}")
    manifest = Manifest(
        schema=bundles.SCHEMA,
        source=Source(name="x", layout="apple", sha256="00"),
        target="onnx",
        recipe=recipes.get("fp32").to_dict(),
        quantization={},
        resolution=256,
        context=512,
        image_tokens=16,
        preprocessing=Preprocessing(strategy=Strategy.PAD, resolution=256),
        prompt_template="qwen_2",
        image_token="<image>",  # noqa: S106 - not a secret
        image_token_id=7,
        eos_token_ids=(2, 3),
        model={"layers": 2},
        graphs={"vision": {"inputs": {"pixel_values": "float32[1,3,256,256]"}}},
        versions={"torch": "2.13"},
        files=bundles.files_of(folder),
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


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


def test_publishing_replaces_the_old_bundle_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("one", "two", "three"):
        with staging(out) as folder:
            write(folder, content)
            publish(folder, out)
        assert (out / "onnx" / "graph.onnx").read_text() == content
        assert names(tmp_path) == ["out"]


def test_a_failed_run_leaves_the_old_bundle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out, "old")

    def fails() -> None:
        with staging(out) as folder:
            write(folder, "new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    open_bundle(out)
    assert (out / "onnx" / "graph.onnx").read_text() == "old"
    assert names(tmp_path) == ["out"]


REPUBLISH = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
from fastvlm_export.exporter.bundle import publish, staging
out = Path(sys.argv[1])
print("ready", flush=True)
while True:
    with staging(out) as folder:
        for i in range(20):
            (folder / f"{i}").write_text("x")
        publish(folder, out)
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_moment_a_whole_bundle_is_there(tmp_path: Path, kill: signal.Signals) -> None:
    out = tmp_path / "out"
    for attempt in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", REPUBLISH, str(out)], stdout=subprocess.PIPE, stderr=-3
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.05 + 0.013 * attempt)
        child.send_signal(kill)
        child.wait()
        if out.exists():
            assert len(names(out)) == 20
    with staging(out) as folder:
        (folder / "new").write_text("x")
        publish(folder, out)
    assert names(tmp_path) == ["out"]  # what killed runs left behind is gone
    assert names(out) == ["new"]


def test_where_names_cannot_be_swapped_two_renames_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "elsewhere")
    out = tmp_path / "out"
    for content in ("one", "two"):
        with staging(out) as folder:
            write(folder, content)
            publish(folder, out)
    assert (out / "onnx" / "graph.onnx").read_text() == "two"
    assert names(tmp_path) == ["out"]


def test_a_bundle_moved_aside_by_a_killed_run_is_put_back(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    aside = tmp_path / f".out.{dead.pid}.abc.old"
    aside.mkdir()
    (aside / "kept").write_text("x")
    (tmp_path / f".out.{dead.pid}.abc").mkdir()
    with staging(tmp_path / "out"):
        assert names(tmp_path / "out") == ["kept"]
    assert names(tmp_path) == ["out"]


def test_an_output_that_is_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("x")
    with pytest.raises(ExportError, match="not empty"):
        bundles.check_out(tmp_path, force=False)
    with pytest.raises(ExportError, match="not a bundle"):
        bundles.check_out(tmp_path, force=True)
    with pytest.raises(ExportError, match="not a folder"):
        bundles.check_out(tmp_path / "photo.jpg", force=True)
