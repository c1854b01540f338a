"""The report as one HTML page: what report.html.j2 shows, in the words it shows."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from . import formats, plots
from .parity import STAGE_NAMES, Measurement, Stage, summarize

if TYPE_CHECKING:
    from .accuracy import AnswerSample
    from .latency import SubjectResult
    from .proof import Accuracy
    from .report import Report

TEMPLATE = "report.html.j2"
THUMBNAIL = 192  # pixels: a page with a dozen images stays well below a megabyte
SHOWN_ANSWERS = 12


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A key number: what it is, the number, and what it means."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question of the bundled task with both sides' answers and the right one."""

    image: str
    question: str
    expected: str
    reference: str
    candidate: str


def render(report: "Report") -> str:
    """The page. Every string of a checkpoint, a user or a runtime is escaped by Jinja."""
    return _template().render(
        report=report,
        tiles=tiles(report),
        ttft_plot=plots.ttft(report.latency) if report.latency else None,
        parity_plot=plots.parity(report.parity) if report.parity else None,
        parity_lines=summarize(report.parity) if report.parity else [],
        comparisons=compared(report),
        answers=answers(report.accuracy) if report.accuracy else [],
        examples=[(thumbnail(example.image), example) for example in report.examples],
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fastvlm_export.validate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": formats.number,
        "duration": formats.duration,
        "size": formats.size,
        "lines": formats.lines,
        "stage_name": STAGE_NAMES.__getitem__,
        "target_name": formats.target_name,
        "day": lambda text: f"{datetime.fromisoformat(text):%d %B %Y, %H:%M} UTC".lstrip("0"),
    }
    environment.globals["share"] = formats.share
    return environment


def _template() -> Template:
    return _environment().get_template(TEMPLATE)


def tiles(report: "Report") -> list[Tile]:
    """The numbers that a reader wants first; only those that were measured."""
    found: list[Tile] = []
    if report.parity:
        found += _parity_tiles(report)
    if report.accuracy:
        ours, theirs = report.accuracy.candidate.total, report.accuracy.reference.total
        found.append(
            Tile(
                label="Exact answers",
                value=formats.share(ours.right, ours.total).split(" (")[0],
                note=f"{ours.right} of {ours.total}; PyTorch {theirs.right}",
            )
        )
    if report.latency:
        found += _latency_tiles(report)
    if report.export:
        found.append(
            Tile(
                label="Bundle",
                value=formats.size(report.export.total_bytes),
                note=f"{len(report.export.files)} files",
            )
        )
    return found


def _parity_tiles(report: "Report") -> list[Tile]:
    if report.parity is None:
        return []
    found = []
    features = _worst(report.parity.measurements, Stage.FIRST_TOKEN, "max relative")
    if features is not None:
        found.append(
            Tile(
                label="Worst logit difference",
                value=formats.number(features),
                note=f"of the peak; limit {formats.number(report.parity.limits.logits)}",
            )
        )
    greedy = [m for m in report.parity.measurements if m.stage is Stage.GREEDY and m.numbers]
    if greedy:
        same = int(sum(m.numbers["matching"] for m in greedy))
        total = int(sum(m.numbers["tokens"] for m in greedy))
        images = len({m.case for m in greedy})
        note = f"greedy, on {images} image{'s' if images > 1 else ''}"
        found.append(Tile(label="Tokens equal", value=f"{same} of {total}", note=note))
    return found


def _worst(measurements: Sequence[Measurement], stage: Stage, name: str) -> float | None:
    values = [c.value for m in measurements if m.stage is stage for c in m.checks if c.name == name]
    return max(values, default=None)


def _latency_tiles(report: "Report") -> list[Tile]:
    if report.latency is None:
        return []
    ours: SubjectResult = report.latency.subjects[0]
    note = f"p95 {formats.duration(ours.ttft.p95)}, n={ours.ttft.n}"
    found = [
        Tile(label="Time to first token", value=formats.duration(ours.ttft.p50), note=note),
        Tile(
            label="Decoding",
            value=f"{formats.rate(ours.tokens_per_second)} tokens/s",
            note="at the median",
        ),
        Tile(
            label="Peak memory",
            value=formats.size(ours.peak_memory_bytes),
            note="loading and running, own process",
        ),
    ]
    for peer in report.latency.subjects[1:]:
        ratio = report.latency.ratios(peer)["ttft"]
        name = f"{formats.target_name(peer.name)} takes"
        found.insert(1, Tile(label=name, value=f"{ratio:.3g}x", note="our time to first token"))
    return found


def compared(report: "Report") -> list[tuple[str, list[str], str]]:
    """Rows of the latency table: what, a cell for each subject, the ratio to the first peer."""
    if report.latency is None:
        return []
    result = report.latency
    peers = result.subjects[1:]
    ratios = result.ratios(peers[0]) if peers else {}

    def cell(subject: "SubjectResult", name: str) -> str:
        timing = subject.timing(name)
        if timing is None:
            return "-"
        if name == "decode":
            return f"{formats.rate(subject.tokens_per_second)} tokens/s"
        return f"{formats.duration(timing.p50)} (p95 {formats.duration(timing.p95)}, n={timing.n})"

    rows = []
    for name, label in formats.PART_NAMES.items():
        cells = [cell(subject, name) for subject in result.subjects]
        rows.append((label, cells, f"{ratios[name]:.3g}x" if name in ratios else ""))
    memory = [formats.size(subject.peak_memory_bytes) for subject in result.subjects]
    of_memory = ""
    if peers:
        ratio = peers[0].peak_memory_bytes / result.subjects[0].peak_memory_bytes
        of_memory = f"{ratio:.3g}x"
    return [*rows, ("Peak memory", memory, of_memory)]


def answers(accuracy: "Accuracy") -> list[Answer]:
    """A dozen answers with their images: those that differ first, then wrong ones, then a mix."""
    pairs = list(zip(accuracy.reference.samples, accuracy.candidate.samples, strict=True))
    differing = [pair for pair in pairs if pair[0].got != pair[1].got]
    wrong = [pair for pair in pairs if pair[0].got == pair[1].got and not pair[1].right]
    right = [pair for pair in pairs if pair[0].got == pair[1].got and pair[1].right]
    shown = [*differing[:6], *wrong[:4]]
    room = SHOWN_ANSWERS - len(shown)
    step = max(1, len(right) // room)
    step -= step % 3 == 0 and step > 1  # every third question would be of one kind
    shown += right[::step][:room]
    return [_answer(theirs, ours) for theirs, ours in shown]


def _answer(theirs: "AnswerSample", ours: "AnswerSample") -> Answer:
    return Answer(
        image=thumbnail(ours.image),
        question=ours.question,
        expected=ours.expected,
        reference=theirs.got,
        candidate=ours.got,
    )


def thumbnail(image: Image.Image) -> str:
    """The image as a data URI, at most THUMBNAIL pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
