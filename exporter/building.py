"""`build`: engines for a TensorRT bundle that exists, on the machine that shall run it."""

import dataclasses
import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..quantize.recipes import Recipe, recorded
from ..targets import TargetName, tensorrt, tensorrt_build, tensorrt_device
from ..targets import tensorrt_package as packages
from ..targets.base import Options
from ..targets.tensorrt_package import Backend
from ..targets.tensorrt_plan import PLAN, Plan, read_plan
from ..targets.tensorrt_record import RECORD
from ..validate import tensorrt_build as proof
from ..validate.tensorrt_build import EngineProof
from . import bundle as bundles
from . import ownership, publish
from .clock import Clock
from .errors import ExportError
from .progress import Progress, Silent

REWRITTEN = (PLAN, RECORD, "engines")
"""What is not carried over, beside the manifest and the report."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What `build` was asked for; None: what the bundle's plan says."""

    bundle: Path
    backend: str | None = None
    compute_capabilities: tuple[str, ...] | None = None


def build(request: BuildRequest, progress: Progress | None = None) -> EngineProof:
    """Build a bundle's engines by its plan, and put them into it in one step.

    Its other files stay, but for its report, which spoke of other engines. A build that fails or is
    interrupted leaves the bundle as it was. Raises ExportError for a bundle of another target or
    with files that no export wrote, for GPUs that can't be built for here, and where TensorRT
    fails.
    """
    clock = Clock(progress or Silent())
    clock.stage("Check the files")
    path = Path(os.path.realpath(request.bundle))
    bundle = bundles.open_bundle(path, clock.detail)
    if foreign := ownership.problem(path):
        raise ExportError(foreign, "Move it away: `build` replaces a bundle as a whole.")
    manifest = bundle.manifest
    if manifest.target != TargetName.TENSORRT:
        raise ExportError(
            f"{path} is a bundle of target '{manifest.target}', which has no engines to build.",
            "Export one with --target tensorrt.",
        )
    recipe = recorded(manifest.recipe)
    plan = _plan(request, read_plan(path), recipe)
    options = Options(backend=plan.backend, compute_capabilities=plan.compute_capabilities or None)
    _check(options, plan.backend, recipe)
    clock.stage("Build the engines")
    with publish.staging(path) as folder:
        for name in manifest.files:
            if PurePosixPath(name).parts[0] not in REWRITTEN:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _link(path / name, folder / name)
        tensorrt_build.write_plan(folder, plan)
        gpu = tensorrt.gpu_to_build_on(plan.backend)
        record = tensorrt_build.build(folder, clock.detail, engines=True, gpu=gpu)
        renewed = dataclasses.replace(
            manifest,
            artifact=tensorrt.details(record),
            versions={**manifest.versions, **tensorrt.availability().versions},
            files=bundles.files_of(folder),
        )
        (folder / bundles.MANIFEST).write_text(renewed.to_json(), "utf-8")
        clock.stage("Check the engines")
        found = proof.engines(bundles.open_bundle(folder), clock.detail)
        if found.passed:
            clock.stage("Publish")
            same = functools.partial(bundles.check_current, bundle)
            publish.publish(folder, path, force=True, check=same)
    return found


def _plan(request: BuildRequest, plan: Plan, recipe: Recipe) -> Plan:
    """The bundle's plan with what was asked for instead."""
    backend = plan.backend
    if request.backend is not None:
        if request.backend not in list(Backend):
            raise ExportError(
                f"--backend {request.backend}: there is no such package.",
                f"Use one of: {', '.join(Backend)}.",
            )
        backend = Backend(request.backend)
    asked = request.compute_capabilities
    if asked is None and backend is plan.backend:
        return plan
    if backend is Backend.TENSORRT and asked is None:
        return dataclasses.replace(plan, backend=backend, compute_capabilities=())
    options = Options(backend=backend, compute_capabilities=asked)
    if problems := tensorrt.option_problems(options):
        raise ExportError("\n".join(problems), "`fastvlm-export targets` lists what there is.")
    return dataclasses.replace(
        plan, backend=backend, compute_capabilities=tensorrt.capabilities_of(options, recipe)
    )


def _check(options: Options, backend: Backend, recipe: Recipe) -> None:
    """Raise ExportError where this machine can't build for these GPUs, or they not compute it."""
    packages.load(backend)
    problems = tensorrt.option_problems(options)
    problems += tensorrt.problems(recipe, None, options=options)
    if problems:
        raise ExportError(
            "\n".join(dict.fromkeys(problems)),
            "Name other GPUs with --compute-capability, or export with another recipe.",
        )
    if backend is Backend.TENSORRT and not tensorrt.gpu_to_build_on(backend):
        raise ExportError(
            f"Backend '{backend}' builds on the GPU that it is for. "
            f"{tensorrt_device.driver_problem(backend, packages.version(backend))}",
            "Run the same command where that GPU is, or build ahead of time with "
            f"--backend {Backend.RTX}.",
        )


def _link(source: Path, target: Path) -> None:
    """A second name for a file that stays as it is; a copy where the system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
