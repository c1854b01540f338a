"""The decoder for ExecuTorch: the cache in buffers, everything else in one piece for XNNPACK.

XNNPACK knows no reductions, comparisons, integers or slices of a size that is not fixed, and what
it does not know splits a method into several delegates. So a mean is a product with a row of 1/D,
RoPE's swapped halves are a product with a signed permutation, and the last row is picked by a
product with ones and zeros. Those are exact but for the mean, whose order of sums is its own.
The cache's filled rows go in as they were before the call; new keys and values come out, and
portable operators write them to their positions afterwards, in place.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from ..exporter.config import DecoderConfig
from ..quantize.ranges import QUANTIZED_LINEAR
from .executorch_linear import quantized_linear, share_rounding
from .executorch_retrace import Rewritten, retrace

VISIBLE = 1e30
"""Limit of scores that a row may see; its negative, of those that it may not, has weight 0.

A limit, not a number to add: what an earlier answer left in the cache may be of any size.
"""

BLOCK = 64
"""A call reads as many rows of the cache as are filled, rounded up to a multiple of this."""

PARTS = ("key", "value")
EXAMPLE = 3  # new positions while tracing: neither 0 nor 1, which torch.export would specialize


def decoder_method(
    program: ExportedProgram, config: DecoderConfig, context: int
) -> ExportedProgram:
    """`graphs.build`'s decoder as a method with the cache inside.

    inputs_embeds [1,S,D] float32, cache_position [S] int64, consecutive positions below `context`
    -> logits [1,1,V] of the last. Starting again at position 0 resets; the runtime refuses
    positions that the rotary tables do not have.
    """
    module = _Decoder(program, config, context)
    inputs = (torch.zeros(1, EXAMPLE, config.hidden_size), torch.arange(EXAMPLE))
    size = Dim("sequence_length", min=1, max=context)
    method = retrace(module, inputs, ({1: size}, {0: size}))
    share_rounding(method)
    return method


class _Decoder(nn.Module):
    """Per layer a cache of keys and one of values, [context,KV,d]: its first rows lie together."""

    mean: Tensor
    swapped: Tensor
    places: Tensor

    def __init__(self, program: ExportedProgram, config: DecoderConfig, context: int) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.rows = _Rows(self)
        self.decoder = Rewritten(
            program,
            {
                "fastvlm.cached_attention.default": self.rows.attention,
                QUANTIZED_LINEAR: quantized_linear,
                "aten.mean.dim": lambda x, *_: F.linear(x, self.mean),
                "aten.slice.Tensor": self.rows.slice,
            },
        )
        groups, width = config.kv_heads, config.head_dim
        for layer in range(config.layers):
            for part in PARTS:
                self.register_buffer(f"{part}_{layer}", torch.zeros(context, groups, width))
        self.register_buffer("mean", torch.full((1, config.hidden_size), 1 / config.hidden_size))
        one, none = torch.eye(width // 2), torch.zeros(width // 2, width // 2)
        swapped = torch.cat((torch.cat((none, -one), 1), torch.cat((one, none), 1)))
        self.register_buffer("swapped", swapped)  # (x1, x2) -> (-x2, x1)
        self.register_buffer("places", torch.arange(context))

    def forward(self, inputs_embeds: Tensor, cache_position: Tensor) -> Tensor:
        cache = [
            getattr(self, f"{part}_{layer}")
            for layer in range(self.config.layers)
            for part in PARTS
        ]
        filled = _filled(cache_position, self.context)
        self.rows.start(cache_position, filled)
        past = [part[:filled] for part in cache]
        logits: Tensor
        # What stands where the mask was is not read: a row's own position says what it may see.
        logits, *new = self.decoder(inputs_embeds, cache_position, *past)
        for part, rows in zip(cache, new, strict=True):
            torch.ops.aten.index_put_.default(part, (cache_position,), rows)
        return logits


def _filled(position: Tensor, context: int) -> int:
    """How many rows of the cache a call at `position` [S] reads; a number of the run."""
    if context <= BLOCK:
        return context
    blocks = torch.div(position[:1], BLOCK, rounding_mode="floor") + 1
    filled = cast(int, (blocks * BLOCK).clamp(BLOCK, context).item())
    torch._check(filled >= BLOCK)
    torch._check(filled <= context)
    return filled


class _Rows:
    """What the layers of one call share: where its new rows are, and what each may see."""

    last: Tensor  # [1,1,S]: 1 at the last row, else 0
    past: Tensor  # [1,P,1]: limits of scores with the cache's P rows
    new: Tensor  # [1,G*S,S]: with the new keys; query heads of one key head one behind the other

    def __init__(self, decoder: _Decoder) -> None:
        self.config = decoder.config
        self.decoder = decoder

    def start(self, position: Tensor, filled: int) -> None:
        """Begin a call whose rows are at `position` [S], and that reads `filled` of the cache."""
        self.swapped, self.position = self.decoder.swapped, position
        self.angles: dict[int, Tensor] = {}
        self.last = (position == position[-1:]).float().view(1, 1, -1)
        seen = self.decoder.places[:filled] < position[:1]
        self.past = torch.where(seen, VISIBLE, -VISIBLE).view(1, -1, 1)
        # [G*S,S] is made inside the delegate, of rows alone: the memory of what is outside is
        # set aside for S = context.
        rows = position.float()
        group = self.config.heads // self.config.kv_heads
        ahead = rows.repeat(group).view(1, -1, 1) - rows.view(1, 1, -1)
        self.new = (ahead * 2 + 1).clamp(-1, 1) * VISIBLE

    def slice(self, x: Tensor, axis: int, start: int, end: int) -> Tensor:
        """`x[:, -1:]` of [1,S,D]; the other slices in a decoder are of everything."""
        if (axis, start) == (1, -1):
            return torch.bmm(self.last, x)
        if start != 0:
            raise NotImplementedError(f"slice along {axis} from {start} to {end}")
        return x

    def attention(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`fastvlm::cached_attention` of one sequence: mixed [1,S,H*d], new key and value.

        Keys and values are as the cache holds them: [...,KV,d].
        """
        query, key, value, past_key, past_value, _, cos, sin, heads, kv_heads = args
        width = self.config.head_dim
        group = heads // kv_heads
        query = self._rotated(query, cos, sin) * width**-0.5
        query = query.view(-1, kv_heads, group, width).permute(1, 2, 0, 3).contiguous()
        query = query.view(kv_heads, -1, width)  # [KV,G*S,d]
        key = self._rotated(key, cos, sin)
        value = value.view(-1, kv_heads, width)
        # Keys times queries, not the reverse: XNNPACK repacks what stands on the right.
        past = torch.bmm(_heads_first(past_key), query.permute(0, 2, 1).contiguous())
        past = torch.minimum(past, self.past).permute(0, 2, 1).contiguous()
        new = torch.minimum(torch.bmm(query, key.permute(1, 2, 0).contiguous()), self.new)
        weights = torch.softmax(torch.cat((past, new), 2), 2)
        mixed = torch.bmm(weights, _heads_first(torch.cat((past_value, value), 0)))
        mixed = mixed.view(kv_heads, group, -1, width).permute(2, 0, 1, 3).contiguous()
        return mixed.view(1, -1, heads * width), key, value

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE of [1,S,H*d] by tables [context,d/2] -> [S,H,d]."""
        width = self.config.head_dim
        for index, table in enumerate((cos, sin)):
            if index not in self.angles:  # every layer has the same tables
                rows = table[self.position]
                self.angles[index] = torch.cat((rows, rows), 1).view(-1, 1, width)
        x = x.view(-1, x.shape[2] // width, width)
        return x * self.angles[0] + F.linear(x, self.swapped) * self.angles[1]


def _heads_first(x: Tensor) -> Tensor:
    """[S,KV,d] -> [KV,S,d]."""
    return x.permute(1, 0, 2).contiguous()
