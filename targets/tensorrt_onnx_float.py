"""A graph for ONNX Runtime's CPU with float32 in the place of bfloat16, rounded as that is.

It has no kernels of bfloat16. So every operator computes in float32, and two casts behind it round
what it made, as a bfloat16 operator with float32 sums would. See `onnx_unrounded` for the graph
without any rounding.

Weights are cast as they are loaded; inputs and outputs, the cache among them, are float32.
"""

from collections.abc import Iterator

import onnx

from .onnx_unrounded import BFLOAT16, FLOAT, MOVES, cast, cast_to_float, replace_nodes, widen_ends


def has_bfloat16(model: onnx.ModelProto) -> bool:
    """Whether any weight, input or cast is of that type."""
    values = (*model.graph.input, *model.graph.output)
    return (
        any(tensor.data_type == BFLOAT16 for tensor in model.graph.initializer)
        or any(value.type.tensor_type.elem_type == BFLOAT16 for value in values)
        or any(_casts_to(node) == BFLOAT16 for node in model.graph.node)
    )


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float32 in the place of bfloat16, rounded. Data files stay where they are."""
    types = _types(model)
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    nodes = widen_ends(wide.graph, (BFLOAT16,))
    for node in wide.graph.node:
        nodes += _rounded(node, types)
    replace_nodes(wide, nodes)
    return wide


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of what the nodes make."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _rounded(node: onnx.NodeProto, types: dict[str, int]) -> Iterator[onnx.NodeProto]:
    """The node in float32, and where it made numbers of bfloat16 the casts that round them."""
    cast_to_float(node, (BFLOAT16,))
    made = [name for name in node.output if types.get(name) == BFLOAT16]
    if node.op_type in MOVES or not made:
        yield node
        return
    (out,) = made
    node.output[list(node.output).index(out)] = f"{out}.unrounded"
    yield node
    yield cast(f"{out}.unrounded", f"{out}.rounded", BFLOAT16)
    yield cast(f"{out}.rounded", out, FLOAT)


def _casts_to(node: onnx.NodeProto) -> int:
    found = (a.i for a in node.attribute if node.op_type == "Cast" and a.name == "to")
    return next(found, 0)
