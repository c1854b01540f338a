"""ExportedPrograms -> the three ONNX files that TensorRT builds engines from.

Batch 1, standard operators of opset 24 only, every type in the graph: what an engine computes in is
decided here, and TensorRT's strongly typed networks leave it so.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from ..exporter.graphs import cache_names
from ..exporter.spec import ExportSpec
from ..quantize.ranges import layer_of
from . import (
    onnx_files,
    onnx_lowering,
    tensorrt_attention,
    tensorrt_float32,
    tensorrt_quantized,
)
from .onnx_lowering import Interface
from .onnx_rewrites import fuse_norms
from .tensorrt_plan import ATTENDED, GRAPHS, NEW, onnx_file

WHOLE = "graph"
"""What nodes are named after that belong to no module."""

CACHED_ATTENTION = "fastvlm.cached_attention.default"


@dataclass(frozen=True, kw_only=True)
class LoweredGraph:
    """One ONNX file: where it lies in the folder, what goes in and out, what it computes in.

    `signature` is "inputs" or "outputs" -> tensor name -> "float32[1,3,256,256]". `float32_nodes`
    is node name -> why it computes in float32 where the recipe's floats are of 16 bits.
    """

    file: str
    signature: Mapping[str, Mapping[str, str]]
    nodes: int
    float32_nodes: Mapping[str, str]


def write(
    programs: Mapping[str, ExportedProgram], spec: ExportSpec, out: Path
) -> dict[str, LoweredGraph]:
    """Write onnx/{vision,embedding,decoder}.onnx below `out`: graph -> what it is."""
    (out / "onnx").mkdir(exist_ok=True)
    lowered = {}
    for name in GRAPHS:
        names = interface(name, spec)
        model = to_onnx(programs[name], names)
        lowered[name] = LoweredGraph(
            file=onnx_file(name),
            signature=onnx_lowering.signature(names, model),
            nodes=len(model.graph),
            float32_nodes=tensorrt_float32.float32_nodes(model, programs[name]),
        )
        onnx_files.save(model, out / onnx_file(name))
    return lowered


def interface(name: str, spec: ExportSpec) -> Interface:
    """What goes into the graph `name` and out of it: vision, embedding or decoder."""
    config, size = spec.decoder, spec.preprocessing.resolution
    width = config.hidden_size
    if name == "vision":
        return Interface(
            inputs={"pixel_values": (1, 3, size, size)},
            outputs={"image_features": (1, spec.image_tokens, width)},
        )
    if name == "embedding":
        return Interface(inputs={"input_ids": (1, NEW)}, outputs={"inputs_embeds": (1, NEW, width)})
    cache = (1, config.kv_heads, spec.context, config.head_dim)
    return Interface(
        inputs={
            "inputs_embeds": (1, NEW, width),
            "attention_mask": (1, ATTENDED),
            **dict.fromkeys(cache_names(config, "past_key_values"), cache),
        },
        outputs={
            "logits": (1, 1, config.vocab_size),
            **dict.fromkeys(cache_names(config, "present"), cache),
        },
    )


def to_onnx(program: ExportedProgram, names: Interface) -> ir.Model:
    """Translate, rewrite and tidy. The model's weights stay the program's own memory."""
    translations = {**tensorrt_attention.TRANSLATIONS, **tensorrt_quantized.TRANSLATIONS}
    model = onnx_lowering.translate(program, translations, tensorrt_attention.OPSET)
    tensorrt_quantized.pack(model)
    tensorrt_attention.keep_cache_type(model)
    _count_once(model)
    fuse_norms(model, halves=True)
    onnx_lowering.set_interface(model, names)
    return onnx_lowering.tidy(model, functools.partial(_named, program))


def _count_once(model: ir.Model) -> None:
    """Take the number of new tokens from the graph's first input, not from each layer's query.

    Then what no layer decides is written alike in all of them, and is merged.
    """
    whole = model.graph.inputs[0]
    for node in model.graph:
        if node.op_type == "Shape" and node.inputs[0] not in model.graph.inputs:
            node.replace_input_with(0, whole)


def _named(program: ExportedProgram, nodes: Sequence[ir.Node]) -> list[str]:
    """The module that a node comes from, its operator, and a number where that is not enough."""
    origins = {node.name: node for node in program.graph.nodes}
    found: Counter[str] = Counter()
    lengths: set[ir.Value] = set()
    names = []
    for node in nodes:
        written_for = node.metadata_props.get("pkg.torch.onnx.fx_node", "").partition(" ")[0]
        node.meta[tensorrt_float32.ORIGIN] = written_for.removeprefix("%")
        if _measures(node, lengths):
            lengths.update(node.outputs)
            module = WHOLE
        else:
            module = _module_of(node, origins)
        name = f"{module}/{node.op_type}"
        found[name] += 1
        names.append(name if found[name] == 1 else f"{name}_{found[name]}")
    return names


def _measures(node: ir.Node, lengths: set[ir.Value]) -> bool:
    """Whether a node computes nothing but places and lengths, which all layers share."""
    read = [v for v in node.inputs if v is not None and not v.is_initializer()]
    known = [v in lengths or v.name == "attention_mask" for v in read]
    return node.op_type == "Shape" or (bool(read) and all(known))


def _module_of(node: ir.Node, origins: Mapping[str, torch.fx.Node]) -> str:
    """The innermost module by torch.onnx's record; attention's is that of its projections."""
    record = node.metadata_props.get("namespace", "")
    modules = [part.partition(":")[0] for part in record.split("/")[:-1]]
    named = [name for name in modules if name]
    if named:
        return named[-1]
    origin = origins.get(node.meta[tensorrt_float32.ORIGIN])
    if origin is None or str(origin.target) != CACHED_ATTENTION:
        return WHOLE
    return layer_of(origin.all_input_nodes[0]).rpartition(".")[0] or WHOLE
