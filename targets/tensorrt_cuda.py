"""What a session needs of CUDA's runtime: memory, one stream, events, graphs. Errors are told.

Through NVIDIA's own bindings (`cuda.bindings.runtime`), whose functions return a status first:
https://docs.nvidia.com/cuda/cuda-runtime-api/
"""

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Collection
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..exporter.errors import ExportError

OUT_OF_MEMORY: Final = 2  # cudaErrorMemoryAllocation
OLD_DRIVER: Final = 35  # cudaErrorInsufficientDriver: older than these bindings, or not there
_NON_BLOCKING: Final = 1  # cudaStreamNonBlocking: does not wait for the default stream
_DEFAULT: Final = 0

MEMORY_HINT = (
    "Close what else uses the GPU (nvidia-smi lists it), or export with a smaller --context or a "
    "recipe of fewer bits."
)
DRIVER_HINT = (
    "Install a newer driver (https://www.nvidia.com/drivers), or the cuda-bindings of the driver's "
    "own CUDA, which nvidia-smi names: pip install 'cuda-bindings==12.*'"
)
BINDINGS_HINT = "Get them: pip install 'fastvlm-export[tensorrt]'"


class Cuda:
    """The first GPU of this process, one stream on it, and everything that was made there.

    `api` is `cuda.bindings.runtime` or what behaves like it. All work goes to the one stream, in
    order; nothing waits for it but `synchronize`. `close` frees all.
    """

    def __init__(self, api: Any = None) -> None:
        self.api = runtime_api() if api is None else api
        self._made = contextlib.ExitStack()
        self._graphs: list[Any] = []
        self._call("cudaSetDevice", 0)
        self.stream: Any = self._call("cudaStreamCreateWithFlags", _NON_BLOCKING)
        self._made.callback(self.api.cudaStreamDestroy, self.stream)

    def close(self) -> None:
        """Wait for the work at hand, then free everything; a second call does nothing."""
        with contextlib.suppress(ExportError):  # what failed was told when it failed
            self.synchronize()
        self.release(list(self._graphs))
        self._made.close()

    def device_memory(self, size: int) -> int:
        """The address of `size` bytes on the GPU, all zero. Raises ExportError where it is full."""
        address = int(self._call("cudaMalloc", max(size, 1), size=size))
        self._made.callback(self.api.cudaFree, address)
        self.zero(address, max(size, 1))
        return address

    def zero(self, address: int, size: int) -> None:
        """Put zeros into `size` bytes of the GPU's memory."""
        self._call("cudaMemsetAsync", address, 0, size, self.stream)

    def pinned(self, count: int, dtype: DTypeLike) -> NDArray[Any]:
        """An array [count] in page-locked memory, which copies need to overlap with anything."""
        size = max(count * np.dtype(dtype).itemsize, 1)
        address = int(self._call("cudaHostAlloc", size, _DEFAULT, size=size))
        self._made.callback(self.api.cudaFreeHost, address)
        memory = memoryview((ctypes.c_byte * size).from_address(address))
        return np.frombuffer(memory, np.dtype(dtype), count)

    def to_device(self, address: int, source: NDArray[Any]) -> None:
        """Copy a pinned, contiguous array; it must stay as it is until `synchronize`."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(address, source.ctypes.data, source.nbytes, kind)

    def to_host(self, target: NDArray[Any], address: int) -> None:
        """Copy into a pinned, contiguous array; it is filled after `synchronize`."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(target.ctypes.data, address, target.nbytes, kind)

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        self._call("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def synchronize(self) -> None:
        """Wait until the stream has done its work; raises ExportError for what failed in it."""
        self._call("cudaStreamSynchronize", self.stream)

    def event(self) -> Any:
        """A point in the stream that `record` sets."""
        found = self._call("cudaEventCreate")
        self._made.callback(self.api.cudaEventDestroy, found)
        return found

    def record(self, event: Any) -> None:
        """Set the event after the work that is in the stream by now."""
        self._call("cudaEventRecord", event, self.stream)

    def seconds_between(self, start: Any, end: Any) -> float:
        """Seconds on the GPU's clock between two events that have come to pass."""
        return float(self._call("cudaEventElapsedTime", start, end)) / 1e3

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` puts into the stream, without doing it, as a graph for `launch`.

        Raises ExportError for work that can't be recorded; the stream is usable after that, too.
        """
        modes = self.api.cudaStreamCaptureMode
        self._call("cudaStreamBeginCapture", self.stream, modes.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except ExportError:
            self.api.cudaStreamEndCapture(self.stream)
            self.api.cudaGetLastError()  # else the next call reports the capture's error as its own
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self.api.cudaGraphDestroy(graph)
        self._graphs.append(executable)
        return executable

    def release(self, graphs: Collection[Any]) -> None:
        """Give back what these graphs hold; none of them may be launched again."""
        for graph in graphs:
            self._graphs = [one for one in self._graphs if one is not graph]
            self.api.cudaGraphExecDestroy(graph)

    def launch(self, graph: Any) -> None:
        """Do what was captured once more."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def free_memory(self) -> tuple[int, int]:
        """Bytes of the GPU's memory that are free, and all of them."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def _call(self, name: str, *arguments: Any, size: int | None = None) -> Any:
        """The function's result without its status: nothing, a value, or a tuple of values."""
        status, *values = getattr(self.api, name)(*arguments)
        if int(status) != 0:
            self.api.cudaGetLastError()
            raise self._failure(name, status, size)
        if len(values) > 1:
            return tuple(values)
        return values[0] if values else None

    def _failure(self, name: str, status: Any, size: int | None) -> ExportError:
        if int(status) == OUT_OF_MEMORY:
            wanted = f"{size / 2**20:.1f} MiB more were wanted" if size else "more was wanted"
            return out_of_memory(wanted, *self._memory())
        _, described = self.api.cudaGetErrorString(status)
        text = described.decode() if isinstance(described, bytes) else str(described)
        return ExportError(
            f"The GPU failed in {name}: {text} (CUDA error {int(status)}).",
            DRIVER_HINT
            if int(status) == OLD_DRIVER
            else "See what the driver says: nvidia-smi. If it is well, please report this.",
        )

    def _memory(self) -> tuple[int, int]:
        try:
            return self.free_memory()
        except ExportError:
            return 0, 0


def out_of_memory(wanted: str, free: int = 0, total: int = 0) -> ExportError:
    """The error of a GPU that is full; `free` and `total` in bytes, 0 where they are not known."""
    room = f", {free / 2**20:.0f} of {total / 2**20:.0f} MiB are free" if total else ""
    return ExportError(f"The GPU's memory is full: {wanted}{room}.", MEMORY_HINT)


def runtime_api() -> Any:
    """NVIDIA's bindings of CUDA's runtime. Raises ExportError where they are not installed."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise ExportError(f"CUDA's Python bindings are missing: {error}.", BINDINGS_HINT) from error
