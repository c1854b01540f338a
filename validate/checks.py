"""A number, its limit, and whether it passed: what every gate in this package is made of."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Check:
    """One measured number against its limit. Lower is always better, e.g. `1 - cosine`.

    `message` says why there is no number (a missing output, another shape, nothing compared);
    such a check holds NaN and fails, like every value that is not finite.
    """

    name: str
    value: float
    limit: float
    message: str = ""

    @property
    def passed(self) -> bool:
        """True where the value is finite and within the limit."""
        return math.isfinite(self.value) and self.value <= self.limit

    @property
    def severity(self) -> float:
        """value / limit: above 1 fails, infinite where there is no number or the limit is 0."""
        if self.passed and self.value <= 0:
            return 0.0
        if not math.isfinite(self.value) or self.limit <= 0:
            return math.inf
        return self.value / self.limit

    def __str__(self) -> str:
        if self.message:
            return f"{self.name}: {self.message}"
        sign = "<=" if self.passed else ">"
        return f"{self.name} {self.value:.3g} {sign} {self.limit:.3g}"


def missing(name: str, limit: float, message: str) -> Check:
    """Return a check that fails because there is nothing to measure."""
    return Check(name=name, value=math.nan, limit=limit, message=message)
