"""`fastvlm::cached_attention` in plain ONNX operators, for heads that no fused operator takes.

attention_mask [B,A] has a column for each position up to the last new one, so its length A and the
number S of new tokens say where they go: rows A-S to A of the cache. A past of exactly A-S rows
gives a present of A; one of more, such as a buffer of the whole context, keeps its length and what
lies behind. No row of the past is read after the first of the present is written, so that both may
be one buffer. Unlike the fused operator this copies the whole cache in each step.
"""

from typing import Any

import onnx_ir as ir
from onnxscript import opset23

HIDDEN = -3.0e38
"""A score that no softmax gives a share: beyond any real one, and finite, as -inf - -inf is NaN."""

_END = 2**63 - 1
"""An end up to which a slice takes all that there is."""

op: Any = opset23


def attention(
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
    """See `cached_attention`. Products and softmax are float32 whatever the tensors are."""
    head_dim, dtype = int(past_key.shape[3]), query.dtype
    attended = op.Shape(attention_mask, start=1, end=2)
    past = op.Sub(attended, op.Shape(query, start=1, end=2))
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    positions = op.Range(op.Squeeze(past), op.Squeeze(attended), one)
    rows = op.Expand(_unsqueezed(positions, 0), op.Shape(query, start=0, end=2))

    def split(x: Any, count: int) -> Any:
        apart = op.Constant(value_ints=[0, 0, count, head_dim])
        return op.Transpose(op.Reshape(x, apart), perm=[0, 2, 1, 3])

    def appended(old: Any, new: Any) -> tuple[Any, Any]:
        """The rows that are looked at, and these with what lies behind."""
        start, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[2])
        seen = op.Concat(op.Slice(old, start, past, axis), new, axis=2)
        behind = op.Slice(old, attended, op.Constant(value_ints=[_END]), axis)
        return seen, op.Concat(seen, behind, axis=2)

    query = split(op.RotaryEmbedding(query, cos, sin, rows, num_heads=heads), heads)
    key = split(op.RotaryEmbedding(key, cos, sin, rows, num_heads=kv_heads), kv_heads)
    keys, present_key = appended(past_key, key)
    values, present_value = appended(past_value, split(value, kv_heads))

    order = op.Range(zero, op.Squeeze(attended), one)
    causal = op.LessOrEqual(order, _unsqueezed(positions, 1))  # [S,A]
    visible = op.And(causal, _unsqueezed(op.Cast(attention_mask, to=ir.DataType.BOOL), 1, 2, 3))
    query, keys, values = (_retyped(x, dtype, ir.DataType.FLOAT) for x in (query, keys, values))
    # Heads that share a key are apart from it in an axis of their own: no key is repeated.
    grouped = op.Reshape(
        query, op.Constant(value_ints=[0, kv_heads, heads // kv_heads, -1, head_dim])
    )
    scores = op.MatMul(
        op.Mul(grouped, op.Constant(value_float=head_dim**-0.5)),
        _unsqueezed(op.Transpose(keys, perm=[0, 1, 3, 2]), 2),
    )
    shares = op.Softmax(op.Where(visible, scores, op.Constant(value_float=HIDDEN)), axis=-1)
    mixed = op.Reshape(
        op.MatMul(shares, _unsqueezed(values, 2)),
        op.Constant(value_ints=[0, heads, -1, head_dim]),
    )
    together = op.Constant(value_ints=[0, 0, heads * head_dim])
    out = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), together)
    return _retyped(out, ir.DataType.FLOAT, dtype), present_key, present_value


def _unsqueezed(x: Any, *axes: int) -> Any:
    return op.Unsqueeze(x, op.Constant(value_ints=list(axes)))


def _retyped(x: Any, dtype: ir.DataType | None, wanted: ir.DataType | None) -> Any:
    """x, which is of type `dtype`, as the wanted type."""
    return x if dtype == wanted else op.Cast(x, to=wanted)
