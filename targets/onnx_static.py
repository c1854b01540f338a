"""Linear layers in PT2E's form, around DequantizeLinear -> the operators that compute them.

Convolutions keep that form, which ONNX Runtime fuses to QLinearConv. What it makes of a linear
layer is another matter. With quantized input and float output it takes three times as long as the
integer product written out; with float input it rounds the input to 8 bits, which nobody asked for.
"""

from typing import Any

import onnx_ir as ir
import onnxscript.rewriter.pattern as patterns

from .onnx_attention import MICROSOFT
from .onnx_build import values_of
from .onnx_pack import Weights


def _linear(op: Any, x: Any, s_x: Any, z_x: Any, weight: Any, s_w: Any, z_w: Any) -> Any:
    rows = op.DequantizeLinear(weight, s_w, z_w, axis=0)
    return op.MatMul(op.DequantizeLinear(x, s_x, z_x), op.Transpose(rows, perm=[1, 0]))


def _weight_only(op: Any, x: Any, weight: Any, s_w: Any, z_w: Any) -> Any:
    rows = op.DequantizeLinear(weight, s_w, z_w, axis=0)
    return op.MatMul(x, op.Transpose(rows, perm=[1, 0]))


def _is_symmetric(_: Any, weight: ir.Value, z_w: ir.Value, **__: Any) -> bool:
    return weight.dtype == ir.DataType.INT8 and not values_of(z_w).any()


def _product(
    op: Any, x: ir.Value, s_x: ir.Value, z_x: Any, weight: ir.Value, s_w: ir.Value, **_: Any
) -> Any:
    weights = _weights(x, weight, s_w)
    columns = op.initializer(weights.columns())
    scale = ir.tensor(values_of(s_x) * values_of(s_w), name=f"{weights.scale_name}.product")
    sums = op.Cast(op.MatMulInteger(x, columns, z_x), to=int(ir.DataType.FLOAT))
    return op.Mul(sums, op.initializer(scale))


def _float_product(op: Any, x: ir.Value, weight: ir.Value, s_w: ir.Value, **_: Any) -> Any:
    weights = _weights(x, weight, s_w)
    return op.MatMulNBits(
        x,
        op.initializer(weights.packed()),
        op.initializer(weights.block_scales()),
        _domain=MICROSOFT,
        _version=1,
        **weights.attributes(accuracy_level=1),
    )


def _weights(x: ir.Value, weight: ir.Value, s_w: ir.Value) -> Weights:
    """Named after x, too: layers whose weights are equal share one initializer."""
    return Weights(
        name=f"{weight.name}.{x.name}",
        scale_name=f"{weight.name}.{x.name}.scale",
        integers=values_of(weight),
        scale=values_of(s_w)[:, None],
        zero_point=None,
        bits=8,
    )


STATIC_LINEAR = patterns.RewriteRule(_linear, _product, _is_symmetric, name="StaticLinear")
"""DQ(x) DQ(w)'  ->  s_x s_w * ((x - z_x) w') in integers: MatMulInteger, Cast, Mul."""

WEIGHT_ONLY_LINEAR = patterns.RewriteRule(
    _weight_only, _float_product, _is_symmetric, name="WeightOnlyLinear"
)
"""x DQ(w)'  ->  MatMulNBits of 8 bits, in float. Applied last: it matches static layers, too."""
