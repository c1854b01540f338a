"""Engines of a bundle, loaded onto this machine's GPU, and contexts that run them.

One code path for TensorRT and TensorRT for RTX. Neither raises: a function that fails returns
nothing or False and says why in the log, so that the log is where errors are made of.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from ..exporter.errors import ExportError
from . import tensorrt_package
from .tensorrt_cuda import Cuda, out_of_memory
from .tensorrt_device import Gpu, driver_problem, find_gpu
from .tensorrt_log import Log
from .tensorrt_package import NAMES, Backend, capabilities
from .tensorrt_plan import Plan, read_plan

Shape = tuple[int, ...]

_MEMORY: Final = re.compile(r"out ?of ?memory|insufficient memory|cudaErrorMemoryAllocation", re.I)
_DRIVER: Final = re.compile(r"driver version is insufficient|cudaError 35\b", re.I)
_CAPABILITY: Final = re.compile(
    r"incompatible device|expecting compute|compute capability|different (GPU|compute)", re.I
)
_VERSION: Final = re.compile(
    r"version tag|incompatible serialization version|created with .*version|version mismatch", re.I
)
_DAMAGED: Final = re.compile(r"magic ?tag|header\.size|blobSize", re.I)
_UNREADABLE: Final = re.compile(r"serialization", re.I)


def gpu_for(plan: Plan, version: str, folder: Path) -> Gpu:
    """The GPU of this machine. Raises ExportError where there is none that the package can use."""
    problem = driver_problem(plan.backend, version)
    found = find_gpu()
    if problem or found is None:
        raise ExportError(
            f"{folder}: {problem or 'no GPU was found.'}",
            f"Without a GPU its ONNX graphs can be proven: fastvlm-export validate {folder}",
        )
    return found


def open_loader(folder: Path) -> "Loader":
    """The loader of a bundle's engines on this machine. Raises ExportError where none can run."""
    plan = read_plan(folder)
    version = tensorrt_package.version(plan.backend)
    gpu = gpu_for(plan, version, folder)
    return Loader(tensorrt_package.load(plan.backend), plan, folder, version=version, gpu=gpu)


class Loader:
    """Reads engine files of one bundle with one package, and says why one can't be read."""

    def __init__(
        self, package: ModuleType, plan: Plan, folder: Path, *, version: str, gpu: Gpu
    ) -> None:
        self.package, self.plan, self.folder = package, plan, folder
        self.version, self.gpu = version, gpu
        self.name = NAMES[plan.backend]
        self.log = Log(package)
        self.runtime = package.Runtime(self.log.made)

    def load(self, graph: str) -> Any:
        """The engine of "vision", "embedding" or "decoder" on the GPU. Raises ExportError."""
        path = self.folder / self.plan.graphs[graph].engine
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise ExportError(
                f"{self.folder} has no engine for its {graph} graph: {path.name} is missing.",
                f"Build the engines on this machine: {self.build_command()}",
            ) from error
        except OSError as error:
            raise ExportError(f"{path} cannot be read: {error}", "Check the file.") from error
        self._refuse(path, data)
        engine = self.runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._failure(path, self.log.take())
        return engine

    def _refuse(self, path: Path, data: bytes) -> None:
        """Raise what the package finds in the file's header; TensorRT itself has no such look."""
        if not hasattr(self.runtime, "get_engine_validity"):
            return
        header = data[: self.runtime.engine_header_size]
        validity, found = self.runtime.get_engine_validity(header)
        text = self.log.take()
        if validity != self.package.EngineValidity.INVALID:
            return
        kinds = self.package.EngineInvalidityDiagnostics
        for kind, problem in (
            ("MALFORMED_ENGINE", self._damaged),
            ("VERSION_MISMATCH", self._other_version),
            ("UNSUPPORTED_CC", self._other_gpu),
            ("OLD_CUDA_DRIVER", self._old_driver),
            ("OLD_CUDA_RUNTIME", self._other_version),
            ("INSUFFICIENT_GPU_MEMORY", self._too_large),
        ):
            if int(found) & int(getattr(kinds, kind)):
                raise problem(path, text)
        raise self._failure(path, text)

    def _failure(self, path: Path, said: str) -> ExportError:
        """What the log of a failed loading means."""
        for pattern, problem in (
            (_MEMORY, self._too_large),
            (_DRIVER, self._old_driver),
            (_CAPABILITY, self._other_gpu),
            (_DAMAGED, self._damaged),
            (_VERSION, self._other_version),
            (_UNREADABLE, self._damaged),
        ):
            if pattern.search(said):
                return problem(path, said)
        if self._foreign:
            return self._other_gpu(path, said)
        return ExportError(
            f"{path} cannot be loaded by {self.name} {self.version}: {said or 'no reason given'}",
            f"Build it anew on this machine: {self.build_command()}",
        )

    @property
    def _foreign(self) -> bool:
        """Whether the engines were built for other GPUs than this one, by the plan."""
        named = self.plan.compute_capabilities
        return bool(named) and self.gpu.capability not in named

    def _damaged(self, path: Path, said: str) -> ExportError:
        return ExportError(
            f"{path} is damaged, cut short, or no engine of {self.name}{_because(said)}.",
            f"Copy the bundle again, or build the engine anew: {self.build_command()}",
        )

    def _other_version(self, path: Path, said: str) -> ExportError:
        return ExportError(
            f"{path} was built by another version of {self.name} than {self.version}, which is "
            f"installed here{_because(said)}.",
            f"Engines are for one version only. Build it anew: {self.build_command()}",
        )

    def _other_gpu(self, path: Path, said: str) -> ExportError:
        built = ", ".join(self.plan.compute_capabilities) or "another GPU"
        known = capabilities(self.package)
        if self.plan.backend is Backend.RTX and known and self.gpu.capability not in known:
            hint = (
                f"{self.name} {self.version} knows {', '.join(known)} only. With NVIDIA's TensorRT "
                f"installed: fastvlm-export build {self.folder} --backend {Backend.TENSORRT}"
            )
        else:
            hint = f"Build it for this GPU: {self.build_command(capability=True)}"
        return ExportError(
            f"{path} was built for compute capability {built}; {self.gpu.name} has "
            f"{self.gpu.capability}{_because(said)}.",
            hint,
        )

    def _old_driver(self, path: Path, said: str) -> ExportError:
        return ExportError(
            f"{path} needs a newer NVIDIA driver than that of {self.gpu.name}{_because(said)}.",
            "Install the newest driver for this GPU: https://www.nvidia.com/drivers",
        )

    def _too_large(self, path: Path, said: str) -> ExportError:
        size = path.stat().st_size
        total = self.gpu.memory_bytes / 2**20
        return out_of_memory(
            f"{path.name} of {size / 2**20:.0f} MiB does not fit into what is left of the "
            f"{total:.0f} MiB of {self.gpu.name}"
        )

    def build_command(self, *, capability: bool = False) -> str:
        """The command that builds the bundle's engines here."""
        command = f"fastvlm-export build {self.folder}"
        if capability and self.plan.backend is Backend.RTX:
            command += f" --compute-capability {self.gpu.capability}"
        return command


def _because(said: str) -> str:
    return f" ({said.strip().rstrip('.')})" if said else ""


class Context:
    """One engine under one of its optimization profiles, with its tensors at fixed addresses.

    `graphs`: let TensorRT for RTX record each shape's kernels as one CUDA graph and replay it; it
    does so anew where a shape or an address is another than before.
    """

    def __init__(
        self,
        loader: Loader,
        engine: Any,
        profile: int,
        cuda: Cuda,
        *,
        graphs: bool = False,
        kernels: Any = None,
    ) -> None:
        self._log, self._cuda = loader.log, cuda
        self._hint = f"Build the engines anew on this machine: {loader.build_command()}"
        self._shapes: dict[str, Shape] = {}
        self._outputs: dict[str, Shape] = {}
        package = loader.package
        strategy = package.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if loader.plan.backend is Backend.RTX:
            self._config = engine.create_runtime_config()
            # Memory for this profile's shapes, not for the largest of all profiles.
            self._config.set_execution_context_allocation_strategy(strategy)
            if graphs:
                self._config.cuda_graph_strategy = package.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if kernels is not None:
                self._config.set_runtime_cache(kernels)
            self._context = engine.create_execution_context(self._config)
        else:
            self._context = engine.create_execution_context(strategy)
        if self._context is None:
            raise self._failure("prepared")
        if not self._context.set_optimization_profile_async(profile, int(cuda.stream)):
            raise self._failure(f"put under its profile {profile}")
        cuda.synchronize()

    def bind(self, name: str, address: int) -> None:
        """Let the tensor lie at this address of the GPU's memory."""
        if not self._context.set_tensor_address(name, address):
            raise self._failure(f"given an address for {name}")

    def shape(self, name: str, shape: Sequence[int]) -> None:
        """Say the input's shape; the same shape again costs nothing."""
        shape = tuple(shape)
        if self._shapes.get(name) == shape:
            return
        if not self._context.set_input_shape(name, shape):
            raise self._failure(f"given {name} of shape {list(shape)}")
        self._shapes[name] = shape
        self._outputs.clear()

    def check(self, name: str, shape: Shape) -> None:
        """Raise ExportError where the output will have another shape than this one.

        A size of -1 is one that TensorRT knows only after the run.
        """
        if self._outputs.get(name) == shape:
            return
        found = tuple(self._context.get_tensor_shape(name))
        if len(found) != len(shape) or any(
            one not in (-1, size) for one, size in zip(found, shape, strict=True)
        ):
            raise ExportError(
                f"An engine gives {name} of shape {list(found)}, not {list(shape)}.",
                self._hint,
            )
        self._outputs[name] = shape

    def enqueue(self) -> None:
        """Put one run into the stream. Raises ExportError where the engine refuses."""
        if not self._context.execute_async_v3(int(self._cuda.stream)):
            raise self._failure("run")

    def _failure(self, what: str) -> ExportError:
        said = self._log.take() or "no reason given"
        if _MEMORY.search(said):
            free, total = self._cuda.free_memory()
            return out_of_memory(f"an engine cannot be {what} ({said})", free, total)
        return ExportError(
            f"An engine cannot be {what}: {said}",
            self._hint,
        )
