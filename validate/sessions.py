"""How a bundle runs on this machine: in its own runtime, or in a reference interpreter of it.

Core ML runs on a Mac only. Anywhere else its packages, and what an ExecuTorch program hands over to
it, are opened by the MIL reference interpreter, which computes what the saved program says; its
numbers are no device's, and it is never timed. TensorRT's engines run on NVIDIA's GPUs only. Where
there is none, ONNX Runtime computes the graphs that they were built from, and is not timed either.
It also computes target onnx's own graphs without rounding, rewritten for that.
"""

import functools
from dataclasses import dataclass

from .. import targets
from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from ..targets import TargetName, executorch_backends
from ..targets import tensorrt_package as nvidia
from ..targets.base import Session
from ..targets.executorch_model import Backend
from ..targets.tensorrt_device import Gpu, find_gpu

NAMES: dict[str, str] = {
    TargetName.ONNX: "ONNX Runtime",
    TargetName.COREML: "Core ML",
    TargetName.EXECUTORCH: "ExecuTorch",
    TargetName.TENSORRT: "TensorRT",
}
SIMULATED = (TargetName.COREML,)
"""Targets with an interpreter here; it needs what their lowering needs."""
EXACT_GRAPHS = (TargetName.ONNX, TargetName.TENSORRT)
"""Targets whose ONNX graphs can be rewritten so that ONNX Runtime rounds nothing."""
SIMULATED_BACKENDS = (Backend.COREML,)
"""Of ExecuTorch's: those that the interpreter stands in for, everywhere."""
EXACT_BACKENDS = (Backend.XNNPACK, Backend.PORTABLE)
"""Of ExecuTorch's: those that `pte` computes without rounding, and never otherwise."""

EXACT_TARGETS = (*SIMULATED, TargetName.EXECUTORCH, *EXACT_GRAPHS)
"""Targets that something computes without rounding."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What runs a bundle's files here; `device` is False where that is no runtime of a user's."""

    name: str
    device: bool


INTERPRETER = Runtime(name="MIL reference interpreter", device=False)
GRAPHS = Runtime(name="ONNX Runtime, on the ONNX graphs of the engines", device=False)
NOT_TIMED = (
    "Latency is not measured here: the interpreter says what the packages compute, not how fast. "
    "On a Mac: fastvlm-export bench BUNDLE"
)
DELEGATES_NOT_TIMED = (
    "Latency is not measured here: the interpreter says what the delegates compute, not how fast. "
    "On an iPhone or a Mac: see examples/ios"
)
ENGINES_NOT_TIMED = (
    "Latency is not measured here: no engine ran, as that takes an NVIDIA GPU. ONNX Runtime says "
    "what the graphs of the engines compute, not how fast. On a machine with one: "
)
FOREIGN_NOT_TIMED = (
    "Latency is not measured here: the engines are for compute capability {served}, and {gpu} has "
    "{capability}. For this GPU: fastvlm-export build BUNDLE {how}, then fastvlm-export bench "
    "BUNDLE"
)


def runs_here(target: str, backend: str | None = None) -> Runtime | None:
    """What runs a target's bundles on this machine; None where nothing does.

    `backend`: what an ExecuTorch program hands its operators over to; None: its default.
    """
    here = targets.get(target).availability()
    if backend in SIMULATED_BACKENDS:
        can = here.run and not executorch_backends.problems(backend)
        return INTERPRETER if can else None
    if here.run:
        return Runtime(name=NAMES.get(target, target), device=True)
    if target == TargetName.TENSORRT:
        return _runs_graphs()
    return INTERPRETER if target in SIMULATED and here.lower else None


def _runs_graphs() -> Runtime | None:
    """ONNX Runtime on the graphs of engines, where it is installed."""
    return GRAPHS if targets.get(TargetName.ONNX).availability().run else None


def not_timed(bundle: Bundle) -> str:
    """Why the bundle has no times here, and how to get some; empty where it can be timed."""
    if runtime(bundle).device:
        return ""
    if bundle.manifest.target == TargetName.TENSORRT:
        if gpu := _foreign_gpu(bundle):
            unknown = nvidia.capability_problems(nvidia.Backend.RTX, (gpu.capability,))
            return FOREIGN_NOT_TIMED.format(
                served=", ".join(_served(bundle)),
                gpu=gpu.name,
                capability=gpu.capability,
                how="--backend tensorrt" if unknown else f"--compute-capability {gpu.capability}",
            )
        build = "" if _has_engines(bundle) else "fastvlm-export build BUNDLE, then "
        return f"{ENGINES_NOT_TIMED}{build}fastvlm-export bench BUNDLE"
    return NOT_TIMED if bundle.manifest.target == TargetName.COREML else DELEGATES_NOT_TIMED


def can_run(target: str) -> bool:
    """Whether a target's bundles can be opened on this machine, and so be proven."""
    return runs_here(target) is not None


def runtime(bundle: Bundle) -> Runtime:
    """What `open_session` runs this bundle in. Raises ExportError where nothing can."""
    target, backend = bundle.manifest.target, _backend(bundle)
    found = runs_here(target, backend)
    if target == TargetName.TENSORRT and (not _has_engines(bundle) or _foreign_gpu(bundle)):
        found = _runs_graphs()
        if found is None and not _has_engines(bundle):
            raise ExportError(
                f"{bundle.path} has no engines yet, and its ONNX graphs can't be run here.",
                "On the machine with the GPU: fastvlm-export build BUNDLE. Or to run the graphs: "
                "pip install 'fastvlm-export[onnx]'",
            )
    if found is None:
        here = targets.get(target).availability()
        if here.run and backend in SIMULATED_BACKENDS:
            remedy = "; ".join(executorch_backends.problems(backend))
            raise ExportError(f"Backend '{backend}' of '{target}' can't be run here.", remedy)
        raise ExportError(f"Target '{target}' can't be run here.", here.remedy)
    return found


def _backend(bundle: Bundle) -> str | None:
    """What an ExecuTorch program hands its operators over to; None for any other target."""
    found = bundle.manifest.artifact.get("backend")
    return None if found is None else str(found)


def _has_engines(bundle: Bundle) -> bool:
    """Whether a TensorRT bundle has been built, and not only been made ready for it."""
    return bool(bundle.manifest.artifact.get("engines"))


def _served(bundle: Bundle) -> tuple[str, ...]:
    """The compute capabilities that engines are for; none: that of the GPU they were built on."""
    named = str(bundle.manifest.artifact.get("compute_capabilities", ""))
    return tuple(one for one in named.split(",") if one)


def _foreign_gpu(bundle: Bundle) -> Gpu | None:
    """The GPU of this machine where the engines are for others, so that it can't run them."""
    gpu, served = find_gpu(), _served(bundle)
    return gpu if gpu and served and gpu.capability not in served else None


def _has_interpreter(bundle: Bundle) -> bool:
    """Whether something computes what the bundle says without rounding."""
    if bundle.manifest.target in EXACT_GRAPHS:
        return _runs_graphs() is not None
    return bundle.manifest.target in SIMULATED or _backend(bundle) in (
        *SIMULATED_BACKENDS,
        *EXACT_BACKENDS,
    )


def has_exact(bundle: Bundle) -> bool:
    """Whether the bundle can also be computed without any rounding.

    That is an interpreter's doing, or ONNX Runtime's on ONNX graphs without their roundings. An
    artifact in float32 gains by it, too: it is held to the very programs that it was made from, and
    not to the checkpoint, whose convolutions are not yet folded.
    """
    return _has_interpreter(bundle)


def open_session(
    bundle: Bundle, *, exact: bool = False, compute_units: str | None = None
) -> Session:
    """Open a bundle in what runs it here, as `runtime` names it.

    `exact`: compute without rounding, in what stands in, also where a device is (see `has_exact`).
    `compute_units`: where Core ML may compute, one of `coreml_session.COMPUTE_UNITS`; a Mac only.
    Raises ExportError where that can't be had.
    """
    target = bundle.manifest.target
    here = runtime(bundle)
    simulated = exact or not here.device
    if exact and not _has_interpreter(bundle):
        raise ExportError(
            f"Target '{target}' has no interpreter that computes without rounding.",
            f"Use one that has: {', '.join(EXACT_TARGETS)}.",
        )
    if compute_units is not None and (target != TargetName.COREML or simulated):
        where = INTERPRETER.name if exact else here.name
        raise ExportError(
            f"Compute units '{compute_units}' are Core ML's, on a Mac; the {where} has none.",
            "Leave them out, or run a bundle of target 'coreml' on a Mac.",
        )
    if simulated:
        return _interpreted(bundle, exact=exact)
    if compute_units is not None:
        return _on_units(bundle, compute_units)
    return targets.get(target).open(bundle)


def _interpreted(bundle: Bundle, *, exact: bool) -> Session:
    """The packages in the MIL reference interpreter; ONNX graphs in ONNX Runtime.

    ExecuTorch's own programs without rounding, in an interpreter of theirs.
    """
    if bundle.manifest.target == TargetName.ONNX:
        from ..targets import onnx  # noqa: PLC0415 - as its runtime is

        return onnx.open(bundle, exact=exact)
    if bundle.manifest.target == TargetName.TENSORRT:
        from ..targets.tensorrt_onnx_session import (  # noqa: PLC0415 - imports onnxruntime
            TensorRTOnnxSession,
        )

        return TensorRTOnnxSession(bundle, exact=exact)
    if _backend(bundle) in SIMULATED_BACKENDS:
        from .executorch_coreml import CoreMLDelegateSession  # noqa: PLC0415 - imports coremltools

        return CoreMLDelegateSession(bundle, exact=exact)
    if _backend(bundle) in EXACT_BACKENDS:
        from .executorch_exact import ExactExecuTorchSession  # noqa: PLC0415 - imports executorch

        return ExactExecuTorchSession(bundle)
    from ..targets import coreml  # noqa: PLC0415 - with its runtime
    from . import mil  # noqa: PLC0415 - imports coremltools

    return coreml.session(bundle, functools.partial(mil.open_model, exact=exact), exact=exact)


def _on_units(bundle: Bundle, compute_units: str) -> Session:
    """The packages in Core ML, on the compute units that are named."""
    from ..targets import coreml, coreml_session  # noqa: PLC0415 - with their runtimes

    return coreml.session(bundle, coreml_session.open_mlmodel(compute_units))
