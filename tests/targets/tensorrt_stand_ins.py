"""TensorRT for machines without a GPU: its classes, computed by ONNX Runtime.

An engine is a bundle's file, run from the ONNX graph that it was built from, held to the addresses,
types and profiles of the build plan as TensorRT would hold it.
"""

import json
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from fastvlm_export.targets.tensorrt_device import Gpu
from fastvlm_export.targets.tensorrt_plan import Plan, parse_tensor

from .cuda_stand_in import MEMORY, CudaApi

GPU = Gpu(name="Simulated GPU", capability="86", driver=13010, memory_bytes=MEMORY)
RUN_SECONDS = 0.002
"""What every engine's run takes by the simulated GPU's clock."""

NUMPY = {"float32": np.float32, "float16": np.float16, "int64": np.int64}
NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}


class Severity(IntEnum):
    """ILogger's, the worst first."""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    """What a log derives from."""

    INTERNAL_ERROR, ERROR, WARNING = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class Mode(IntEnum):
    """TensorIOMode."""

    INPUT = 1
    OUTPUT = 2


class Location(IntEnum):
    """TensorLocation."""

    DEVICE = 0
    HOST = 1


class Package:
    """The module tensorrt_rtx, or tensorrt, with the engines of one bundle.

    `valid`: what an engine's header tells, as (validity, diagnostics); `says`: why no engine can be
    read; `in_place`: whether past and present are one buffer; `rtx`: TensorRT for RTX's own calls.
    """

    __name__ = "tensorrt_rtx"
    __version__ = "1.7.1"
    ILogger = ILogger
    TensorIOMode, TensorLocation = Mode, Location
    ExecutionContextAllocationStrategy = SimpleNamespace(STATIC=0, ON_PROFILE_CHANGE=1)
    CudaGraphStrategy = SimpleNamespace(DISABLED=0, WHOLE_GRAPH_CAPTURE=1)
    LayerInformationFormat = SimpleNamespace(ONELINE=0, JSON=1)
    EngineValidity = SimpleNamespace(VALID=0, SUBOPTIMAL=1, INVALID=2)
    ComputeCapability = type("ComputeCapability", (), dict.fromkeys(("SM80", "SM86", "SM120")))
    EngineInvalidityDiagnostics = SimpleNamespace(
        VERSION_MISMATCH=1,
        UNSUPPORTED_CC=2,
        OLD_CUDA_DRIVER=4,
        OLD_CUDA_RUNTIME=8,
        INSUFFICIENT_GPU_MEMORY=16,
        MALFORMED_ENGINE=32,
        CUDA_ERROR=64,
    )

    def __init__(self, folder: Path, plan: Plan, api: CudaApi, *, in_place: bool = True) -> None:
        self.folder, self.plan, self.api, self.in_place = folder, plan, api, in_place
        self.valid: tuple[int, int] = (0, 0)
        self.says = ""
        self.no_context = ""
        self.engines: list[Engine] = []
        self.inspector = '{"Layers": ["a", "b"]}'
        self.location = Location.DEVICE
        self.kernels: list[Kernels] = []

    def Runtime(self, logger: ILogger) -> "Runtime":  # noqa: N802
        return Runtime(self, logger)


class Runtime:
    engine_header_size = 8

    def __init__(self, package: Package, logger: ILogger) -> None:
        self.package, self.logger = package, logger
        if not package.__name__.endswith("_rtx"):
            self.get_engine_validity = None  # type: ignore[assignment, method-assign]
            del self.__dict__["get_engine_validity"]

    def get_engine_validity(self, header: bytes) -> tuple[int, int]:
        assert len(header) <= self.engine_header_size
        if len(header) < self.engine_header_size:
            return 2, 32
        return self.package.valid

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        package = self.package
        if package.says:
            self.logger.log(Severity.ERROR, package.says)
            return None
        for name, graph in package.plan.graphs.items():
            if data == (package.folder / "whole" / f"{name}.engine").read_bytes():
                engine = Engine(package, name, graph, self.logger)
                package.engines.append(engine)
                return engine
        self.logger.log(
            Severity.ERROR,
            "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
            "plan.header.size == blobSize failed. In parsePlan)",
        )
        return None


class Engine:
    """One graph of the bundle as the build plan has it."""

    def __init__(self, package: Package, name: str, graph: Any, logger: ILogger) -> None:
        self.package, self.name, self.graph, self.logger = package, name, graph, logger
        self.tensors = {**graph.inputs, **graph.outputs}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(graph.profiles)
        self.num_layers = 2
        self.device_memory_size_v2 = 4096
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(
            package.folder / graph.onnx, options, providers=["CPUExecutionProvider"]
        )
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.graph.inputs else Mode.OUTPUT

    def get_tensor_location(self, name: str) -> Location:
        return self.package.location

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=NAMES[parse_tensor(self.tensors[name])[0]])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name == "logits":  # its length is cut off by a slice that TensorRT leaves open
            return (1, -1, int(parse_tensor(self.tensors[name])[1][2]))
        return tuple(-1 if isinstance(s, str) else s for s in parse_tensor(self.tensors[name])[1])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        one = self.graph.profiles[profile].shapes[name]
        return [one.min, one.opt, one.max]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        if name.startswith("present.") and self.package.in_place:
            return name.replace("present", "past_key_values")
        return None

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda _: self.package.inspector)

    def create_runtime_config(self) -> "RuntimeConfig":
        assert self.package.__name__ == "tensorrt_rtx", "TensorRT is asked for another overload"
        return RuntimeConfig(self.package)

    def create_execution_context(self, config: Any) -> Any:
        if self.package.no_context:
            self.logger.log(Severity.ERROR, self.package.no_context)
            return None
        context = Context(self, config if isinstance(config, RuntimeConfig) else None)
        self.contexts.append(context)
        return context


class RuntimeConfig:
    def __init__(self, package: Package) -> None:
        self.package = package
        self.cuda_graph_strategy = 0
        self.allocation = 0
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> "Kernels":
        self.package.kernels.append(Kernels())
        return self.package.kernels[-1]

    def set_runtime_cache(self, cache: "Kernels") -> bool:
        self.cache = cache
        return True


class Kernels:
    """IRuntimeCache: what was compiled, as JSON."""

    def __init__(self) -> None:
        self.known: list[str] = []
        self.compiled = 0

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.known)).encode()

    def deserialize(self, data: bytes) -> bool:
        try:
            self.known = json.loads(data)
        except ValueError:
            return False
        return True

    def compile(self, what: str) -> None:
        if what not in self.known:
            self.known.append(what)
            self.compiled += 1


class Context:
    """IExecutionContext: shapes within the profile, every address set, work put into the stream."""

    def __init__(self, engine: Engine, config: RuntimeConfig | None) -> None:
        self.engine, self.config = engine, config
        self.api = engine.package.api
        self.profile: Any = None
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.runs = 0
        self.recordings = 0
        self._recorded: Any = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream in self.api.streams
        self.profile = self.engine.graph.profiles[index]
        self.shapes = {}
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.tensors:
            return False
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        one = self.profile.shapes[name]
        rows = zip(one.min, shape, one.max, strict=True)
        if not all(low <= size <= high for low, size, high in rows):
            self.engine.logger.log(
                Severity.ERROR, f"{name}: {shape} is not in {one.min} to {one.max}"
            )
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        lengths = self.lengths(self.shapes)
        sizes = parse_tensor(self.engine.tensors[name])[1]
        return tuple(lengths.get(s, -1) if isinstance(s, str) else s for s in sizes)

    def lengths(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
        """What the names of sizes stand for under these shapes of the inputs."""
        return {
            name: size
            for tensor, shape in shapes.items()
            for name, size in zip(
                parse_tensor(self.engine.graph.inputs[tensor])[1], shape, strict=True
            )
            if isinstance(name, str)
        }

    def execute_async_v3(self, stream: int) -> bool:
        assert stream in self.api.streams
        engine = self.engine
        if set(self.addresses) != set(engine.tensors) or set(self.shapes) != set(
            self.profile.shapes
        ):
            engine.logger.log(Severity.ERROR, "addresses or shapes are not all set")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        for name in engine.graph.outputs:
            source = engine.get_aliased_input_tensor(name)
            if source:
                assert addresses[name] == addresses[source], f"{name} is not in place"
            elif name.startswith("present."):
                past = name.replace("present", "past_key_values")
                assert addresses[name] != addresses[past], f"{name} overwrites its input"
        if self.config and self.config.cuda_graph_strategy == 1:
            state = (sorted(shapes.items()), sorted(addresses.items()))
            self.recordings += state != self._recorded
            self._recorded = state
        if self.config and self.config.cache:
            self.config.cache.compile(f"{self.profile.name} {sorted(shapes.items())}")
        self.runs += 1
        self.api.put(lambda: self._compute(shapes, addresses))
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """Run the ONNX graph on what lies at the addresses by now."""
        graph = self.engine.graph
        lengths = self.lengths(shapes)

        def array(name: str) -> Any:
            dtype, sizes = parse_tensor(self.engine.tensors[name])
            shape = [lengths[s] if isinstance(s, str) else s for s in sizes]
            size = int(np.prod(shape)) * np.dtype(NUMPY[dtype]).itemsize
            memory = self.api.at(addresses[name], size)
            return np.frombuffer(memory, NUMPY[dtype]).reshape(shape)

        feeds = {name: array(name).copy() for name in graph.inputs}
        outputs = self.engine.session.run(list(graph.outputs), feeds)
        for name, value in zip(graph.outputs, outputs, strict=True):
            np.copyto(array(name), value, casting="no")
        self.api.clock += RUN_SECONDS
