"""Quantized weights as operators of their own: integers times scales, or indices into tables.

One node in the ExportedProgram, so that a target packs the very integers and picks its runtime's
fused kernel. The eager implementations below are the definitions that every target is held to.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FLOAT_ACTIVATIONS, PER_TOKEN, AFFINE = 0, -1, -2
"""Values of `activation_group` that are not a number of values."""

CHUNK = 2**23  # values looked up at once: 32-bit places of a whole table would be its size again


def dequantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(weight - zero_point) * scale: int8 [N,K], scale and zero point [N,G], G dividing K."""
    rows, width = weight.shape
    groups = scale.shape[1]
    values = weight.reshape(rows, groups, width // groups).to(scale.dtype)
    if zero_point is not None:
        values = values - zero_point[:, :, None].to(scale.dtype)
    out: Tensor = (values * scale[:, :, None]).reshape(rows, width)
    return out


def round_activations(x: Tensor, activation_group: int) -> Tensor:
    """Symmetric 8-bit rounding of [...,K], one scale per token (-1) or per so many values; 0: none.

    q = round(x / s) with s = max|x| / 127, half to even. -2: `round_affine`.
    """
    if activation_group == FLOAT_ACTIVATIONS:
        return x
    if activation_group == AFFINE:
        return round_affine(x)
    size = x.shape[-1] if activation_group == PER_TOKEN else activation_group
    groups = x.unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded = torch.round(groups / torch.where(scale > 0, scale, 1.0))
    out: Tensor = (rounded * scale).flatten(-2)
    return out


def round_affine(x: Tensor) -> Tensor:
    """Asymmetric 8-bit rounding of [...,K], one scale and zero point per token: XNNPACK's qd8.

    With r = 255 / (max - min), both taken with 0 among the values, q = round(x r) + z in -128..127
    and x becomes (q - z) / r, in this order of float32 operations, half to even. Of the zero points
    that put an end of the range on its integer, -128 - min r and 127 - max r, z is the rounded one
    of the end that is nearer to 0. Tokens whose scale 1 / r is no normal number become zeros.
    """
    wide = x.float()
    low = wide.amin(-1, keepdim=True).clamp(max=0)
    high = wide.amax(-1, keepdim=True).clamp(min=0)
    # PyTorch multiplies a number over a tensor by the reciprocal, which rounds twice.
    inverse = torch.full_like(low, 255) / torch.where(high > low, high - low, 255.0)
    scale = 1 / inverse
    least, greatest = low * inverse, high * inverse
    by_least = (-128 + least) + (127 + greatest) > 0
    zero_point = torch.where(by_least, -128 - least, 127 - greatest).clamp(-128, 127).round()
    integers = (wide * inverse).round().add_(zero_point).clamp_(-128, 127).sub_(zero_point)
    normal = scale >= torch.finfo(torch.float32).smallest_normal
    return torch.where(normal, integers * scale, 0.0).to(x.dtype)


def to_integers(
    x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """clamp(round(x / scale) + zero_point), half to even: ONNX's and Core ML's definition.

    PyTorch's own operator multiplies by 1 / scale, which is off by a bit: of float16 numbers many
    lie halfway between two integers, and land on the other side.
    """
    return ((x / scale).round() + zero_point).clamp(low, high).to(dtype)


@torch.library.custom_op("fastvlm::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation_group: int,
) -> Tensor:
    """round_activations(x) @ dequantize(weight)' + bias.

    x [...,K] float; weight [N,K] int8 holding `bits`-bit integers (signed); scale [N,G] float,
    zero_point [N,G] int8 or None; bias [N] float or None; `activation_group` 0: x as it is,
    -1: one scale per token, -2: one scale and zero point per token, else so many values per scale.
    """
    return F.linear(
        round_activations(x, activation_group), dequantize(weight, scale, zero_point), bias
    )


@quantized_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation_group: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max  # 448


def dequantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """weight * its channel's scale: float8_e4m3fn [N,K], scale [N] -> [N,K] of the scale's type."""
    return weight.to(scale.dtype) * scale[:, None]


def round_fp8(x: Tensor, input_scale: float) -> Tensor:
    """x / s, cut at +-448 and rounded to the nearest float8_e4m3fn, half to even; times s.

    In the type of x, and in float32 until there is a float8.
    """
    eight = (x.float() / input_scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
    return (eight.float() * input_scale).to(x.dtype)


def cut_fp8(x: Tensor, input_scale: float) -> Tensor:
    """What `round_fp8` would make of real numbers: nothing beyond 448 s."""
    return x.clamp(-LARGEST_FP8 * input_scale, LARGEST_FP8 * input_scale)


@torch.library.custom_op("fastvlm::fp8_linear", mutates_args=())
def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, input_scale: float
) -> Tensor:
    """round_fp8(x, input_scale) @ dequantize_fp8(weight, scale)' + bias.

    x [...,K] float; weight [N,K] float8_e4m3fn; scale [N] and bias [N] (or None) of x's type.
    """
    return F.linear(round_fp8(x, input_scale), dequantize_fp8(weight, scale), bias)


@fp8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, input_scale: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("fastvlm::quantized_embedding", mutates_args=())
def quantized_embedding(
    input_ids: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    """Rows of dequantize(weight): ids [B,S] int64, weight [V,D] int8, scale [V,G] -> [B,S,D]."""
    ids = input_ids.flatten()
    zeros = None if zero_point is None else zero_point[ids]
    rows = dequantize(weight[ids], scale[ids], zeros)
    out: Tensor = rows.unflatten(0, input_ids.shape)
    return out


@quantized_embedding.register_fake
def _(
    input_ids: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    return scale.new_empty((*input_ids.shape, weight.shape[1]))


@torch.library.custom_op("fastvlm::lookup", mutates_args=())
def lookup(indices: Tensor, table: Tensor) -> Tensor:
    """The weights that indices stand for: out[n,...] = table[n // (N / G), indices[n,...]].

    Indices uint8 [N,...], table float [G,E], G dividing N: each N / G consecutive rows (a layer's
    output channels) share one row of E values, more than the largest index. Gives [N,...] of the
    table's type.
    """
    groups, entries = table.shape
    flat, values = indices.reshape(groups, -1), table.flatten()
    out = table.new_empty(flat.shape)
    first = torch.arange(0, groups * entries, entries, dtype=torch.int32)[:, None]
    step = max(1, CHUNK // max(1, flat.shape[1]))
    for part, offset, into in zip(
        flat.split(step), first.split(step), out.split(step), strict=True
    ):
        for columns, to in zip(part.split(CHUNK, 1), into.split(CHUNK, 1), strict=True):
            places = columns.int() + offset
            to.copy_(values.index_select(0, places.flatten()).reshape(places.shape))
    return out.reshape(indices.shape)


@lookup.register_fake
def _(indices: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(indices.shape)


@torch.library.custom_op("fastvlm::palettized_embedding", mutates_args=())
def palettized_embedding(input_ids: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """Rows of lookup(indices, table): ids [B,S] int64, indices uint8 [V,D], table [G,E] -> [B,S,D].

    Only the rows that are asked for are looked up; [B,S,D] has the table's type.
    """
    ids = input_ids.flatten()
    tables = table[ids // (len(indices) // len(table))]
    out: Tensor = tables.gather(1, indices[ids].long()).unflatten(0, input_ids.shape)
    return out


@palettized_embedding.register_fake
def _(input_ids: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    return table.new_empty((*input_ids.shape, indices.shape[1]))
