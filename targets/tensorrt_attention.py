"""Attention in operators that TensorRT fuses: TensorScatter, RotaryEmbedding and Attention.

The cache is static, [1,KV,C,d] of the whole context, and TensorScatter writes the new positions
into it: where input and output are one buffer, TensorRT does that in place (its KV cache update).
attention_mask has ones for all valid positions, the new ones among them, and perhaps zeros behind
them, so that its length A may stay the same over many steps. Of its sum and the new tokens' number
follows where they go, and A says how much of the cache is looked at.

TensorRT fuses Attention in float16 and bfloat16, of heads of 16, 24, 32, ... numbers, and of enough
heads. Elsewhere it does not build, so there the products and the softmax are written out, in
float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.values import Opset

from ..exporter.model.attention_op import cached_attention
from .onnx_build import Builder

OPSET = 24  # the first with TensorScatter
HEAD_STEP, SMALLEST_HEAD = 8, 16
"""Head dimensions that the fused kernels take are multiples of one and at least the other."""

HEADS, FEW_HEADS = 4, 2
"""Heads that they take at least: of a single token, and of more."""

HIDDEN = -3.0e38
"""A score that no softmax gives a share: beyond any real one, and finite, as -inf - -inf is NaN."""

_ALL = 2**31 - 1
"""An end from which on a slice reaches to that of its axis."""

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
op: Any = Opset("", OPSET)


def is_fused(dtype: ir.DataType | None, head_dim: int, heads: int, tokens: int = 1) -> bool:
    """Whether TensorRT has a kernel for attention of that type and these sizes.

    `tokens`: the fewest that ask at once. Found by building, with TensorRT for RTX 1.7.1.
    """
    enough = FEW_HEADS if tokens > 1 else HEADS
    sized = head_dim % HEAD_STEP == 0 and head_dim >= SMALLEST_HEAD and heads >= enough
    return dtype in _HALVES and sized


def _cached(
    query: Any,
    key: Any,
    value: Any,
    past_key: Any,
    past_value: Any,
    attention_mask: Any,
    cos: Any,
    sin: Any,
    heads: int,
    kv_heads: int,
) -> Any:
    """See `cached_attention`. What no layer decides is written per layer and merged later."""
    head_dim = int(past_key.shape[3])
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    new = op.Shape(query, start=1, end=2)
    valid = op.ReduceSum(attention_mask, op.Constant(value_ints=[1]), keepdims=0)
    past = op.Sub(valid, new)
    positions = op.Add(op.Range(zero, op.Squeeze(new), one), past)
    attended = op.Shape(attention_mask, start=1, end=2)
    keys = op.Range(zero, op.Squeeze(attended), one)
    visible = op.LessOrEqual(keys, op.Unsqueeze(positions, op.Constant(value_ints=[1])))  # [S,A]
    rows = op.Unsqueeze(positions, op.Constant(value_ints=[0]))

    def split(x: Any, count: int) -> Any:
        shape = op.Constant(value_ints=[0, 0, count, head_dim])
        return op.Transpose(op.Reshape(x, shape), perm=[0, 2, 1, 3])

    def written(old: Any, update: Any) -> tuple[Any, Any]:
        """The cache with the new positions in it, and the part that is looked at."""
        present = op.TensorScatter(old, update, past, axis=2)
        start, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[2])
        return present, op.Slice(present, start, attended, axis)

    rotated = op.RotaryEmbedding(split(query, heads), cos, sin, rows)
    key = op.RotaryEmbedding(split(key, kv_heads), cos, sin, rows)
    present_key, keys_seen = written(past_key, key)
    present_value, values_seen = written(past_value, split(value, kv_heads))
    if is_fused(query.dtype, head_dim, heads):
        mixed, *_ = op.Attention(rotated, keys_seen, values_seen, visible)
    else:
        wide = [_wide(x, query.dtype) for x in (rotated, keys_seen, values_seen)]
        mixed = _grouped(wide, visible, (heads, kv_heads, head_dim))
        mixed = _narrowed(mixed, query.dtype)
    together = op.Constant(value_ints=[0, 0, heads * head_dim])
    out = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), together)
    return out, present_key, present_value


def _grouped(tensors: list[Any], visible: Any, sizes: tuple[int, int, int]) -> Any:
    """softmax(query key' / sqrt(d)) value, query [1,H,S,d], the others [1,KV,A,d] -> [1,H,S,d].

    Heads that share a key are rows of one matrix product with it, so that no key is repeated.
    """
    heads, kv_heads, head_dim = sizes
    query, key, value = tensors
    apart = op.Constant(value_ints=[1, kv_heads, heads // kv_heads, -1, head_dim])
    axis = op.Constant(value_ints=[2])
    grouped = op.Reshape(query, apart)
    scores = op.MatMul(
        op.Mul(grouped, op.Constant(value_float=head_dim**-0.5)),
        op.Unsqueeze(op.Transpose(key, perm=[0, 1, 3, 2]), axis),
    )
    seen = op.Where(visible, scores, op.Constant(value_float=HIDDEN))
    mixed = op.MatMul(op.Softmax(seen, axis=-1), op.Unsqueeze(value, axis))
    together = op.Constant(value_ints=[1, heads, -1, head_dim])
    return op.Reshape(mixed, together)


def _plain(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query key' / sqrt(d)) value, for the tower: no mask, one head per key."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa or scale is not None:
        raise NotImplementedError("only plain attention is translated; see cached_attention")
    heads, tokens, head_dim = map(int, query.shape[1:])
    if is_fused(query.dtype, head_dim, heads, tokens):
        mixed, *_ = op.Attention(query, key, value)
        return mixed
    dtype = query.dtype
    query, key, value = (_wide(x, dtype) for x in (query, key, value))
    scores = op.MatMul(
        op.Mul(query, op.Constant(value_float=head_dim**-0.5)),
        op.Transpose(key, perm=[0, 1, 3, 2]),
    )
    return _narrowed(op.MatMul(op.Softmax(scores, axis=-1), value), dtype)


def _wide(x: Any, dtype: ir.DataType | None) -> Any:
    """x, which is of that type, in float32."""
    return op.Cast(x, to=ir.DataType.FLOAT) if dtype in _HALVES else x


def _narrowed(x: Any, dtype: ir.DataType | None) -> Any:
    return op.Cast(x, to=dtype) if dtype in _HALVES else x


def _slice(
    x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """All of an axis, or its last element alone: by its index, so that the size is known."""
    if step == 1 and (end is None or end >= _ALL):
        if not start:
            return op.Identity(x)
        if start == -1:
            return op.Gather(x, op.Constant(value_ints=[-1]), axis=dim)
    raise NotImplementedError(f"elements {start} to {end} in steps of {step} along axis {dim}")


def keep_cache_type(model: ir.Model) -> None:
    """Let TensorScatter write into the cache itself where attention stayed in float32.

    The program turns the whole cache into float32 there, and back; what is written is rounded to
    the cache's type instead, and what is looked at becomes float32.
    """
    for scatter in [node for node in model.graph if node.op_type == "TensorScatter"]:
        wide, update, place = scatter.inputs
        cast = None if wide is None else wide.producer()
        cache = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
        if cache is None or cache.dtype is None or cache not in model.graph.inputs:
            continue
        builder = Builder(model.graph, scatter)
        rounded = builder.op("Cast", update, to=cache.dtype.value)
        present = builder.op("TensorScatter", cache, rounded, place, axis=2)
        for user, _ in list(scatter.outputs[0].uses()):
            if user.op_type == "Cast":  # back to the cache's type, as the graph returns it
                ir.convenience.replace_all_uses_with(
                    user.outputs[0], present, replace_graph_outputs=True
                )
            else:
                user.replace_input_with(0, present)
                model.graph.insert_after(user, _widened_behind(user))
        builder.replace(present)
        present.dtype = cache.dtype  # not that of what it replaces


def _widened_behind(node: ir.Node) -> ir.Node:
    """A cast to float32 for all that read what the node makes."""
    out = node.outputs[0]
    readers = list(out.uses())
    wide = ir.node("Cast", [out], attributes={"to": int(ir.DataType.FLOAT)})
    wide.metadata_props.update(node.metadata_props)
    for user, index in readers:
        user.replace_input_with(index, wide.outputs[0])
    return wide


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.fastvlm.cached_attention.default: _cached,
    torch.ops.aten.scaled_dot_product_attention.default: _plain,
    torch.ops.aten.slice.Tensor: _slice,
}
"""Operator -> function that writes its ONNX nodes, for `torch.onnx.export`."""

assert cached_attention is not None  # noqa: S101 - importing it registers the operator
