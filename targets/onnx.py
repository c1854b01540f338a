"""ONNX: one folder that Transformers.js runs as it is, and ONNX Runtime runs here."""

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..exporter.bundle import MANIFEST, Bundle
from ..exporter.errors import ExportError
from ..exporter.spec import ExportSpec
from ..exporter.versions import version_of
from ..quantize.recipes import Float, Recipe, recorded
from . import onnx_recipes
from .base import DEFAULTS, Artifact, Availability, Options, Session, Statement, foreign_options

if TYPE_CHECKING:
    from torch.export import ExportedProgram

LOWERING_PACKAGES = ("onnx", "onnxscript")
RUNTIME_PACKAGES = ("onnxruntime",)
REMEDY = "pip install 'fastvlm-export[onnx]'"

STEMS = {
    "vision": "onnx/vision_encoder",
    "embedding": "onnx/embed_tokens",
    "decoder": "onnx/decoder_model_merged",
}
"""Graph -> file, as Transformers.js names the three sessions of `LlavaQwen2ForCausalLM`."""

SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q4": "_q4"}
"""Transformers.js's `dtype` -> what it puts between a stem and ".onnx"."""


def client_dtype(recipe: Recipe) -> str:
    """The `dtype` of Transformers.js that comes closest: the decoder's. It only names the files."""
    if recipe.float_format is Float.FP16:
        return "fp16"
    return {None: "fp32", 8: "int8", 4: "q4"}[recipe.decoder.bits]


def files(recipe: Recipe) -> dict[str, str]:
    """Graph -> its file in the bundle."""
    suffix = SUFFIXES[client_dtype(recipe)]
    return {name: f"{stem}{suffix}.onnx" for name, stem in STEMS.items()}


def availability() -> Availability:
    """Look for onnx, onnxscript (lowering) and onnxruntime (running)."""
    packages = (*LOWERING_PACKAGES, *RUNTIME_PACKAGES)
    found = {name: version_of(name) for name in packages if find_spec(name)}
    missing = [name for name in packages if name not in found]
    return Availability(
        lower=all(name in found for name in LOWERING_PACKAGES),
        run=all(name in found for name in RUNTIME_PACKAGES),
        versions=found,
        remedy=f"{', '.join(missing)} not found: {REMEDY}" if missing else "",
    )


def adapt(recipe: Recipe, options: Options = DEFAULTS) -> Recipe:
    """Recipes are written as ONNX Runtime computes them."""
    return recipe


def option_problems(options: Options) -> list[str]:
    """One folder serves every client here."""
    return foreign_options(options, "onnx")


def problems(
    recipe: Recipe,
    layers: Mapping[str, int] | None,
    *,
    tied: bool = False,
    options: Options = DEFAULTS,
) -> list[str]:
    """Every reason why ONNX cannot express the recipe."""
    return onnx_recipes.problems(recipe, layers, tied=tied)


def contract_problems(spec: ExportSpec, options: Options = DEFAULTS) -> list[str]:
    """Its clients run every model that can be read."""
    return []


def lower(
    programs: Mapping[str, "ExportedProgram"],
    spec: ExportSpec,
    recipe: Recipe,
    out: Path,
    options: Options = DEFAULTS,
) -> Artifact:
    """Write the three graphs and the client's files below the empty folder `out`."""
    from . import (  # noqa: PLC0415 - imports torch
        onnx_files,
        onnx_lowering,
        onnx_table,
        transformers_js,
    )

    (out / "onnx").mkdir()
    names = {n: onnx_lowering.interface(n, programs[n], spec.decoder) for n in STEMS}
    models = {n: onnx_lowering.to_onnx(programs[n], names[n]) for n in STEMS}
    shared = None
    if onnx_files.is_large(models["decoder"]):  # what a small file holds inside is its own
        shared = onnx_table.share(models["embedding"], models["decoder"])
    chunks: dict[str, int] = {}
    for name in ("vision", "decoder", "embedding"):
        path = out / files(recipe)[name]
        if shared and name == "embedding":
            onnx_table.refer(*shared)
        apart = shared[1] if shared and name == "decoder" else None
        chunks[path.name] = onnx_files.save(models[name], path, apart=apart)
    transformers_js.write_client_files(spec, client_dtype(recipe), chunks, out)
    return Artifact(graphs={n: onnx_lowering.signature(names[n], models[n]) for n in STEMS})


def statements(
    bundle: Bundle,
    spec: ExportSpec,
    programs: "Callable[[], Mapping[str, ExportedProgram]] | None",
) -> Iterator[Statement]:
    """The client's files, and the graphs' interfaces as the ONNX files have them."""
    from . import client_files, onnx_lowering, transformers_js  # noqa: PLC0415 - imports torch

    files = paths(bundle)
    written = {name: onnx_lowering.saved_signature(path) for name, path in files.items()}
    yield Statement(
        where=MANIFEST, found={"graphs": bundle.manifest.graphs}, wanted={"graphs": written}
    )
    chunks = {
        path.name: sum(file.startswith(f"onnx/{path.name}_data") for file in bundle.manifest.files)
        for path in files.values()
    }
    dtype = client_dtype(recorded(bundle.manifest.recipe))
    yield from client_files.statements(transformers_js.files(spec, dtype, chunks), bundle.path)


def open(bundle: Bundle, *, exact: bool = False) -> Session:  # noqa: A001 - each target's name
    """Load the three graphs into ONNX Runtime; `exact`: with nothing rounded, see `onnx_exact`.

    Raises ExportError for a damaged file.
    """
    from .onnx_exact import open_exact  # noqa: PLC0415 - imports onnxruntime
    from .onnx_session import OnnxSession  # noqa: PLC0415 - imports onnxruntime

    chosen = open_exact if exact else OnnxSession
    return chosen(paths(bundle), context=bundle.manifest.context)


def paths(bundle: Bundle) -> dict[str, Path]:
    """Graph -> its file. Raises ExportError where the manifest lists no three that fit."""
    there = bundle.manifest.files
    for suffix in SUFFIXES.values():
        found = {name: f"{stem}{suffix}.onnx" for name, stem in STEMS.items()}
        if all(file in there for file in found.values()):
            return {name: bundle.path / file for name, file in found.items()}
    raise ExportError(
        f"{bundle.path} lists no {', '.join(STEMS.values())} of one suffix in its manifest.",
        "Export it again: fastvlm-export --target onnx --out DIR --force",
    )


__all__ = [
    "RUNTIME_PACKAGES",
    "adapt",
    "availability",
    "client_dtype",
    "contract_problems",
    "files",
    "lower",
    "open",
    "option_problems",
    "problems",
    "statements",
]
