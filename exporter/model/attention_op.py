"""`fastvlm::cached_attention`: RoPE, cache append and causal attention as one operator.

One node in the ExportedProgram instead of a dozen, so that a target can lower it to its runtime's
fused attention, which appends to the cache in place. The eager implementation below is its
definition; RoPE is that of RoFormer in the half-split layout that Qwen2 uses.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B,H,S,d] by tables [S,d/2]: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@torch.library.custom_op("fastvlm::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from S new positions to P past ones and themselves.

    query [B,S,H*d], key and value [B,S,KV*d] before RoPE; past_key and past_value [B,KV,P,d] after
    RoPE; attention_mask [B,P+S] int64, 1 where a key may be seen; cos and sin [positions,d/2].
    The new positions are P..P+S-1. Returns mixed values [B,S,H*d], present key and value
    [B,KV,P+S,d].
    """
    past, new = past_key.shape[2], query.shape[1]
    cos, sin = cos[past : past + new], sin[past : past + new]
    split = [
        x.unflatten(2, (n, -1)).transpose(1, 2)
        for x, n in ((query, heads), (key, kv_heads), (value, kv_heads))
    ]
    present_key = torch.cat((past_key, rotate(split[1], cos, sin)), dim=2)
    present_value = torch.cat((past_value, split[2]), dim=2)
    causal = torch.ones(new, past + new, dtype=torch.bool, device=query.device).tril(past)
    mixed = F.scaled_dot_product_attention(
        rotate(split[0], cos, sin),
        present_key,
        present_value,
        attn_mask=causal & attention_mask[:, None, None, :].bool(),
        enable_gqa=heads != kv_heads,
    )
    return mixed.transpose(1, 2).flatten(2), present_key, present_value


@cached_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, past, width = past_key.shape
    present = (batch, kv_heads, past + query.shape[1], width)
    return torch.empty_like(query), past_key.new_empty(present), past_value.new_empty(present)
