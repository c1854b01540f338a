"""What a parity comparison takes and gives: cases, limits, measurements and the verdict."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

from .checks import Check
from .formats import check_limit, check_name, check_value
from .limits import Limits


class Stage(StrEnum):
    """The stages of answering a question about an image, in order."""

    PREPROCESS = "preprocess"
    IMAGE_FEATURES = "image_features"
    EMBEDDINGS = "embeddings"
    FIRST_TOKEN = "first_token"  # noqa: S105 - a stage, not a secret
    TEACHER_FORCED = "teacher_forced"
    GREEDY = "greedy"


class Scope(StrEnum):
    """What the candidate was fed: the reference's inputs, or its own results."""

    ISOLATED = "isolated"
    END_TO_END = "end_to_end"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One stage on one case: the gates, and numbers without a limit (`max_abs`, `psnr_db`)."""

    stage: Stage
    scope: Scope
    case: str
    checks: tuple[Check, ...]
    numbers: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """True where every check passed; a measurement without checks fails."""
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Tie:
    """The candidate took another token where the reference's own margin is within rounding.

    `margin` is the reference's logit of its own token less that of the candidate's; both may move
    by the logits limit, so a margin of up to twice that (`noise`) decides nothing. A free-running
    candidate is then handed the reference's token, so that both go on with the same text.
    """

    case: str
    stage: Stage
    scope: Scope
    position: int
    reference_token: int
    candidate_token: int
    margin: float
    noise: float


@dataclass(frozen=True, kw_only=True)
class FreeRun:
    """Greedy tokens of both sides on one case, `steps` of them; the candidate's may be missing.

    The candidate's are what it chose itself, at ties too: see `Tie`.
    """

    case: str
    reference: tuple[int, ...]
    candidate: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """All measurements of a comparison. It passes where there is at least one and none failed."""

    measurements: tuple[Measurement, ...]
    ties: tuple[Tie, ...]
    free_runs: tuple[FreeRun, ...]
    limits: Limits
    steps: int

    @property
    def passed(self) -> bool:
        """True where something was measured and every check passed."""
        return bool(self.measurements) and all(m.passed for m in self.measurements)

    @property
    def failures(self) -> tuple[tuple[Measurement, Check], ...]:
        """Failed checks by stage; within a stage isolated ones first, the worst first."""
        failed = [(m, c) for m in self.measurements for c in m.checks if not c.passed]
        order = list(Stage)
        return tuple(
            sorted(
                failed,
                key=lambda item: (
                    item[0].scope is not Scope.ISOLATED,
                    order.index(item[0].stage),
                    -item[1].severity,
                ),
            )
        )

    @property
    def first_broken(self) -> Stage | None:
        """The first stage that fails on the reference's inputs, else the first end to end."""
        return self.failures[0][0].stage if self.failures else None

    @property
    def worst(self) -> tuple[Measurement, Check] | None:
        """The check nearest to its limit, or furthest beyond it."""
        pairs = [(m, c) for m in self.measurements for c in m.checks]
        return max(pairs, key=lambda pair: pair[1].severity, default=None)

    @property
    def verdict(self) -> str:
        """One sentence: what broke first, by how much; or the worst number that passed."""
        if not self.failures:
            if self.worst is None:
                return "Nothing was compared."
            return f"Every stage agrees with PyTorch. Nearest to a limit: {self.nearest}."
        return f"The first stage to break: {self.failure}"

    @property
    def nearest(self) -> str:
        """The number nearest to its limit, in words; empty where nothing was compared."""
        return _describe(*self.worst) if self.worst else ""

    @property
    def failure(self) -> str:
        """What broke first, by how much, and what fails after it; empty where nothing does."""
        if not self.failures:
            return ""
        later = {STAGE_NAMES[m.stage] for m, _ in self.failures if m.stage != self.first_broken}
        after = f" Failing after it: {', '.join(sorted(later))}." if later else ""
        return f"{_describe(*self.failures[0])}.{after}"

    def to_dict(self) -> dict[str, object]:
        """Plain data. Numbers may be NaN or infinite: `report.to_json` writes those as null."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "first_broken": self.first_broken,
            "steps": self.steps,
            "limits": asdict(self.limits),
            "measurements": [
                {
                    "stage": m.stage,
                    "scope": m.scope,
                    "case": m.case,
                    "passed": m.passed,
                    "checks": [asdict(check) | {"passed": check.passed} for check in m.checks],
                    "numbers": dict(m.numbers),
                }
                for m in self.measurements
            ],
            "ties": [asdict(tie) for tie in self.ties],
            "free_runs": [asdict(run) for run in self.free_runs],
        }


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One line of a table: the worst of one check over all cases, and the case it came from."""

    stage: Stage
    name: str
    limit: float
    worst: Mapping[Scope, tuple[Check, str]]

    @property
    def overall(self) -> tuple[Check, str]:
        """The worse of the two scopes."""
        return max(self.worst.values(), key=_badness)

    @property
    def judged(self) -> bool:
        """False for a number that passes wherever it is finite."""
        return math.isfinite(self.limit) or not self.passed

    @property
    def passed(self) -> bool:
        """True where every scope passed."""
        return all(check.passed for check, _ in self.worst.values())


def summarize(result: ParityResult) -> list[Summary]:
    """The worst of each stage's checks over the cases, in the order of the pipeline."""
    groups: dict[tuple[Stage, str], dict[Scope, list[tuple[Check, str]]]] = {}
    for measurement in result.measurements:
        for check in measurement.checks:
            scopes = groups.setdefault((measurement.stage, check.name), {})
            scopes.setdefault(measurement.scope, []).append((check, measurement.case))
    lines = [
        Summary(
            stage=stage,
            name=name,
            limit=next(iter(scopes.values()))[0][0].limit,
            worst={scope: max(found, key=_badness) for scope, found in scopes.items()},
        )
        for (stage, name), scopes in groups.items()
    ]
    return sorted(lines, key=lambda line: list(Stage).index(line.stage))


def _badness(found: tuple[Check, str]) -> tuple[float, float]:
    """Orders checks of one limit: no number at all is the worst."""
    check = found[0]
    return check.severity, check.value if check.value == check.value else float("inf")


STAGE_NAMES = {
    Stage.PREPROCESS: "Preprocessing",
    Stage.IMAGE_FEATURES: "Image features",
    Stage.EMBEDDINGS: "Embeddings",
    Stage.FIRST_TOKEN: "First-token logits",
    Stage.TEACHER_FORCED: "Teacher-forced logits",
    Stage.GREEDY: "Greedy tokens",
}


def _describe(measurement: Measurement, check: Check) -> str:
    scope = "fed by the reference" if measurement.scope is Scope.ISOLATED else "end to end"
    on = f" on {measurement.case}" if measurement.case else ""
    value = check.message or f"{check_value(check.name, check.value)} (limit {_limit(check)})"
    return f"{STAGE_NAMES[measurement.stage]}, {check_name(check.name)}: {value}{on}, {scope}"


def _limit(check: Check) -> str:
    return check_limit(check.name, check.limit)
