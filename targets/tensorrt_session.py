"""The engines of a bundle on this machine's GPU: nothing is allocated, no cache copied in a call.

Every tensor has its place on the GPU from the start. Keys and values stay there: the engine writes
new ones in place where past and present are one buffer to it (`get_aliased_input_tensor`), else two
sets of buffers take turns. Prefill and decoding have a context each, under profiles of their own.
Decoding attends a multiple of 256 positions, so that its shapes, and with them its CUDA graph, stay
the same for as many tokens.
"""

import math
import weakref
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from . import tensorrt_package
from .base import Array, TokenIds, check_context
from .tensorrt_cuda import Cuda
from .tensorrt_device import Gpu
from .tensorrt_engine import Context, Loader, gpu_for
from .tensorrt_inspect import interface_problems
from .tensorrt_kernels import Kernels
from .tensorrt_package import Backend
from .tensorrt_plan import BUCKET, DECODE, PREFILL, STATIC, GraphPlan, parse_tensor, read_plan

GRAPHS = ("vision", "embedding", "decoder")
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
"""Element type -> bytes."""

HOST_TYPES: Mapping[str, Any] = {"float32": np.float32, "int64": np.int64}
"""Element type -> what its values are on this side; the cache never comes over."""

PAST, PRESENT = "past_key_values.", "present."


class Tensor:
    """An input or output: its place on the GPU and a pinned array here, of the largest size."""

    def __init__(self, cuda: Cuda, text: str, context: int) -> None:
        dtype, sizes = parse_tensor(text)
        self.sizes = sizes
        count = math.prod(context if isinstance(size, str) else size for size in sizes)
        self.address = cuda.device_memory(count * SIZES[dtype])
        self.host = cuda.pinned(count, HOST_TYPES[dtype])

    def shape(self, length: int = 1) -> tuple[int, ...]:
        """Its shape where what varies in it is `length`."""
        return tuple(length if isinstance(size, str) else size for size in self.sizes)

    def view(self, length: int = 1) -> NDArray[Any]:
        """The part of the pinned array that such a shape fills."""
        shape = self.shape(length)
        return self.host[: math.prod(shape)].reshape(shape)


class Cache:
    """Keys and values on the GPU: one set that is both past and present, or two that take turns."""

    def __init__(self, cuda: Cuda, plan: GraphPlan, engine: Any) -> None:
        self.cuda = cuda
        self.bytes = {name: _bytes(text) for name, text in plan.inputs.items() if PAST in name}
        self.in_place = all(_aliased(engine, _present(name)) == name for name in self.bytes)
        self.sets = [
            {name: cuda.device_memory(size) for name, size in self.bytes.items()}
            for _ in range(1 if self.in_place else 2)
        ]
        self.turn = 0

    def addresses(self) -> dict[str, int]:
        """Tensor name -> address, of past and present, in this turn."""
        past, present = self.sets[self.turn], self.sets[self.turn - 1]
        return {**past, **{_present(name): address for name, address in present.items()}}

    def written(self) -> None:
        """What was present is the next call's past."""
        self.turn = (self.turn + 1) % len(self.sets)

    def clear(self) -> None:
        """All zero: a value that is not finite would get through the mask's zero weights."""
        for addresses in self.sets:
            for name, address in addresses.items():
                self.cuda.zero(address, self.bytes[name])


class TensorRTSession:
    """Vision, embedding and decoder engines on one GPU, batch 1. See `Session`.

    `package`, `cuda` and `gpu` are what stands for TensorRT, CUDA and the driver in tests. Raises
    ExportError for engines that this machine can't run, with what to do about it.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        package: ModuleType | None = None,
        cuda: Cuda | None = None,
        gpu: Gpu | None = None,
    ) -> None:
        self.plan = read_plan(bundle.path)
        self.context = self.plan.context
        self.package = package or tensorrt_package.load(self.plan.backend)
        version = tensorrt_package.version(self.plan.backend)
        self.gpu = gpu or gpu_for(self.plan, version, bundle.path)
        self._cuda = cuda or Cuda()
        free, _ = self._cuda.free_memory()
        self._kernels = Kernels(bundle, self.plan, version, self.gpu)
        weakref.finalize(self, _close, self._cuda, self._kernels)
        # Kept: engines need the runtime that read them, and the log that it writes to.
        self._loader = Loader(self.package, self.plan, bundle.path, version=version, gpu=self.gpu)
        self._engines = {name: self._engine(name) for name in GRAPHS}
        self._events = self._cuda.event(), self._cuda.event()
        self._tensors = {
            graph: {
                name: Tensor(self._cuda, text, self.context)
                for name, text in {**plan.inputs, **plan.outputs}.items()
                if not name.startswith((PAST, PRESENT))
            }
            for graph, plan in self.plan.graphs.items()
        }
        self._cache = Cache(self._cuda, self.plan.graphs["decoder"], self._engines["decoder"])
        self._contexts = {
            (graph, use): self._prepare(graph, use)
            for graph in GRAPHS
            for use in ((STATIC,) if graph == "vision" else (PREFILL, DECODE))
        }
        self.gpu_memory_bytes = free - self._cuda.free_memory()[0]
        self._graphs: dict[tuple[int, int], Any] = {}
        self._after: Callable[[], None] | None = None  # what is left to do once results are here
        self.device_seconds = 0.0
        self.graph_problem = ""
        self.past = 0

    def _engine(self, name: str) -> Any:
        engine = self._loader.load(name)
        plan = self.plan.graphs[name]
        if problems := interface_problems(engine, plan, self.package):
            raise ExportError(
                f"{plan.engine} is not the engine of its plan: {'; '.join(problems)}.",
                f"Build the engines anew: fastvlm-export build {self._loader.folder}",
            )
        return engine

    def _prepare(self, graph: str, use: str) -> Context:
        """The context for a use, under the profile of its name or the only one there is."""
        engine = self._engines[graph]
        names = [one.name for one in self.plan.graphs[graph].profiles]
        context = Context(
            self._loader,
            engine,
            names.index(use) if use in names else 0,
            self._cuda,
            graphs=use in (DECODE, STATIC) and (graph != "decoder" or self._cache.in_place),
            kernels=self._kernels.of(graph, engine),
        )
        for name, tensor in self._tensors[graph].items():
            context.bind(name, tensor.address)
        if graph == "decoder":
            self._bind_cache(context)
        return context

    @property
    def how(self) -> str:
        """How this runs, in words, for whoever reads its times."""
        replay = (
            "CUDA graphs" if not self.graph_problem else f"no CUDA graph ({self.graph_problem})"
        )
        cache = "cache in place" if self._cache.in_place else "cache in two sets"
        memory = f"{self.gpu_memory_bytes / 2**20:.0f} MiB of its memory"
        return f"{self.gpu.name}, {memory}, {replay}, {cache}"

    def take_device_seconds(self) -> float:
        """Seconds that the GPU computed since the last call, by events around the engines alone."""
        spent, self.device_seconds = self.device_seconds, 0.0
        return spent

    def encode_image(self, pixels: Array) -> Array:
        """Pixels [1,3,R,R] -> [1,N,D]."""
        tensors = self._tensors["vision"]
        self._send(tensors["pixel_values"], pixels)
        context = self._contexts["vision", STATIC]
        context.check("image_features", tensors["image_features"].shape())
        return self._run(context.enqueue, tensors["image_features"])

    def embed(self, input_ids: TokenIds) -> Array:
        """Token ids [1,S] -> [1,S,D]. Raises ExportError where S is larger than the context."""
        length = input_ids.shape[1]
        check_context(0, length, self.context)
        tensors = self._tensors["embedding"]
        self._send(tensors["input_ids"], input_ids, length)
        context = self._contexts["embedding", DECODE if length == 1 else PREFILL]
        context.shape("input_ids", (1, length))
        context.check("inputs_embeds", tensors["inputs_embeds"].shape(length))
        return self._run(context.enqueue, tensors["inputs_embeds"], length)

    def decode(self, inputs_embeds: Array) -> Array:
        """Embeddings [1,S,D] -> logits of the last position [1,V]."""
        new = inputs_embeds.shape[1]
        check_context(self.past, new, self.context)
        end = self.past + new
        attended = end if new > 1 else min(-(-end // BUCKET) * BUCKET, self.context)
        tensors = self._tensors["decoder"]
        self._send(tensors["inputs_embeds"], inputs_embeds, new)
        mask = np.arange(attended, dtype=np.int64)[None] < end
        self._send(tensors["attention_mask"], mask, attended)
        context = self._contexts["decoder", DECODE if new == 1 else PREFILL]
        if not self._cache.in_place:
            self._bind_cache(context)
        context.shape("inputs_embeds", tensors["inputs_embeds"].shape(new))
        context.shape("attention_mask", (1, attended))
        context.check("logits", tensors["logits"].shape())
        work = context.enqueue if new > 1 else self._step(context, attended)
        logits = self._run(work, tensors["logits"])
        self._cache.written()
        self.past = end
        return logits[:, 0]

    def reset(self) -> None:
        """Empty the cache."""
        self.past = 0
        self._cache.clear()

    def _bind_cache(self, context: Context) -> None:
        for name, address in self._cache.addresses().items():
            context.bind(name, address)

    def _step(self, context: Context, attended: int) -> Callable[[], None]:
        """One decoding step: the graph that was captured for these shapes and addresses, if any.

        TensorRT for RTX captures and replays by itself. For TensorRT the first step of a shape runs
        as it is, which sets up the context; it is captured after that, for all later steps.
        """
        key = (attended, self._cache.turn)
        if self._graphs and all(attended != other for other, _ in self._graphs):
            # A graph holds the shapes that its context had; the context has others now.
            self._cuda.release(self._graphs.values())
            self._graphs.clear()
        if self.plan.backend is Backend.RTX or self.graph_problem:
            return context.enqueue
        if key in self._graphs:
            return lambda: self._cuda.launch(self._graphs[key])

        def first() -> None:
            context.enqueue()
            self._after = lambda: self._capture(context, key)

        return first

    def _capture(self, context: Context, key: tuple[int, int]) -> None:
        try:
            self._graphs[key] = self._cuda.capture(context.enqueue)
        except ExportError as error:  # slower, and `how` says so
            self.graph_problem = error.message

    def _send(self, tensor: Tensor, array: NDArray[Any], length: int = 1) -> None:
        """Copy to the GPU, through pinned memory."""
        staged = tensor.view(length)
        np.copyto(staged, array, casting="same_kind")
        self._cuda.to_device(tensor.address, staged)

    def _run(self, work: Callable[[], None], output: Tensor, length: int = 1) -> Array:
        """Do the work, timed by the GPU's clock, and bring the output over."""
        start, end = self._events
        self._cuda.record(start)
        work()
        self._cuda.record(end)
        staged = output.view(length)
        self._cuda.to_host(staged, output.address)
        self._cuda.synchronize()
        self.device_seconds += self._cuda.seconds_between(start, end)
        if self._after:
            after, self._after = self._after, None
            after()
        return staged.copy()


def _close(cuda: Cuda, kernels: Kernels) -> None:
    """Keep what was compiled, free what was taken; at the session's end or the process's."""
    try:
        kernels.save()
    finally:
        cuda.close()


def _present(name: str) -> str:
    return name.replace(PAST, PRESENT)


def _bytes(text: str) -> int:
    dtype, sizes = parse_tensor(text)
    return math.prod(int(size) for size in sizes) * SIZES[dtype]


def _aliased(engine: Any, output: str) -> str | None:
    """The input that the output is written over; None where there is none or none is known of."""
    ask = getattr(engine, "get_aliased_input_tensor", None)
    return ask(output) if ask else None
