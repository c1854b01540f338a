"""What was found about one bundle: strict JSON for machines, one self-contained page for people."""

import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..exporter.errors import ExportError
from . import machine
from .checks import Check
from .formats import number, plain
from .latency import LatencyResult
from .machine import Machine
from .parity import ParityResult
from .quantized import describe
from .sessions import Runtime

if TYPE_CHECKING:
    from PIL import Image

    from ..exporter.bundle import Manifest
    from ..exporter.reparameterize import Fold, Reparameterization
    from ..quantize.apply import Record
    from .accuracy import AccuracyReport
    from .contract import Contract
    from .delegation import Delegation
    from .loss import QuantizationLoss
    from .proof_types import Accuracy
    from .stored_types import StoredWeights
    from .tensorrt_build import EngineProof

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

    `source` names the checkpoint, `checkpoint` says what it is (label -> value). `quantized` is
    what the recipe did, None where it leaves everything in float32: else `quantization`, what it
    costs, must have been measured. `contract` is what clients read beside the numbers. `parity` is
    the artifact's own error on top of that, `exact` the same where neither side rounds. `stored`
    compares the artifact's numbers themselves, or `stored_note` says why they could not be.
    `placement` is what an ExecuTorch program hands over, `engines` what TensorRT made of its
    graphs. `runtime` is what ran the artifact; where that was no device, `latency_note` says how to
    time one.
    """

    source: str
    target: str
    recipe: str
    checkpoint: Mapping[str, object] = field(default_factory=dict)
    reparameterization: Folding | None = None
    export: Export | None = None
    quantized: "Record | None" = None
    quantization: "QuantizationLoss | None" = None
    contract: "Contract | None" = None
    parity: ParityResult | None = None
    exact: ParityResult | None = None
    stored: "StoredWeights | None" = None
    stored_note: str = ""
    placement: "Delegation | None" = None
    engines: "EngineProof | None" = None
    accuracy: "Accuracy | None" = None
    latency: LatencyResult | None = None
    latency_note: str = ""
    runtime: Runtime | None = None
    examples: tuple[Example, ...] = ()
    environment: Machine = field(default_factory=machine.describe)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def passed(self) -> bool:
        """True where parity was measured, the loss of quantization if any, and every gate held."""
        if self.parity is None or not self.parity.passed:
            return False
        if self.quantization is None and self.quantized is not None:
            return False
        answers = self.accuracy.check if self.accuracy else None
        gates = (
            self.contract,
            self.exact,
            self.stored,
            self.placement,
            self.engines,
            answers,
            self.quantization,
        )
        return all(gate.passed for gate in gates if gate is not None)

    @property
    def verdict(self) -> str:
        """A few sentences with the numbers that decide."""
        if self.parity is None:
            return "Parity was not measured."
        said = [self.parity.verdict]
        if self.contract and not self.contract.passed:
            said.insert(0, self.contract.verdict)
        if self.exact:
            said.append(_without_rounding(self.exact))
        if self.stored:
            said.append(self.stored.verdict)
        if self.placement:
            said.append(self.placement.verdict)
        if self.engines:
            said.append(self.engines.verdict)
        if self.accuracy and self.parity.passed and (self.exact is None or self.exact.passed):
            said.append(_on_answers(self.accuracy))
        if self.quantization:
            said.append(_on_loss(self.quantization))
        elif self.quantized:
            said.append("What quantization costs was not measured.")
        if self.interpreted:
            said.append(self.interpreted)
        return " ".join(said)

    @property
    def interpreted(self) -> str:
        """A sentence where the numbers are no device's; empty where they are."""
        if self.runtime is None or self.runtime.device:
            return ""
        if self.engines:
            return f"The artifact's numbers come from {self.runtime.name}, not from a GPU."
        return f"The artifact's numbers come from the {self.runtime.name}, not from a device."

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
            "quantized": describe(self.quantized) if self.quantized else None,
            "quantization_loss": self.quantization.to_dict() if self.quantization else None,
            "runtime": self.runtime,
            "contract": self.contract.to_dict() if self.contract else None,
            "parity": self.parity.to_dict() if self.parity else None,
            "exact_parity": self.exact.to_dict() if self.exact else None,
            "stored_weights": self.stored.to_dict() if self.stored else None,
            "stored_note": self.stored_note,
            "placement": self.placement.to_dict() if self.placement else None,
            "engines": self.engines.to_dict() if self.engines else None,
            "accuracy": _accuracy(self.accuracy) if self.accuracy else None,
            "latency": self.latency.to_dict() if self.latency else None,
            "latency_note": self.latency_note,
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
        """Write report.json and report.html into `folder`, which is made where it is not there.

        Nothing else in the folder is touched. Raises ExportError, see `check_report`.
        """
        check_report(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in ((JSON_FILE, self.to_json()), (HTML_FILE, self.to_html())):
            # Whole or not at all, where a bundle's earlier report is replaced.
            unfinished = folder / f".{name}.{secrets.token_hex(16)}"
            try:
                with unfinished.open("x", encoding="utf-8") as file:
                    file.write(text)
                unfinished.replace(folder / name)
            except OSError as error:
                raise ExportError(
                    f"{folder / name} cannot be written: {error.strerror}.",
                    "Make room there, or make it writable, and run the command again.",
                ) from error
            finally:
                unfinished.unlink(missing_ok=True)


def check_report(folder: Path) -> None:
    """Raise ExportError where a report can't be written into this folder.

    That is where it may not be written to, or where something other than an earlier report's file,
    such as a link, has the name of one.
    """
    files = [folder / name for name in (JSON_FILE, HTML_FILE)]
    odd = [path for path in files if os.path.lexists(path) and not is_plain_file(path)]
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        odd = [folder]
    if odd:
        raise ExportError(
            f"{' and '.join(map(str, odd))} cannot be replaced by a report: no export wrote it.",
            "Move it away and run again.",
        )
    place = folder if folder.exists() else folder.parent
    if place.exists() and not os.access(place, os.W_OK | os.X_OK):
        raise ExportError(
            f"{place} is not writable, and the report goes there.",
            "Make it writable, or copy the bundle and run the command on the copy.",
        )


def is_plain_file(path: Path) -> bool:
    """Whether this is a file itself, not a link to one."""
    return path.is_file() and not path.is_symlink()


def _without_rounding(exact: ParityResult) -> str:
    if exact.failure:
        return f"Without rounding, the first stage to break: {exact.failure}"
    return f"Without rounding, every stage agrees to float32's last bits; nearest: {exact.nearest}."


def _on_answers(accuracy: "Accuracy") -> str:
    check, asked = accuracy.check, len(accuracy.candidate.samples)
    if not check.passed:
        return f"Every stage agrees, but not every answer: {check}."
    if check.value:
        differ = f"{check.value:.0f} of {asked} answers differ from {accuracy.reference_name}'s"
        return f"{differ} (limit {number(check.limit)})."
    return f"All {asked} answers are {accuracy.reference_name}'s."


def _on_loss(loss: "QuantizationLoss") -> str:
    failed = [check for check in loss.checks if not check.passed]
    word = "beyond its limits" if failed else "within its limits"
    if loss.limits is None and not failed:
        word = "without a limit"
    found = "; ".join(map(_gate, failed or loss.checks))
    return f"Quantization loss {word}: {found}."


def _gate(check: Check) -> str:
    if check.message:
        return str(check)
    limit = f" (limit {number(check.limit)})" if math.isfinite(check.limit) else ""
    return f"{check.name} {number(check.value)}{limit}"


def _accuracy(accuracy: "Accuracy") -> dict[str, object]:
    original = accuracy.original
    before = original.samples if original else [None] * len(accuracy.candidate.samples)
    return {
        "passed": accuracy.check.passed,
        "check": accuracy.check,
        "original": _shares(original) if original else None,
        "reference": _shares(accuracy.reference),
        "candidate": _shares(accuracy.candidate),
        "answers": [
            {
                "kind": theirs.kind,
                "question": theirs.question,
                "expected": theirs.expected,
                "original": at_first.got if at_first else None,
                "reference": theirs.got,
                "candidate": ours.got,
            }
            for theirs, ours, at_first in zip(
                accuracy.reference.samples, accuracy.candidate.samples, before, strict=True
            )
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
