"""Stage by stage: does a candidate Session compute what the reference computed?

Every stage after preprocessing is measured twice. *Isolated*: the candidate gets the reference's
own inputs, so a difference arose in that stage. *End to end*: the candidate lives on what it made
itself, so differences add up as they do for a user. The first isolated failure, in the order of the
pipeline, is the stage that broke.

Where roundings decide single values (see `Limits.statistics`) those are shown and need only be
finite; what is judged is all images together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from ..targets.base import Array, Session
from . import metrics
from .checks import Check, missing
from .formats import NOISE
from .limits import Limits
from .parity_types import (
    STAGE_NAMES,
    FreeRun,
    Measurement,
    ParityResult,
    Scope,
    Stage,
    Summary,
    Tie,
    summarize,
)
from .pooled import Pool
from .recording import Case, Progress, Recording, one

__all__ = [
    "STAGE_NAMES",
    "FreeRun",
    "Measurement",
    "ParityResult",
    "Scope",
    "Stage",
    "Summary",
    "Tie",
    "compare",
    "summarize",
]


def compare(
    recordings: Sequence[Recording],
    cases: Sequence[Case],
    candidate: Session,
    limits: Limits,
    progress: Progress | None = None,
) -> ParityResult:
    """Measure every stage of `candidate` against what was recorded of the reference.

    `cases` are the recorded images and prompts once more, as the candidate's own contract makes
    them. As many greedy tokens are compared as the recordings have steps. An error of the candidate
    fails its stage.
    """
    say = progress or (lambda _: None)
    measurements: list[Measurement] = []
    ties: list[Tie] = []
    free_runs: list[FreeRun] = []
    pool = Pool()
    for number, (recording, case) in enumerate(zip(recordings, cases, strict=True), 1):

        def announce(stage: Stage, label: str = f"{case.name}, {number} of {len(cases)}") -> None:
            say(f"{label}: {stage}")

        comparison = _Comparison(recording, case, candidate, limits, pool, announce)
        measurements += comparison.run()
        ties += comparison.ties
        free_runs += comparison.free_runs
    if limits.statistics:
        measurements += pool.measurements(limits.statistics)
    if not measurements:
        nothing = missing("images", 0.0, "no image was compared")
        measurements.append(
            Measurement(
                stage=Stage.PREPROCESS, scope=Scope.ISOLATED, case="", checks=(nothing,), numbers={}
            )
        )
    return ParityResult(
        measurements=tuple(measurements),
        ties=tuple(ties),
        free_runs=tuple(free_runs),
        limits=limits,
        steps=min((recording.steps for recording in recordings), default=0),
    )


class _Absent:
    """Stands where the candidate gave no output, and knows why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


Output = Array | _Absent


def _attempt(call: Callable[..., object], *arguments: object) -> Output:
    """The candidate's output, copied since a runtime may reuse its buffers."""
    try:
        out = call(*arguments)
    except Exception as error:  # whatever a runtime raises: that stage has failed, and says why
        return _Absent(f"{type(error).__name__}: {error}".splitlines()[0])
    if not isinstance(out, np.ndarray):
        return _Absent("the output is missing")
    return np.array(out)


def _flaw(reference: Array, candidate: Output) -> str:
    if isinstance(candidate, _Absent):
        return candidate.reason
    return metrics.flaw(reference, candidate)


class _Comparison:
    """One case: runs the decoder of the candidate once per scope and once freely."""

    def __init__(
        self,
        recording: Recording,
        case: Case,
        candidate: Session,
        limits: Limits,
        pool: Pool,
        announce: Callable[[Stage], None],
    ) -> None:
        self.recording, self.case, self.candidate = recording, case, candidate
        self.limits, self.pool, self.announce = limits, pool, announce
        self.ties: list[Tie] = []
        self.free_runs: list[FreeRun] = []

    def run(self) -> Iterator[Measurement]:
        recording, candidate = self.recording, self.candidate
        self.announce(Stage.PREPROCESS)
        yield self._pixels()

        self.announce(Stage.IMAGE_FEATURES)
        image = _attempt(candidate.encode_image, recording.case.pixels)
        yield self._features(Scope.ISOLATED, image)
        if not np.array_equal(recording.case.pixels, self.case.pixels):
            image = _attempt(candidate.encode_image, self.case.pixels)
            yield self._features(Scope.END_TO_END, image)

        self.announce(Stage.EMBEDDINGS)
        text = _attempt(candidate.embed, recording.case.text_ids)
        yield self._embeddings(text)

        self.announce(Stage.FIRST_TOKEN)
        yield from self._logits(Scope.ISOLATED, self._forced())
        own = self._own_prompt(text, image)
        self.announce(Stage.TEACHER_FORCED)
        yield from self._logits(Scope.END_TO_END, self._forced_own(own))
        self.announce(Stage.GREEDY)
        free = self._free(own)
        self.free_runs.append(
            FreeRun(
                case=self.case.name,
                reference=recording.tokens[: recording.steps],
                candidate=() if isinstance(free, _Absent) else tuple(free),
            )
        )
        yield self._greedy(free)

    def _own_prompt(self, text: Output, image: Output) -> Output:
        if isinstance(text, _Absent) or isinstance(image, _Absent):
            return _Absent("an earlier stage gave no output")
        return _attempt(self.recording.case.splice, text, image)

    def _restart(self) -> _Absent | None:
        try:
            self.candidate.reset()
        except Exception as error:  # see _attempt
            return _Absent(f"reset raised {type(error).__name__}: {error}".splitlines()[0])
        return None

    def _forced(self) -> list[Output]:
        """The candidate's logits after each of the reference's inputs."""
        if absent := self._restart():
            return [absent] * len(self.recording.inputs)
        return [_attempt(self.candidate.decode, x) for x in self.recording.inputs]

    def _forced_own(self, prompt: Output) -> list[Output]:
        """The same from the candidate's own prompt and embeddings of the reference's tokens."""
        absent = self._restart()
        if isinstance(prompt, _Absent) or absent:
            return [absent or prompt] * len(self.recording.inputs)
        out = [_attempt(self.candidate.decode, prompt)]
        return out + [_attempt(self._step, token) for token in self.recording.tokens[:-1]]

    def _step(self, token: int) -> Array:
        return self.candidate.decode(self.candidate.embed(one(token)))

    def _free(self, prompt: Output) -> list[int] | _Absent:
        """The tokens that the candidate chooses; at a tie it goes on with the reference's.

        After any other difference it goes on with its own: from there on the two write other texts.
        """
        absent = self._restart()
        if isinstance(prompt, _Absent) or absent:
            return absent or _Absent("an earlier stage gave no output")
        tokens: list[int] = []
        together = True
        logits = _attempt(self.candidate.decode, prompt)
        for position in range(self.recording.steps):
            row, expected = self.recording.logits[position], self.recording.tokens[position]
            flaw = _flaw(row[None], logits)
            if flaw or isinstance(logits, _Absent):
                return _Absent(f"token {position}: {flaw}")
            token = fed = int(logits[0].argmax())
            if together and token != expected:
                tie = self._tie(Stage.GREEDY, Scope.END_TO_END, position, row, token)
                if tie:
                    self.ties.append(tie)
                    fed = expected
                together = tie is not None
            tokens.append(token)
            if position + 1 < self.recording.steps:
                logits = _attempt(self._step, fed)
        return tokens

    def _measurement(
        self, stage: Stage, scope: Scope, checks: Sequence[Check], numbers: dict[str, float]
    ) -> Measurement:
        return Measurement(
            stage=stage, scope=scope, case=self.case.name, checks=tuple(checks), numbers=numbers
        )

    def _pixels(self) -> Measurement:
        theirs, ours = self.recording.case, self.case
        name, limit = "max diff (1/255)", self.limits.pixels
        if flaw := metrics.flaw(theirs.pixels, ours.pixels):
            return self._measurement(
                Stage.PREPROCESS, Scope.ISOLATED, [missing(name, limit, flaw)], {}
            )
        pairs = zip_longest(theirs.prompt_ids, ours.prompt_ids)
        levels = metrics.max_abs(theirs.pixels, ours.pixels) * 255
        checks = [
            Check(name=name, value=levels, limit=limit),
            Check(name="prompt tokens differ", value=sum(a != b for a, b in pairs), limit=0),
        ]
        numbers = {"psnr_db": metrics.psnr(theirs.pixels, ours.pixels)}
        return self._measurement(Stage.PREPROCESS, Scope.ISOLATED, checks, numbers)

    def _features(self, scope: Scope, ours: Output) -> Measurement:
        theirs = self.recording.features
        limits = {
            "max relative": self.limits.features,
            "RMS relative": self.limits.features_rms,
            NOISE: self.limits.features_noise,
            "1 - cosine": self.limits.cosine,
        }
        flaw = _flaw(theirs, ours)
        if flaw or isinstance(ours, _Absent):
            self.pool.add_flaw(Stage.IMAGE_FEATURES, scope, f"{self.case.name}: {flaw}")
            return self._measurement(Stage.IMAGE_FEATURES, scope, _all_missing(limits, flaw), {})
        self.pool.add_features(scope, theirs, ours)
        values = (
            metrics.relative(theirs, ours),
            metrics.relative_rms(theirs, ours),
            metrics.noise(theirs, ours),
            metrics.cosine_distance(theirs, ours),
        )
        checks = _checks(limits, values)
        return self._measurement(Stage.IMAGE_FEATURES, scope, checks, _numbers(theirs, ours))

    def _embeddings(self, ours: Output) -> Measurement:
        theirs, limits = self.recording.embeddings, {"max relative": self.limits.embeddings}
        flaw = _flaw(theirs, ours)
        if flaw or isinstance(ours, _Absent):
            checks, numbers = _all_missing(limits, flaw), {}
        else:
            checks = _checks(limits, [metrics.relative(theirs, ours)])
            numbers = _numbers(theirs, ours)
        return self._measurement(Stage.EMBEDDINGS, Scope.ISOLATED, checks, numbers)

    def _logits(self, scope: Scope, ours: Sequence[Output]) -> list[Measurement]:
        """Row 0 is the first token's, the others are teacher-forced."""
        theirs = self.recording.logits
        first = self._rows(Stage.FIRST_TOKEN, scope, theirs[:1], ours[:1], 0)
        return [first, self._rows(Stage.TEACHER_FORCED, scope, theirs[1:], ours[1:], 1)]

    def _rows(
        self, stage: Stage, scope: Scope, theirs: Array, ours: Sequence[Output], start: int
    ) -> Measurement:
        limits = {
            "max relative": self.limits.logits,
            "RMS relative": self.limits.logits_rms,
            "worst KL": self.limits.worst_kl,
            "mean KL": self.limits.mean_kl,
            "top-1 differs": self.limits.tokens,
        }
        if stage is Stage.FIRST_TOKEN:
            del limits["mean KL"]  # of one position it is the worst
        rows = [row for row in ours if not isinstance(row, _Absent)]
        flaw = "no position was compared" if not ours else ""
        for position, (their, our) in enumerate(zip(theirs, ours, strict=True), start):
            if problem := _flaw(their[None], our):
                flaw = f"position {position}: {problem}"
                break
        if flaw:
            self.pool.add_flaw(stage, scope, f"{self.case.name}: {flaw}")
            return self._measurement(stage, scope, _all_missing(limits, flaw), {})
        stacked = np.concatenate(rows)
        self.pool.add_logits(scope, theirs, stacked)
        pairs = list(zip(theirs, stacked, strict=True))
        kl = metrics.kl(theirs, stacked)
        values = (
            max(metrics.relative(t, o) for t, o in pairs),
            max(metrics.relative_rms(t, o) for t, o in pairs),
            float(kl.max()),
            *([float(kl.mean())] if "mean KL" in limits else []),
            float(self._disagreements(stage, scope, theirs, stacked, start)),
        )
        numbers = _numbers(theirs, stacked) | {
            "positions": float(len(stacked)),
            "top1_agreement": float(np.mean(theirs.argmax(-1) == stacked.argmax(-1))),
        }
        return self._measurement(stage, scope, _checks(limits, values), numbers)

    def _tie(self, stage: Stage, scope: Scope, position: int, row: Array, token: int) -> Tie | None:
        """A tie where the reference prefers its token to `token` by no more than rounding."""
        best = int(row.argmax())
        margin = float(row[best]) - float(row[token])
        noise = 2 * self.limits.tie * float(np.abs(row).max())
        if margin > noise:
            return None
        return Tie(
            case=self.case.name,
            stage=stage,
            scope=scope,
            position=position,
            reference_token=best,
            candidate_token=token,
            margin=margin,
            noise=noise,
        )

    def _disagreements(
        self, stage: Stage, scope: Scope, theirs: Array, ours: Array, start: int
    ) -> int:
        """Positions where the candidate prefers another token, ties apart."""
        wrong = 0
        for position in np.flatnonzero(theirs.argmax(-1) != ours.argmax(-1)):
            token = int(ours[position].argmax())
            tie = self._tie(stage, scope, start + int(position), theirs[position], token)
            if tie:
                self.ties.append(tie)
            wrong += tie is None
        return wrong

    def _greedy(self, ours: Sequence[int] | _Absent) -> Measurement:
        name = "tokens differ"
        if isinstance(ours, _Absent) or not ours:
            flaw = ours.reason if isinstance(ours, _Absent) else "no token was compared"
            checks = [missing(name, self.limits.tokens, flaw)]
            return self._measurement(Stage.GREEDY, Scope.END_TO_END, checks, {})
        theirs = self.recording.tokens[: len(ours)]
        ties = {tie.position for tie in self.ties if tie.stage is Stage.GREEDY}
        differ = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b]
        parted = next((i for i in differ if i not in ties), None)
        # What follows the first token that differs answers another text: it is not compared.
        compared = (len(ours) if parted is None else parted + 1) - len(ties)
        check = Check(name=name, value=float(parted is not None), limit=self.limits.tokens)
        if not compared and not self.limits.rounded:
            check = missing(name, self.limits.tokens, "every token is a tie: none was compared")
        numbers = {
            "tokens": float(compared),
            "matching": compared - check.value,
            "ties": float(len(ties)),
        }
        return self._measurement(Stage.GREEDY, Scope.END_TO_END, [check], numbers)


def _checks(limits: Mapping[str, float], values: Sequence[float]) -> list[Check]:
    pairs = zip(limits.items(), values, strict=True)
    return [Check(name=name, value=value, limit=limit) for (name, limit), value in pairs]


def _all_missing(limits: Mapping[str, float], flaw: str) -> list[Check]:
    return [missing(name, limit, flaw) for name, limit in limits.items()]


def _numbers(theirs: Array, ours: Array) -> dict[str, float]:
    return {"max_abs": metrics.max_abs(theirs, ours), "psnr_db": metrics.psnr(theirs, ours)}
