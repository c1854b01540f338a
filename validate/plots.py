"""Plots as inline SVG: the page's style sheet colours them, so that they follow light and dark."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from .formats import PART_NAMES, check_name, check_value, duration, target_name
from .latency import LatencyResult, Part
from .parity import STAGE_NAMES, ParityResult, Scope, Summary, summarize

WIDTH = 880


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(text)}</text>"


def _svg(height: float, label: str, parts: Sequence[str]) -> Markup:
    # What goes in is built by this module alone, and every text in it is escaped by `_text`.
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return Markup(f"{head}{''.join(parts)}</svg>")  # noqa: S704


def ticks(largest: float) -> list[float]:
    """Up to six round numbers from 0 to just below `largest`."""
    step = 10 ** math.floor(math.log10(largest))
    for divisor in (1, 2, 5, 10):
        if largest / (step / divisor) >= 4:
            step /= divisor
            break
    return [step * i for i in range(int(largest / step) + 1)]


def ttft(result: LatencyResult) -> Markup:
    """One stacked bar for each subject: the medians of TTFT's parts, in order."""
    left, right, bar, gap, top = 130, 130, 40, 22, 34
    medians = [[subject.parts[part].p50 for part in Part] for subject in result.subjects]
    longest = max(sum(parts) for parts in medians)
    scale = (WIDTH - left - right) / longest
    height = top + len(medians) * (bar + gap) + 24
    out = _legend(left)
    for tick in ticks(longest):
        x = left + tick * scale
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - 20}" class="grid"/>')
        out.append(_text(x, height - 5, duration(tick) if tick else "0", "tick", "middle"))
    for row, (subject, parts) in enumerate(zip(result.subjects, medians, strict=True)):
        x, y = float(left), top + 8 + row * (bar + gap)
        out.append(_text(left - 10, y + bar / 2 + 5, target_name(subject.name), "label", "end"))
        for part, seconds in zip(Part, parts, strict=True):
            width = seconds * scale
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{bar}" class="{part}">'
                f"<title>{escape(PART_NAMES[part])}: {duration(seconds)}</title></rect>"
            )
            if width > 64:
                middle = x + width / 2
                out.append(_text(middle, y + bar / 2 + 5, duration(seconds), "inside", "middle"))
            x += width
        out.append(_text(x + 8, y + bar / 2 + 5, duration(subject.ttft.p50), "total"))
    label = "Time to first token: " + "; ".join(
        f"{target_name(subject.name)} {duration(subject.ttft.p50)}" for subject in result.subjects
    )
    return _svg(height, label, out)


def _legend(left: float) -> list[str]:
    out, x = [], left
    for part in Part:
        out.append(f'<rect x="{x}" y="4" width="12" height="12" class="{part}"/>')
        out.append(_text(x + 18, 15, PART_NAMES[part], "tick"))
        x += 42 + 7 * len(PART_NAMES[part])
    return out


def parity(result: ParityResult) -> Markup:
    """The worst value of each check on a log scale against its limit.

    A dot is fed by the reference, a ring lives on what the artifact made itself. A value of 0
    stands at the left edge, one that is missing or infinite at the right.
    """
    lines = summarize(result)
    left, right, row, top = 330, 120, 26, 34
    low, high = _decades(lines)
    height = top + row * len(lines) + 26

    def place(value: float) -> float:
        if not math.isfinite(value):
            return WIDTH - right
        exponent = math.log10(value) if value > 0 else low
        share = (min(max(exponent, low), high) - low) / (high - low)
        return left + share * (WIDTH - left - right)

    out = _parity_legend(left)
    for exponent in range(low, high + 1, 2 if high - low > 8 else 1):
        x = place(10.0**exponent)
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - 22}" class="grid"/>')
        text = "0" if exponent == low else f"1e{exponent}"
        out.append(_text(x, height - 6, text, "tick", "middle"))
    before = None
    for index, line in enumerate(lines):
        y = top + row * index + row / 2
        if line.stage != before:
            edge = y - row / 2
            out.append(f'<line x1="0" x2="{WIDTH}" y1="{edge}" y2="{edge}" class="rule"/>')
            out.append(_text(0, y + 5, STAGE_NAMES[line.stage], "label"))
        before = line.stage
        out.append(_text(left - 14, y + 4, check_name(line.name), "tick", "end"))
        furthest = place(line.overall[0].value)
        out.append(f'<line x1="{left}" x2="{furthest:.1f}" y1="{y}" y2="{y}" class="stem"/>')
        if math.isfinite(line.limit):
            out.append(_limit(place(line.limit), y))
        for scope, (check, _) in line.worst.items():
            out.append(_mark(place(check.value), y, scope, check.passed))
        style = "good" if line.passed else "bad"
        sign = ("✓ " if line.judged else "") if line.passed else "✗ "
        value = check_value(line.name, line.overall[0].value)
        style = style if line.judged else "tick"
        out.append(_text(WIDTH - right + 16, y + 4, f"{sign}{value}", style))
    return _svg(height, f"Worst value of each check against its limit. {result.verdict}", out)


def _mark(x: float, y: float, scope: Scope, passed: bool) -> str:
    style = "good" if passed else "bad"
    shape, radius = ("dot", 5) if scope is Scope.ISOLATED else ("ring", 7.5)
    return f'<circle cx="{x:.1f}" cy="{y}" r="{radius}" class="{style} {shape}"/>'


def _limit(x: float, y: float) -> str:
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 9}" y2="{y + 9}" class="limit"/>'


def _parity_legend(left: float) -> list[str]:
    return [
        _mark(left + 5, 12, Scope.ISOLATED, True),
        _text(left + 16, 16, "fed by the reference", "tick"),
        _mark(left + 165, 12, Scope.END_TO_END, True),
        _text(left + 178, 16, "end to end", "tick"),
        _limit(left + 264, 12),
        _text(left + 272, 16, "limit", "tick"),
    ]


def _decades(lines: Sequence[Summary]) -> tuple[int, int]:
    """Powers of ten that hold every value and limit, with one to spare for 0 on the left."""
    found = [
        value
        for line in lines
        for value in (line.limit, *(check.value for check, _ in line.worst.values()))
        if math.isfinite(value) and value > 0
    ]
    if not found:
        return -3, 0
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    return low - 1, max(high, low + 1)
