"""The payload of a Core ML delegate: a folder in one piece, as ExecuTorch's runtime reads it.

The files lie one behind the other, and after them is a JSON text, last byte first, so that it can
be read from the end: `{"nodes": [...]}`, where a node is a file (kind 0, with the range of its
bytes) or a folder (kind 1, whose `children` name earlier nodes); the last one is the whole.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..exporter.errors import ExportError
from .executorch_model import EXPORT_HINT

BACKEND = "CoreMLBackend"
"""What the runtime registers Core ML's delegate as."""

PACKAGE, METADATA = "model.mlpackage", "metadata.json"
"""What is in the folder: the model, and `inputNames`, `outputNames`, `identifier`."""

_FILE, _FOLDER = 0, 1
_DEEPEST = 16


def pack(folder: Path) -> bytes:
    """The folder's files as a payload: the same bytes for the same names and contents."""
    nodes: list[dict[str, Any]] = []
    parts: list[bytes] = []
    _add(folder, nodes, parts)
    text = json.dumps({"nodes": nodes}, separators=(",", ":"))
    return b"".join((*parts, text.encode("ascii")[::-1]))


def _add(path: Path, nodes: list[dict[str, Any]], parts: list[bytes]) -> int:
    """Append what is in a path, then itself; returns its number."""
    node: dict[str, Any] = {"children": {}, "kind": _FOLDER, "name": path.name}
    region = {"offset": 0, "size": 0}
    if path.is_dir():
        for child in sorted(path.iterdir()):
            node["children"][child.name] = _add(child, nodes, parts)
    else:
        region = {"offset": sum(map(len, parts)), "size": path.stat().st_size}
        parts.append(path.read_bytes())
        node["kind"] = _FILE
    nodes.append({**node, "dataRegion": region})
    return len(nodes) - 1


def unpack(payload: memoryview, folder: Path, where: str) -> None:
    """Write a payload's files below an empty folder.

    Nothing in it is trusted: names that lead elsewhere, ranges beyond it and folders in themselves
    are damage. Raises ExportError, which names the payload as `where`.
    """
    try:
        nodes = _nodes(payload)
        for names, start, size in _files(nodes, len(nodes) - 1, ()):
            if start < 0 or size < 0 or start + size > len(payload):
                raise ValueError(f"{'/'.join(names)} lies beyond its end")
            path = folder.joinpath(*names)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(payload[start : start + size])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{where} is damaged: {error!r}.", EXPORT_HINT) from error


def _nodes(payload: memoryview) -> list[Mapping[str, Any]]:
    """The JSON text at the end: read more of it until it is whole."""
    size = 1 << 16
    while True:
        text = bytes(payload[-size:][::-1]).decode("latin-1")
        if not text.startswith('{"nodes":'):
            raise ValueError("it does not end in a table of files")
        try:
            found: list[Mapping[str, Any]] = json.JSONDecoder().raw_decode(text)[0]["nodes"]
            return found
        except json.JSONDecodeError:
            if size >= len(payload):
                raise
            size *= 16


def _files(
    nodes: list[Mapping[str, Any]], index: int, names: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Each file below a node: its path, where it starts, its size."""
    if not 0 <= index < len(nodes) or len(names) > _DEEPEST:
        raise ValueError(f"{'/'.join(names) or 'it'} is in no folder")
    node = nodes[index]
    if node["kind"] == _FILE:
        region = node["dataRegion"]
        yield names, int(region["offset"]), int(region["size"])
        return
    for name, child in node["children"].items():
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"a file is named {name!r}")
        if not int(child) < index:
            raise ValueError(f"{name!r} comes after its folder")
        yield from _files(nodes, int(child), (*names, name))


__all__ = ["BACKEND", "METADATA", "PACKAGE", "pack", "unpack"]
