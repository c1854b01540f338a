"""ExportedProgram -> ONNX graph, named as Transformers.js reads it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes import Sequential, common
from onnxscript import opset23 as op
from torch.export import ExportedProgram

from ..exporter.bundle import VALIDATE_HINT
from ..exporter.config import DecoderConfig
from ..exporter.errors import ExportError
from ..exporter.graphs import cache_names
from ..quantize.quiet import quiet_import
from . import onnx_attention, onnx_quantized
from .onnx_rewrites import rewrite

OPSET = 23  # the first with RMSNormalization; ONNX Runtime 1.24 and Transformers.js 4 read it
IR_VERSION = 11

Dims = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Names and shapes of a graph's inputs and outputs, in order. A str is a size known only later.

    Transformers.js builds the empty cache from these: it knows `batch_size`, any other name is 0.
    """

    inputs: Mapping[str, Dims]
    outputs: Mapping[str, Dims]


def interface(name: str, program: ExportedProgram, config: DecoderConfig) -> Interface:
    """What Transformers.js calls the tensors of the graph `name`: vision, embedding or decoder."""
    batch, new, total = "batch_size", "sequence_length", "total_sequence_length"
    if name == "vision":
        size, features = _user_shapes(program)
        return Interface(
            inputs={"pixel_values": (batch, *size[1:])},
            outputs={"image_features": (batch, *features[1:])},
        )
    width = config.hidden_size
    if name == "embedding":
        return Interface(
            inputs={"input_ids": (batch, new)}, outputs={"inputs_embeds": (batch, new, width)}
        )
    past = (batch, config.kv_heads, "past_sequence_length", config.head_dim)
    present = (batch, config.kv_heads, total, config.head_dim)
    return Interface(
        inputs={
            "inputs_embeds": (batch, new, width),
            "attention_mask": (batch, total),
            **dict.fromkeys(cache_names(config, "past_key_values"), past),
        },
        outputs={
            "logits": (batch, 1, config.vocab_size),
            **dict.fromkeys(cache_names(config, "present"), present),
        },
    )


def _user_shapes(program: ExportedProgram) -> tuple[Sequence[int], Sequence[int]]:
    """Shapes of the first input and the first output; dynamic sizes are not integers."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature
    return (
        tuple(values[str(signature.user_inputs[0])].shape),
        tuple(values[str(signature.user_outputs[0])].shape),
    )


def to_onnx(program: ExportedProgram, names: Interface) -> ir.Model:
    """Translate, rewrite and tidy. The model's weights stay the program's own memory."""
    translations = {
        **_TRANSLATIONS,
        **onnx_attention.TRANSLATIONS,
        **onnx_quantized.TRANSLATIONS,
    }
    model = translate(program, translations, OPSET)
    onnx_quantized.pack(model)
    rewrite(model)
    set_interface(model, names)
    return tidy(model)


def translate(
    program: ExportedProgram, translations: Mapping[Callable[..., Any], Any], opset: int
) -> ir.Model:
    """The program in ONNX's operators, as torch.onnx and the translations write them."""
    with warnings.catch_warnings(), quiet_import():
        warnings.simplefilter("ignore")  # deprecations inside torch.onnx
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=dict(translations),
            verbose=False,
        )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model: ir.Model = exported.model
    return model


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query key' / sqrt(d)) value, for the tower: no mask, one head per key.

    torch.onnx's own translation computes the key's transpose from shapes read at run time.
    """
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        raise NotImplementedError("only plain attention is translated; see cached_attention")
    factor = float(query.shape[-1]) ** -0.5 if scale is None else scale
    half = query.dtype == ir.DataType.FLOAT16
    if half:  # products of numbers within fp16's range can leave it; their mixture can't
        query, key, value = (op.Cast(x, to=ir.DataType.FLOAT) for x in (query, key, value))
    scores = op.MatMul(
        op.Mul(query, op.Constant(value_float=factor)), op.Transpose(key, perm=[0, 1, 3, 2])
    )
    mixed = op.MatMul(op.Softmax(scores, axis=-1), value)
    return op.Cast(mixed, to=ir.DataType.FLOAT16) if half else mixed


_TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _attention
}


def set_interface(model: ir.Model, names: Interface) -> None:
    """Give the graph's inputs and outputs their names and shapes."""
    for values, declared in (
        (model.graph.inputs, names.inputs),
        (model.graph.outputs, names.outputs),
    ):
        if len(values) != len(declared):
            raise ValueError(f"the graph has {len(values)} tensors, not {len(declared)}")
        for value, (name, dims) in zip(values, declared.items(), strict=True):
            value.name = name
            value.shape = ir.Shape(dims)


def _numbered(nodes: Sequence[ir.Node]) -> list[str]:
    return [f"{node.op_type}_{index}" for index, node in enumerate(nodes)]


def tidy(
    model: ir.Model, name: Callable[[Sequence[ir.Node]], Sequence[str]] = _numbered
) -> ir.Model:
    """Merge equal nodes and constants, drop what nobody reads, keep no trace of this machine.

    `name` gives all nodes their names; it is the last that sees what torch.onnx says of them.
    """
    Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    )(model)
    nodes = list(model.graph)
    for node, called in zip(nodes, name(nodes), strict=True):
        node.name = called
    common.ClearMetadataAndDocStringPass()(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "fastvlm-export", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    interface_values = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in interface_values:
                # Half of these shapes are in torch's own symbols, and runtimes infer their own.
                value.shape = value.type = None
    for value in (*interface_values, *model.graph.initializers.values()):
        value.metadata_props.clear()
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
    return model


def signature(names: Interface, model: ir.Model) -> dict[str, dict[str, str]]:
    """For the manifest: inputs and outputs -> name -> "float32[batch_size,3,256,256]"."""
    found: dict[str, dict[str, str]] = {}
    for part, values in (("inputs", model.graph.inputs), ("outputs", model.graph.outputs)):
        found[part] = {
            str(value.name): f"{_dtype(value)}[{','.join(map(str, value.shape or ()))}]"
            for value in values
        }
    return found


def saved_signature(path: Path) -> dict[str, dict[str, str]]:
    """As `signature`, of a saved graph. Raises ExportError where it can't be read."""
    try:
        model = onnx.load(path, load_external_data=False)
        return {
            "inputs": {one.name: _written(one) for one in model.graph.input},
            "outputs": {one.name: _written(one) for one in model.graph.output},
        }
    except (OSError, DecodeError, KeyError) as error:
        raise ExportError(f"{path} can't be read: {error}", VALIDATE_HINT) from error


def _written(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = (dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)}[{','.join(sizes)}]"


def _dtype(value: ir.Value) -> str:
    if value.dtype is None:
        raise ValueError(f"{value.name} has no element type")
    return str(onnx.helper.tensor_dtype_to_np_dtype(int(value.dtype)))
