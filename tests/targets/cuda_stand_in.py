"""CUDA for machines without a GPU: `cuda.bindings.runtime` over host memory.

`CudaApi` has the functions that are used, with their results. Its stream does nothing before
somebody waits for it: what is read or changed too early shows.
"""

import ctypes
import itertools
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

MEMORY = 8 * 2**30


class Handle(int):
    """A stream, event or graph of the bindings: an object with a number."""


class Status(IntEnum):
    """A part of cudaError_t."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NO_DRIVER = 35
    ILLEGAL_ADDRESS = 700
    CAPTURE_UNSUPPORTED = 900
    CAPTURE_INVALIDATED = 901


class CudaApi:
    """`cuda.bindings.runtime` over host memory."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, *, memory: int = MEMORY, set_device: int = 0) -> None:
        self.memory, self.taken, self.set_device = memory, 0, set_device
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, float | None] = {}
        self.streams: set[int] = set()
        self.clock = 0.0
        self.refuses_capture = False
        self.fails_at_sync: Status | None = None
        self.calls: list[str] = []
        self._numbers = itertools.count(1)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and name[4:5].isupper() and not name.startswith("cudaMemcpyK"):
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def put(self, work: Callable[[], None]) -> None:
        """Into the stream, or into the graph that is being recorded."""
        (self.queue if self.capturing is None else self.capturing).append(work)

    def at(self, address: int, size: int) -> Any:
        """The bytes of device memory there; fails for what was not set aside as one piece."""
        for start, buffer in self.device.items():
            if start <= address and address + size <= start + len(buffer):
                return (ctypes.c_char * size).from_address(address)
        raise AssertionError(f"{size} bytes at {address:#x} are not the device's")

    def cudaSetDevice(self, device: int) -> tuple[Status]:  # noqa: N802
        assert device == 0
        return (Status(self.set_device),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, Handle]:  # noqa: N802
        stream = Handle(next(self._numbers))
        self.streams.add(stream)
        return Status.SUCCESS, stream

    def cudaStreamDestroy(self, stream: Handle) -> tuple[Status]:  # noqa: N802
        self.streams.remove(stream)
        return (Status.SUCCESS,)

    def cudaStreamSynchronize(self, stream: Handle) -> tuple[Status]:  # noqa: N802
        assert stream in self.streams
        assert self.capturing is None, "waiting is not allowed while a graph is recorded"
        work, self.queue = self.queue, []
        for one in work:
            one()
        return (self.fails_at_sync or Status.SUCCESS,)

    def cudaMalloc(self, size: int) -> tuple[Status, int | None]:  # noqa: N802
        assert self.capturing is None
        if self.taken + size > self.memory:
            return Status.OUT_OF_MEMORY, None
        buffer = (ctypes.c_char * size)()
        ctypes.memset(buffer, 0xFF, size)  # what is not set must not pass for zero
        self.taken += size
        self.device[ctypes.addressof(buffer)] = buffer
        return Status.SUCCESS, ctypes.addressof(buffer)

    def cudaFree(self, address: int) -> tuple[Status]:  # noqa: N802
        self.taken -= len(self.device.pop(address))
        return (Status.SUCCESS,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Status, int]:  # noqa: N802
        buffer = (ctypes.c_char * size)()
        self.host[ctypes.addressof(buffer)] = buffer
        return Status.SUCCESS, ctypes.addressof(buffer)

    def cudaFreeHost(self, address: int) -> tuple[Status]:  # noqa: N802
        del self.host[address]
        return (Status.SUCCESS,)

    def cudaMemsetAsync(  # noqa: N802
        self, address: int, value: int, size: int, stream: Handle
    ) -> tuple[Status]:
        assert stream in self.streams
        self.put(lambda: ctypes.memset(self.at(address, size), value, size) and None)
        return (Status.SUCCESS,)

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, size: int, kind: int, stream: Handle
    ) -> tuple[Status]:
        assert stream in self.streams
        device, host = (target, source) if kind == 1 else (source, target)
        self.at(device, size)
        assert any(
            start <= host and host + size <= start + len(buffer)
            for start, buffer in self.host.items()
        ), "a copy from or to memory that is not pinned"
        self.put(lambda: ctypes.memmove(target, source, size) and None)
        return (Status.SUCCESS,)

    def cudaEventCreate(self) -> tuple[Status, Handle]:  # noqa: N802
        event = Handle(next(self._numbers))
        self.events[event] = None
        return Status.SUCCESS, event

    def cudaEventDestroy(self, event: Handle) -> tuple[Status]:  # noqa: N802
        del self.events[event]
        return (Status.SUCCESS,)

    def cudaEventRecord(self, event: Handle, stream: Handle) -> tuple[Status]:  # noqa: N802
        assert stream in self.streams
        assert self.capturing is None
        self.put(lambda: self.events.__setitem__(event, self.clock))
        return (Status.SUCCESS,)

    def cudaEventElapsedTime(  # noqa: N802
        self, start: Handle, end: Handle
    ) -> tuple[Status, float | None]:
        first, last = self.events[start], self.events[end]
        if first is None or last is None or self.queue:
            return Status.INVALID_VALUE, None
        return Status.SUCCESS, (last - first) * 1e3

    def cudaStreamBeginCapture(self, stream: Handle, mode: int) -> tuple[Status]:  # noqa: N802
        assert stream in self.streams
        assert self.capturing is None
        self.capturing = []
        return (Status.SUCCESS,)

    def cudaStreamEndCapture(self, stream: Handle) -> tuple[Status, Any]:  # noqa: N802
        recorded, self.capturing = self.capturing, None
        if recorded is None or self.refuses_capture:
            return Status.CAPTURE_INVALIDATED, None
        return Status.SUCCESS, recorded

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Status, Handle]:  # noqa: N802
        executable = Handle(next(self._numbers))
        self.graphs[executable] = list(graph)
        return Status.SUCCESS, executable

    def cudaGraphDestroy(self, graph: Any) -> tuple[Status]:  # noqa: N802
        return (Status.SUCCESS,)

    def cudaGraphExecDestroy(self, executable: Handle) -> tuple[Status]:  # noqa: N802
        del self.graphs[executable]
        return (Status.SUCCESS,)

    def cudaGraphLaunch(self, executable: Handle, stream: Handle) -> tuple[Status]:  # noqa: N802
        assert stream in self.streams
        self.queue += self.graphs[executable]
        return (Status.SUCCESS,)

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:  # noqa: N802
        return Status.SUCCESS, self.memory - self.taken, self.memory

    def cudaGetLastError(self) -> tuple[Status]:  # noqa: N802
        return (Status.SUCCESS,)

    def cudaGetErrorString(self, status: Status) -> tuple[Status, bytes]:  # noqa: N802
        return Status.SUCCESS, Status(status).name.lower().replace("_", " ").encode()
