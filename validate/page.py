"""The report as one HTML page: what report.html.j2 shows, in the words it shows."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment, Template
from PIL import Image

from . import delegation_view, formats, plots, tensorrt_view
from .parity import STAGE_NAMES, Measurement, ParityResult, Stage, summarize
from .quantized import EXACT, kept_operators, layer_groups, loss_rows, recipe_facts
from .templates import environment

if TYPE_CHECKING:
    from .latency import SubjectResult
    from .loss import QuantizationLoss
    from .proof_types import Accuracy
    from .report import Example, Report

TEMPLATE = "report.html.j2"
THUMBNAIL = 192  # pixels: a page with a dozen images stays well below a megabyte
SHOWN_ANSWERS = 12
SHOWN_TIES = 10  # report.json lists every one
SHOWN_OPERATORS = 40


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A key number: what it is, the number, and what it means."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question of the bundled task with every side's answer and the right one.

    `original` is None where it is the reference itself.
    """

    image: str
    question: str
    expected: str
    original: str | None
    reference: str
    candidate: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One image of the parity check with both sides' texts.

    `passed` is the gate on their tokens, `ties` how many of those were left out of it.
    """

    image: str
    example: "Example"
    passed: bool
    ties: int


def render(report: "Report") -> str:
    """The page. Every string of a checkpoint, a user or a runtime is escaped by Jinja."""
    return _template().render(
        report=report,
        tiles=tiles(report),
        ttft_plot=plots.ttft(report.latency) if report.latency else None,
        parity_plot=plots.parity(report.parity) if report.parity else None,
        parity_lines=summarize(report.parity) if report.parity else [],
        exact_lines=summarize(report.exact) if report.exact else [],
        exact_words=EXACT,
        placement_rows=delegation_view.rows(report.placement) if report.placement else [],
        placement_details=_placement_details(report),
        engine_rows=tensorrt_view.rows(report.engines) if report.engines else [],
        engine_details=list(tensorrt_view.details(report.engines)) if report.engines else [],
        engine_notes=list(tensorrt_view.notes(report.engines)) if report.engines else [],
        comparisons=compared(report),
        answers=answers(report.accuracy) if report.accuracy else [],
        examples=[_shown(report, example) for example in report.examples],
        loss=loss_rows(report.quantization) if report.quantization else [],
        recipe=recipe_facts(report.quantized.recipe) if report.quantized else {},
        layers=layer_groups(report.quantized.layers) if report.quantized else [],
        kept=kept_operators(report.quantized) if report.quantized else [],
        shown_ties=SHOWN_TIES,
        shown_operators=SHOWN_OPERATORS,
    )


def _placement_details(report: "Report") -> list[tuple[str, str]]:
    return list(delegation_view.details(report.placement)) if report.placement else []


def _shown(report: "Report", example: "Example") -> Shown:
    found = []
    if report.parity:
        found = [
            m
            for m in report.parity.measurements
            if m.stage is Stage.GREEDY and m.case == example.name
        ]
    return Shown(
        image=thumbnail(example.image),
        example=example,
        passed=all(m.passed for m in found) if found else example.candidate == example.reference,
        ties=sum(int(m.numbers.get("ties", 0)) for m in found),
    )


@cache
def _environment() -> Environment:
    made = environment(
        {
            "number": formats.number,
            "check_name": formats.check_name,
            "duration": formats.duration,
            "size": formats.size,
            "lines": formats.lines,
            "stage_name": STAGE_NAMES.__getitem__,
            "target_name": formats.target_name,
            "day": lambda text: f"{datetime.fromisoformat(text):%d %B %Y, %H:%M} UTC".lstrip("0"),
        }
    )
    made.globals["share"] = formats.share
    made.globals["check_value"] = formats.check_value
    made.globals["check_limit"] = formats.check_limit
    return made


def _template() -> Template:
    return _environment().get_template(TEMPLATE)


def tiles(report: "Report") -> list[Tile]:
    """The numbers that a reader wants first; only those that were measured."""
    found: list[Tile] = []
    if report.quantization:
        found.append(_loss_tile(report.quantization))
    if report.parity:
        found += _parity_tiles(report)
    if report.accuracy:
        ours = report.accuracy.candidate.total
        others = [f"{k} {v.total.right}" for k, v in report.accuracy.references.items()]
        found.append(
            Tile(
                label="Exact answers",
                value=formats.share(ours.right, ours.total).split(" (")[0],
                note=f"{ours.right} of {ours.total}; {', '.join(others)}",
            )
        )
    if report.exact:
        found.append(_exact_tile(report.exact))
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


def _loss_tile(loss: "QuantizationLoss") -> Tile:
    same = loss.same_first
    agreement = formats.share(same.right, same.total) if same.total else "nothing compared"
    return Tile(
        label="Quantization loss",
        value=formats.number(loss.mean_kl),
        note=f"nats, mean KL; same token first: {agreement}",
    )


def _parity_tiles(report: "Report") -> list[Tile]:
    if report.parity is None:
        return []
    found = []
    logits = _worst(report.parity.measurements, Stage.FIRST_TOKEN, "max relative")
    if logits is not None:
        limit = formats.check_limit("max relative", report.parity.limits.logits)
        judged = f"limit {limit}" if limit else "all images are judged together"
        found.append(
            Tile(
                label="Worst logit difference",
                value=formats.number(logits),
                note=f"of the peak; {judged}",
            )
        )
    greedy = [m for m in report.parity.measurements if m.stage is Stage.GREEDY and m.numbers]
    if greedy:
        same = int(sum(m.numbers["matching"] for m in greedy))
        total = int(sum(m.numbers["tokens"] for m in greedy))
        images = len({m.case for m in greedy})
        ties = int(sum(m.numbers["ties"] for m in greedy))
        note = f"greedy, on {images} image{'s' if images > 1 else ''}"
        note += f"; {ties} ties left out" if ties else ""
        found.append(Tile(label="Tokens equal", value=f"{same} of {total}", note=note))
    return found


def _exact_tile(exact: ParityResult) -> Tile:
    logits = _worst(exact.measurements, Stage.FIRST_TOKEN, "max relative")
    return Tile(
        label="Without rounding",
        value=formats.number(math.nan if logits is None else logits),
        note=f"worst logit difference; limit {formats.number(exact.limits.logits)}",
    )


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
    """A dozen answers with their images.

    Those that differ from the reference first, then those that quantization changed, then wrong
    ones, then a mix.
    """
    before = accuracy.original or accuracy.reference
    sides = (accuracy.candidate, accuracy.reference, before)
    asked = list(zip(*(side.samples for side in sides), strict=True))
    differing = [s for s in asked if s[0].got != s[1].got]
    changed = [s for s in asked if s[0].got == s[1].got != s[2].got]
    same = [s for s in asked if s[0].got == s[1].got == s[2].got]
    wrong = [s for s in same if not s[0].right]
    right = [s for s in same if s[0].right]
    shown = [*differing[:6], *changed[:4], *wrong[:4]]
    room = max(SHOWN_ANSWERS - len(shown), 0)
    step = max(1, len(right) // max(room, 1))
    step -= step % 3 == 0 and step > 1  # every third question would be of one kind
    shown += right[::step][:room]
    return [
        Answer(
            image=thumbnail(ours.image),
            question=ours.question,
            expected=ours.expected,
            original=at_first.got if accuracy.original else None,
            reference=theirs.got,
            candidate=ours.got,
        )
        for ours, theirs, at_first in shown[:SHOWN_ANSWERS]
    ]


def thumbnail(image: Image.Image) -> str:
    """The image as a data URI, at most THUMBNAIL pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
