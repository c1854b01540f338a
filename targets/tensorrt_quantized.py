"""Quantized layers as TensorRT reads them: the integers, DequantizeLinear, and a float operator.

| layer | becomes |
|---|---|
| linear, 8 bits per channel | DequantizeLinear(int8 [N,K], [N], axis 0), Transpose, MatMul |
| linear, 4 bits in groups | DequantizeLinear(int4 [N,K], [N,G], axis 1, block K/G), ... |
| embedding, 8 bits per row | DequantizeLinear(int8 [V,D], [V], axis 0), Gather |
| static activations | QuantizeLinear, DequantizeLinear with one scale |
| linear, fp8 | both of the above, of float8 (e4m3fn) in the place of int8 |

Zero points are all zero, and so are left out. TensorRT takes the three nodes of a layer for one,
and keeps what it reads in 4 or 8 bits; of `Gather` it makes one that dequantizes the rows it takes.
`tensorrt_recipes.problems` refuses recipes that ask for anything else.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.values import Opset

from ..quantize import activations, ops
from . import onnx_quantized
from .onnx_build import Builder, lazy
from .onnx_pack import Weights
from .tensorrt_attention import OPSET
from .tensorrt_recipes import GROUP_SIZES

op: Any = Opset("", OPSET)


def pack(model: ir.Model) -> None:
    """Replace every quantized layer in place by standard operators."""
    onnx_quantized.pack(
        model,
        {onnx_quantized.LINEAR: _write_linear, onnx_quantized.EMBEDDING: _write_embedding},
    )


def _write_linear(b: Builder, node: ir.Node) -> ir.Value:
    """x @ (integers * scales)' + bias."""
    x, weights, zeros, bias = onnx_quantized.linear_of(node)
    group = node.attributes.get_int("activation_group")
    by_channel = weights.bits == 8 and weights.groups == 1
    by_group = weights.bits == 4 and weights.width in GROUP_SIZES
    if group != ops.FLOAT_ACTIVATIONS or zeros is not None or not (by_channel or by_group):
        raise NotImplementedError(
            f"{weights.name}: {weights.bits} bits in groups of {weights.width}, activation group "
            f"{group}, {'no' if zeros is None else 'with'} zero points"
        )
    if by_channel:
        integers, scales = b.weight(weights.table()), b.weight(_scales(weights, (weights.rows,)))
        rows = b.op("DequantizeLinear", integers, scales, axis=0)
    else:
        shape = (weights.rows, weights.groups)
        integers, scales = b.weight(_int4(weights)), b.weight(_scales(weights, shape))
        rows = b.op("DequantizeLinear", integers, scales, axis=1, block_size=weights.width)
    out = b.op("MatMul", x, b.op("Transpose", rows, perm=[1, 0]))
    return out if bias is None else b.op("Add", out, bias)


def _write_embedding(b: Builder, node: ir.Node) -> ir.Value:
    """integer * scale of the rows that are asked for: ids [1,S] -> [1,S,D]."""
    ids, weight, scale = node.inputs
    weights = Weights.of(weight, scale, None, bits=8)
    if weights.groups > 1:
        raise NotImplementedError(f"{weights.name}: a table with {weights.groups} groups a row")
    scales = b.weight(_scales(weights, (weights.rows,)))
    rows = b.op("DequantizeLinear", b.weight(weights.table()), scales, axis=0)
    return b.op("Gather", rows, ids, axis=0)


def _scales(weights: Weights, shape: tuple[int, ...]) -> ir.TensorProtocol:
    return ir.tensor(weights.scale.reshape(shape), name=f"{weights.scale_name}.rows")


def _int4(weights: Weights) -> ir.TensorProtocol:
    """[N,K] int4: two to a byte, the first in the low half."""
    shape = (weights.rows, weights.depth)
    return lazy(
        f"{weights.name}.int4",
        ir.DataType.INT4,
        shape,
        lambda: weights.integers.astype(ir.DataType.INT4.numpy()),
    )


def _quantize(
    x: Any, scale: float, zero_point: int, low: int, high: int, dtype: ir.DataType
) -> Any:
    """clamp(round(x / scale), -128, 127), half to even: int8."""
    if zero_point or (low, high, dtype) != (-128, 127, ir.DataType.INT8):
        raise NotImplementedError(f"activations {low}..{high} in {dtype} around {zero_point}")
    zero = op.Constant(value=ir.tensor(np.int8(0)))
    return op.QuantizeLinear(x, _number(scale, x.dtype), zero)


def _dequantize(
    x: Any,
    scale: float,
    zero_point: int,
    low: int,
    high: int,
    dtype: ir.DataType,
    out_dtype: ir.DataType | None = None,
) -> Any:
    """x * scale, in the type that is asked for."""
    if zero_point:
        raise NotImplementedError(f"activations around {zero_point}")
    return op.DequantizeLinear(x, _number(scale, out_dtype or ir.DataType.FLOAT))


def _dequantize_weight(
    weight: Any,
    scale: Any,
    zero_point: Any,
    axis: int,
    low: int,
    high: int,
    dtype: ir.DataType,
    out_dtype: ir.DataType | None = None,
) -> Any:
    """weight * scale of its output channel; vision's zero points are zeros (`activations`)."""
    if axis:
        raise NotImplementedError(f"scales along axis {axis}")
    wanted = out_dtype or ir.DataType.FLOAT
    if scale.dtype != wanted:
        scale = op.Cast(scale, to=wanted)
    return op.DequantizeLinear(weight, scale, axis=0)


def _fp8_linear(x: Any, weight: Any, scale: Any, bias: Any, input_scale: float) -> Any:
    """round(x / s) s in float8, times (weight * scale)', plus bias."""
    size, zero = _number(input_scale, x.dtype), _number(0.0, ir.DataType.FLOAT8E4M3FN)
    rounded = op.DequantizeLinear(op.QuantizeLinear(x, size, zero), size)
    rows = op.DequantizeLinear(weight, scale, axis=0)
    out = op.MatMul(rounded, op.Transpose(rows, perm=[1, 0]))
    return out if bias is None else op.Add(out, bias)


def _number(value: float, dtype: ir.DataType) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, dtype=dtype.numpy()), dtype=dtype))


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    **onnx_quantized.TRANSLATIONS,
    torch.ops.quantized_decomposed.quantize_per_tensor.default: _quantize,
    torch.ops.quantized_decomposed.dequantize_per_tensor.default: _dequantize,
    torch.ops.quantized_decomposed.dequantize_per_channel.default: _dequantize_weight,
    torch.ops.fastvlm.fp8_linear.default: _fp8_linear,
}
"""Operator -> function that writes its ONNX nodes, for `torch.onnx.export`."""

assert activations is not None  # noqa: S101 - importing it registers PT2E's operators
