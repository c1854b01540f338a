"""`fastvlm::quantized_linear` and `fastvlm::quantized_embedding` in ONNX Runtime's operators.

torch.onnx writes each as a node of our own domain; `pack` replaces it once the weights are known:

| activations | weights | becomes |
|---|---|---|
| one scale per token | 8 bits per channel | QuantizeLinear, MatMulInteger, two Mul |
| one scale per group of weights | 4 or 8 bits in groups | MatMulNBits, accuracy level 4 |
| float | 8 bits per channel, 4 or 8 in groups | MatMulNBits, accuracy level 1 |

`onnx_recipes.problems` refuses recipes that ask for anything else.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Op, Opset

from ..quantize import ops
from .onnx_attention import MICROSOFT
from .onnx_build import Builder
from .onnx_pack import Weights

_DOMAIN = "fastvlm"
LINEAR, EMBEDDING = "QuantizedLinear", "QuantizedEmbedding"
"""Operators of our own domain."""

_TINY = 1e-30
"""Stands for a scale of zero: a token whose values are all 0 has integers 0 with any scale."""

_Schema = onnx.defs.OpSchema


def _private(name: str, inputs: tuple[str, ...], attributes: tuple[str, ...]) -> Op:
    """An operator of our own domain; inputs that end in "?" are optional."""
    optional = _Schema.FormalParameterOption.Optional
    single = _Schema.FormalParameterOption.Single
    parameters = [
        _Schema.FormalParameter(
            i.rstrip("?"), f"T{n}", param_option=optional if i.endswith("?") else single
        )
        for n, i in enumerate(inputs)
    ]
    types = [f"tensor({name})" for name in ("float", "float16", "bfloat16", "int8", "int64")]
    schema = _Schema(
        name,
        _DOMAIN,
        1,
        inputs=parameters,
        outputs=[_Schema.FormalParameter("out", "T")],
        type_constraints=[(t, types, "") for t in ("T", *(p.type_str for p in parameters))],
        attributes=[_Schema.Attribute(a, _Schema.AttrType.INT) for a in attributes],
    )
    return Op(Opset(_DOMAIN, 1), name, schema)


_linear = _private(
    LINEAR,
    ("x", "weight", "scale", "zero_point?", "bias?"),
    ("bits", "activation_group"),
)
_embedding = _private(EMBEDDING, ("ids", "weight", "scale"), ())


def _translate_linear(
    x: Any, weight: Any, scale: Any, zero_point: Any, bias: Any, bits: int, activation_group: int
) -> Any:
    return _linear(x, weight, scale, zero_point, bias, bits=bits, activation_group=activation_group)


def _translate_embedding(ids: Any, weight: Any, scale: Any, zero_point: Any, bits: int) -> Any:
    if zero_point is not None or bits != 8:
        raise NotImplementedError(f"a table of {bits} bits or with zero points")
    return _embedding(ids, weight, scale)


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.fastvlm.quantized_linear.default: _translate_linear,
    torch.ops.fastvlm.quantized_embedding.default: _translate_embedding,
}
"""Operator -> function that writes its ONNX node, for `torch.onnx.export`."""


Writers = Mapping[str, Callable[[Builder, ir.Node], ir.Value]]
"""Operator of our own domain -> function that writes what takes its place, and returns its value.
"""


def pack(model: ir.Model, writers: Writers | None = None) -> None:
    """Replace every quantized layer in place by operators that ONNX Runtime, or another, knows."""
    if writers is None:
        writers = {LINEAR: _write_linear, EMBEDDING: _write_embedding}
    for node in list(model.graph):
        if node.domain == _DOMAIN:
            builder = Builder(model.graph, node)
            builder.replace(writers[node.op_type](builder, node))
    model.graph.opset_imports.pop(_DOMAIN, None)


def linear_of(
    node: ir.Node,
) -> tuple[ir.Value | None, Weights, ir.Value | None, ir.Value | None]:
    """What a QuantizedLinear reads: x, its weights, their zero points and the bias, if any."""
    # Optional inputs at the end are not there when they are absent.
    x, weight, scale, zeros, bias = (*node.inputs, None, None)[:5]
    bits = node.attributes.get_int("bits")
    return x, Weights.of(weight, scale, zeros, bits=bits), zeros, bias


def _write_linear(b: Builder, node: ir.Node) -> ir.Value:
    x, weights, zeros, bias = linear_of(node)
    bits = weights.bits
    group = node.attributes.get_int("activation_group")
    if group == ops.FLOAT_ACTIVATIONS:
        return _blocks(b, x, weights, bias, level=1)
    if group == ops.PER_TOKEN and weights.groups == 1 and bits == 8 and zeros is None:
        return _per_token(b, x, weights, bias)
    if group == weights.width == weights.block:
        return _blocks(b, x, weights, bias, level=4)
    raise NotImplementedError(
        f"{weights.name}: {bits} bits in {weights.groups} groups, activation group {group}"
    )


def _per_token(b: Builder, x: ir.Value | None, weights: Weights, bias: ir.Value | None) -> ir.Value:
    """s_w s_x sum (q - 128) w + bias, with s_x = max|x| / 127 and q = round(x / s_x) + 128."""
    peak = b.op("ReduceMax", b.op("Abs", x), b.constant(np.array([-1])), keepdims=1)
    scale = b.op("Div", peak, b.constant(np.float32(127)))
    scale = b.op("Max", scale, b.constant(np.float32(_TINY)))
    one, middle = b.constant(np.float32(1)), b.constant(np.uint8(128))
    integers = b.op("QuantizeLinear", b.op("Div", x, scale), one, middle)
    # MatMulIntegerToFloat, one node for the next three, takes as long or a quarter longer.
    sums = b.op("MatMulInteger", integers, b.weight(weights.columns()), middle)
    sums = b.op("Cast", sums, to=int(ir.DataType.FLOAT))
    out = b.op("Mul", b.op("Mul", sums, scale), b.weight(weights.channel_scales()))
    return out if bias is None else b.op("Add", out, bias)


def _blocks(
    b: Builder, x: ir.Value | None, weights: Weights, bias: ir.Value | None, level: int
) -> ir.Value:
    """x @ weights' + bias."""
    return b.op(
        "MatMulNBits",
        x,
        b.weight(weights.packed()),
        b.weight(weights.block_scales()),
        None if weights.zero_point is None else b.weight(weights.packed_zeros()),
        None,
        bias,
        domain=MICROSOFT,
        **weights.attributes(level),
    )


def _write_embedding(b: Builder, node: ir.Node) -> ir.Value:
    """integer * scale of the rows that are asked for: ids [B,S] -> [B,S,D]."""
    ids, weight, scale = node.inputs
    weights = Weights.of(weight, scale, None, bits=8)
    if weights.groups > 1:
        raise NotImplementedError(f"{weights.name}: a table with {weights.groups} groups a row")
    rows = b.op("Gather", b.weight(weights.table()), ids, axis=0)
    scales = b.op("Gather", b.weight(weights.row_scales()), ids, axis=0)
    return b.op("Mul", b.op("Cast", rows, to=int(ir.DataType.FLOAT)), scales)
