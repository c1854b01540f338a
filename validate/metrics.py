"""Distances between a reference array and a candidate's, in float64. Lower is better."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating[Any]]


def flaw(reference: object, candidate: object) -> str:
    """Say why two outputs cannot be compared; empty where they can."""
    if not isinstance(candidate, np.ndarray):
        return "the output is missing"
    if not isinstance(reference, np.ndarray):
        return "the reference's output is missing"
    if reference.shape != candidate.shape:
        return f"the shape is {list(candidate.shape)}, the reference's is {list(reference.shape)}"
    if reference.size == 0:
        return "the output is empty: nothing was compared"
    if not np.isfinite(reference).all():
        return "the reference itself holds NaN or infinity"
    wrong = int(np.size(candidate) - np.count_nonzero(np.isfinite(candidate)))
    return f"{wrong} of {candidate.size} values are NaN or infinite" if wrong else ""


def max_abs(reference: Numbers, candidate: Numbers) -> float:
    """max |r - c|."""
    return float(np.max(np.abs(_wide(reference) - _wide(candidate))))


def relative(reference: Numbers, candidate: Numbers) -> float:
    """max |r - c| / max |r|: the worst difference in parts of the reference's peak."""
    difference, peak = max_abs(reference, candidate), float(np.max(np.abs(_wide(reference))))
    if peak > 0:
        return difference / peak
    return float("inf") if difference > 0 else 0.0


def relative_rms(reference: Numbers, candidate: Numbers) -> float:
    """rms(r - c) / rms(r): the typical difference in parts of the reference's typical value."""
    wide = _wide(reference)
    difference, size = np.linalg.norm(wide - _wide(candidate)), np.linalg.norm(wide)
    if size > 0:
        return float(difference / size)
    return float("inf") if difference > 0 else 0.0


def noise(reference: Numbers, candidate: Numbers) -> float:
    """rmse / max |r|, which is 10^(-PSNR / 20). Lower is better."""
    wide = _wide(reference)
    rmse, peak = float(np.sqrt(np.mean((wide - _wide(candidate)) ** 2))), float(np.abs(wide).max())
    if peak > 0:
        return rmse / peak
    return float("inf") if rmse > 0 else 0.0


def psnr(reference: Numbers, candidate: Numbers) -> float:
    """20 log10(max |r| / rmse) in dB; infinite for equal arrays. Higher is better."""
    return decibels(noise(reference, candidate))


def decibels(noise: float) -> float:
    """The PSNR in dB of noise in parts of the peak."""
    if noise > 0:
        return -20 * math.log10(noise)
    return math.inf if noise == 0 else math.nan


def cosine_distance(reference: Numbers, candidate: Numbers) -> float:
    """Worst 1 - cosine over the vectors of the last axis.

    Computed as |r/|r| - c/|c||^2 / 2, which is the same number without the cancellation.
    """
    units = [_unit(x.reshape(-1, x.shape[-1])) for x in (_wide(reference), _wide(candidate))]
    return float(np.max(np.sum((units[0] - units[1]) ** 2, axis=-1)) / 2)


def kl(reference: Numbers, candidate: Numbers) -> NDArray[np.float64]:
    """KL(reference || candidate) in nats per row: logits [S,V] and [S,V] -> [S]."""
    log_p, log_q = _log_softmax(_wide(reference)), _log_softmax(_wide(candidate))
    out: NDArray[np.float64] = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return np.maximum(out, 0.0)


def _wide(x: Numbers) -> NDArray[np.float64]:
    return np.asarray(x, np.float64)


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    out: NDArray[np.float64] = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    return out


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = x - np.max(x, axis=-1, keepdims=True)
    out: NDArray[np.float64] = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return out
