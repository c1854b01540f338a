"""The decoder for ExecuTorch: the cache in buffers, everything else in one piece for XNNPACK.

XNNPACK knows no reductions, no comparisons, no integers and no sizes that depend on each other,
and what it does not know splits a method into several delegates. So: a mean is a product with a
row of 1/D, RoPE's swapped halves are a product with a permutation, the last row is picked by a
product with ones and zeros. The cache goes in as it was before the call, the new keys and values
come out, and are written to their positions afterwards.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from ..exporter.config import DecoderConfig
from ..quantize.ops import AFFINE
from .executorch_linear import affine_linear, share_rounding
from .executorch_retrace import Rewritten, retrace

VISIBLE = 1e30
"""Limit of scores that a row may see; its negative, of those that it may not, has weight 0."""

EXAMPLE = 3  # new positions while tracing: neither 0 nor 1, which torch.export would specialize


def decoder_method(
    program: ExportedProgram, config: DecoderConfig, context: int
) -> ExportedProgram:
    """`graphs.build`'s decoder as a method with the cache inside.

    inputs_embeds [1,S,D] float32, cache_position [S] int64, consecutive positions below `context`
    -> logits [1,1,V] of the last. Starting again at position 0 resets.
    """
    module = _Decoder(program, config, context)
    inputs = (
        torch.zeros(1, EXAMPLE, config.hidden_size),
        torch.arange(EXAMPLE, dtype=torch.int64),
    )
    size = Dim("sequence_length", min=1, max=context)
    method = retrace(module, inputs, ({1: size}, {0: size}))
    share_rounding(method)
    return method


class _Decoder(nn.Module):
    """Cache [KV,d,context] of keys and [KV,context,d] of values, per layer, as matrix products read
    them: none of them is transposed while decoding.
    """

    def __init__(self, program: ExportedProgram, config: DecoderConfig, context: int) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.decoder = Rewritten(program, self._operators())
        groups, width = config.kv_heads, config.head_dim
        for layer in range(config.layers):
            self.register_buffer(f"key_{layer}", torch.zeros(groups, width, context))
            self.register_buffer(f"value_{layer}", torch.zeros(groups, context, width))
        self.register_buffer("mean", torch.full((1, config.hidden_size), 1 / config.hidden_size))
        half = torch.eye(width // 2)
        zero = torch.zeros_like(half)
        rows = (torch.cat((zero, -half), 1), torch.cat((half, zero), 1))
        self.register_buffer("swapped", torch.cat(rows))
        self.register_buffer("places", torch.arange(context))

    def forward(self, inputs_embeds: Tensor, cache_position: Tensor) -> Tensor:
        self._call = _Call(self, cache_position)
        past = [
            getattr(self, f"{part}_{layer}")
            for layer in range(self.config.layers)
            for part in ("key", "value")
        ]
        logits, *new = self.decoder(inputs_embeds, cache_position, *past)
        put = torch.ops.aten.index_put_.default
        for layer in range(self.config.layers):
            put(past[2 * layer], (None, None, cache_position), new[2 * layer])
            put(past[2 * layer + 1], (None, cache_position), new[2 * layer + 1])
        return logits

    def _operators(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "fastvlm.cached_attention.default": lambda *args: self._call.attention(*args),
            "fastvlm.quantized_linear.default": _linear,
            "aten.mean.dim": lambda x, *_: F.linear(x, self.mean),
            "aten.slice.Tensor": lambda x, *args: self._call.slice(x, *args),
        }


def _linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation_group: int,
) -> Tensor:
    if zero_point is not None or activation_group != AFFINE:
        raise NotImplementedError(f"activations {activation_group}, zero points {zero_point}")
    return affine_linear(x, weight, scale, bias, bits)


class _Call:
    """What one call's layers share: where they are, and what they may see."""

    def __init__(self, decoder: _Decoder, position: Tensor) -> None:
        config = decoder.config
        self.config, self.decoder = config, decoder
        self.position = position
        self.last = (position == position[-1:]).float().view(1, 1, -1)
        rows = position.float()
        past = torch.where(decoder.places < position[:1], VISIBLE, -VISIBLE)
        self.past = past.view(1, 1, -1)
        ahead = rows.repeat(config.heads // config.kv_heads).view(1, -1, 1) - rows.view(1, 1, -1)
        self.new = (ahead * 2 + 1).clamp(-1, 1) * VISIBLE
        self._angles: tuple[Tensor, Tensor] | None = None

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The new rows of the rotary tables, once per half: [S,1,d] each."""
        if self._angles is None:
            width = self.config.head_dim
            self._angles = tuple(
                torch.cat((table[self.position],) * 2, 1).view(-1, 1, width) for table in (cos, sin)
            )
        return self._angles

    def slice(self, x: Tensor, axis: int, start: int, end: int) -> Tensor:
        """Everything, or the last position of [1,S,D]."""
        if (axis, start) == (1, -1):
            return torch.bmm(self.last, x)
        if start != 0:
            raise NotImplementedError(f"slice {axis}, {start}, {end}")
        return x

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        _mask: Tensor,
        cos: Tensor,
        sin: Tensor,
        *_: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        kv_heads, width = config.kv_heads, config.head_dim
        group = config.heads // kv_heads
        cos, sin = self.angles(cos, sin)
        query = self._rotated(query, cos, sin) * width**-0.5
        query = query.view(-1, kv_heads, group, width).permute(1, 2, 0, 3).contiguous()
        query = query.view(kv_heads, -1, width)
        key = self._rotated(key, cos, sin).permute(1, 2, 0).contiguous()
        value = value.view(-1, kv_heads, width).permute(1, 0, 2).contiguous()
        scores = torch.cat(
            (
                torch.minimum(torch.bmm(query, past_key), self.past),
                torch.minimum(torch.bmm(query, key), self.new),
            ),
            2,
        )
        weights = torch.softmax(scores, 2)
        mixed = torch.bmm(weights, torch.cat((past_value, value), 1))
        mixed = mixed.view(kv_heads, group, -1, width).permute(2, 0, 1, 3).contiguous()
        return mixed.view(1, -1, config.heads * width), key, value

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE of [1,S,H*d] -> [S,H,d]."""
        x = x.view(-1, x.shape[2] // self.config.head_dim, self.config.head_dim)
        return x * cos + F.linear(x, self.decoder.swapped) * sin
