"""A folder as ExecuTorch's runtime packs it, and payloads that are none."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.targets.executorch_coreml_payload import (
    BACKEND,
    METADATA,
    PACKAGE,
    pack,
    unpack,
)

with quiet_import():
    from executorch.backends.apple.coreml import executorchcoreml
    from executorch.backends.apple.coreml.compiler import coreml_preprocess

FILES = {"metadata.json": b"{}", "a/weights/weight.bin": bytes(range(256)) * 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    for name, data in FILES.items():
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def unpacked(payload: bytes, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    unpack(memoryview(payload), folder, "x.pte")
    return contents(folder)


def test_executorch_reads_what_is_packed_here_and_the_other_way_round(
    folder: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    assert executorchcoreml.unflatten_directory_contents(pack(folder), str(theirs))
    assert contents(theirs / folder.name if (theirs / folder.name).is_dir() else theirs) == FILES
    payload = executorchcoreml.flatten_directory_contents(str(folder))
    assert unpacked(payload, tmp_path / "ours") == FILES
    assert unpacked(pack(folder), tmp_path / "again") == FILES


def test_names_are_those_of_executorchs_own_lowering() -> None:
    assert coreml_preprocess.CoreMLBackend.__name__ == BACKEND
    assert coreml_preprocess.MODEL_PATHS.MODEL.value == PACKAGE
    assert coreml_preprocess.MODEL_PATHS.METADATA.value == METADATA
    names = {field.name for field in fields(coreml_preprocess.ModelMetadata)}
    assert names == {"inputNames", "outputNames", "identifier"}


def node(name: str, *, region: tuple[int, int] = (0, 0), **children: int) -> dict[str, Any]:
    found = {"name": name, "kind": int(bool(children)), "children": children}
    return {**found, "dataRegion": {"offset": region[0], "size": region[1]}}


def as_payload(nodes: object) -> bytes:
    return b"data" + json.dumps({"nodes": nodes}, separators=(",", ":")).encode()[::-1]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"CMJR{}",
        as_payload([]),
        as_payload(3),
        as_payload([{"kind": 0}]),
        as_payload([node("f", region=(0, 10**9)), node("x", f=0)]),
        as_payload([node("f", region=(-2, 2)), node("x", f=0)]),
        as_payload([node("f", region=(0, 4)), {**node("x", f=0), "children": {"../f": 0}}]),
        as_payload([node("f", region=(0, 4)), {**node("x", f=0), "children": {"..": 0}}]),
        as_payload([{**node("x", f=0), "children": {"f": 0}}]),
        as_payload([node("f", region=(0, 4)), {**node("x", f=0), "children": {"f": -7}}]),
        as_payload([node("f", region=(0, 4)), {**node("x", f=0), "children": {"f": "a"}}]),
        as_payload([node("f", region=(0, 4)), {**node("x", f=0), "children": {"f": 0}}])[:-1],
    ],
)
def test_damage_is_one_error_and_writes_nothing_elsewhere(payload: bytes, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"x\.pte is damaged"):
        unpacked(payload, tmp_path / "inside")
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_a_table_longer_than_what_is_read_first(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(1500):
        (folder / f"{number:04}").write_bytes(b"%d" % number)
    assert len(pack(folder)) > 1 << 16
    assert unpacked(pack(folder), tmp_path / "out") == contents(folder)
