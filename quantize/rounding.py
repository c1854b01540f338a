"""Float weights to integers: round to nearest (RTN), or a search for better scales (HQQ).

torchao chooses ranges and rounds. Scales stay positive, which every runtime can take: a sign in
the scale would give 4-bit weights 6 % less error, but XNNPACK refuses it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops import dequantize
from .quiet import quiet_import
from .recipes import Method, Precision, ScaleFormat

CHUNK = 2**23  # weights rounded at once: temporaries stay small beside a table of a gigabyte
HQQ_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Integers:
    """Quantized weights: int8 [N,K] holding `bits`-bit integers, scale float32 [N,G], zero point
    int8 [N,G], or None where it is 0 everywhere.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int

    def dequantize(self) -> Tensor:
        """The float32 weights that the integers stand for: [N,K]."""
        return dequantize(self.weight, self.scale, self.zero_point)


def limits(precision: Precision) -> tuple[int, int]:
    """The least and greatest integer. Symmetric 8-bit: -127..127, as the kernels want it;
    symmetric 4-bit: -8..7, whose 16 steps have 5 % less error than the 15 of -7..7.
    """
    if precision.bits is None:
        raise ValueError("a float layer has no integers")
    top = 2 ** (precision.bits - 1)
    return (1 - top if precision.symmetric and precision.bits == 8 else -top), top - 1


def choose_scales(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor | None]:
    """The tightest scales [N,G] that clip nothing, and zero points int8 (None: symmetric).

    Float32 [N,K] in groups of `group_size`, else one group per row.
    """
    with quiet_import():
        from torchao.quantization.quant_primitives import (  # noqa: PLC0415 - takes seconds
            MappingType,
            choose_qparams_affine,
        )

    low, high = limits(precision)
    kind = MappingType.SYMMETRIC_NO_CLIPPING_ERR if precision.symmetric else MappingType.ASYMMETRIC
    block = (1, precision.group_size or weight.shape[1])
    scale, zero_point = choose_qparams_affine(
        weight,
        kind,
        block,
        torch.int8,
        low,
        high,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int8,
        keepdim=True,
    )
    return scale, None if precision.symmetric else zero_point


def round_to_nearest(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, precision: Precision
) -> Tensor:
    """clamp(round(weight / scale) + zero point): float32 [N,K] -> int8 [N,K]."""
    with quiet_import():
        from torchao.quantization.quant_primitives import quantize_affine  # noqa: PLC0415

    zeros = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
    block = (1, weight.shape[1] // scale.shape[1])
    out: Tensor = quantize_affine(weight, block, scale, zeros, torch.int8, *limits(precision))
    return out


def search_scales(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, precision: Precision
) -> Tensor:
    """Scales [N,G] of less squared error |weight - dequantized|^2 in each group than `scale`.

    The half-quadratic alternation: with s fixed the best integers q are the nearest, with q fixed
    the best s is <w,q> / <q,q>. No step can raise the error. torchao's two HQQ functions do not
    serve: one starts from scales that clip (0.0886 of relative error against 0.0878 on normal
    weights in groups of 32), the other's gain is in zero points that are no integers.
    """
    rows = len(weight)
    groups = weight.reshape(rows, scale.shape[1], -1)
    for _ in range(HQQ_STEPS):
        q = round_to_nearest(weight, scale, zero_point, precision).reshape(groups.shape).float()
        if zero_point is not None:
            q = q - zero_point[:, :, None].float()
        power = (q * q).sum(-1)
        scale = torch.where(power > 0, (groups * q).sum(-1) / power.clamp(min=1), scale)
    return scale


def stored_scales(scale: Tensor, precision: Precision) -> Tensor:
    """Scales as the recipe's runtime has them: float32, of numbers that `scale_format` has."""
    if precision.scale_format is ScaleFormat.BF16:
        return scale.bfloat16().float()
    return scale


def quantize_rows(weight: Tensor, precision: Precision) -> Integers:
    """RTN or HQQ of float [N,K]."""
    if precision.method is Method.PALETTE:
        raise ValueError("lookup tables have no scales: see `palettes`")
    scale, zero_point = choose_scales(weight, precision)
    if precision.method is Method.HQQ:
        scale = search_scales(weight, scale, zero_point, precision)
    scale = stored_scales(scale, precision)
    integers = round_to_nearest(weight, scale, zero_point, precision)
    return Integers(
        weight=integers, scale=scale, zero_point=zero_point, bits=int(precision.bits or 0)
    )


def by_rows(
    weight: Tensor, quantize: Callable[[Tensor], Integers], hessian: Tensor | None = None
) -> tuple[Integers, float]:
    """`quantize` of a float [N,K], `CHUNK` weights at a time: output channels are independent.

    Also the relative error |W - W_q| / |W|, or with H = X'X that of the output, |X (W - W_q)'| /
    |X W'|.
    """
    parts: list[Integers] = []
    lost = whole = 0.0
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        parts.append(quantize(rows))
        lost += _power(rows - parts[-1].dequantize(), hessian)
        whole += _power(rows, hessian)
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    integers = Integers(
        weight=torch.cat([part.weight for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat(zeros) if zeros else None,
        bits=parts[0].bits,
    )
    return integers, (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def _power(weight: Tensor, hessian: Tensor | None) -> float:
    return float(((weight if hessian is None else weight @ hessian) * weight).sum())
