"""What quantization costs: the quantized model in eager PyTorch, held against the original.

No artifact takes part: this is the recipe's own price, and every target pays it. How far an
artifact is from the quantized model is `parity`'s to say.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..quantize.recipes import LossLimits
from ..targets.base import Session
from . import metrics
from .accuracy import AccuracyReport, Share
from .checks import Check, missing
from .recording import Progress, Recording, along


@dataclass(frozen=True, kw_only=True)
class FeatureLoss:
    """Image features [1,N,D] of one case: PSNR in dB, the worst image token, the worst value."""

    psnr_db: float
    cosine: float
    relative: float


@dataclass(frozen=True, kw_only=True)
class CaseLoss:
    """One image and prompt, the quantized model fed its own features and the original's tokens.

    `kl` in nats and `agrees` (the same token first) are one per position. `flaw` says why there is
    nothing to compare; the other fields are then empty.
    """

    case: str
    features: FeatureLoss | None
    kl: tuple[float, ...]
    agrees: tuple[bool, ...]
    flaw: str = ""

    @property
    def tokens_before_difference(self) -> int:
        """Greedy tokens that both sides write before they first differ."""
        return self.agrees.index(False) if False in self.agrees else len(self.agrees)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The bundled task's answers before and after quantization."""

    original: AccuracyReport
    quantized: AccuracyReport

    @property
    def points_lost(self) -> float:
        """Percentage points of exact answers, negative where there are more; NaN for no question.

        Only of questions that both were asked: raises ValueError where they are not the same.
        """
        total = self.quantized.agreement(self.original).total
        lost = self.original.total.right - self.quantized.total.right
        return 100 * lost / total if total else math.nan


@dataclass(frozen=True, kw_only=True)
class QuantizationLoss:
    """All cases, and the gates of the recipe. Without `limits` any finite loss passes.

    `answers` is None where the bundled task was not asked.
    """

    cases: tuple[CaseLoss, ...]
    limits: LossLimits | None
    answers: Answers | None = None

    @property
    def mean_kl(self) -> float:
        """Over all positions of all cases; NaN for none."""
        values = [value for case in self.cases for value in case.kl]
        return float(np.mean(values)) if values else math.nan

    @property
    def worst_kl(self) -> float:
        """Of any position; NaN for none."""
        values = [value for case in self.cases for value in case.kl]
        return max(values) if values else math.nan

    @property
    def same_first(self) -> Share:
        """Positions whose most likely token is the original's."""
        same = [agrees for case in self.cases for agrees in case.agrees]
        return Share(right=sum(same), total=len(same))

    @property
    def features(self) -> FeatureLoss | None:
        """The worst of each number over the cases; None where no image was compared."""
        found = [case.features for case in self.cases if case.features]
        if not found:
            return None
        return FeatureLoss(
            psnr_db=min(loss.psnr_db for loss in found),
            cosine=max(loss.cosine for loss in found),
            relative=max(loss.relative for loss in found),
        )

    @property
    def checks(self) -> tuple[Check, ...]:
        """Mean KL, and points lost where the bundled task was asked."""
        limit = self.limits.mean_kl if self.limits else math.inf
        flaws = [f"{case.case}: {case.flaw}" for case in self.cases if case.flaw]
        if not self.cases:
            flaws = ["no image was compared"]
        mean = Check(name="mean KL", value=self.mean_kl, limit=limit)
        checks = [missing(mean.name, limit, flaws[0]) if flaws else mean]
        if self.answers:
            limit = self.limits.accuracy_points if self.limits else math.inf
            lost = self.answers.points_lost
            checks.append(Check(name="accuracy points lost", value=lost, limit=limit))
        return tuple(checks)

    @property
    def passed(self) -> bool:
        """True where every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, object]:
        """Plain data. Numbers may be NaN or infinite: `report.to_json` writes those as null."""
        return {
            "passed": self.passed,
            "checks": [
                {"name": c.name, "value": c.value, "limit": c.limit, "message": c.message}
                | {"passed": c.passed}
                for c in self.checks
            ],
            "mean_kl": self.mean_kl,
            "worst_kl": self.worst_kl,
            "top1_agreement": self.same_first.value,
            "positions": self.same_first.total,
            "features": self.features,
            "accuracy_points_lost": self.answers.points_lost if self.answers else None,
            "cases": [
                {
                    "case": case.case,
                    "features": case.features,
                    "kl": case.kl,
                    "agrees": case.agrees,
                    "tokens_before_difference": case.tokens_before_difference,
                    "flaw": case.flaw,
                }
                for case in self.cases
            ],
        }


def measure_loss(
    recordings: Sequence[Recording],
    quantized: Session,
    limits: LossLimits | None,
    progress: Progress | None = None,
) -> QuantizationLoss:
    """Run the quantized model on what was recorded of the original, along the original's tokens.

    It sees its own image features and embeddings, as a user's would. Its errors are raised; outputs
    that are NaN, infinite or of another shape fail.
    """
    say = progress or (lambda _: None)
    cases = []
    for number, recording in enumerate(recordings, 1):
        say(f"{recording.case.name}, {number} of {len(recordings)}")
        cases.append(_case(recording, quantized))
    return QuantizationLoss(cases=tuple(cases), limits=limits)


def _case(recording: Recording, quantized: Session) -> CaseLoss:
    case = recording.case
    image = np.array(quantized.encode_image(case.pixels))
    if flaw := metrics.flaw(recording.features, image):
        return CaseLoss(
            case=case.name, features=None, kl=(), agrees=(), flaw=f"image features: {flaw}"
        )
    features = FeatureLoss(
        psnr_db=metrics.psnr(recording.features, image),
        cosine=metrics.cosine_distance(recording.features, image),
        relative=metrics.relative(recording.features, image),
    )
    logits = along(recording, quantized, image)
    if flaw := metrics.flaw(recording.logits, logits):
        return CaseLoss(case=case.name, features=features, kl=(), agrees=(), flaw=f"logits: {flaw}")
    same = recording.logits.argmax(-1) == logits.argmax(-1)
    return CaseLoss(
        case=case.name,
        features=features,
        kl=tuple(metrics.kl(recording.logits, logits).tolist()),
        agrees=tuple(same.tolist()),
    )
