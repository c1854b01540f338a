"""An ONNX graph in float32 with nothing rounded: the same real numbers as the quantized program.

Two implementations of a quantized model round at different places, so their outputs differ by the
noise of quantization, and a wrong operator hides behind it. Here every float is float32, and
quantizers only cut: see `quantize.runnable` for the program's side.

| saved | becomes |
|---|---|
| QuantizeLinear(x, s, z) | Clip(x / s, low - z, high - z), which is q - z before it is rounded |
| DequantizeLinear(q, s, z') | (q - z + (z - z')) * s |
| MatMulInteger(q, w, z', z_w) | MatMul(q - z + (z - z'), w - z_w) |
| MatMulNBits with rounded activations | MatMulNBits with accuracy level 1, which is float32 |
| float16, bfloat16: weights, inputs, outputs, casts | float32; weights keep their stored values |

Integers less their zero point stand for the integers, so that nothing is lost to adding 128 and
taking it away again. Integer weights stay as they are.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT16, FLOAT, BFLOAT16 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16
HALVES = (FLOAT16, BFLOAT16)
WIDE = ".wide"
"""Ends the names of 16-bit weights in float32."""

MOVES = frozenset(
    {"Gather", "Identity", "Reshape", "Slice", "Squeeze", "TensorScatter", "Transpose", "Unsqueeze"}
)
"""Operators that compute nothing: what they make needs no rounding."""

RANGES = {
    TensorProto.INT8: (-128.0, 127.0),
    TensorProto.UINT8: (0.0, 255.0),
    TensorProto.FLOAT8E4M3FN: (-448.0, 448.0),
}
"""Of the types that activations are quantized to."""

MICROSOFT: dict[str, frozenset[str]] = {
    "GroupQueryAttention": frozenset({"do_rotary", "kv_num_heads", "num_heads", "scale"}),
    "MatMulNBits": frozenset({"K", "N", "accuracy_level", "bits", "block_size"}),
    "SkipSimplifiedLayerNormalization": frozenset({"epsilon"}),
}
"""ONNX Runtime's own operators that compute in float32 when their inputs are, and the attributes
with which they do."""

_FLOAT_LEVEL = 1
"""MatMulNBits's accuracy level that computes in float32."""

_ROUNDING = frozenset(
    {
        "BitCast",
        "Ceil",
        "ConvInteger",
        "DynamicQuantizeLinear",
        "Floor",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
        "Round",
    }
)
"""Standard operators that round numbers, or work on numbers that were."""

_WIDE = frozenset({TensorProto.UNDEFINED, FLOAT, TensorProto.DOUBLE})
_INTEGERS = frozenset({TensorProto.BOOL, TensorProto.INT32, TensorProto.INT64})
_FLOATS = frozenset({FLOAT, TensorProto.DOUBLE, *HALVES})
_TYPE_ATTRIBUTES = frozenset({"dtype", "softmax_precision", "stash_type", "to"})
"""Where operators say in which type they compute or what they make."""


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """Activations that were to be integers: which type's, and the zero point taken off them."""

    dtype: int
    zero_point: float


def unrounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model that rounds nothing. Data files stay where they are.

    Raises ValueError for a graph that has an operator which rounds in other ways, naming the node:
    it is never left in silently.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    nodes = _Rewriter(wide.graph).nodes
    replace_nodes(wide, nodes)
    _refuse_rounding(wide)
    return wide


class _Rewriter:
    """Goes over a graph in its order; `nodes` are what takes the place of its own."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.cuts: dict[str, _Cut] = {}
        self.nodes = widen_ends(graph, HALVES)
        for node in graph.node:
            _widen_tensors(node)
            cast_to_float(node, HALVES)
            try:
                self.nodes += self._rewritten(node)
            except LookupError as error:
                raise ValueError(f"{_named(node)} does not have the inputs of one") from error

    def _rewritten(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        kind, reads_cut = node.op_type, [name for name in node.input if name in self.cuts]
        if kind == "QuantizeLinear":
            yield from self._quantize(node)
        elif kind == "DequantizeLinear" and node.input[0] not in self.constants:
            yield from self._dequantize(node)
        elif kind == "MatMulInteger":
            yield from self._multiply(node)
        elif reads_cut and (kind not in MOVES or reads_cut != node.input[:1]):
            raise ValueError(f"{_named(node)} reads integers that were rounded")
        else:
            if reads_cut:
                self.cuts[node.output[0]] = self.cuts[reads_cut[0]]
            if kind == "MatMulNBits":
                _set_attribute(node, "accuracy_level", _FLOAT_LEVEL)
            yield node

    def _quantize(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """x / s, cut to where the integers end, less the zero point."""
        x, scale, zero = (node.input[index] for index in range(3))
        dtype, zero_point = self.constants[zero].data_type, self._number_of(zero, node)
        self._number_of(scale, node)
        if dtype not in RANGES:
            raise ValueError(f"{_named(node)} rounds to {TensorProto.DataType.Name(dtype)}")
        low, high = RANGES[dtype]
        (out,) = node.output
        self.cuts[out] = _Cut(dtype=dtype, zero_point=zero_point)
        ends = [self._constant(end - zero_point) for end in (low, high)]
        yield helper.make_node("Div", [x, scale], [f"{out}.uncut"])
        yield helper.make_node("Clip", [f"{out}.uncut", *ends], [out])

    def _dequantize(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """What was cut, from this operator's own zero point, times its scale."""
        x, scale, *zero = node.input
        self._number_of(scale, node)
        entering, shifting = self._from_zero(x, zero, node)
        yield from shifting
        yield helper.make_node("Mul", [entering, scale], node.output)

    def _multiply(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The product of what was cut and of the weights, both from their zero points."""
        x, weight, *zeros = node.input
        (out,) = node.output
        if any(name not in self.constants for name in (weight, *zeros)):
            raise ValueError(f"{_named(node)} multiplies by what is computed at run time")
        entering, shifting = self._from_zero(x, zeros[:1], node)
        yield from shifting
        columns = f"{out}.weight"
        yield cast(weight, columns, FLOAT)
        for zero in zeros[1:]:
            yield cast(zero, f"{out}.zero", FLOAT)
            yield helper.make_node("Sub", [columns, f"{out}.zero"], [f"{columns}.centred"])
            columns = f"{columns}.centred"
        yield helper.make_node("MatMul", [entering, columns], [out])

    def _from_zero(
        self, x: str, zero: list[str], node: onnx.NodeProto
    ) -> tuple[str, list[onnx.NodeProto]]:
        """What was cut, less the zero point that is read here (none: 0), and the node for it."""
        if x not in self.cuts:
            raise ValueError(f"{_named(node)} reads {x}, which no QuantizeLinear made")
        found = self.cuts[x]
        if any(self.constants[name].data_type != found.dtype for name in zero):
            raise ValueError(f"{_named(node)} reads {x} with a zero point of another type")
        shift = found.zero_point - sum(self._number_of(name, node) for name in zero)
        if not shift:
            return x, []
        shifted = f"{node.output[0]}.shifted"
        return shifted, [helper.make_node("Add", [x, self._constant(shift)], [shifted])]

    def _number_of(self, name: str, node: onnx.NodeProto) -> float:
        """A constant of one number, which is what activations are quantized by."""
        stored = name if name in self.constants else name.removesuffix(WIDE)
        array = numpy_helper.to_array(self.constants[stored])
        if array.size != 1:
            raise ValueError(f"{_named(node)}: {name} has {array.size} numbers, not one")
        return float(array.reshape(()).astype(np.float64))

    def _constant(self, value: float) -> str:
        name = f"unrounded.{value}"
        if name not in self.constants:
            tensor = numpy_helper.from_array(np.array(value, np.float32), name)
            self.constants[name] = tensor
            self.graph.initializer.append(tensor)
        return name


def _refuse_rounding(model: onnx.ModelProto) -> None:
    """Raise ValueError for what rounds, or may."""
    if model.functions or model.graph.sparse_initializer:
        raise ValueError("it has functions, or sparse weights")
    whole = {t.name for t in model.graph.initializer if t.data_type not in _FLOATS}
    whole |= {
        value.name for value in model.graph.input if value.type.tensor_type.elem_type not in _FLOATS
    }
    for node in model.graph.node:
        if problem := _problem(node, whole):
            raise ValueError(f"{_named(node)} {problem}")
        if node.op_type in ("Shape", "Size") or whole.issuperset(filter(None, node.input)):
            whole.update(node.output)


def _problem(node: onnx.NodeProto, whole: Collection[str]) -> str:
    """Why a node may round; `whole`: what depends on integers alone, as positions do."""
    kind, names = node.op_type, {attribute.name for attribute in node.attribute}
    if node.domain == "com.microsoft":
        if kind not in MICROSOFT or names - MICROSOFT[kind]:
            return "is not known to compute in float32"
    elif node.domain not in ("", "ai.onnx"):
        return f"is of domain {node.domain}"
    if kind in _ROUNDING:
        return "rounds"
    for attribute in node.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            return "has a graph inside"
        if attribute.name in _TYPE_ATTRIBUTES and attribute.i not in _WIDE:
            if kind == "Cast" and attribute.i in _INTEGERS and node.input[0] in whole:
                continue
            return f"computes in type {TensorProto.DataType.Name(attribute.i)}"
    return ""


def replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Give the graph other nodes, in place, and drop what was known of its inner values."""
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]


def widen_ends(graph: onnx.GraphProto, narrow: Collection[int]) -> list[onnx.NodeProto]:
    """Make inputs and outputs float32, in place: the casts of weights, which are read instead."""
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = FLOAT
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type in narrow}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in weights:
                node.input[index] = f"{name}{WIDE}"
    return [cast(name, f"{name}{WIDE}", FLOAT) for name in sorted(weights)]


def cast_to_float(node: onnx.NodeProto, narrow: Collection[int]) -> None:
    """Let a Cast to one of these types make float32, in place."""
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i in narrow:
            attribute.i = FLOAT


def cast(source: str, target: str, dtype: int) -> onnx.NodeProto:
    """A Cast, named after what it makes."""
    return helper.make_node("Cast", [source], [target], name=target, to=dtype)


def _widen_tensors(node: onnx.NodeProto) -> None:
    """Make 16-bit constants that a node holds float32, in place."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in HALVES:
            wide = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(wide))


def _set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _named(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or ', '.join(node.output)!r}"
