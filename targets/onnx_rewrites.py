"""Graph rewrites between torch.onnx and the file: fewer, larger operators, the same numbers.

Each rule names what it matches and what it becomes. Both sides are the same function of real
numbers; tests/targets/test_onnx_rewrites.py holds the rounding against a limit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.rewriter.pattern as patterns
from onnxscript import rewriter

from .onnx_attention import MICROSOFT
from .onnx_static import STATIC_LINEAR, WEIGHT_ONLY_LINEAR


def rewrite(model: ir.Model) -> None:
    """Apply every rule in place."""
    fuse_norms(model)
    rewriter.rewrite(model, pattern_rewrite_rules=[STATIC_LINEAR])
    rewriter.rewrite(model, pattern_rewrite_rules=[_SKIP_RMS_NORM, WEIGHT_ONLY_LINEAR])
    fold_transposed_weights(model)


def fuse_norms(model: ir.Model, *, halves: bool = False) -> None:
    """Apply the rules that leave standard operators, in place.

    `halves`: float16's norm over channels, too, becomes the operator, whose statistics are
    float32 inside, so that nothing overflows there. ONNX Runtime computes the safe form faster.
    """
    if halves:
        rewriter.rewrite(model, pattern_rewrite_rules=[_NARROW_ABS, _NARROW_MAX])
        rewriter.rewrite(model, pattern_rewrite_rules=[_HALF_CHANNEL_NORM])
    rewriter.rewrite(model, pattern_rewrite_rules=[_CHANNEL_NORM, _RMS_NORM, _HALF_RMS_NORM])


def _scalar(value: ir.Value | None) -> float | None:
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None or constant.size != 1 else float(constant.numpy().item())


def _wide_abs(op: Any, x: Any) -> Any:
    return op.Cast(op.Abs(op.Cast(x, to=ir.DataType.FLOAT)), _outputs=["out"])


def _narrow_abs(op: Any, x: Any, **_: Any) -> Any:
    return op.Abs(x)


def _wide_max(op: Any, x: Any, axes: Any) -> Any:
    wide = op.Cast(x, to=ir.DataType.FLOAT)
    return op.Cast(op.ReduceMax(wide, axes, keepdims=1), _outputs=["out"])


def _narrow_max(op: Any, x: Any, axes: Any, **_: Any) -> Any:
    return op.ReduceMax(x, axes, keepdims=1)


def _comes_back(_: Any, x: ir.Value, out: ir.Value, **__: Any) -> bool:
    cast = out.producer()
    return cast is not None and cast.attributes.get_int("to", 0) == x.dtype


_NARROW_ABS = patterns.RewriteRule(_wide_abs, _narrow_abs, _comes_back, name="NarrowAbs")
_NARROW_MAX = patterns.RewriteRule(_wide_max, _narrow_max, _comes_back, name="NarrowMax")
"""Two operators that torch.onnx puts between casts to float32 and back, which change no number."""


def _rms_norm(op: Any, x: Any, epsilon: Any, weight: Any) -> Any:
    mean = op.ReduceMean(op.Mul(x, x), [-1], keepdims=1)
    return op.Mul(op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))), weight)


def _fused_rms_norm(op: Any, x: Any, epsilon: ir.Value, weight: Any) -> Any:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=_scalar(epsilon), stash_type=1)


def _epsilon_known(_: Any, epsilon: ir.Value, **__: Any) -> bool:
    return _scalar(epsilon) is not None


_RMS_NORM = patterns.RewriteRule(_rms_norm, _fused_rms_norm, _epsilon_known, name="RmsNorm")
"""x / sqrt(mean(x^2) + eps) * weight, seven nodes -> RMSNormalization (opset 23)."""


def _half_rms_norm(op: Any, x: Any, epsilon: Any, weight: Any) -> Any:
    wide = op.Cast(x, to=ir.DataType.FLOAT)
    mean = op.ReduceMean(op.Mul(wide, wide), [-1], keepdims=1)
    normed = op.Mul(wide, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))
    return op.Mul(op.Cast(normed, _outputs=["narrow"]), weight)


def _fused_half_rms_norm(op: Any, x: Any, epsilon: ir.Value, weight: Any, **_: Any) -> Any:
    return _fused_rms_norm(op, x, epsilon, weight)


def _comes_back_narrow(
    context: Any, x: ir.Value, epsilon: ir.Value, narrow: ir.Value, **_: Any
) -> bool:
    return _comes_back(context, x, narrow) and _scalar(epsilon) is not None


_HALF_RMS_NORM = patterns.RewriteRule(
    _half_rms_norm, _fused_half_rms_norm, _comes_back_narrow, name="HalfRmsNorm"
)
"""The same of 16 bits, its statistics in float32 -> RMSNormalization, whose stash_type says so."""


def _skip_rms_norm(op: Any, x: Any, skip: Any, weight: Any) -> Any:
    total = op.Add(x, skip)
    return op.RMSNormalization(total, weight, _outputs=["normed"]), total


def _fused_skip_rms_norm(op: Any, x: Any, skip: Any, weight: Any, normed: ir.Value) -> Any:
    norm = normed.producer()
    if norm is None:
        raise ValueError("the matched norm has no node")
    normed, _, _, total = op.SkipSimplifiedLayerNormalization(
        x,
        skip,
        weight,
        epsilon=norm.attributes.get_float("epsilon"),
        _domain=MICROSOFT,
        _version=1,
        _outputs=4,
    )
    return normed, total


_SKIP_RMS_NORM = patterns.RewriteRule(_skip_rms_norm, _fused_skip_rms_norm, name="SkipRmsNorm")
"""The residual sum and the norm after it, which both go on -> one node, the sum read once."""


def _channel_norm(
    op: Any, x: Any, shape: Any, one: Any, least: Any, epsilon: Any, weight: Any, bias: Any
) -> Any:
    def at_least(value: Any, bound: Any) -> Any:
        return op.Clip(value, bound)

    return _safe_norm(op, at_least, x, shape, one, least, epsilon, weight, bias)


def _half_channel_norm(
    op: Any, x: Any, shape: Any, one: Any, least: Any, epsilon: Any, weight: Any, bias: Any
) -> Any:
    def at_least(value: Any, bound: Any) -> Any:
        return op.Max(value, bound)

    return _safe_norm(op, at_least, x, shape, one, least, epsilon, weight, bias)


def _safe_norm(
    op: Any,
    at_least: Callable[[Any, Any], Any],
    x: Any,
    shape: Any,
    one: Any,
    least: Any,
    epsilon: Any,
    weight: Any,
    bias: Any,
) -> Any:
    peak = at_least(op.ReduceMax(op.Abs(x), [1], keepdims=1), one)
    scaled = op.Div(x, peak)
    centred = op.Sub(scaled, op.ReduceMean(scaled, [1], keepdims=1))
    spread = at_least(op.ReduceMax(op.Abs(centred), [1], keepdims=1), least)
    unit = op.Div(centred, spread)
    size = op.Mul(peak, spread)
    variance = op.ReduceMean(op.Mul(unit, unit), [1], keepdims=1)
    small = op.Div(op.Mul(op.Reciprocal(size), epsilon), size)
    normed = op.Mul(unit, op.Reciprocal(op.Sqrt(op.Add(variance, small))))
    placed = op.Add(op.Mul(normed, weight), bias)
    return op.Transpose(op.Reshape(placed, shape), perm=[0, 2, 1])


def _fused_channel_norm(
    op: Any, x: Any, shape: Any, epsilon: ir.Value, weight: ir.Value, bias: ir.Value, **_: Any
) -> Any:
    tokens = op.Transpose(op.Reshape(x, shape), perm=[0, 2, 1])
    flat = [
        # Named after x: norms whose weights are equal share one initializer.
        op.initializer(ir.tensor(value.const_value.numpy().reshape(-1), name=f"{x.name}.{part}"))
        for part, value in (("scale", weight), ("shift", bias))
        if value.const_value is not None
    ]
    return op.LayerNormalization(tokens, *flat, axis=-1, epsilon=_scalar(epsilon), stash_type=1)


def _is_norm(
    _: Any, x: ir.Value, epsilon: ir.Value, weight: ir.Value, bias: ir.Value, **__: Any
) -> bool:
    constant = weight.const_value is not None and bias.const_value is not None
    return x.dtype == weight.dtype and _scalar(epsilon) is not None and constant


def _is_float32_norm(context: Any, x: ir.Value, **found: Any) -> bool:
    return x.dtype == ir.DataType.FLOAT and _is_norm(context, x, **found)


_CHANNEL_NORM = patterns.RewriteRule(
    _channel_norm, _fused_channel_norm, _is_float32_norm, name="ChannelNorm"
)
"""The overflow-safe norm over channels, then [B,C,H,W] -> [B,N,C]  ->  LayerNormalization.

Only in float32, where squares can't overflow; the safe form takes a dozen passes over the map.
"""

_HALF_CHANNEL_NORM = patterns.RewriteRule(
    _half_channel_norm, _fused_channel_norm, _is_norm, name="HalfChannelNorm"
)
"""The same of types that torch.onnx writes a lower bound of as a maximum."""


def fold_transposed_weights(model: ir.Model) -> None:
    """Transpose(weight) -> the transposed weight, computed only as the file is written.

    torch.nn.Linear keeps [out,in], MatMul wants [in,out]. onnxscript folds the small ones and
    leaves the large to the runtime, which would redo them at each load with twice the memory.
    """
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or weight.const_value is None:
            continue
        order = node.attributes.get_ints("perm")
        if list(order) != [1, 0]:
            continue
        tensor = _transposed(weight.const_value)
        folded = ir.Value(
            name=tensor.name,
            const_value=tensor,
            shape=tensor.shape,
            type=ir.TensorType(tensor.dtype),
        )
        graph.register_initializer(folded)
        ir.convenience.replace_all_uses_with(node.outputs[0], folded)
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[str(weight.name)]


def _transposed(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=tensor.name)

    rows, columns = tensor.shape.numpy()
    return ir.LazyTensor(
        compute,
        dtype=tensor.dtype,
        shape=ir.Shape([columns, rows]),
        name=f"{tensor.name}.transposed",
    )
