"""What is judged over all images together, where roundings decide what a single value is.

Two correct computations that differ in a last bit round some activations to other sides. Which
ones depends on the processor, the library and the number of threads, so the largest difference of
any logit is a draw from a long tail. Means over thousands of values are not.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..targets.base import Array
from . import metrics
from .checks import Check, missing
from .formats import NOISE_OF_ALL
from .limits import Statistics
from .parity_types import Measurement, Scope, Stage

ALL = "all images"
RMS = "RMS relative, all"
MEAN_KL = "mean KL, all"
TOKENS = "top-1 differs, all"


@dataclass
class _Sums:
    """Of one stage and scope: squares for the RMS, and a KL and a hit for each row of logits."""

    difference: float = 0.0
    size: float = 0.0
    peak: float = 0.0
    count: int = 0
    kl: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    flaw: str = ""

    def add(self, theirs: Array, ours: Array) -> None:
        wide = theirs.astype(np.float64)
        self.difference += float(np.sum((wide - ours) ** 2))
        self.size += float(np.sum(wide**2))
        self.peak = max(self.peak, float(np.abs(wide).max()))
        self.count += wide.size

    @property
    def rms(self) -> float:
        """RMS of the difference in parts of the reference's RMS; NaN where nothing was added."""
        return self._parts(self.size)

    @property
    def noise(self) -> float:
        """RMS of the difference in parts of the reference's peak; NaN where nothing was added."""
        return self._parts(self.count * self.peak**2)

    def _parts(self, size: float) -> float:
        if not self.count:
            return math.nan
        if size > 0:
            return math.sqrt(self.difference / size)
        return math.inf if self.difference else 0.0


class Pool:
    """Sums up image features [1,N,D] and logits [S,V] of all images; see `Statistics`."""

    def __init__(self) -> None:
        self._features: dict[Scope, _Sums] = {}
        self._logits: dict[Scope, _Sums] = {}

    def add_features(self, scope: Scope, theirs: Array, ours: Array) -> None:
        """Image features of one image."""
        self._features.setdefault(scope, _Sums()).add(theirs, ours)

    def add_logits(self, scope: Scope, theirs: Array, ours: Array) -> None:
        """Logits after the prompt and along the reference's tokens."""
        sums = self._logits.setdefault(scope, _Sums())
        sums.add(theirs, ours)
        sums.kl += metrics.kl(theirs, ours).tolist()
        sums.same += (theirs.argmax(-1) == ours.argmax(-1)).tolist()

    def add_flaw(self, stage: Stage, scope: Scope, flaw: str) -> None:
        """An output that can't be compared: its statistics fail."""
        sums = self._features if stage is Stage.IMAGE_FEATURES else self._logits
        sums.setdefault(scope, _Sums()).flaw = flaw

    def statistics(self, scope: Scope) -> Statistics:
        """What was found; NaN for what was not measured."""
        features = self._features.get(scope, _Sums())
        logits = self._logits.get(scope, _Sums())
        return Statistics(
            features_rms=features.rms,
            features_noise=features.noise,
            logits_rms=logits.rms,
            mean_kl=_mean(logits.kl),
            tokens=1 - _mean(logits.same),
        )

    def measurements(self, limits: Statistics) -> Iterator[Measurement]:
        """A measurement for each stage and scope, held to the limits."""
        for scope, sums in self._features.items():
            found = {
                RMS: (sums.rms, limits.features_rms),
                NOISE_OF_ALL: (sums.noise, limits.features_noise),
            }
            yield _measurement(Stage.IMAGE_FEATURES, scope, sums, found, {})
        for scope, sums in self._logits.items():
            found = {
                RMS: (sums.rms, limits.logits_rms),
                MEAN_KL: (_mean(sums.kl), limits.mean_kl),
                TOKENS: (1 - _mean(sums.same), limits.share(len(sums.same))),
            }
            numbers = {"positions": float(len(sums.kl))}
            yield _measurement(Stage.TEACHER_FORCED, scope, sums, found, numbers)


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _measurement(
    stage: Stage,
    scope: Scope,
    sums: _Sums,
    found: Mapping[str, tuple[float, float]],
    numbers: Mapping[str, float],
) -> Measurement:
    checks = tuple(
        missing(name, limit, sums.flaw) if sums.flaw else Check(name=name, value=value, limit=limit)
        for name, (value, limit) in found.items()
    )
    return Measurement(stage=stage, scope=scope, case=ALL, checks=checks, numbers=numbers)
