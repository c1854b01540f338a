"""Core ML: three packages with the cache as states, or the folder that Apple's FastVLM app reads.

The decoder is one package with two functions of static shapes that share their weights: `prefill`
takes a chunk of the prompt, `decode` one token. Apple's tools offer the same with one function of
range shapes, but those keep a model off the Neural Engine (coremltools' guide to flexible inputs);
multifunction models with shared weights and states are there from iOS 18 and macOS 15 on, which is
the oldest system that is built for.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..exporter.bundle import Bundle
from ..exporter.spec import ExportSpec
from ..exporter.versions import version_of
from ..quantize.recipes import RECIPES, Recipe, recorded
from . import apple_app, apple_app_recipes, coreml_recipes
from .base import DEFAULTS, Artifact, Availability, Options, Session, Statement, foreign_options
from .coreml_model import OpenModel

if TYPE_CHECKING:
    from torch.export import ExportedProgram

RUNTIME_PACKAGES = ("coremltools",)
REMEDY = "pip install 'fastvlm-export[coreml]'"

LAYOUT = "fastvlm"
LAYOUTS = (LAYOUT, apple_app.LAYOUT)
SYSTEMS = {
    "ios18": "iOS18",
    "macos15": "iOS18",
    "ios26": "iOS26",
    "macos26": "iOS26",
}
"""`--deployment-target` -> coremltools' name: both systems of a year have the same operators."""

CHUNK = 128
"""Rows of a prefill: three at 1024 pixels (256 image tokens and a question)."""


def availability() -> Availability:
    """Core ML packages can be written on any system and run on a Mac."""
    found = {name: version_of(name) for name in RUNTIME_PACKAGES if find_spec(name)}
    return Availability(
        lower=bool(found),
        run=bool(found) and sys.platform == "darwin",
        versions=found,
        remedy="" if found else f"coremltools not found: {REMEDY}",
    )


def option_problems(options: Options) -> list[str]:
    """Unknown layouts, systems without states or blockwise weights, other targets' choices."""
    found = foreign_options(options, "coreml", ("layout", "deployment_target"))
    if options.layout and options.layout not in LAYOUTS:
        found.append(f"--layout {options.layout}: target 'coreml' has {', '.join(LAYOUTS)}")
    if options.deployment_target and options.deployment_target.lower() not in SYSTEMS:
        found.append(
            f"--deployment-target {options.deployment_target}: target 'coreml' takes "
            f"{', '.join(SYSTEMS)}; older systems have neither states nor blockwise weights"
        )
    return found


def adapt(recipe: Recipe, options: Options = DEFAULTS) -> Recipe:
    """The recipe as Core ML computes it, and where the app's layout is asked for, as MLX does."""
    adapted = coreml_recipes.adapt(recipe)
    if options.layout == apple_app.LAYOUT and recipe == RECIPES.get(recipe.name):
        return apple_app_recipes.adapt(adapted)
    return adapted


def problems(
    recipe: Recipe,
    layers: Mapping[str, int] | None,
    *,
    tied: bool = False,
    options: Options = DEFAULTS,
) -> list[str]:
    """Every reason why Core ML, or the app's layout, cannot express an adapted recipe."""
    if options.layout == apple_app.LAYOUT:
        return apple_app_recipes.problems(recipe, layers)
    return coreml_recipes.problems(recipe, layers)


def contract_problems(spec: ExportSpec, options: Options = DEFAULTS) -> list[str]:
    """What Apple's app could not run; the packages by themselves take every model."""
    return apple_app.spec_problems(spec) if options.layout == apple_app.LAYOUT else []


def lower(
    programs: Mapping[str, "ExportedProgram"],
    spec: ExportSpec,
    recipe: Recipe,
    out: Path,
    options: Options = DEFAULTS,
) -> Artifact:
    """Write the packages and the files beside them below the empty folder `out`."""
    from . import coreml_graphs  # noqa: PLC0415 - imports coremltools and torch

    layout = options.layout or LAYOUT
    system = SYSTEMS[(options.deployment_target or "ios18").lower()]
    details: dict[str, str | int] = {"layout": layout, "deployment_target": system}
    if layout == apple_app.LAYOUT:
        apple_app.write(programs, spec, recipe, out)
        graphs = coreml_graphs.write_tower(programs["vision"], system, out / apple_app.PACKAGE)
        return Artifact(graphs=graphs, details=details)
    chunk = max(2, min(CHUNK, spec.context))  # one row is what `decode` takes
    capacity = spec.context + chunk  # padding may be written behind the last position
    details |= {"prefill_chunk": chunk, "capacity": capacity}
    graphs = coreml_graphs.write(programs, spec, chunk, capacity, system, out)
    return Artifact(graphs=graphs, details=details)


def statements(
    bundle: Bundle,
    spec: ExportSpec,
    programs: "Callable[[], Mapping[str, ExportedProgram]] | None",
) -> Iterator[Statement]:
    """The files beside the packages, and what the packages say of themselves."""
    from . import client_files, coreml_described, coreml_graphs  # noqa: PLC0415 - import coremltools

    manifest = bundle.manifest
    yield coreml_described.statement(bundle, spec)
    if manifest.artifact.get("layout") == apple_app.LAYOUT:
        recipe = recorded(manifest.recipe)
        files = apple_app.files(spec, recipe, programs() if programs else None, bundle.path)
    else:
        files = coreml_graphs.json_files(spec)
    yield from client_files.statements(files, bundle.path)


def open(bundle: Bundle) -> Session:  # noqa: A001 - the name that every target gives it
    """Load the packages into Core ML, on all compute units. Raises ExportError off a Mac."""
    from .coreml_session import open_mlmodel  # noqa: PLC0415 - imports coremltools

    return session(bundle, open_mlmodel())


def session(bundle: Bundle, open_model: OpenModel, *, exact: bool = False) -> Session:
    """The bundle's packages, whatever runs them, as the layout has them put together.

    `exact`: `open_model` rounds nothing, and what is beside the packages shall not either.
    """
    from .coreml_session import CoreMLSession  # noqa: PLC0415 - imports coremltools

    if bundle.manifest.artifact.get("layout") == apple_app.LAYOUT:
        return apple_app.AppleAppSession(bundle, open_model, exact=exact)
    return CoreMLSession(bundle, open_model)


__all__ = [
    "RUNTIME_PACKAGES",
    "adapt",
    "availability",
    "contract_problems",
    "lower",
    "open",
    "option_problems",
    "problems",
    "session",
    "statements",
]
