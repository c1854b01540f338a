"""`fastvlm::cached_attention` as ONNX Runtime's GroupQueryAttention.

The fused operator rotates query and key, appends to the cache and attends. When past and present
are one buffer of the whole context it appends in place; given a past of exact length it returns one
that is longer. Both come from the same graph, because the number of valid positions is taken from
attention_mask, never from the cache's shape.
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnxscript import opset23 as op
from onnxscript.values import Op, Opset

from ..exporter.model.attention_op import cached_attention

MICROSOFT = "com.microsoft"

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
        *(_Schema.FormalParameter(name, _T) for name in ("cos_cache", "sin_cache")),
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
_group_query_attention = Op(Opset(MICROSOFT, 1), "GroupQueryAttention", _SCHEMA)


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
    one: Any = op.Constant(value_ints=[1])
    valid = op.ReduceSum(attention_mask, one, keepdims=0)
    last_position = op.Cast(op.Sub(valid, op.Constant(value_int=1)), to=onnx.TensorProto.INT32)
    total = op.Squeeze(op.Shape(attention_mask, start=1, end=2))
    return _group_query_attention(
        query,
        key,
        value,
        past_key,
        past_value,
        last_position,
        op.Cast(total, to=onnx.TensorProto.INT32),
        cos,
        sin,
        num_heads=heads,
        kv_num_heads=kv_heads,
        do_rotary=1,
    )


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.fastvlm.cached_attention.default: _translate
}
"""Operator -> function that writes its ONNX nodes, for `torch.onnx.export`."""

assert cached_attention is not None  # noqa: S101 - importing it registers the operator
