"""What an ExecuTorch runner printed about its runs: `PyTorchObserver {...}`, one line a run.

The format is that of ExecuTorch's LLM runners (1.5.1: extension/llm/runner/stats.h). Times are
counts of a unit that the line itself names, from a clock of the runner's own:
    TTFT     inference_start -> first_token: image encoder, prefill, sampling; the image is pixels
             in memory by then, the model is loaded
    decode   first_token -> inference_end, `generated_tokens` tokens: the first one not among them
    load     model_load_start -> model_load_end
`examples/android` adds image_encode_end_ms, peak_memory_bytes, threads and tokens (ids).
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..exporter.errors import ExportError

MARK = "PyTorchObserver"
UNIT = "SCALING_FACTOR_UNITS_PER_SECOND"
NEEDED = (
    "prompt_tokens",
    "generated_tokens",
    "inference_start_ms",
    "first_token_ms",
    "inference_end_ms",
    UNIT,
)
HINT = (
    "Give all that the runner printed, from its start to its end. What there is to run on a "
    "phone: examples/android/README.md, examples/ios/README.md"
)

# C++ streams print what JSON cannot say, such as a rate over no time at all.
NOT_FINITE = re.compile(r":\s*-?(?:inf|nan)(?=\s*[,}])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """One run, in seconds; None is what the runner did not say.

    `encode`, `prefill` and `first_token` (sampling it) add up to `ttft`.
    `generated_tokens` are those after the first; `tokens` are the ids of all, or none.
    """

    prompt_tokens: int
    generated_tokens: int
    ttft: float
    decode: float
    load: float | None = None
    encode: float | None = None
    prefill: float | None = None
    first_token: float | None = None
    peak_memory_bytes: int | None = None
    threads: int | None = None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunnerStats:
    """Runs of one prompt in the order they were printed: at least one."""

    runs: tuple[RunStats, ...]

    @property
    def prompt_tokens(self) -> int:
        """Positions that the prompt took, the image's among them."""
        return self.runs[0].prompt_tokens

    @property
    def generated_tokens(self) -> int:
        """Tokens after the first."""
        return self.runs[0].generated_tokens


def parse(text: str) -> RunnerStats:
    """Every run in a runner's output, whatever else is printed between or before them.

    Raises ExportError where there is none, where one says what cannot be, and where they are not
    runs of one prompt with one number of tokens.
    """
    problems: list[str] = []
    runs = []
    for number, report in enumerate(_reports(text, problems), start=1):
        before = len(problems)
        values = _values(report, f"report {number}", problems)
        if len(problems) == before:
            runs.append(_run(values, report, f"report {number}", problems))
    if not runs and not problems:
        problems.append(f"there is no line with {MARK} and a run's times")
    for name in ("prompt_tokens", "generated_tokens"):
        found = sorted({getattr(run, name) for run in runs})
        if len(found) > 1:
            listed = ", ".join(map(str, found))
            problems.append(f"its runs differ in {name}: {listed}; they are not one measurement")
    if problems:
        raise ExportError("The runner's output: " + "\n".join(problems), HINT)
    return RunnerStats(runs=tuple(runs))


def _reports(text: str, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    """The JSON objects behind each mark; generated text may stand before it on the same line."""
    decoder = json.JSONDecoder()
    for number, part in enumerate(text.split(MARK)[1:], start=1):
        found = re.match(r"\s*(?=\{)", part)
        if not found:
            continue  # a word of somebody's prose
        try:
            report, _ = decoder.raw_decode(NOT_FINITE.sub(":null", part), found.end())
        except ValueError:
            problems.append(f"report {number} is cut off or damaged")
            continue
        yield report


def _values(report: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, int]:
    """The needed numbers, each a whole one; what is wrong goes to `problems`."""
    values = {}
    for name in NEEDED:
        value = _whole(report.get(name))
        if value is None or (name == UNIT and not value):
            said = repr(report[name]) if name in report else "nothing"
            problems.append(f"{where} says {said} for {name}")
        else:
            values[name] = value
    return values


def _whole(value: object) -> int | None:
    """A whole number of 0 or more, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _run(
    values: Mapping[str, int], report: Mapping[str, Any], where: str, problems: list[str]
) -> RunStats:
    start, first, end = (
        values[f"{n}_ms"] for n in ("inference_start", "first_token", "inference_end")
    )
    if not 0 < start <= first <= end:
        problems.append(
            f"{where} has times out of order: inference_start {start}, first_token {first}, "
            f"inference_end {end}"
        )

    def between(low: int | None, high: int | None) -> float | None:
        """Seconds; None where one end was never set, which runners print as 0, or is misplaced."""
        return (high - low) / values[UNIT] if low and high and low <= high else None

    load_start, load_end, encoded, prefilled = (
        _whole(report.get(f"{name}_ms"))
        for name in ("model_load_start", "model_load_end", "image_encode_end", "prompt_eval_end")
    )
    tokens = report.get("tokens", [])
    whole = isinstance(tokens, list) and all(_whole(one) is not None for one in tokens)
    return RunStats(
        prompt_tokens=values["prompt_tokens"],
        generated_tokens=values["generated_tokens"],
        ttft=(first - start) / values[UNIT],
        decode=(end - first) / values[UNIT],
        # A runner that had loaded before prints one time twice.
        load=between(load_start, load_end) or None,
        encode=between(start, encoded),
        prefill=between(encoded, prefilled),
        first_token=between(prefilled, first) if encoded else None,
        peak_memory_bytes=_whole(report.get("peak_memory_bytes")) or None,
        threads=_whole(report.get("threads")) or None,
        tokens=tuple(tokens) if whole and max(tokens, default=0) < 2**31 else (),
    )
