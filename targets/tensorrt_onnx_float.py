"""A graph of bfloat16 for ONNX Runtime's CPU, which computes it in float32 and rounds each result.

It has no kernels of bfloat16. So every operator computes in float32, and two casts behind it round
what it made, as a bfloat16 operator with float32 sums would. Weights are cast as they are loaded;
inputs and outputs, the cache among them, are float32 of numbers that bfloat16 has.
"""

from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper

BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT

MOVES = frozenset(
    {"Gather", "Identity", "Reshape", "Slice", "Squeeze", "TensorScatter", "Transpose", "Unsqueeze"}
)
"""Operators that compute nothing: what they make needs no rounding."""


def has_bfloat16(model: onnx.ModelProto) -> bool:
    """Whether any weight, input or cast is of that type."""
    values = (*model.graph.input, *model.graph.output)
    return (
        any(tensor.data_type == BFLOAT16 for tensor in model.graph.initializer)
        or any(value.type.tensor_type.elem_type == BFLOAT16 for value in values)
        or any(_casts_to(node) == BFLOAT16 for node in model.graph.node)
    )


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float32 in the place of bfloat16. Data files stay where they are."""
    types = _types(model)
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    narrow = {tensor.name for tensor in graph.initializer if tensor.data_type == BFLOAT16}
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == BFLOAT16:
            value.type.tensor_type.elem_type = FLOAT
    nodes = [_cast(name, f"{name}.wide", FLOAT) for name in sorted(narrow)]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in narrow:
                node.input[index] = f"{name}.wide"
        nodes += _rounded(node, types)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return wide


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of what the nodes make."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _rounded(node: onnx.NodeProto, types: dict[str, int]) -> Iterator[onnx.NodeProto]:
    """The node in float32, and where it made numbers of bfloat16 the casts that round them."""
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == BFLOAT16:
            attribute.i = FLOAT
    made = [name for name in node.output if types.get(name) == BFLOAT16]
    if node.op_type in MOVES or not made:
        yield node
        return
    (out,) = made
    node.output[list(node.output).index(out)] = f"{out}.unrounded"
    yield node
    yield _cast(f"{out}.unrounded", f"{out}.rounded", BFLOAT16)
    yield _cast(f"{out}.rounded", out, FLOAT)


def _cast(source: str, target: str, dtype: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=target, to=dtype)


def _casts_to(node: onnx.NodeProto) -> int:
    found = (a.i for a in node.attribute if node.op_type == "Cast" and a.name == "to")
    return next(found, 0)
