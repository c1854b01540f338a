"""The rounding floor: how far apart two models may be that are the same but for their roundings.

Where activations are rounded, one that is next to a boundary falls on the other side for a
difference of one part in 10^7, and the whole step travels on. How far it gets depends on the model:
deep towers, and random weights above all, amplify it. No artifact can be nearer to its reference
than the reference is to itself, so this is measured: several runs of the reference with one
rounding's noise on its inputs, and float32's wherever activations are rounded, because pixels are
so far from their boundaries that the first rounding often takes the whole noise away. The worst of
these runs, with room, is what an artifact may differ by.

Where floats have 16 bits, and no activation becomes an integer, a runtime may round in fewer places
than the reference does, or in others: both are then as far from the real numbers, and that is
measured, by the same model without any rounding.

Everything is measured over all images together (see `pooled`), never as the worst of any value.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..quantize.recipes import Activations, Float, Recipe
from ..quantize.runnable import roundings_moved
from ..targets.base import Array, Session, TokenIds
from . import metrics
from .limits import NOTHING, Limits, Statistics
from .parity_types import Scope
from .pooled import Pool
from .recording import Progress, Recording, along

MOVES = {Float.FP32: 2e-7, Float.FP16: 2.0**-11, Float.BF16: 2.0**-8}
"""Standard deviation in parts of each value: two roundings of float32, one of 16 bits."""
DRAWS = 4
ROOM = 3.0
"""Times the worst of the draws, of an amplitude; an artifact is one more draw of like noise."""


class _Moved:
    """A session whose inputs and rounded activations have a rounding's noise on every value."""

    def __init__(self, session: Session, move: float, seed: int) -> None:
        self.session, self.move = session, move
        self.noise = np.random.default_rng(seed)
        self.inner = torch.Generator().manual_seed(seed)

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
    recipe: Recipe,
    progress: Progress | None = None,
) -> Statistics:
    """The session, moved as the recipe's float format rounds, against its own recordings.

    The worst of `DRAWS` seeded runs. What is not finite counts as nothing: it must fail elsewhere.
    """
    say = progress or (lambda _: None)
    worst = NOTHING
    for seed in range(DRAWS):
        say(f"run {seed + 1} of {DRAWS}")
        moved = _Moved(session, MOVES[recipe.float_format], seed)
        worst = worst.worst(difference(recordings, moved))
    return worst


def difference(recordings: Sequence[Recording], session: Session) -> Statistics:
    """A session that lives on its own outputs, along the recorded tokens, against the recordings.

    NaN where an output can't be compared.
    """
    pool = Pool()
    for recording in recordings:
        image = np.array(session.encode_image(recording.case.pixels))
        logits = along(recording, session, image)
        if metrics.flaw(recording.features, image) or metrics.flaw(recording.logits, logits):
            continue
        pool.add_features(Scope.END_TO_END, recording.features, image)
        pool.add_logits(Scope.END_TO_END, recording.logits, logits)
    return pool.statistics(Scope.END_TO_END)


def widened(limits: Limits, floor: Statistics) -> Limits:
    """The limits with `ROOM` times the floor for statistics where that is more.

    Limits that judge single values stay as they are.
    """
    if limits.statistics is None:
        return limits
    return replace(limits, statistics=limits.statistics.worst(floor.times(ROOM)))
