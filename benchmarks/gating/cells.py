"""One target under one recipe: its bundle of the bundled model, and what that is held to."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fastvlm_export.exporter import pipeline
from fastvlm_export.exporter.bundle import Bundle, open_bundle
from fastvlm_export.exporter.clock import Clock
from fastvlm_export.exporter.progress import Silent
from fastvlm_export.exporter.samples import Sample, samples
from fastvlm_export.exporter.source import SourceRequest
from fastvlm_export.validate import proof
from fastvlm_export.validate.proof import Baseline, Original, Reference

RECIPES = {
    "onnx": ("fp32", "fp16", "int8", "int4"),
    "coreml": ("fp32", "fp16", "int8", "int4", "lut4", "lut6"),
    "executorch": ("fp32", "int8", "int4"),
    "tensorrt": ("fp32", "fp16", "bf16", "int8", "int4", "fp8"),
}
"""Target -> the built-in recipes that it takes."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much each proof compares: greedy tokens on an image, questions of the bundled task."""

    steps: int = 16
    questions: int = 60


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An exported bundle that passed, and the reference, original and baseline of its proof."""

    target: str
    recipe: str
    bundle: Bundle
    images: tuple[Sample, ...]
    reference: Reference
    original: Original
    baseline: Baseline

    def examined(
        self, original: Original | None = None, reference: Reference | None = None
    ) -> Baseline:
        """The baseline anew, of another original or by another reference."""
        return proof.examine(
            reference or self.reference, original or self.original, Clock(Silent())
        )

    def original_on(self, images: Sequence[Sample], steps: int) -> Original:
        """What the checkpoint says about other images. The bundled task is not asked again."""
        with mock.patch.object(proof, "is_bundled_model", lambda _: False):
            return proof.run_original(
                self.reference.checkpoint, self.reference.spec, images, Clock(Silent()), steps
            )


def prepare(
    target: str, recipe: str, folder: Path, effort: Effort, calibration: Path | None = None
) -> Prepared:
    """Export to `folder`, or take the bundle that an earlier run left there; then examine it.

    Raises RuntimeError where the bundle doesn't pass its own proof: no disturbance, and already an
    alarm.
    """
    source = SourceRequest()
    with _captured() as found, asking(effort.questions):
        if folder.exists():
            outcome = pipeline.validate(folder, calibration=calibration, steps=effort.steps)
        else:
            [outcome] = pipeline.export(
                pipeline.ExportRequest(
                    source=source,
                    out=folder,
                    targets=(target,),
                    recipe=recipe,
                    calibration=calibration,
                    steps=effort.steps,
                )
            )
    if not outcome.passed:
        raise RuntimeError(f"{target} {recipe}: {outcome.report.verdict}")
    reference, original, baseline = found[0]
    return Prepared(
        target=target,
        recipe=recipe,
        bundle=open_bundle(outcome.path),
        images=tuple(samples(())),
        reference=reference,
        original=original,
        baseline=baseline,
    )


@contextlib.contextmanager
def asking(questions: int) -> Iterator[None]:
    """Proofs ask so many of the bundled task's questions."""
    with mock.patch.object(proof, "QUESTIONS", questions):
        yield


@contextlib.contextmanager
def _captured() -> Iterator[list[tuple[Reference, Original, Baseline]]]:
    """What the pipeline examines, and what comes of it."""
    found: list[tuple[Reference, Original, Baseline]] = []

    def examine(reference: Reference, original: Original, clock: Any) -> Baseline:
        baseline = proof.examine(reference, original, clock)
        found.append((reference, original, baseline))
        return baseline

    with mock.patch.object(pipeline, "examine", examine):
        yield found
