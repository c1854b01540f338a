"""The stand-ins have the packages' own names, arguments and values, as far as can be seen here."""

import inspect
import re
from typing import Any

import pytest

from . import tensorrt_stand_ins as stand_ins
from .cuda_stand_in import CudaApi, Status

RTX = "tensorrt-rtx is not installed"
BINDINGS = "cuda-bindings is not installed"


def arguments_of(documentation: str) -> int:
    """How many arguments the first line of a function's documentation has."""
    found = re.search(r"\((.*?)\)(?: ->|\s*$)", documentation.strip().splitlines()[0])
    assert found, documentation
    return len([one for one in re.sub(r"\[[^\]]*\]", "", found[1]).split(",") if one.strip()])


def own(kind: type) -> dict[str, Any]:
    """A class's own public functions."""
    return {
        name: value
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }


def test_cudas_functions_are_those_of_the_bindings() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason=BINDINGS)
    functions = {name: f for name, f in own(CudaApi).items() if name.startswith("cuda")}
    assert len(functions) > 20
    for name, function in functions.items():
        expected = arguments_of(getattr(runtime, name).__doc__)
        assert len(inspect.signature(function).parameters) - 1 == expected, name
    for group in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
        for name, value in vars(getattr(CudaApi, group)).items():
            assert int(getattr(getattr(runtime, group), name)) == value, name
    errors = {
        Status.OUT_OF_MEMORY: "cudaErrorMemoryAllocation",
        Status.NO_DRIVER: "cudaErrorInsufficientDriver",
        Status.ILLEGAL_ADDRESS: "cudaErrorIllegalAddress",
        Status.CAPTURE_INVALIDATED: "cudaErrorStreamCaptureInvalidated",
    }
    for status, name in errors.items():
        assert int(getattr(runtime.cudaError_t, name)) == status
    assert int(runtime.cudaStreamNonBlocking) == 1
    assert runtime.cudaGetErrorString(runtime.cudaError_t(2))[1] == b"out of memory"
    assert int(runtime.cudaStream_t(5)) == 5, "streams are handed to TensorRT as numbers"


@pytest.mark.parametrize(
    ("ours", "theirs", "other"),
    [
        (stand_ins.Runtime, "Runtime", ()),
        (stand_ins.Engine, "ICudaEngine", ()),
        (stand_ins.RuntimeConfig, "IRuntimeConfig", ()),
        (stand_ins.Kernels, "IRuntimeCache", ("compile",)),
        (stand_ins.Context, "IExecutionContext", ("lengths",)),
    ],
)
def test_tensorrts_methods_are_those_of_the_package(
    ours: type, theirs: str, other: tuple[str, ...]
) -> None:
    package = pytest.importorskip("tensorrt_rtx", reason=RTX)
    for name, function in own(ours).items():
        if name in other:
            continue
        text = getattr(getattr(package, theirs), name).__doc__
        overloads = re.findall(rf"^(?:\d\. )?({name}\(self.*)$", text, re.MULTILINE)
        assert overloads, name
        expected = {arguments_of(one) for one in overloads}
        assert len(inspect.signature(function).parameters) in expected, name


def test_tensorrts_enumerations_are_those_of_the_package() -> None:
    package = pytest.importorskip("tensorrt_rtx", reason=RTX)
    for name, ours in vars(stand_ins.Package).items():
        if not hasattr(ours, "__dict__") or name.startswith("_") or inspect.isfunction(ours):
            continue
        if name in ("ILogger", "ComputeCapability"):
            continue
        members = ours.__members__ if isinstance(ours, type) else vars(ours)
        for member, value in members.items():
            assert int(getattr(getattr(package, name), member)) == int(value), (name, member)
    for name, value in stand_ins.Severity.__members__.items():
        assert int(getattr(package.ILogger, name)) == value
    assert isinstance(package.ICudaEngine.device_memory_size_v2, property)
    assert isinstance(package.Runtime.engine_header_size, property)
    assert isinstance(package.IRuntimeConfig.cuda_graph_strategy, property)


def test_a_header_that_is_no_engines_is_told_apart_by_the_package_itself() -> None:
    """The one thing that TensorRT for RTX says of a file without a driver."""
    package = pytest.importorskip("tensorrt_rtx", reason=RTX)
    from fastvlm_export.targets.tensorrt_log import Log  # noqa: PLC0415

    log = Log(package)
    runtime = package.Runtime(log.made)
    kinds = package.EngineInvalidityDiagnostics
    for data in (b"", bytes(10), bytes(1000)):
        validity, found = runtime.get_engine_validity(data[: runtime.engine_header_size])
        assert validity == package.EngineValidity.INVALID
        assert int(found) & int(kinds.MALFORMED_ENGINE)
    assert runtime.deserialize_cuda_engine(bytes(1000)) is None
    assert "magicTag" in log.take()
    assert log.take() == ""
