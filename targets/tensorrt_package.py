"""NVIDIA's two packages with one Python API: TensorRT for RTX, and TensorRT.

TensorRT for RTX builds engines for GPUs that it is told, on any machine; its kernels are made when
an engine is loaded. TensorRT times its kernels while it builds, on the very GPU, so that it builds
nothing without one.
"""

import importlib
import re
from collections.abc import Collection, Sequence
from enum import StrEnum
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..exporter.errors import ExportError
from .base import Options


class Backend(StrEnum):
    """A package, as `--backend` names it."""

    RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"


MODULES = {Backend.RTX: "tensorrt_rtx", Backend.TENSORRT: "tensorrt"}
"""Backend -> the module that its package installs."""

DISTRIBUTIONS = {
    Backend.RTX: ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    Backend.TENSORRT: ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}
"""Backend -> the names under which its package may be installed."""

REMEDIES = {
    Backend.RTX: "pip install 'fastvlm-export[tensorrt]'",
    Backend.TENSORRT: "install TensorRT 10.13 or later for Python from NVIDIA on a machine with "
    "one of its GPUs",
}

NAMES = {Backend.RTX: "TensorRT for RTX", Backend.TENSORRT: "TensorRT"}
"""Backend -> how people call it."""

CAPABILITIES = ("80", "86", "89", "120")
"""Compute capabilities that engines are built for where none are named: A100, GeForce 30, 40, 50
and their professional sisters. One engine serves them all and stores its weights once."""

ABILITIES = {
    "LayerType.KV_CACHE_UPDATE": "writing the cache in place (TensorScatter)",
    "LayerType.ROTARY_EMBEDDING": "rotary embeddings as one layer (RotaryEmbedding)",
    "LayerType.ATTENTION_INPUT": "fused attention (Attention)",
    "DataType.FP8": "8-bit floats",
    "DataType.INT4": "4-bit weights",
}
"""What the graphs use that not every version has: a member of the module -> what it is for."""

OPERATORS = {
    "TensorScatter": ABILITIES["LayerType.KV_CACHE_UPDATE"],
    "RotaryEmbedding": ABILITIES["LayerType.ROTARY_EMBEDDING"],
    "Attention": ABILITIES["LayerType.ATTENTION_INPUT"],
    "RMSNormalization": "RMS norms as one layer (RMSNormalization)",
}
"""What a version has not whose parser lacks an operator."""

NO_FUSED_ATTENTION = "this version has no fused attention"
"""Why nodes of Attention that are written out compute in float32 among narrower floats."""

_CAPABILITY = re.compile(r"SM(\d+)")


def installed() -> tuple[Backend, ...]:
    """The packages that are there, the default first; nothing is imported."""
    return tuple(backend for backend, module in MODULES.items() if find_spec(module))


def backend_of(options: Options) -> Backend:
    """The backend that is asked for; else the first that is installed, or TensorRT for RTX."""
    if options.backend:
        return Backend(options.backend)
    return next(iter(installed()), Backend.RTX)


def version(backend: Backend) -> str:
    """The installed package's version; empty where there is none."""
    for name in DISTRIBUTIONS[backend]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def load(backend: Backend) -> ModuleType:
    """Import the package. Raises ExportError where it, or a library that it needs, is missing."""
    try:
        return importlib.import_module(MODULES[backend])
    except ModuleNotFoundError as error:
        if error.name != MODULES[backend]:
            raise ExportError(
                f"{MODULES[backend]} cannot be loaded: {error}.", REMEDIES[backend]
            ) from error
        raise ExportError(
            f"--backend {backend}: the package {MODULES[backend]} is not installed.",
            f"Get it: {REMEDIES[backend]}",
        ) from error
    except (ImportError, OSError, RuntimeError) as error:  # its libraries, or those of CUDA
        raise ExportError(
            f"{MODULES[backend]} cannot be loaded: {error}.", f"Get it anew: {REMEDIES[backend]}"
        ) from error


def capabilities(package: ModuleType) -> tuple[str, ...]:
    """The compute capabilities that the package builds ahead of time for: "80", "86", ...

    TensorRT has none: it builds for the GPU that it finds.
    """
    members = vars(getattr(package, "ComputeCapability", object))
    found = [match[1] for match in map(_CAPABILITY.fullmatch, members) if match]
    return tuple(sorted(found, key=int))


def lacks(package: ModuleType, written_out: Collection[str] = ()) -> tuple[str, ...]:
    """What the graphs use and this version has not; none where it has all.

    `written_out`: operators that its parser lacks, so that others stand for them.
    """
    members = [what for path, what in ABILITIES.items() if not _has(package, path)]
    parser = [what for name, what in OPERATORS.items() if name in written_out]
    return tuple(dict.fromkeys(members + parser))


def _has(package: Any, path: str) -> bool:
    for name in path.split("."):
        package = getattr(package, name, None)
    return package is not None


def capability_problems(backend: Backend, asked: Sequence[str]) -> list[str]:
    """Why engines can't be built for these compute capabilities; none: they can.

    What the installed package builds for is known only where it is installed.
    """
    flag = f"--compute-capability {','.join(asked)}"
    if backend is Backend.TENSORRT:
        return [
            f"{flag}: backend '{backend}' builds for the GPU that it runs on; "
            f"backend '{Backend.RTX}' builds for others"
        ]
    if backend not in installed():
        return []
    known = capabilities(load(backend))
    unknown = [one for one in asked if one not in known]
    if unknown or not asked:
        return [
            f"{flag}: {NAMES[backend]} {version(backend)} builds for "
            f"{', '.join(known)}, not for {', '.join(unknown) or 'none'}"
        ]
    return []
