"""The Qwen2 decoder: grouped-query attention with biases, RoPE, SwiGLU, RMSNorm.

`Decoder` holds the weights and runs whole sequences (training, reference). Two wrappers around
the same weights keep a cache: `CacheInputsDecoder` takes past keys and values and returns present
ones (ONNX, TensorRT), `CacheBuffersDecoder` mutates buffers (states of Core ML and ExecuTorch).
Both return the last position's logits only: at 280 prompt tokens and 151,936 words the full head
would cost a third of the prefill.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import DecoderConfig
from .attention_op import cached_attention, rotate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def rotary_tables(config: DecoderConfig, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/head_dim): each [positions, head_dim / 2], float32.

    Computed in float64: at position 30000 float32 angles are off by 2e-3.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), config.rope_theta**-exponent)
    return angles.cos().float(), angles.sin().float()


class Attention(nn.Module):
    """The projections of grouped-query attention; whoever owns the cache does the mixing."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        width = config.hidden_size
        self.q_proj = nn.Linear(width, config.heads * config.head_dim)
        self.k_proj = nn.Linear(width, config.kv_heads * config.head_dim)
        self.v_proj = nn.Linear(width, config.kv_heads * config.head_dim)
        self.o_proj = nn.Linear(config.heads * config.head_dim, width, bias=False)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B,S,D] -> query [B,H,S,d], key and value [B,KV,S,d], before RoPE."""
        query, key, value = (
            projected.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return query, key, value


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). [B,S,D] -> [B,S,D]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """The parts of one pre-norm transformer layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


Mix = Callable[[int, Attention, Tensor], Tensor]
"""(layer index, its projections, normed x [B,S,D]) -> mixed values [B,S,H*d]."""


class Decoder(nn.Module):
    """Qwen2. forward: inputs_embeds [B,S,D] -> logits of every position [B,S,V], no cache."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def run(self, x: Tensor, mix: Mix) -> Tensor:
        """Hidden states after the last layer, not yet normed: [B,S,D] -> [B,S,D]."""
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):  # what nn.ModuleList cannot tell a type checker
                raise TypeError(type(layer))
            mixed = mix(index, layer.self_attn, layer.input_layernorm(x))
            x = x + layer.self_attn.o_proj(mixed)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Norm and head: [B,S,D] -> [B,S,V]."""
        normed = self.norm(x)
        if hasattr(self, "lm_head"):  # untied, or quantized apart from the embedding
            out: Tensor = self.lm_head(normed)
            return out
        return F.linear(normed, self.embed_tokens.weight)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        cos, sin = (
            table.to(inputs_embeds.device)
            for table in rotary_tables(self.config, inputs_embeds.shape[1])
        )

        def mix(_: int, attention: Attention, x: Tensor) -> Tensor:
            query, key, value = attention.heads_of(x)
            mixed = F.scaled_dot_product_attention(
                rotate(query, cos, sin),
                rotate(key, cos, sin),
                value,
                is_causal=True,
                enable_gqa=attention.heads != attention.kv_heads,
            )
            return mixed.transpose(1, 2).flatten(2)

        return self.logits(self.run(inputs_embeds, mix))


class _CachedDecoder(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, decoder: Decoder, context: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.context = context
        cos, sin = rotary_tables(decoder.config, context)
        dtype = decoder.norm.weight.dtype
        self.register_buffer("cos", cos.to(dtype), persistent=False)
        self.register_buffer("sin", sin.to(dtype), persistent=False)


class CacheInputsDecoder(_CachedDecoder):
    """The cache as inputs and outputs.

    forward: inputs_embeds [B,S,D], attention_mask [B,P+S] int64, then per layer past key and value
    [B,KV,P,d] -> logits of the last position [B,1,V], then per layer present key and value
    [B,KV,P+S,d].
    """

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, *past_key_values: Tensor
    ) -> tuple[Tensor, ...]:
        present: list[Tensor] = []

        def mix(index: int, attention: Attention, x: Tensor) -> Tensor:
            mixed: Tensor
            mixed, key, value = cached_attention(
                attention.q_proj(x),
                attention.k_proj(x),
                attention.v_proj(x),
                past_key_values[2 * index],
                past_key_values[2 * index + 1],
                attention_mask,
                self.cos,
                self.sin,
                attention.heads,
                attention.kv_heads,
            )
            present.extend((key, value))
            return mixed

        hidden = self.decoder.run(inputs_embeds, mix)
        return self.decoder.logits(hidden[:, -1:]), *present


class CacheBuffersDecoder(_CachedDecoder):
    """The cache as mutable buffers `key_cache`, `value_cache` [layers,1,KV,context,d].

    forward: inputs_embeds [1,S,D], cache_position [S] int64, the consecutive positions of the new
    tokens -> logits of the last position [1,1,V]. Start again at position 0 to reset.
    """

    key_cache: Tensor
    value_cache: Tensor

    def __init__(self, decoder: Decoder, context: int) -> None:
        super().__init__(decoder, context)
        config = decoder.config
        shape = (config.layers, 1, config.kv_heads, context, config.head_dim)
        dtype = decoder.norm.weight.dtype
        self.register_buffer("key_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("value_cache", torch.zeros(shape, dtype=dtype), persistent=False)

    def forward(self, inputs_embeds: Tensor, cache_position: Tensor) -> Tensor:
        new = inputs_embeds.shape[1]
        start = int(cache_position[0].item())
        torch._check(start >= 0)
        torch._check(start + new <= self.context)
        cos, sin = self.cos[cache_position], self.sin[cache_position]
        visible = torch.arange(self.context, device=cos.device) <= cache_position[:, None]

        def mix(index: int, attention: Attention, x: Tensor) -> Tensor:
            query, key, value = attention.heads_of(x)
            # Slice assignment: Core ML knows no index_copy in a mutated buffer.
            self.key_cache[index, :, :, start : start + new] = rotate(key, cos, sin)
            self.value_cache[index, :, :, start : start + new] = value
            mixed = F.scaled_dot_product_attention(
                rotate(query, cos, sin),
                self.key_cache[index],
                self.value_cache[index],
                attn_mask=visible,
                enable_gqa=attention.heads != attention.kv_heads,
            )
            out: Tensor = mixed.transpose(1, 2).flatten(2)
            return out

        hidden = self.decoder.run(inputs_embeds, mix)
        return self.decoder.logits(hidden[:, -1:])
