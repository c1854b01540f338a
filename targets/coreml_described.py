"""What saved Core ML packages say of themselves, beside what the manifest says of them."""

from pathlib import Path
from typing import Any

from ..exporter.bundle import MANIFEST, Bundle
from ..exporter.errors import ExportError
from ..exporter.spec import ExportSpec
from ..quantize.quiet import quiet_import
from . import apple_app
from .base import Statement
from .coreml_model import (
    DECODER,
    EMBEDDING,
    EMBEDS,
    EXPORT_HINT,
    FEATURES,
    KEY_CACHE,
    LOGITS,
    MAIN,
    PREFILL,
    VISION,
)

with quiet_import():
    from coremltools.proto import FeatureTypes_pb2, Model_pb2
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
SYSTEMS = {9: "iOS18", 10: "iOS26"}
"""Core ML's specification version -> the first system that has it."""

_CAPACITY = 3  # the axis of a state's shape that counts positions

Signature = dict[str, dict[str, str]]


def statement(bundle: Bundle, spec: ExportSpec) -> Statement:
    """The manifest's `graphs` and `artifact`, and what its packages have.

    Raises ExportError where a package can't be read.
    """
    is_app = bundle.manifest.artifact.get("layout") == apple_app.LAYOUT
    names = (apple_app.PACKAGE,) if is_app else (VISION, EMBEDDING, DECODER)
    width = spec.features if is_app else spec.decoder.hidden_size
    outputs: dict[str, list[Any]] = {
        FEATURES: [1, spec.image_tokens, width],
        EMBEDS: [1, "sequence_length", width],
        LOGITS: [1, spec.decoder.vocab_size],
    }
    models = {name: _read(bundle.path / name / MODEL) for name in names}
    graphs = {
        f"{Path(name).stem}.{function}": _signature(described, outputs)
        for name, model in models.items()
        for function, described in _functions(model).items()
    }
    systems = {SYSTEMS.get(one.specificationVersion) for one in models.values()}
    details: dict[str, Any] = {
        "layout": bundle.manifest.artifact.get("layout"),
        "deployment_target": systems.pop() if len(systems) == 1 else None,
    }
    if not is_app:
        prefill = _functions(models[DECODER])[PREFILL]
        states = {one.name: one.type.stateType.arrayType for one in prefill.state}
        rows = {one.name: one.type.multiArrayType for one in prefill.input}[EMBEDS]
        details |= {
            "prefill_chunk": rows.shape[1],
            "capacity": states[KEY_CACHE].shape[_CAPACITY],
        }
    manifest = bundle.manifest
    return Statement(
        where=MANIFEST,
        found={"graphs": manifest.graphs, "artifact": manifest.artifact},
        wanted={"graphs": graphs, "artifact": details},
    )


def _read(path: Path) -> Any:
    try:
        return Model_pb2.Model.FromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise ExportError(f"{path} can't be read: {error}", EXPORT_HINT) from error


def _functions(model: Any) -> dict[str, Any]:
    """Name -> description; a package of one function has no table of them."""
    described = model.description
    return {one.name: one for one in described.functions} or {MAIN: described}


def _signature(described: Any, outputs: dict[str, list[Any]]) -> Signature:
    """Inputs, outputs and states; an output's sizes are not in every package."""
    parts = {"inputs": described.input, "outputs": described.output, "states": described.state}
    found = {
        part: {one.name: _written(one, outputs) for one in values} for part, values in parts.items()
    }
    if not found["states"]:
        del found["states"]
    return found


def _written(one: Any, outputs: dict[str, list[Any]]) -> str:
    array = one.type.multiArrayType
    if one.type.WhichOneof("Type") == "stateType":
        array = one.type.stateType.arrayType
    kind = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType.Name(array.dataType).lower()
    sizes: list[Any] = list(array.shape) or outputs.get(one.name, [])
    ranges = array.shapeRange.sizeRanges
    if ranges and ranges[-1].lowerBound != ranges[-1].upperBound:
        sizes[-1] = "sequence_length"
    return f"{kind}[{','.join(map(str, sizes))}]"
