"""How far apart two computations of the same real numbers may be in float32.

Where neither side rounds to 16 bits or integers, an artifact and its reference differ by the order
of their sums alone: by a rounding of float32 in each operator, carried to the end by whatever the
model multiplies it with. This is measured: the reference runs with such a rounding added to
everything that it computes. Nothing in it is chaotic, so that the largest difference varies little
from run to run, and a fault shows that is not much larger than rounding itself.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..quantize.runnable import results_moved
from ..targets.base import Session
from .formats import NOISE
from .limits import Limits
from .parity import Stage, compare
from .recording import Progress, Recording

ROUNDING = 2.0**-24
"""Of a sum: in parts of the result, and of its row's RMS, as terms may cancel in a single one."""
DRAWS = 3
ROOM = 5.0
"""Times the worst of the draws. Other kernels were seen at up to 1.4 times it."""
LEAST = 2e-6
"""Of a limit: small models can be nearer to themselves than kernels are to each other."""

_FIELDS = {
    (Stage.IMAGE_FEATURES, "max relative"): "features",
    (Stage.IMAGE_FEATURES, "RMS relative"): "features_rms",
    (Stage.IMAGE_FEATURES, NOISE): "features_noise",
    (Stage.FIRST_TOKEN, "max relative"): "logits",
    (Stage.FIRST_TOKEN, "RMS relative"): "logits_rms",
    (Stage.TEACHER_FORCED, "max relative"): "logits",
    (Stage.TEACHER_FORCED, "RMS relative"): "logits_rms",
}
"""Stage and check -> the limit that is measured. KL, a square, would be 1e-10: it says no more."""


def measured(
    limits: Limits,
    recordings: Sequence[Recording],
    session: Session,
    progress: Progress | None = None,
) -> Limits:
    """The limits with those that float32's roundings explain in the place of fixed ones.

    `session` runs programs without rounding and made the recordings. What is not finite counts as
    nothing: it must fail elsewhere.
    """
    found: dict[str, Any] = dict.fromkeys(_FIELDS.values(), LEAST)
    cases = [recording.case for recording in recordings]
    for seed in range(DRAWS):
        noise = torch.Generator().manual_seed(seed)

        def moved(x: torch.Tensor, noise: torch.Generator = noise) -> torch.Tensor:
            if not x.dim():
                return x
            size = x.abs() + x.square().mean(-1, keepdim=True).sqrt()
            return x + size * torch.randn(x.shape, generator=noise) * ROUNDING

        with results_moved(moved):
            result = compare(recordings, cases, session, limits, progress)
        for measurement in result.measurements:
            for check in measurement.checks:
                name = _FIELDS.get((measurement.stage, check.name))
                if name and np.isfinite(check.value):
                    found[name] = max(found[name], ROOM * check.value)
    return replace(limits, **found)
