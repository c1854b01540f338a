"""The formats that a FastVLM can be exported to: one module each, named by `TargetName`."""

from enum import StrEnum

from ..exporter.errors import ExportError
from .base import Target


class TargetName(StrEnum):
    """A target's name on the command line, and its module's."""

    ONNX = "onnx"
    COREML = "coreml"
    EXECUTORCH = "executorch"
    TENSORRT = "tensorrt"


def get(name: str) -> Target:
    """The target of that name; raises ExportError for one that there is not."""
    if name == TargetName.ONNX:
        from . import onnx  # noqa: PLC0415 - imports onnx and torch

        return onnx
    if name == TargetName.COREML:
        from . import coreml  # noqa: PLC0415 - imports coremltools where it lowers and runs

        return coreml
    if name == TargetName.EXECUTORCH:
        from . import executorch  # noqa: PLC0415 - imports executorch where it lowers and runs

        return executorch
    if name == TargetName.TENSORRT:
        from . import tensorrt  # noqa: PLC0415 - imports TensorRT where it builds and runs

        return tensorrt
    raise ExportError(
        f"There is no target named '{name}'.",
        f"Use one of: {', '.join(TargetName)}. `fastvlm-export targets` lists what each needs.",
    )
