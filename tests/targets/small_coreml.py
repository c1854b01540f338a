"""The Core ML packages of a small model under each recipe, made once for all workers."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.export import ExportedProgram

from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.spec import ExportSpec
from fastvlm_export.quantize.recipes import RECIPES, Precision, Recipe
from fastvlm_export.targets import coreml, coreml_graphs

from ..shared import once
from .conftest import CONTEXT, lively_model, make_spec, programs_once

CHUNK = 8
CAPACITY = CONTEXT + CHUNK
ASYMMETRIC = Recipe(
    # What no built-in has: float32 around integers, so int32 biases; zero points, an untied head
    # of other bits.
    name="asymmetric",
    vision=Precision(bits=8),
    decoder=Precision(bits=4, group_size=16, symmetric=False),
    head=Precision(bits=8),
)


@dataclass(frozen=True, kw_only=True)
class SmallCoreML:
    """A model, the recipe as Core ML takes it, its programs and the folder with their packages."""

    model: FastVLM
    spec: ExportSpec
    recipe: Recipe
    programs: dict[str, ExportedProgram]
    folder: Path


def small_coreml(factory: pytest.TempPathFactory, name: str) -> SmallCoreML:
    """Not to be changed. `name` is a built-in recipe's, or "asymmetric"."""
    recipe = coreml.adapt(ASYMMETRIC if name == ASYMMETRIC.name else RECIPES[name])
    # With each kind of block and layer once or twice: what is written and read back is the same.
    tied = name != ASYMMETRIC.name
    model = lively_model(300, tied=tied, depths=(1, 1, 1, 1, 1), layers=2)
    spec = make_spec(model)
    programs = programs_once(f"coreml-{name}", model, spec, recipe)

    def write(out: Path) -> None:
        out.mkdir()
        coreml_graphs.write(programs, spec, CHUNK, CAPACITY, "iOS18", out)

    folder = once(factory, f"coreml-{name}-packages", write)
    return SmallCoreML(model=model, spec=spec, recipe=recipe, programs=programs, folder=folder)
