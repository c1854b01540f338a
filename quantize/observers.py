"""Ranges of activations, as torchao's observers find them on calibration images.

A range becomes unsigned integers with a zero point (`static` activations), or, by its end that is
farther from 0, numbers to either side of it (`symmetric` ones): integers up to 127, fp8 up to 448.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..exporter.errors import ExportError
from .quiet import quiet_import
from .recipes import Observer, Recipe

with quiet_import():
    from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationSpec

# Fine enough for 99.99 % of a range whose outliers are 100 times its body.
BINS = 2**14


class PercentileObserver(HistogramObserver):  # type: ignore[misc]
    """The range that holds `percentile` % of all calibration values, half of the rest either side.

    Exact up to one of the histogram's bins.
    """

    def __init__(self, percentile: float, **kwargs: Any) -> None:
        super().__init__(bins=BINS, **kwargs)
        self.outside = (1 - percentile / 100) / 2

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        share = torch.cumsum(self.histogram.double(), 0)
        share /= share[-1].clone()
        first = int((share <= self.outside).sum())
        last = int((share < 1 - self.outside).sum())
        width = (self.max_val - self.min_val) / self.bins
        return self.min_val + width * first, self.min_val + width * (last + 1)


class _AroundZero:
    """Scales of symmetric numbers: of a range [a, b] found as ever, max(|a|, |b|) / largest.

    torchao's own would divide by 127.5 where integers are -128..127, and clip the largest value.
    """

    largest: float = 127
    eps: Tensor

    def _calculate_qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.maximum(low.abs(), high.abs()).reshape(1) / self.largest
        return scale.maximum(self.eps), torch.zeros(1, dtype=torch.int64)


class _MinMaxAroundZero(_AroundZero, MinMaxObserver):  # type: ignore[misc]
    pass


class _HistogramAroundZero(_AroundZero, HistogramObserver):  # type: ignore[misc]
    pass


class _PercentileAroundZero(_AroundZero, PercentileObserver):
    pass


def unsigned(recipe: Recipe) -> Any:
    """What torchao is to do with `static` activations: uint8 0..255, by the recipe's observer."""
    observers: dict[Observer, Any] = {
        Observer.MINMAX: MinMaxObserver,
        Observer.HISTOGRAM: HistogramObserver,
        Observer.PERCENTILE: PercentileObserver.with_args(percentile=recipe.percentile),
    }
    return QuantizationSpec(
        dtype=torch.uint8,
        observer_or_fake_quant_ctr=observers[recipe.observer],
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
    )


def around_zero(recipe: Recipe) -> Any:
    """Likewise of `symmetric` ones: int8 -128..127 with zero point 0."""
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=_around_zero(recipe),
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric,
    )


def of_floats(recipe: Recipe, largest: float) -> Any:
    """An observer whose scale takes its range to floats of at most that magnitude."""
    found = _around_zero(recipe)(
        dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_symmetric
    )
    found.largest = largest
    return found


def _around_zero(recipe: Recipe) -> Any:
    return {
        Observer.MINMAX: _MinMaxAroundZero,
        Observer.HISTOGRAM: _HistogramAroundZero,
        Observer.PERCENTILE: _PercentileAroundZero.with_args(percentile=recipe.percentile),
    }[recipe.observer]


def refuse_not_finite(observer: nn.Module, layer: str, side: str) -> None:
    """Let an observer raise ExportError for what is not a number, in the name of its layer."""
    observer.register_forward_pre_hook(partial(_check_finite, layer, side))


def _check_finite(layer: str, side: str, _: nn.Module, args: tuple[Tensor]) -> None:
    # The sum would overflow for large but finite values.
    low, high = torch.aminmax(args[0])
    if not (low.isfinite() and high.isfinite()):
        raise ExportError(
            f"Calibration finds values that are not finite at the {side} of {layer}.",
            "Run `fastvlm-export inspect` on the checkpoint: its weights may be damaged.",
        )
