"""GPTQ (Frantar et al., 2022): rounding that makes up for its own error in what comes after.

For inputs X [T,K] and weights W [N,K] it looks for integers of little |X (W - W_q)'|^2, which is
tr((W - W_q) H (W - W_q)') with H = X'X. Columns are rounded one by one; each one's error is spread
over the columns not yet rounded, by the rows of the Cholesky factor U of H^-1 = U'U (section 3.3).
torchao's own (prototype.gptq) asserts CUDA and packs into the layouts of GPU kernels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .recipes import Precision
from .rounding import Integers, choose_scales, limits, search_scales, stored_scales

DAMPING = 0.01  # of the mean diagonal, as in the paper
BLOCK = 128  # columns between updates of all that come after


def hessian(inputs: Iterable[Tensor], width: int) -> Tensor:
    """H = X'X of the rows of all inputs [...,K]: float32 [K,K]."""
    total = torch.zeros(width, width)
    for x in inputs:
        rows = x.reshape(-1, width).float()
        total.addmm_(rows.T, rows)
    return total


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular U of (H + damping)^-1 = U'U: [K,K] -> float32 [K,K].

    With J the reversal of rows and JHJ = LL', U is the inverse of JLJ, which is upper triangular:
    half the work of factoring the inverse. In float64: H is singular where the calibration has
    fewer tokens than the layer inputs. Weights of an input that is always 0 are rounded to nearest.
    """
    damped = h.double()
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1  # only where every input is always 0
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(h), dtype=upper.dtype)
    factor: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return factor.float()


def quantize_columns(weight: Tensor, factor: Tensor, precision: Precision) -> Integers:
    """GPTQ of float32 [N,K] with `inverse_factor`'s [K,K].

    A group's scales are chosen when its first column's turn comes, by RTN's rule and HQQ's search
    on the weights as they then are. The search changes nothing at groups of 32, and takes a fifth
    of the KL divergence where a whole channel shares a 4-bit scale (bundled model).
    """
    low, high = limits(precision)
    rows, width = weight.shape
    group = precision.group_size or width
    block = max(BLOCK // group, 1) * group if precision.group_size else BLOCK
    columns = weight.T.contiguous()  # [K,N]: one column of weights is one row of memory
    integers = torch.empty(width, rows, dtype=torch.int8)
    scales, zeros = [], []
    for start in range(0, width, block):
        end = min(start + block, width)
        errors = torch.empty(end - start, rows)
        for k in range(start, end):
            if k % group == 0:
                scale, zero_point = _scales(columns[k : k + group].T, precision)
                scales.append(scale)
                zeros.append(zero_point)
                step, zero = scale[:, 0], 0.0 if zero_point is None else zero_point[:, 0].float()
            q = (torch.round(columns[k] / step) + zero).clamp_(low, high)
            integers[k] = q.to(torch.int8)
            error = (columns[k] - (q - zero) * step) / factor[k, k]
            columns[k + 1 : end].addr_(factor[k, k + 1 : end], error, alpha=-1)
            errors[k - start] = error
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    known = [zero for zero in zeros if zero is not None]
    return Integers(
        weight=integers.T.contiguous(),
        scale=torch.cat(scales, 1),
        zero_point=torch.cat(known, 1) if known else None,
        bits=int(precision.bits or 0),
    )


def _scales(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor | None]:
    weight = weight.contiguous()
    scale, zero_point = choose_scales(weight, precision)
    scale = search_scales(weight, scale, zero_point, precision)
    return stored_scales(scale, precision), zero_point
