"""A small bundle for the stand-ins of CUDA and TensorRT, and sessions that are opened on it."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.quantize.apply import quantize
from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import tensorrt_lowering, tensorrt_plan
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.targets.tensorrt_cuda import Cuda
from fastvlm_export.targets.tensorrt_package import Backend
from fastvlm_export.targets.tensorrt_plan import GraphPlan, Plan, read_plan
from fastvlm_export.targets.tensorrt_session import TensorRTSession

from ..shared import once
from .conftest import RESOLUTION, byte_tokenizer, lively_model, make_spec
from .cuda_stand_in import CudaApi
from .tensorrt_stand_ins import GPU, Package

CONTEXT = 600
"""Two whole buckets of attended positions and a part of a third."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a session was opened on."""

    session: TensorRTSession
    package: Package
    api: CudaApi

    def contexts(self, graph: str) -> dict[str, Any]:
        """Profile -> the stand-in's context."""
        engine = next(one for one in self.package.engines if one.name == graph)
        return {one.profile.name: one for one in engine.contexts}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """A bundle's folder with engines' names on it, and PyTorch's session of the same model."""

    folder: Path
    plan: Plan
    eager: EagerSession

    def bundle(self, *, hashes: bool = False) -> Any:
        names = tensorrt_plan.GRAPHS if hashes else ()
        files = {f"engines/{name}.engine": name * 8 for name in names}
        return SimpleNamespace(path=self.folder, manifest=SimpleNamespace(files=files))

    def opens(
        self,
        *,
        backend: Backend = Backend.RTX,
        in_place: bool = True,
        api: CudaApi | None = None,
        change: Callable[[Package], None] = lambda _: None,
        hashes: bool = False,
    ) -> Machine:
        """Open a session: TensorRT captures graphs itself; `in_place` as `Package`'s."""
        api = api or CudaApi()
        plan = dataclasses.replace(self.plan, backend=backend)
        package = Package(self.folder, plan, api, in_place=in_place)
        if backend is Backend.TENSORRT:
            package.__name__ = "tensorrt"
        change(package)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastvlm_export.targets.tensorrt_session.read_plan", lambda _: plan)
            session = TensorRTSession(
                self.bundle(hashes=hashes), package=package, cuda=Cuda(api), gpu=GPU
            )
        return Machine(session=session, package=package, api=api)


def exported(factory: pytest.TempPathFactory) -> Exported:
    """A small model lowered, and files where its engines would be: a copy of what workers share."""
    folder = factory.mktemp("tensorrt")
    shutil.copytree(once(factory, "tensorrt-opened", _write), folder, dirs_exist_ok=True)
    return Exported(folder=folder, plan=read_plan(folder), eager=EagerSession(_folded(), CONTEXT))


def _model() -> FastVLM:
    return lively_model(byte_tokenizer().vocab_size, tied=False)


def _folded() -> FastVLM:
    return reparameterize(_model()).model


def _write(folder: Path) -> None:
    folder.mkdir()
    spec = dataclasses.replace(make_spec(_model()), context=CONTEXT)
    programs = dict(quantize(_folded(), RECIPES["fp32"], spec, None, lambda _: None).programs)
    lowered = tensorrt_lowering.write(programs, spec, folder)
    plan = Plan(
        backend=Backend.RTX,
        compute_capabilities=("80", "86"),
        float_type="float32",
        context=CONTEXT,
        graphs={
            name: GraphPlan(
                onnx=tensorrt_plan.onnx_file(name),
                engine=tensorrt_plan.engine_file(name),
                inputs=graph.signature["inputs"],
                outputs=graph.signature["outputs"],
                profiles=tensorrt_plan.profiles(
                    graph.signature["inputs"], CONTEXT, spec.image_tokens
                ),
            )
            for name, graph in lowered.items()
        },
    )
    (folder / tensorrt_plan.PLAN).write_text(plan.to_json(), "utf-8")
    for place in ("engines", "whole"):
        (folder / place).mkdir()
        for name in plan.graphs:
            (folder / place / f"{name}.engine").write_bytes(f"an engine of {name}".encode() * 9)


def pixels(seed: int = 0) -> Any:
    size = (1, 3, RESOLUTION, RESOLUTION)
    return np.random.default_rng(seed).random(size, dtype=np.float32)


def ids(count: int) -> Any:
    return np.random.default_rng(count).integers(0, 200, (1, count))
