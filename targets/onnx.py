"""ONNX: one folder that Transformers.js runs as it is, and ONNX Runtime runs here."""

from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..exporter.bundle import Bundle
from ..exporter.spec import ExportSpec
from .base import Artifact, Availability, Session

if TYPE_CHECKING:
    from torch.export import ExportedProgram

LOWERING_PACKAGES = ("onnx", "onnxscript")
RUNTIME_PACKAGES = ("onnxruntime",)
REMEDY = "pip install 'fastvlm-export[onnx]'"

FILES = {
    "vision": "onnx/vision_encoder.onnx",
    "embedding": "onnx/embed_tokens.onnx",
    "decoder": "onnx/decoder_model_merged.onnx",
}
"""Graph -> file, as Transformers.js names the three sessions of `LlavaQwen2ForCausalLM`."""


def availability() -> Availability:
    """Look for onnx, onnxscript (lowering) and onnxruntime (running)."""
    packages = (*LOWERING_PACKAGES, *RUNTIME_PACKAGES)
    found = {name: metadata.version(name) for name in packages if find_spec(name)}
    missing = [name for name in packages if name not in found]
    return Availability(
        lower=all(name in found for name in LOWERING_PACKAGES),
        run=all(name in found for name in RUNTIME_PACKAGES),
        versions=found,
        remedy=f"{', '.join(missing)} not found: {REMEDY}" if missing else "",
    )


def lower(programs: Mapping[str, "ExportedProgram"], spec: ExportSpec, out: Path) -> Artifact:
    """Write the three graphs and the client's files below the empty folder `out`."""
    from . import onnx_files, onnx_lowering, transformers_js  # noqa: PLC0415 - imports torch

    (out / "onnx").mkdir()
    chunks: dict[str, int] = {}
    graphs: dict[str, dict[str, dict[str, str]]] = {}
    for name, file in FILES.items():
        names = onnx_lowering.interface(name, programs[name], spec.decoder)
        model = onnx_lowering.to_onnx(programs[name], names)
        graphs[name] = onnx_lowering.signature(names, model)
        chunks[Path(file).name] = onnx_files.save(model, out / file)
    transformers_js.write_client_files(spec, chunks, out)
    return Artifact(graphs=graphs)


def open(bundle: Bundle) -> Session:  # noqa: A001 - the name that every target gives it
    """Load the three graphs into ONNX Runtime. Raises ExportError for a damaged file."""
    from .onnx_session import OnnxSession  # noqa: PLC0415 - imports onnxruntime

    paths = {name: bundle.path / file for name, file in FILES.items()}
    return OnnxSession(paths, context=bundle.manifest.context)
