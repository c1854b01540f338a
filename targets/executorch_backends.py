"""Which of ExecuTorch's backends can be had here, and what hands operators over to them.

A backend is offered where the installed wheel lowers for it ahead of time and what comes out can be
proven on this machine: the Python runtime registers the backend, or our interpreter stands in for
it. Tried with executorch 1.5.1 on Linux: the runtime registers XNNPACK, OpenVINO and QNN. Vulkan is
lowered without its SDK, but not registered. QNN starts Qualcomm's compiler, which the wheel has
not; where QNN_SDK_ROOT is not set it would download it, so nothing of it is imported here.
"""

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from ..quantize.quiet import quiet_import
from .executorch_model import Backend

PROVEN = (Backend.XNNPACK, Backend.PORTABLE, Backend.COREML)
"""What can be had, given its packages."""

SDK = "QNN_SDK_ROOT"


def problems(backend: str) -> list[str]:
    """Why a backend can't be had here, and what to do; none: it can. Imports nothing heavy."""
    if backend not in set(Backend):
        names = ", ".join(Backend)
        return [f"--backend {backend}: target 'executorch' has {names}"]
    reason = _REASONS.get(Backend(backend), _nothing)()
    return [f"--backend {backend}: {reason}"] if reason else []


def _nothing() -> str:
    return ""


def _coreml() -> str:
    if find_spec("coremltools"):
        return ""
    return "coremltools not found: pip install 'fastvlm-export[coreml]'"


def _vulkan() -> str:
    return (
        "ExecuTorch's wheel lowers for Vulkan, but its runtime has no VulkanBackend, so nothing "
        "here could prove the file; that takes ExecuTorch built from source with the Vulkan SDK "
        "and -DEXECUTORCH_BUILD_VULKAN=ON. Use --backend xnnpack"
    )


def _qnn() -> str:
    lacking = "" if os.environ.get(SDK) else f", which is not installed ({SDK} is not set)"
    return (
        f"ExecuTorch lowers for it with Qualcomm's AI Engine Direct SDK alone{lacking}; this "
        "package has no lowering for it yet that was proven with one. Use --backend xnnpack"
    )


_REASONS: Mapping[Backend, Callable[[], str]] = {
    Backend.COREML: _coreml,
    Backend.VULKAN: _vulkan,
    Backend.QNN: _qnn,
}


def partitioners(backend: Backend, method: str) -> list[Any]:
    """What takes a method's operators; none: ExecuTorch's own kernels keep them.

    XNNPACK's one partitioner takes float32, static and dynamic integers together, so that a method
    with all of them is one delegate. Core ML takes whole methods: see `executorch_coreml.lower`.
    """
    if backend is Backend.PORTABLE:
        return []
    if backend is not Backend.XNNPACK:
        raise ValueError(f"{backend} has no partitioner for {method}")
    with quiet_import():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # noqa: PLC0415
            XnnpackPartitioner,
        )
    return [XnnpackPartitioner()]


__all__ = ["PROVEN", "SDK", "partitioners", "problems"]
