"""What was found about one bundle: strict JSON for machines, one self-contained page for people."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from . import machine
from .checks import Check
from .formats import plain
from .latency import LatencyResult
from .machine import Machine
from .parity import ParityResult

if TYPE_CHECKING:
    from PIL import Image

    from ..exporter.bundle import Manifest
    from ..exporter.reparameterize import Fold, Reparameterization
    from .accuracy import AccuracyReport
    from .proof import Accuracy

SCHEMA = 1
JSON_FILE, HTML_FILE = "report.json", "report.html"


@dataclass(frozen=True, kw_only=True)
class Folding:
    """The proof of reparameterization: every block, and the tower as a whole."""

    folds: tuple["Fold", ...]
    difference: float
    limit: float

    @classmethod
    def of(cls, result: "Reparameterization") -> "Folding":
        """The proof without the model, which a report must not keep alive."""
        return cls(folds=result.folds, difference=result.difference, limit=result.limit)


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of the bundle, by its path inside."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Export:
    """How the bundle was made: seconds by stage, the most memory held, the files."""

    seconds: Mapping[str, float]
    peak_memory_bytes: int
    files: tuple[File, ...]

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


def files_of(folder: Path, manifest: "Manifest") -> tuple[File, ...]:
    """The manifest's files with their sizes, the largest first."""
    files = [
        File(path=name, bytes=(folder / name).stat().st_size, sha256=sha256)
        for name, sha256 in manifest.files.items()
    ]
    return tuple(sorted(files, key=lambda file: (-file.bytes, file.path)))


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image and question of the parity check, and what each side wrote, as text."""

    image: "Image.Image"
    name: str
    question: str
    reference: str
    candidate: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Sections that were not measured are None or empty. See `passed` for the verdict.

    `source` names the checkpoint, `checkpoint` says what it is (label -> value).
    """

    source: str
    target: str
    recipe: str
    checkpoint: Mapping[str, object] = field(default_factory=dict)
    reparameterization: Folding | None = None
    export: Export | None = None
    parity: ParityResult | None = None
    accuracy: "Accuracy | None" = None
    latency: LatencyResult | None = None
    examples: tuple[Example, ...] = ()
    environment: Machine = field(default_factory=machine.describe)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def passed(self) -> bool:
        """True where parity was measured and every gate held."""
        if self.parity is None or not self.parity.passed:
            return False
        return self.accuracy is None or self.accuracy.check.passed

    @property
    def verdict(self) -> str:
        """One or two sentences with the number that decides."""
        if self.parity is None:
            return "Parity was not measured."
        if not self.parity.passed or self.accuracy is None:
            return self.parity.verdict
        check = self.accuracy.check
        if not check.passed:
            return f"Every stage agrees, but not every answer: {check}."
        asked = len(self.accuracy.candidate.samples)
        return f"{self.parity.verdict} All {asked} answers are PyTorch's."

    def to_dict(self) -> dict[str, object]:
        """Strict JSON values; a number that is NaN or infinite is null."""
        sections = {
            "schema": SCHEMA,
            "created": self.created,
            "passed": self.passed,
            "verdict": self.verdict,
            "source": self.source,
            "target": self.target,
            "recipe": self.recipe,
            "checkpoint": self.checkpoint,
            "reparameterization": self.reparameterization,
            "export": self.export,
            "parity": self.parity.to_dict() if self.parity else None,
            "accuracy": _accuracy(self.accuracy) if self.accuracy else None,
            "latency": self.latency.to_dict() if self.latency else None,
            "examples": [
                {
                    "image": example.name,
                    "question": example.question,
                    "reference": example.reference,
                    "candidate": example.candidate,
                }
                for example in self.examples
            ],
            "environment": self.environment,
        }
        return {name: plain(section) for name, section in sections.items()}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """One page that needs nothing else: no script, no font, no image from elsewhere."""
        from .page import render  # noqa: PLC0415 - imports jinja2

        return render(self)

    def write(self, folder: Path) -> None:
        """Write report.json and report.html into `folder`, which is made where it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in ((JSON_FILE, self.to_json()), (HTML_FILE, self.to_html())):
            # Whole or not at all, where a bundle's earlier report is replaced.
            unfinished = folder / f".{name}.{os.getpid()}"
            unfinished.write_text(text, "utf-8")
            unfinished.replace(folder / name)


def _accuracy(accuracy: "Accuracy") -> dict[str, object]:
    check: Check = accuracy.check
    pairs = zip(accuracy.reference.samples, accuracy.candidate.samples, strict=True)
    return {
        "passed": check.passed,
        "check": check,
        "reference": _shares(accuracy.reference),
        "candidate": _shares(accuracy.candidate),
        "answers": [
            {
                "kind": theirs.kind,
                "question": theirs.question,
                "expected": theirs.expected,
                "reference": theirs.got,
                "candidate": ours.got,
            }
            for theirs, ours in pairs
        ],
    }


def _shares(report: "AccuracyReport") -> dict[str, object]:
    return {
        "right": report.total.right,
        "total": report.total.total,
        "kinds": {
            kind.value: {"right": part.right, "total": part.total}
            for kind, part in report.kinds.items()
        },
    }
