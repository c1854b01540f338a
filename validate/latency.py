"""Time to first token, decomposed; decoding speed; peak memory. Each backend in its own process.

The clock starts at an image file and a tokenized prompt, with the model loaded:
    preprocess   read and decode the image file, resize, to pixels
    encode       pixels -> image features
    prefill      embed the prompt, splice the features in, decode all of it -> logits
    first_token  pick the token, turn it into text
Their sum is TTFT. Where a runtime tells its GPU's own clock, so do the numbers: what the GPU
computed in encode, prefill and decoding; the rest of each is copying and waiting. Loading is apart:
cold in a fresh process whose files were dropped from the page cache, or whose packages or engines
have yet to be compiled; warm in one that finds them there. Neither counts the start of Python or
its imports.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..exporter.errors import ExportError
from ..exporter.scratch import ScratchFolder
from . import machine
from .latency_process import WorkerProcess, start
from .machine import Machine

RANDOM = "random:"

Progress = Callable[[str], None]


class Backend(StrEnum):
    """What a subject runs on: a bundle in its own runtime, or PyTorch eager."""

    BUNDLE = "bundle"
    PYTORCH = "pytorch"


class Part(StrEnum):
    """The parts of TTFT, in order."""

    PREPROCESS = "preprocess"
    ENCODE = "encode"
    PREFILL = "prefill"
    FIRST_TOKEN = "first_token"  # noqa: S105 - a part of TTFT, not a secret


DECODE = "decode"
DEVICE_PARTS = (Part.ENCODE.value, Part.PREFILL.value, DECODE)
"""What a GPU computes in; decoding is all tokens after the first."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing to time. `bundle` is the contract (preprocessing, context) for either backend.

    `checkpoint` is where PyTorch's weights come from: a folder, `bundled`, or `random:NAME:SEED`.
    The PyTorch model is reparameterized unless not `folded`, runs in float32 under inference_mode
    with a key/value cache, and computes the last position's logits only: the bundle's own work.
    `compute_units` are where Core ML may compute, one of `coreml_session.COMPUTE_UNITS`; "": the
    runtime's default, and the only choice of any other target.
    """

    name: str
    backend: Backend
    bundle: Path
    checkpoint: str = ""
    channels_last: bool = False
    folded: bool = True
    compute_units: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to measure.

    After `warmup` rounds come up to `runs`, fewer once `seconds` have passed but at least
    `least_runs`; each decodes `tokens` after the first. `loads` is the number of fresh processes
    that each way of loading is timed in.
    """

    warmup: int = 2
    runs: int = 30
    least_runs: int = 5
    seconds: float = 60.0
    tokens: int = 16
    loads: int = 3

    def __post_init__(self) -> None:
        if min(self.runs, self.least_runs, self.tokens) < 1 or min(self.warmup, self.loads) < 0:
            raise ExportError(
                "A measurement needs at least one run and one token.",
                "Give --runs and --tokens of 1 or more.",
            )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one repeated step, in the order they were measured."""

    seconds: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many runs."""
        return len(self.seconds)

    @property
    def p50(self) -> float:
        """Median, in seconds."""
        return float(np.percentile(self.seconds, 50))

    @property
    def p95(self) -> float:
        """95th percentile, in seconds: near the worst run where there are fewer than 20."""
        return float(np.percentile(self.seconds, 95))

    def to_dict(self) -> dict[str, object]:
        """Plain data, in seconds."""
        return {"n": self.n, "p50": self.p50, "p95": self.p95, "seconds": list(self.seconds)}


@dataclass(frozen=True, kw_only=True)
class SubjectResult:
    """One backend's numbers. `load_*` are None where there is no file to load (random weights).

    `load_note` says what the cold number is worth; `peak_memory_bytes` is the largest resident
    memory of the process that loaded and ran this backend and nothing else. `on_device` is what
    `DEVICE_PARTS` took by the GPU's own clock; empty where nothing tells.
    """

    name: str
    backend: Backend
    setting: str
    load_cold: Timing | None
    load_warm: Timing | None
    load_note: str
    parts: Mapping[Part, Timing]
    ttft: Timing
    decode: Timing
    tokens: int
    first_text: str
    peak_memory_bytes: int
    on_device: Mapping[str, Timing] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first token, at the median."""
        return self.tokens / self.decode.p50

    def timing(self, name: str) -> Timing | None:
        """`load_cold`, `load_warm`, a part, `ttft` or `decode` by name; None where not timed."""
        if name in self.parts:
            return self.parts[Part(name)]
        others = {
            "load_cold": self.load_cold,
            "load_warm": self.load_warm,
            "ttft": self.ttft,
            "decode": self.decode,
        }
        return others[name]

    def to_dict(self) -> dict[str, object]:
        """Plain data: seconds, bytes, tokens per second."""
        return {
            "name": self.name,
            "backend": self.backend,
            "setting": self.setting,
            "load_cold": self.load_cold.to_dict() if self.load_cold else None,
            "load_warm": self.load_warm.to_dict() if self.load_warm else None,
            "load_note": self.load_note,
            "parts": {part.value: timing.to_dict() for part, timing in self.parts.items()},
            "ttft": self.ttft.to_dict(),
            "decode": self.decode.to_dict(),
            "decoded_tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "first_text": self.first_text,
            "peak_memory_bytes": self.peak_memory_bytes,
            "on_device": {name: timing.to_dict() for name, timing in self.on_device.items()},
        }


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """The subjects in the order given: ours first, then what it is held against."""

    subjects: tuple[SubjectResult, ...]
    machine: Machine
    threads: int
    prompt_tokens: int
    warmup: int

    def ratios(self, peer: SubjectResult) -> dict[str, float]:
        """How many times as long the peer takes, by part: the median over pairs of rounds.

        Round i of both ran one after the other, so what slows the machine slows both. `load_cold`
        and `load_warm` are ratios of medians, where both have them.
        """
        ours = self.subjects[0]
        found = {}
        for name in (*Part, "ttft", "decode", "load_cold", "load_warm"):
            mine, theirs = ours.timing(name), peer.timing(name)
            if not mine or not theirs:
                continue
            paired = mine.n == theirs.n and not name.startswith("load")
            found[str(name)] = (
                statistics.median(b / a for a, b in zip(mine.seconds, theirs.seconds, strict=True))
                if paired
                else theirs.p50 / mine.p50
            )
        return found

    def to_dict(self) -> dict[str, object]:
        """Plain data for the report."""
        return {
            "definition": (__doc__ or "").strip(),
            "machine": asdict(self.machine),
            "threads": self.threads,
            "prompt_tokens": self.prompt_tokens,
            "warmup": self.warmup,
            "subjects": [subject.to_dict() for subject in self.subjects],
            "ratios": {peer.name: self.ratios(peer) for peer in self.subjects[1:]},
        }


def measure(
    subjects: Sequence[Subject],
    image: Path | Image.Image,
    prompt_ids: Sequence[int],
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> LatencyResult:
    """Time each subject on the same image and prompt; rounds alternate A B A B.

    `prompt_ids` holds one image token per image feature, as in `generation.PromptInputs`; the
    bundle's manifest says which id that is. Raises ExportError when a backend fails.
    """
    plan, say = plan or Plan(), progress or (lambda _: None)
    if not subjects:
        raise ExportError("There is nothing to time.", "Run: fastvlm-export bench BUNDLE")
    machine_now = machine.describe()
    threads = machine_now.cores  # what every target's session uses
    with ExitStack() as stack:
        if isinstance(image, Image.Image):
            folder = stack.enter_context(ScratchFolder())
            path = folder / "image.png"
            image.save(path)
        else:
            path = image
        jobs = [_job(subject, path, prompt_ids, plan, threads) for subject in subjects]
        cold = [_cold_loads(job, plan.loads, say) for job in jobs]
        warm = [_warm_loads(job, plan.loads - 1, say) for job in jobs]
        workers = [stack.enter_context(start(job)) for job in jobs]
        for job, worker, seconds in zip(jobs, workers, warm, strict=True):
            say(f"{worker.name}: loading")
            loaded = worker.ask("load", cold=False, keep=True)
            worker.setting = loaded["setting"]
            if plan.loads and not is_random(job["checkpoint"]):
                seconds.append(loaded["seconds"])
        rounds = _rounds(workers, plan, say)
        peaks = [int(worker.ask("finish")["peak_memory_bytes"]) for worker in workers]
    results = [
        _result(subject, worker, peak, list(loads), seconds, list(timings), plan)
        for subject, worker, peak, loads, seconds, timings in zip(
            subjects, workers, peaks, cold, warm, zip(*rounds, strict=True), strict=True
        )
    ]
    return LatencyResult(
        subjects=tuple(results),
        machine=machine_now,
        threads=threads,
        prompt_tokens=len(prompt_ids),
        warmup=plan.warmup,
    )


def is_random(checkpoint: str) -> bool:
    """Whether the weights are made up, not loaded: there is no loading to time then."""
    return checkpoint.startswith(RANDOM)


def _job(
    subject: Subject, image: Path, prompt_ids: Sequence[int], plan: Plan, threads: int
) -> dict[str, Any]:
    """What a worker needs to know, as JSON."""
    return {
        "name": subject.name,
        "backend": subject.backend.value,
        "bundle": str(subject.bundle.absolute()),
        "checkpoint": subject.checkpoint,
        "channels_last": subject.channels_last,
        "folded": subject.folded,
        "compute_units": subject.compute_units,
        "image": str(image.absolute()),
        "prompt_ids": [int(token) for token in prompt_ids],
        "tokens": plan.tokens,
        "threads": threads,
    }


def _cold_loads(job: dict[str, Any], count: int, say: Progress) -> list[dict[str, Any]]:
    loads: list[dict[str, Any]] = []
    for number in range(0 if is_random(job["checkpoint"]) else count):
        say(f"{job['name']}: loading cold, {number + 1} of {count}")
        with start(job) as worker:
            loads.append(worker.ask("load", cold=True, keep=False))
    return loads


def _warm_loads(job: dict[str, Any], count: int, say: Progress) -> list[float]:
    """All but one of the warm loads: the process that measures gives the last."""
    seconds: list[float] = []
    for number in range(0 if is_random(job["checkpoint"]) else count):
        say(f"{job['name']}: loading warm, {number + 1} of {count + 1}")
        with start(job) as worker:
            seconds.append(worker.ask("load", cold=False, keep=False)["seconds"])
    return seconds


def _rounds(
    workers: Sequence[WorkerProcess], plan: Plan, say: Progress
) -> list[list[dict[str, Any]]]:
    """[round][subject] -> seconds by part."""
    for number in range(plan.warmup):
        for worker in workers:
            say(f"{worker.name}: warm-up {number + 1} of {plan.warmup}")
            worker.ask("round")
    rounds: list[list[dict[str, Any]]] = []
    began = time.monotonic()
    while len(rounds) < plan.runs:
        if len(rounds) >= plan.least_runs and time.monotonic() - began > plan.seconds:
            break
        timings = []
        for worker in workers:
            say(f"{worker.name}: run {len(rounds) + 1} of up to {plan.runs}")
            timings.append(worker.ask("round"))
        rounds.append(timings)
    return rounds


def _result(
    subject: Subject,
    worker: WorkerProcess,
    peak: int,
    cold: Sequence[Mapping[str, Any]],
    warm: Sequence[float],
    rounds: Sequence[Mapping[str, Any]],
    plan: Plan,
) -> SubjectResult:
    def timing(name: str) -> Timing:
        return Timing(seconds=tuple(float(one[name]) for one in rounds))

    told = [one["on_device"] for one in rounds]
    on_device = {
        name: Timing(seconds=tuple(float(one[name]) for one in told))
        for name in (DEVICE_PARTS if all(told) else ())
    }
    return SubjectResult(
        name=subject.name,
        backend=subject.backend,
        setting=worker.setting + _by_the_device(on_device, plan.tokens),
        load_cold=Timing(seconds=tuple(load["seconds"] for load in cold)) if cold else None,
        load_warm=Timing(seconds=tuple(warm)) if warm else None,
        load_note=cold[-1]["note"] if cold else "not timed",
        parts={part: timing(part) for part in Part},
        ttft=timing("ttft"),
        decode=timing("decode"),
        tokens=plan.tokens,
        first_text=str(rounds[-1]["text"]),
        peak_memory_bytes=peak,
        on_device=on_device,
    )


def _by_the_device(parts: Mapping[str, Timing], tokens: int) -> str:
    """The GPU's own medians, in words; empty where there are none."""
    if not parts:
        return ""
    told = [f"{name} {parts[name].p50 * 1e3:.4g} ms" for name in DEVICE_PARTS[:-1]]
    told.append(f"{parts[DECODE].p50 / tokens * 1e3:.4g} ms a token")
    return f"; by the GPU's clock: {', '.join(told)}"
