"""TensorRT: engines for vision, embedding and decoder, built ahead of time, and what they are of.

The bundle carries the ONNX graphs, the plan of the build and, with TensorRT for RTX, the engines
themselves, built without a GPU. TensorRT builds where its GPU is: `fastvlm-export build BUNDLE`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..exporter.bundle import MANIFEST, Bundle
from ..exporter.spec import ExportSpec
from ..exporter.versions import version_of
from ..quantize.recipes import Recipe, recorded
from . import tensorrt_device as device
from . import tensorrt_gpus, tensorrt_recipes
from . import tensorrt_package as packages
from .base import DEFAULTS, Artifact, Availability, Options, Session, Statement, foreign_options
from .tensorrt_package import Backend
from .tensorrt_plan import (
    FLOATS,
    GRAPHS,
    PLAN,
    GraphPlan,
    Plan,
    engine_file,
    onnx_file,
    profiles,
    read_plan,
)
from .tensorrt_record import read_record

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from .tensorrt_lowering import LoweredGraph
    from .tensorrt_record import BuildRecord

LOWERING_PACKAGES = ("onnx", "onnxscript")
REMEDY = packages.REMEDIES[Backend.RTX]
STAND_IN = "onnxruntime"
"""Runs the graphs of the engines where no GPU is."""

CUDA = "cuda-bindings"
CUDA_MODULE = "cuda.bindings"
RUNTIME_PACKAGES = (*(packages.MODULES[one] for one in packages.installed()), CUDA_MODULE)


def availability() -> Availability:
    """A package lowers and builds; to run takes a GPU besides, and a driver that is new enough."""
    found = {name: version_of(name) for name in LOWERING_PACKAGES if find_spec(name)}
    missing = [name for name in LOWERING_PACKAGES if name not in found]
    there = packages.installed()
    found |= {backend.value: packages.version(backend) for backend in there}
    if find_spec(STAND_IN):
        found[STAND_IN] = version_of(STAND_IN)
    if has_cuda():
        found[CUDA] = metadata.version(CUDA)
    missing += [] if there else [packages.MODULES[Backend.RTX]]
    if missing:
        return Availability(
            lower=False,
            run=False,
            versions=found,
            remedy=f"{', '.join(missing)} not found: {REMEDY}",
        )
    problem = device.driver_problem(there[0], packages.version(there[0]))
    if not problem and not has_cuda():
        problem = f"{CUDA} not found: {REMEDY}"
    if problem and not find_spec(STAND_IN):
        problem = f"{STAND_IN} not found, which proves the graphs here: {REMEDY}. {problem}"
    return Availability(lower=True, run=not problem, versions=found, remedy=problem)


def has_cuda() -> bool:
    """Whether CUDA's Python bindings are there, which engines run through."""
    return find_spec("cuda") is not None and find_spec(CUDA_MODULE) is not None


def option_problems(options: Options) -> list[str]:
    """Backends and compute capabilities that can't be had here, and other targets' choices."""
    found = foreign_options(options, "tensorrt", ("backend", "compute_capabilities"))
    if options.backend is not None and options.backend not in list(Backend):
        return [
            *found,
            f"--backend {options.backend}: target 'tensorrt' has {', '.join(Backend)}",
        ]
    backend = packages.backend_of(options)
    if backend is Backend.RTX and options.backend and backend not in packages.installed():
        found.append(f"--backend {backend}: {packages.MODULES[backend]} not found: {REMEDY}")
    if options.compute_capabilities is not None:
        found += packages.capability_problems(backend, options.compute_capabilities)
    return found


def capabilities_of(options: Options, recipe: Recipe) -> tuple[str, ...]:
    """The compute capabilities to build for; none: those of the GPU where it is built.

    Where none are named: of the usual ones, those that can compute the recipe.
    """
    if packages.backend_of(options) is Backend.TENSORRT:
        return ()
    asked = options.compute_capabilities
    return tensorrt_gpus.default(recipe) if asked is None else tuple(sorted(set(asked), key=int))


def adapt(recipe: Recipe, options: Options = DEFAULTS) -> Recipe:
    """The built-in recipe as TensorRT computes it; any other as it is."""
    return tensorrt_recipes.adapt(recipe)


def problems(
    recipe: Recipe,
    layers: Mapping[str, int] | None,
    *,
    tied: bool = False,
    options: Options = DEFAULTS,
) -> list[str]:
    """Every reason why TensorRT cannot express an adapted recipe."""
    asked = options.compute_capabilities or ()
    return [
        *tensorrt_recipes.problems(recipe, layers, tied=tied),
        *tensorrt_gpus.problems(recipe, asked),
    ]


def contract_problems(spec: ExportSpec, options: Options = DEFAULTS) -> list[str]:
    """Engines are built to the model's own sizes."""
    return []


def lower(
    programs: Mapping[str, "ExportedProgram"],
    spec: ExportSpec,
    recipe: Recipe,
    out: Path,
    options: Options = DEFAULTS,
) -> Artifact:
    """Write the graphs, the plan, the client's files and the engines below the empty folder `out`.

    Engines of TensorRT are built where a GPU is, else only shown to the parser that is installed.
    """
    from . import client_files, tensorrt_build, tensorrt_lowering  # noqa: PLC0415 - imports torch

    lowered = tensorrt_lowering.write(programs, spec, out)
    plan = plan_of(lowered, spec, recipe, options)
    tensorrt_build.write_plan(out, plan)
    client_files.write_json(_client_files(spec), out)
    gpu = gpu_to_build_on(plan.backend)
    record = tensorrt_build.build(
        out, lambda _: None, engines=plan.backend is Backend.RTX or bool(gpu), gpu=gpu
    )
    graphs = {name: lowered[name].signature for name in GRAPHS}
    return Artifact(graphs=graphs, details=details(record))


def _client_files(spec: ExportSpec) -> dict[str, Any]:
    from . import client_files  # noqa: PLC0415 - imports tokenizers

    files = {"config.json": client_files.config(spec), **client_files.client_files(spec)}
    if spec.image_token_id >= spec.decoder.vocab_size:
        files["tokenizer.json"] = json.loads(spec.tokenizer.to_json())
    return files


def statements(
    bundle: Bundle,
    spec: ExportSpec,
    programs: "Callable[[], Mapping[str, ExportedProgram]] | None",
) -> Iterator[Statement]:
    """The client's files, the graphs' interfaces, and the plan and record of the build."""
    from . import client_files, onnx_lowering  # noqa: PLC0415 - imports torch

    manifest, plan = bundle.manifest, read_plan(bundle.path)
    written = {
        name: onnx_lowering.saved_signature(bundle.path / onnx_file(name)) for name in GRAPHS
    }
    yield Statement(
        where=MANIFEST,
        found={"graphs": manifest.graphs, "artifact": manifest.artifact},
        wanted={"graphs": written, "artifact": details(read_record(bundle.path))},
    )
    yield Statement(
        where=PLAN,
        found={
            "context": plan.context,
            "float_type": plan.float_type,
            "graphs": {
                name: {
                    "inputs": one.inputs,
                    "outputs": one.outputs,
                    "profiles": [asdict(profile) for profile in one.profiles],
                }
                for name, one in plan.graphs.items()
            },
        },
        wanted={
            "context": spec.context,
            "float_type": FLOATS[recorded(manifest.recipe).float_format],
            "graphs": {
                name: {
                    **written[name],
                    "profiles": [
                        asdict(profile)
                        for profile in profiles(
                            written[name]["inputs"], spec.context, spec.image_tokens
                        )
                    ],
                }
                for name in GRAPHS
            },
        },
    )
    yield from client_files.statements(_client_files(spec), bundle.path)


def plan_of(
    lowered: Mapping[str, "LoweredGraph"], spec: ExportSpec, recipe: Recipe, options: Options
) -> Plan:
    """How the engines of these graphs are built."""
    graphs = {
        name: GraphPlan(
            onnx=onnx_file(name),
            engine=engine_file(name),
            inputs=lowered[name].signature["inputs"],
            outputs=lowered[name].signature["outputs"],
            profiles=profiles(lowered[name].signature["inputs"], spec.context, spec.image_tokens),
            float32_nodes=lowered[name].float32_nodes,
        )
        for name in GRAPHS
    }
    return Plan(
        backend=packages.backend_of(options),
        compute_capabilities=capabilities_of(options, recipe),
        float_type=FLOATS[recipe.float_format],
        context=spec.context,
        graphs=graphs,
    )


def gpu_to_build_on(backend: Backend) -> str:
    """The GPU that TensorRT can time its kernels on here; empty: none, or none is needed."""
    if backend is Backend.RTX or backend not in packages.installed():
        return ""
    if device.driver_problem(backend, packages.version(backend)):
        return ""
    found = device.find_gpu()
    return found.name if found else ""


def details(record: "BuildRecord") -> dict[str, str | int]:
    """What the manifest says of the engines, for clients and for `open`."""
    return {
        "backend": record.backend.value,
        "engines": int(record.built),
        "compute_capabilities": ",".join(record.compute_capabilities),
        "parser": f"{record.parser} {record.version}".strip(),
        "lacks": "; ".join(record.lacks),
        "built_on": record.gpu,
    }


def open(bundle: Bundle) -> Session:  # noqa: A001 - the name that every target gives it
    """Load the engines onto the GPU. Raises ExportError where there is none, or no engine."""
    from .tensorrt_session import TensorRTSession  # noqa: PLC0415 - imports TensorRT and CUDA

    return TensorRTSession(bundle)


__all__ = [
    "RUNTIME_PACKAGES",
    "adapt",
    "availability",
    "contract_problems",
    "lower",
    "open",
    "option_problems",
    "problems",
    "statements",
]
