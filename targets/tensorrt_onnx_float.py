"""A graph for ONNX Runtime's CPU with float32 in the place of other floats: rounded as they are,
or not at all.

It has no kernels of bfloat16. So every operator computes in float32, and two casts behind it round
what it made, as a bfloat16 operator with float32 sums would. Without any rounding the graph has the
same real numbers as the quantized program, and an error has nothing to hide behind.

Weights are cast as they are loaded; inputs and outputs, the cache among them, are float32.
"""

from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BFLOAT16, FLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT
HALVES = (FLOAT16, BFLOAT16)

MOVES = frozenset(
    {"Gather", "Identity", "Reshape", "Slice", "Squeeze", "TensorScatter", "Transpose", "Unsqueeze"}
)
"""Operators that compute nothing: what they make needs no rounding."""

RANGES = {
    TensorProto.INT8: (-128.0, 127.0),
    TensorProto.FLOAT8E4M3FN: (-448.0, 448.0),
}
"""Of the types that activations are quantized to."""


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
    nodes = _wide_ends(wide.graph, (BFLOAT16,))
    for node in wide.graph.node:
        nodes += _rounded(node, types)
    return _of(wide, nodes)


def unrounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float32 for all floats: nothing is rounded to 16 or 8 bits, or to integers.

    What is quantized is cut to the range of its type, and times its scale again: see
    `quantize.runnable` for the program's side. Data files stay where they are.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    weights = {tensor.name: tensor.data_type for tensor in wide.graph.initializer}
    nodes = _wide_ends(wide.graph, HALVES)
    for low, high in RANGES.values():
        wide.graph.initializer.extend([_number(low), _number(high)])
    for node in wide.graph.node:
        _cast_to_float(node, HALVES)
        if node.op_type == "QuantizeLinear":
            low, high = RANGES[weights[node.input[2]]]
            x, scale, _ = node.input
            (out,) = node.output
            ends = [_number(low).name, _number(high).name]
            nodes.append(helper.make_node("Div", [x, scale], [f"{out}.uncut"]))
            nodes.append(helper.make_node("Clip", [f"{out}.uncut", *ends], [out]))
        elif node.op_type == "DequantizeLinear" and node.input[0] not in weights:
            nodes.append(helper.make_node("Mul", node.input[:2], node.output))
        else:
            nodes.append(node)
    return _of(wide, nodes)


def _of(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    return model


def _wide_ends(graph: onnx.GraphProto, narrow: Collection[int]) -> list[onnx.NodeProto]:
    """Make inputs and outputs float32, in place: the casts of weights, which are read instead."""
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = FLOAT
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type in narrow}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in weights:
                node.input[index] = f"{name}.wide"
    return [_cast(name, f"{name}.wide", FLOAT) for name in sorted(weights)]


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of what the nodes make."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _rounded(node: onnx.NodeProto, types: dict[str, int]) -> Iterator[onnx.NodeProto]:
    """The node in float32, and where it made numbers of bfloat16 the casts that round them."""
    _cast_to_float(node, (BFLOAT16,))
    made = [name for name in node.output if types.get(name) == BFLOAT16]
    if node.op_type in MOVES or not made:
        yield node
        return
    (out,) = made
    node.output[list(node.output).index(out)] = f"{out}.unrounded"
    yield node
    yield _cast(f"{out}.unrounded", f"{out}.rounded", BFLOAT16)
    yield _cast(f"{out}.rounded", out, FLOAT)


def _cast_to_float(node: onnx.NodeProto, narrow: Collection[int]) -> None:
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i in narrow:
            attribute.i = FLOAT


def _cast(source: str, target: str, dtype: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=target, to=dtype)


def _number(value: float) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, np.float32), f"unrounded.{value}")


def _casts_to(node: onnx.NodeProto) -> int:
    found = (a.i for a in node.attribute if node.op_type == "Cast" and a.name == "to")
    return next(found, 0)
