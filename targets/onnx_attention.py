"""`fastvlm::cached_attention` as ONNX Runtime's GroupQueryAttention.

The fused operator rotates query and key, appends to the cache and attends. When past and present
are one buffer of the whole context it appends in place; given a past of exact length it returns one
that is longer. Both come from the same graph, because the number of valid positions is taken from
attention_mask, never from the cache's shape.

Where it cannot rotate heads of this size, RotaryEmbedding does so before it. Where it takes no such
heads at all, everything is written out: see `onnx_plain_attention`. Filling the heads up with zeros
inside the graph is no way out: ONNX Runtime 1.25 to 1.31 plan present into the memory of a past
that is not the graph's own input.
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnxscript import opset23
from onnxscript.values import Op, Opset

from ..exporter.model.attention_op import cached_attention
from . import onnx_plain_attention

MICROSOFT = "com.microsoft"
op: Any = opset23

_Schema = onnx.defs.OpSchema
_T, _M = "T", "M"
_SCHEMA = _Schema(
    "GroupQueryAttention",
    MICROSOFT,
    1,
    inputs=[
        *(_Schema.FormalParameter(name, _T) for name in ("query", "key", "value")),
        *(_Schema.FormalParameter(name, _T) for name in ("past_key", "past_value")),
        *(_Schema.FormalParameter(name, _M) for name in ("seqlens_k", "total_sequence_length")),
        *(
            _Schema.FormalParameter(name, _T, param_option=_Schema.FormalParameterOption.Optional)
            for name in ("cos_cache", "sin_cache")
        ),
    ],
    outputs=[
        _Schema.FormalParameter(name, _T) for name in ("output", "present_key", "present_value")
    ],
    type_constraints=[
        (_T, ["tensor(float)", "tensor(float16)"], ""),
        (_M, ["tensor(int32)"], ""),
    ],
    attributes=[
        _Schema.Attribute(name, _Schema.AttrType.INT)
        for name in ("num_heads", "kv_num_heads", "do_rotary")
    ],
)
HEAD_STEP, ROTARY_STEP = 8, 16
"""What the head size must be a multiple of: always, and where the operator itself rotates.

From `Check_Q_K_V` and `CheckRotaryCaches` in onnxruntime/contrib_ops/cpu/bert/
group_query_attention_helper.h, alike in ONNX Runtime 1.24 to 1.32. CheckRotaryCaches also wants
tables whose width is a multiple of 8 and at most half the head: those of a whole head are.
"""

_group_query_attention = Op(Opset(MICROSOFT, 1), "GroupQueryAttention", _SCHEMA)


def mixes(head_dim: int) -> bool:
    """Whether GroupQueryAttention takes heads of that size."""
    return head_dim % HEAD_STEP == 0


def rotates(head_dim: int) -> bool:
    """Whether it rotates them, too."""
    return head_dim % ROTARY_STEP == 0


def _translate(
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
    """See `cached_attention`. The lengths are computed per layer; equal nodes are merged later."""
    head_dim = int(past_key.shape[3])
    if not mixes(head_dim):
        cache = past_key, past_value, attention_mask
        return onnx_plain_attention.attention(query, key, value, *cache, cos, sin, heads, kv_heads)
    valid = op.ReduceSum(attention_mask, op.Constant(value_ints=[1]), keepdims=0)
    last_position = op.Cast(op.Sub(valid, op.Constant(value_int=1)), to=onnx.TensorProto.INT32)
    total = op.Squeeze(op.Shape(attention_mask, start=1, end=2))
    lengths = last_position, op.Cast(total, to=onnx.TensorProto.INT32)
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
    if rotates(head_dim):
        return _group_query_attention(
            query, key, value, past_key, past_value, *lengths, cos, sin, **attributes, do_rotary=1
        )

    positions = _positions(valid, query)
    query = op.RotaryEmbedding(query, cos, sin, positions, num_heads=heads)
    key = op.RotaryEmbedding(key, cos, sin, positions, num_heads=kv_heads)
    return _group_query_attention(
        query, key, value, past_key, past_value, *lengths, **attributes, do_rotary=0
    )


def _positions(valid: Any, query: Any) -> Any:
    """Positions of the new tokens [B,S], as GroupQueryAttention counts them.

    They are the last of `valid` [B] ones. In a first prompt they start at 0 in every row of a
    batch, also in those that are shorter and filled up on the right.
    """
    new = op.Shape(query, start=1, end=2)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    first = op.Max(op.Sub(valid, new), zero)
    steps = op.Range(zero, op.Squeeze(new), one)
    return op.Add(op.Unsqueeze(first, op.Constant(value_ints=[1])), steps)


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.fastvlm.cached_attention.default: _translate
}
"""Operator -> function that writes its ONNX nodes, for `torch.onnx.export`."""

assert cached_attention is not None  # noqa: S101 - importing it registers the operator
