"""The rounding floor: how far apart two models may be that are the same but for their roundings.

Where activations are rounded, one that is next to a boundary falls on the other side for a
difference of one part in 10^7, and the whole step travels on. How far it gets depends on the model:
deep towers, and random weights above all, amplify it. No artifact can be nearer to its reference
than the reference is to itself, so this is measured, and the limits leave room for it. What sets
artifacts apart before that is one rounding of the format in between: float32's, or that of 16 bits.
It is added to the inputs, and float32's wherever activations are rounded, because pixels are so far
from their boundaries that the first rounding often takes the whole noise away.

Where floats have 16 bits, and no activation becomes an integer, a runtime may round in fewer places
than the reference does, or in others: both are then as far from the real numbers, and that is
measured, by the same model without any rounding.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..quantize.recipes import Activations, Float, Recipe
from ..quantize.runnable import roundings_moved
from ..targets.base import Array, Session, TokenIds
from .formats import NOISE
from .limits import Limits
from .parity import ParityResult, Scope, Stage, compare
from .recording import Progress, Recording

MOVES = {Float.FP32: 2e-7, Float.FP16: 2.0**-11, Float.BF16: 2.0**-8}
"""Standard deviation in parts of each value: two roundings of float32, one of 16 bits."""
ROOM = 2.0  # of an amplitude; both runs are draws of the same noise, and the worst of a few varies
ROOM_OF_ONE = (
    4.0  # where one position decides: the worst KL varied by 7 = 2.6^2 between eight draws
)

_LOGITS = {
    "max relative": ("logits", ROOM),
    "RMS relative": ("logits_rms", ROOM),
    "worst KL": ("worst_kl", ROOM_OF_ONE**2),
}
_FIELDS = {
    (Stage.IMAGE_FEATURES, "max relative"): ("features", ROOM),
    (Stage.IMAGE_FEATURES, "RMS relative"): ("features_rms", ROOM),
    (Stage.IMAGE_FEATURES, NOISE): ("features_noise", ROOM),
    (Stage.IMAGE_FEATURES, "1 - cosine"): ("cosine", ROOM**2),
    **{(Stage.FIRST_TOKEN, name): field for name, field in _LOGITS.items()},
    **{(Stage.TEACHER_FORCED, name): field for name, field in _LOGITS.items()},
    (Stage.TEACHER_FORCED, "mean KL"): ("mean_kl", ROOM**2),
}
"""Stage and check -> the limit that it widens, and by how many times the floor."""


class _Moved:
    """A session whose inputs and rounded activations have a rounding's noise on every value."""

    def __init__(self, session: Session, move: float) -> None:
        self.session, self.move = session, move
        self.noise = np.random.default_rng(0)
        self.inner = torch.Generator().manual_seed(0)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=self.inner)
        return x * noise.mul_(MOVES[Float.FP32]).add_(1)

    def _move(self, x: Array) -> Array:
        return (x * (1 + self.noise.normal(0, self.move, x.shape))).astype(np.float32)

    def encode_image(self, pixels: Array) -> Array:
        with roundings_moved(self._rounded):
            return self.session.encode_image(self._move(pixels))

    def embed(self, input_ids: TokenIds) -> Array:
        return self.session.embed(input_ids)

    def decode(self, inputs_embeds: Array) -> Array:
        with roundings_moved(self._rounded):
            return self.session.decode(self._move(inputs_embeds))

    def reset(self) -> None:
        self.session.reset()


def has_floor(recipe: Recipe) -> bool:
    """Whether any layer's activations are rounded to integers."""
    return any(p.bits and p.activations is not Activations.FLOAT for p in recipe.precisions)


def has_float_floor(recipe: Recipe) -> bool:
    """Whether floats of 16 bits are all that is rounded while the model runs."""
    return recipe.float_format is not Float.FP32 and not has_floor(recipe)


def rounding_floor(
    recordings: Sequence[Recording],
    session: Session,
    limits: Limits,
    recipe: Recipe,
    progress: Progress | None = None,
) -> ParityResult:
    """The session, moved as the recipe's float format rounds, against its own recordings."""
    cases = [recording.case for recording in recordings]
    moved = _Moved(session, MOVES[recipe.float_format])
    return compare(recordings, cases, moved, limits, progress)


def _changed(floor: ParityResult, case: str) -> float:
    """Tokens of a case that the moved model chooses otherwise, near-ties among them."""
    stage, scope = Stage.TEACHER_FORCED, Scope.END_TO_END
    found = sum((t.case, t.stage, t.scope) == (case, stage, scope) for t in floor.ties)
    checks = (
        check.value
        for m in floor.measurements
        for check in m.checks
        if (m.case, m.stage, m.scope, check.name) == (case, stage, scope, "top-1 differs")
    )
    return found + sum(value for value in checks if np.isfinite(value))


def widened(limits: Limits, floor: ParityResult) -> Limits:
    """Each limit, or twice the floor where that is more: of squares, such as mean KL, four times.

    Of the worst KL, sixteen times. Tokens may differ twice as often as the moved model's do.
    """
    found: dict[str, float] = {}
    for measurement in floor.measurements:
        for check in measurement.checks:
            field, room = _FIELDS.get((measurement.stage, check.name), ("", 0.0))
            # NaN and infinity widen nothing: what is wrong there shall fail.
            if field and np.isfinite(check.value):
                found[field] = max(found.get(field, 0.0), room * check.value)
    found["tokens"] = ROOM * max((_changed(floor, run.case) for run in floor.free_runs), default=0)
    return replace(
        limits, **{name: max(getattr(limits, name), value) for name, value in found.items()}
    )
