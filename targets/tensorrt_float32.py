"""Which nodes of an ONNX graph compute in float32 although its floats are of 16 bits, and why.

TensorRT leaves every type as the graph says it, so this list says what its engines may do in
float32: a layer that does and belongs to none of these nodes is a mistake.
"""

from collections.abc import Iterator

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor
from torch.export import ExportedProgram

ORIGIN = "fastvlm.origin"
"""Where a node's `meta` says which of the program's nodes it was written for."""

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TORCH_HALVES = (torch.float16, torch.bfloat16)
NORMS = ("RMSNormalization", "LayerNormalization")
"""Operators whose mean and variance are float32 whatever they read (`stash_type`)."""
NO_ARITHMETIC = ("Cast", "Shape")

NORM_STATISTICS = "norm statistics"
NO_KERNEL = "no fused kernel for attention of these sizes"
RANGE_SCAN = "range scan"


def float32_nodes(model: ir.Model, program: ExportedProgram) -> dict[str, str]:
    """Node name -> reason; nothing where the graph has no float of 16 bits. Casts compute nothing.

    Nodes have to be named after their modules (`module/Operator`). Types inside of the graph are
    inferred for it, and dropped again.
    """
    inside = {value for node in model.graph for value in node.outputs} - {*model.graph.outputs}
    common.ShapeInferencePass(strict_mode=False)(model)
    unknown = sorted(str(value.name) for value in inside if value.dtype is None)
    if unknown:
        raise RuntimeError(f"{', '.join(unknown)}: no element type could be inferred")
    found = {}
    if any(value.dtype in HALVES for value in _values(model.graph)):
        origins = {node.name: node for node in program.graph.nodes}
        for node in model.graph:
            computes = node.op_type not in NO_ARITHMETIC and _touches_float32(node)
            if node.op_type in NORMS or computes:
                found[str(node.name)] = _reason(node, origins.get(node.meta.get(ORIGIN)))
    for value in inside:
        value.shape = value.type = None
    return found


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _touches_float32(node: ir.Node) -> bool:
    values = (*node.inputs, *node.outputs)
    return any(value is not None and value.dtype == ir.DataType.FLOAT for value in values)


def _reason(node: ir.Node, origin: torch.fx.Node | None) -> str:
    module = str(node.name).rpartition("/")[0]
    if node.op_type in NORMS and not _touches_float32(node):
        return NORM_STATISTICS
    if origin is None:  # written by a rewrite, whose operators were all in float32
        return f"{RANGE_SCAN}: {module}"
    if _is_half(origin):
        return NO_KERNEL
    kinds = [str(kind) for _, kind in origin.meta.get("nn_module_stack", {}).values()]
    if any(kind.endswith("RMSNorm") for kind in kinds):
        return NORM_STATISTICS
    return f"{RANGE_SCAN}: {module}"


def _is_half(node: torch.fx.Node) -> bool:
    values = node.meta["val"]
    first = values[0] if isinstance(values, tuple | list) else values
    return isinstance(first, Tensor) and first.dtype in _TORCH_HALVES
