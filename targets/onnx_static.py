"""Linear layers whose input is quantized statically (PT2E's Q/DQ form) -> products of integers.

Convolutions keep the Q/DQ form, which ONNX Runtime fuses to QLinearConv. What it makes of a linear
layer with a float output takes three times as long as the integer product written out.
"""

from typing import Any

import onnx_ir as ir
import onnxscript.rewriter.pattern as patterns

from .onnx_build import lazy, values_of


def _linear(op: Any, x: Any, s_x: Any, z_x: Any, weight: Any, s_w: Any, z_w: Any) -> Any:
    rows = op.DequantizeLinear(weight, s_w, z_w, axis=0)
    return op.MatMul(op.DequantizeLinear(x, s_x, z_x), op.Transpose(rows, perm=[1, 0]))


def _is_symmetric(_: Any, weight: ir.Value, z_w: ir.Value, **__: Any) -> bool:
    return weight.dtype == ir.DataType.INT8 and not values_of(z_w).any()


def _product(
    op: Any, x: Any, s_x: ir.Value, z_x: Any, weight: ir.Value, s_w: ir.Value, **_: Any
) -> Any:
    integers = values_of(weight)
    rows, depth = integers.shape
    columns = lazy(f"{weight.name}.columns", ir.DataType.INT8, (depth, rows), lambda: integers.T)
    scale = ir.tensor(values_of(s_x) * values_of(s_w), name=f"{weight.name}.product_scale")
    sums = op.Cast(op.MatMulInteger(x, op.initializer(columns), z_x), to=int(ir.DataType.FLOAT))
    return op.Mul(sums, op.initializer(scale))


STATIC_LINEAR = patterns.RewriteRule(_linear, _product, _is_symmetric, name="StaticLinear")
"""DQ(x) DQ(w)'  ->  s_x s_w * ((x - z_x) w') in integers: MatMulInteger, Cast, Mul."""
