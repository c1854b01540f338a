"""Kernels that TensorRT for RTX compiled for this GPU, kept between processes.

An engine of TensorRT for RTX is compiled to kernels when it is loaded and run. Its runtime cache
saves that work; it checks by itself that GPU, driver and version are still those it was made with.
The files are in the user's cache folder, not in the bundle, whose files are hashed.
"""

import contextlib
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from ..exporter.bundle import Bundle
from ..exporter.scratch import ScratchFolder
from .tensorrt_device import Gpu
from .tensorrt_package import Backend
from .tensorrt_plan import Plan

SUFFIX = ".kernels"
_NAME = re.compile(r"[0-9a-z]{32}-[0-9a-f]{16}\.kernels")
MOST_FILES = 48
"""Of all bundles together; the files that were longest unused go first."""


UNUSABLE = (OSError, RuntimeError)
"""What is no error here: a file that can't be read or written, a user without a home folder."""


class Kernels:
    """The runtime caches of one bundle's engines. A file that can't be used is no error."""

    def __init__(self, bundle: Bundle, plan: Plan, version: str, gpu: Gpu) -> None:
        self._hashes = _engine_hashes(bundle, plan)
        self._machine = f"{gpu.name} {gpu.driver} {version}"
        self._caches: dict[str, Any] = {}
        self._before: dict[str, bytes] = {}

    def of(self, graph: str, engine: Any) -> Any:
        """The runtime cache of this graph's engine, filled from disk; None where there is none."""
        if graph not in self._hashes:
            return None
        if graph not in self._caches:
            cache = engine.create_runtime_config().create_runtime_cache()
            with contextlib.suppress(*UNUSABLE):
                saved = self._file(graph).read_bytes()
                if cache.deserialize(saved):
                    self._before[graph] = saved
            self._caches[graph] = cache
        return self._caches[graph]

    def save(self) -> None:
        """Write what was compiled since the engines were loaded."""
        for graph, cache in self._caches.items():
            found = cache.serialize()
            data = b"" if found is None else bytes(found)
            if data and data != self._before.get(graph):
                with contextlib.suppress(*UNUSABLE):
                    _write(self._file(graph), data)

    def _file(self, graph: str) -> Path:
        machine = hashlib.sha256(self._machine.encode()).hexdigest()[:16]
        return folder() / f"{self._hashes[graph]}-{machine}{SUFFIX}"


def folder() -> Path:
    """Where the files are: the user's cache folder, as the system has it."""
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / ".cache") / "fastvlm-export" / "tensorrt"


def forget(bundle: Bundle, plan: Plan) -> bool:
    """Remove what was compiled for the bundle's engines, so that loading compiles anew.

    False for TensorRT, whose engines hold their kernels, and where that can't be done.
    """
    hashes = _engine_hashes(bundle, plan)
    try:
        for found in hashes.values():
            for file in folder().glob(f"{found}-*{SUFFIX}"):
                _remove(file)
    except UNUSABLE:
        return False
    return bool(hashes)


def _engine_hashes(bundle: Bundle, plan: Plan) -> dict[str, str]:
    """Graph -> its engine's hash, shortened; none for a package whose engines need no compiling."""
    if plan.backend is not Backend.RTX:
        return {}
    files = bundle.manifest.files
    return {
        name: files[graph.engine][:32]
        for name, graph in plan.graphs.items()
        if files.get(graph.engine)
    }


def _write(path: Path, data: bytes) -> None:
    """Put the file there by one rename, and make room."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ScratchFolder(path.parent) as folder:
        (folder / path.name).write_bytes(data)
        (folder / path.name).replace(path)
    files = sorted(path.parent.glob(f"*{SUFFIX}"), key=lambda one: one.stat().st_mtime)
    for old in files[:-MOST_FILES]:
        _remove(old)


def _remove(file: Path) -> None:
    """Remove a file that has one of our names, and no other."""
    if _NAME.fullmatch(file.name):
        file.unlink(missing_ok=True)
