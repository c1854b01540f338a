"""Stage by stage: does a candidate Session compute what the reference computes?

Every stage after preprocessing is measured twice. *Isolated*: the candidate gets the reference's
own inputs, so a difference arose in that stage. *End to end*: the candidate lives on what it made
itself, so differences add up as they do for a user. The first isolated failure, in the order of the
pipeline, is the stage that broke.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import numpy as np

from ..targets.base import Array, Session, TokenIds
from ..targets.generation import splice
from . import metrics
from .checks import Check, missing
from .parity_types import (
    LIMITS,
    STAGE_NAMES,
    Case,
    FreeRun,
    Limits,
    Measurement,
    ParityResult,
    Scope,
    Stage,
    Summary,
    Tie,
    summarize,
)

__all__ = [
    "LIMITS",
    "STAGE_NAMES",
    "Case",
    "FreeRun",
    "Limits",
    "Measurement",
    "ParityResult",
    "Progress",
    "Scope",
    "Stage",
    "Summary",
    "Tie",
    "compare",
    "summarize",
]

Progress = Callable[[str], None]


def compare(
    reference: Session,
    candidate: Session,
    cases: Sequence[Case],
    limits: Limits,
    steps: int = 24,
    progress: Progress | None = None,
) -> ParityResult:
    """Measure every stage of `candidate` against `reference` on each case.

    `steps` is the number of greedy tokens compared, and of teacher-forced positions after the
    first: the context must hold the prompt and `steps` more. The end token does not stop it, for
    numbers after it are as comparable as before. An error of the candidate fails its stage; one of
    the reference is raised.
    """
    say = progress or (lambda _: None)
    measurements: list[Measurement] = []
    ties: list[Tie] = []
    free_runs: list[FreeRun] = []
    for number, case in enumerate(cases, 1):

        def announce(stage: Stage, label: str = f"{case.name}, {number} of {len(cases)}") -> None:
            say(f"{label}: {stage}")

        comparison = _Comparison(reference, candidate, case, limits, steps, announce)
        measurements += comparison.run()
        ties += comparison.ties
        free_runs += comparison.free_runs
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
        steps=steps,
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


def _one(token: int) -> TokenIds:
    return np.array([[token]], dtype=np.int64)


class _Comparison:
    """One case: runs the reference once, the decoder of the candidate once per scope and freely."""

    def __init__(
        self,
        reference: Session,
        candidate: Session,
        case: Case,
        limits: Limits,
        steps: int,
        announce: Callable[[Stage], None],
    ) -> None:
        self.reference, self.candidate = reference, candidate
        self.case, self.limits, self.steps, self.announce = case, limits, steps, announce
        self.ties: list[Tie] = []
        self.free_runs: list[FreeRun] = []

    def run(self) -> Iterator[Measurement]:
        case, candidate = self.case, self.candidate
        self.announce(Stage.PREPROCESS)
        yield self._pixels()

        self.announce(Stage.IMAGE_FEATURES)
        features = np.array(self.reference.encode_image(case.reference_pixels))
        image = _attempt(candidate.encode_image, case.reference_pixels)
        yield self._features(Scope.ISOLATED, features, image)
        if not np.array_equal(case.reference_pixels, case.candidate_pixels):
            image = _attempt(candidate.encode_image, case.candidate_pixels)
            yield self._features(Scope.END_TO_END, features, image)

        self.announce(Stage.EMBEDDINGS)
        ids: TokenIds = np.asarray(case.prompt_ids, dtype=np.int64)
        # The image token may lie beyond the embedding table: its rows are overwritten anyway.
        ids = np.where(ids == case.image_token_id, 0, ids)[None]
        embeddings = np.array(self.reference.embed(ids))
        text = _attempt(candidate.embed, ids)
        yield self._embeddings(embeddings, text)

        self.announce(Stage.FIRST_TOKEN)
        prompt = self._splice(embeddings, features)
        tokens, inputs, logits = self._reference_run(prompt)
        own = self._own_prompt(text, image)
        yield from self._logits(Scope.ISOLATED, logits, self._forced(inputs))
        self.announce(Stage.TEACHER_FORCED)
        yield from self._logits(Scope.END_TO_END, logits, self._forced_own(own, tokens))
        self.announce(Stage.GREEDY)
        free = self._free(own)
        self.free_runs.append(
            FreeRun(
                case=case.name,
                reference=tuple(tokens[: self.steps]),
                candidate=() if isinstance(free, _Absent) else tuple(free),
            )
        )
        yield self._greedy(tokens, logits, free)

    def _splice(self, text: Array, image: Array) -> Array:
        return splice(self.case.prompt_ids, self.case.image_token_id, text, image)

    def _own_prompt(self, text: Output, image: Output) -> Output:
        if isinstance(text, _Absent) or isinstance(image, _Absent):
            return _Absent("an earlier stage gave no output")
        return _attempt(self._splice, text, image)

    def _reference_run(self, prompt: Array) -> tuple[list[int], list[Array], Array]:
        """Greedy tokens t0..tN, the inputs (prompt, t0..) and the logits [1+N,V] they lead to."""
        self.reference.reset()
        tokens, inputs, rows = [], [prompt], []
        for _ in range(1 + self.steps):
            rows.append(np.array(self.reference.decode(inputs[-1]))[0])
            tokens.append(int(rows[-1].argmax()))
            inputs.append(np.array(self.reference.embed(_one(tokens[-1]))))
        return tokens, inputs[: 1 + self.steps], np.stack(rows)

    def _restart(self) -> _Absent | None:
        try:
            self.candidate.reset()
        except Exception as error:  # see _attempt
            return _Absent(f"reset raised {type(error).__name__}: {error}".splitlines()[0])
        return None

    def _forced(self, inputs: Sequence[Array]) -> list[Output]:
        """The candidate's logits after each of the reference's inputs."""
        if absent := self._restart():
            return [absent] * len(inputs)
        return [_attempt(self.candidate.decode, x) for x in inputs]

    def _forced_own(self, prompt: Output, tokens: Sequence[int]) -> list[Output]:
        """The same from the candidate's own prompt and embeddings of the reference's tokens."""
        absent = self._restart()
        if isinstance(prompt, _Absent) or absent:
            return [absent or prompt] * (1 + self.steps)
        out = [_attempt(self.candidate.decode, prompt)]
        return out + [_attempt(self._step, token) for token in tokens[:-1]]

    def _step(self, token: int) -> Array:
        return self.candidate.decode(self.candidate.embed(_one(token)))

    def _free(self, prompt: Output) -> list[int] | _Absent:
        """The candidate's own greedy tokens, at most `steps`."""
        absent = self._restart()
        if isinstance(prompt, _Absent) or absent:
            return absent or _Absent("an earlier stage gave no output")
        tokens: list[int] = []
        logits = _attempt(self.candidate.decode, prompt)
        while len(tokens) < self.steps:
            if isinstance(logits, _Absent):
                return logits
            if not logits.size or not np.isfinite(logits).all():
                return _Absent(f"the logits of token {len(tokens)} are not finite")
            tokens.append(int(logits[0].argmax()))
            if len(tokens) < self.steps:
                logits = _attempt(self._step, tokens[-1])
        return tokens

    def _measurement(
        self, stage: Stage, scope: Scope, checks: Sequence[Check], numbers: dict[str, float]
    ) -> Measurement:
        return Measurement(
            stage=stage, scope=scope, case=self.case.name, checks=tuple(checks), numbers=numbers
        )

    def _pixels(self) -> Measurement:
        theirs, ours = self.case.reference_pixels, self.case.candidate_pixels
        name, limit = "max diff (1/255)", self.limits.pixels
        if flaw := metrics.flaw(theirs, ours):
            return self._measurement(
                Stage.PREPROCESS, Scope.ISOLATED, [missing(name, limit, flaw)], {}
            )
        pairs = zip_longest(self.case.prompt_ids, self.case.candidate_prompt_ids)
        checks = [
            Check(name=name, value=metrics.max_abs(theirs, ours) * 255, limit=limit),
            Check(name="prompt tokens differ", value=sum(a != b for a, b in pairs), limit=0),
        ]
        numbers = {"psnr_db": metrics.psnr(theirs, ours)}
        return self._measurement(Stage.PREPROCESS, Scope.ISOLATED, checks, numbers)

    def _features(self, scope: Scope, theirs: Array, ours: Output) -> Measurement:
        limits = {"max relative": self.limits.features, "1 - cosine": self.limits.cosine}
        flaw = _flaw(theirs, ours)
        if flaw or isinstance(ours, _Absent):
            checks = [missing(name, limit, flaw) for name, limit in limits.items()]
            return self._measurement(Stage.IMAGE_FEATURES, scope, checks, {})
        values = (metrics.relative(theirs, ours), metrics.cosine_distance(theirs, ours))
        checks = [
            Check(name=name, value=value, limit=limit)
            for (name, limit), value in zip(limits.items(), values, strict=True)
        ]
        return self._measurement(Stage.IMAGE_FEATURES, scope, checks, _numbers(theirs, ours))

    def _embeddings(self, theirs: Array, ours: Output) -> Measurement:
        name, limit = "max relative", self.limits.embeddings
        flaw = _flaw(theirs, ours)
        if flaw or isinstance(ours, _Absent):
            checks, numbers = [missing(name, limit, flaw)], {}
        else:
            checks = [Check(name=name, value=metrics.relative(theirs, ours), limit=limit)]
            numbers = _numbers(theirs, ours)
        return self._measurement(Stage.EMBEDDINGS, Scope.ISOLATED, checks, numbers)

    def _logits(self, scope: Scope, theirs: Array, ours: Sequence[Output]) -> list[Measurement]:
        """Row 0 is the first token's, the others are teacher-forced."""
        first = self._rows(Stage.FIRST_TOKEN, scope, theirs[:1], ours[:1], 0)
        return [first, self._rows(Stage.TEACHER_FORCED, scope, theirs[1:], ours[1:], 1)]

    def _rows(
        self, stage: Stage, scope: Scope, theirs: Array, ours: Sequence[Output], start: int
    ) -> Measurement:
        limits = {
            "max relative": self.limits.logits,
            "worst KL": self.limits.worst_kl,
            "mean KL": self.limits.mean_kl,
            "top-1 differs": 0.0,
        }
        rows = [row for row in ours if not isinstance(row, _Absent)]
        flaw = "no position was compared" if not ours else ""
        for position, (their, our) in enumerate(zip(theirs, ours, strict=True), start):
            if problem := _flaw(their[None], our):
                flaw = f"position {position}: {problem}"
                break
        if flaw:
            return self._measurement(
                stage, scope, [missing(name, limit, flaw) for name, limit in limits.items()], {}
            )
        stacked = np.concatenate(rows)
        kl = metrics.kl(theirs, stacked)
        wrong = self._disagreements(stage, scope, theirs, stacked, start)
        values = (
            max(metrics.relative(t, o) for t, o in zip(theirs, stacked, strict=True)),
            float(kl.max()),
            float(kl.mean()),
            float(wrong),
        )
        checks = [
            Check(name=name, value=value, limit=limit)
            for (name, limit), value in zip(limits.items(), values, strict=True)
        ]
        numbers = _numbers(theirs, stacked) | {
            "positions": float(len(stacked)),
            "top1_agreement": float(np.mean(theirs.argmax(-1) == stacked.argmax(-1))),
        }
        return self._measurement(stage, scope, checks, numbers)

    def _tie(self, stage: Stage, scope: Scope, position: int, row: Array, token: int) -> Tie | None:
        """A tie where the reference prefers its token to `token` by no more than rounding."""
        best = int(row.argmax())
        margin = float(row[best]) - float(row[token])
        noise = 2 * self.limits.logits * float(np.abs(row).max())
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

    def _greedy(
        self, theirs: Sequence[int], logits: Array, ours: Sequence[int] | _Absent
    ) -> Measurement:
        name = "tokens differ"
        if isinstance(ours, _Absent) or not ours:
            flaw = ours.reason if isinstance(ours, _Absent) else "no token was compared"
            checks = [missing(name, 0.0, flaw)]
            return self._measurement(Stage.GREEDY, Scope.END_TO_END, checks, {})
        differ = [index for index, token in enumerate(ours) if token != theirs[index]]
        compared = len(ours)
        if differ:
            at = differ[0]
            tie = self._tie(Stage.GREEDY, Scope.END_TO_END, at, logits[at], ours[at])
            if tie:
                self.ties.append(tie)
                compared, differ = at, []
        check = Check(name=name, value=float(len(differ)), limit=0.0)
        if not compared:
            check = missing(name, 0.0, "the first token is a tie: no token was compared")
        numbers = {"tokens": float(compared), "matching": float(compared - len(differ))}
        return self._measurement(Stage.GREEDY, Scope.END_TO_END, [check], numbers)


def _numbers(theirs: Array, ours: Array) -> dict[str, float]:
    return {"max_abs": metrics.max_abs(theirs, ours), "psnr_db": metrics.psnr(theirs, ours)}
