"""One target and recipe run to its end, each finding kept as soon as it is there."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from .cells import RECIPES, Effort, Prepared, asking, prepare
from .disturbances import disturbances
from .judge import Finding, timed
from .misses import faults_of, findings, shared_out

FALSE_ALARMS, MISSES = "false-alarms", "misses"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of a cell. `pythons`: interpreters with other versions of the runtimes."""

    target: str
    recipe: str
    work: Path
    kinds: tuple[str, ...] = (FALSE_ALARMS, MISSES)
    most: int | None = None
    effort: Effort = field(default_factory=Effort)
    pythons: tuple[Path, ...] = ()

    @property
    def results(self) -> Path:
        """Where its findings are kept."""
        return self.work / "results" / f"{self.target}-{self.recipe}.json"


@dataclass
class Results:
    """All findings of a cell so far; `without_place`: faults that found nothing to change."""

    target: str
    recipe: str
    false_alarms: list[dict[str, Any]] = field(default_factory=list)
    misses: list[dict[str, Any]] = field(default_factory=list)
    without_place: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(vars(self), indent=1) + "\n", "utf-8")
        unfinished.replace(path)


def load(job: Job) -> Results:
    """What earlier runs found."""
    if not job.results.is_file():
        return Results(target=job.target, recipe=job.recipe)
    return Results(**json.loads(job.results.read_text("utf-8")))


def run(job: Job) -> Results:
    """Everything of the job that no earlier run has found out."""
    import torch  # noqa: PLC0415 - in the worker, which has one thread

    torch.set_num_threads(1)
    started, results = time.monotonic(), load(job)
    before = results.seconds
    with asking(job.effort.questions):
        folder = job.work / "bundles" / f"{job.target}-{job.recipe}"
        cell = prepare(job.target, job.recipe, folder, job.effort)
        for kept, found in _findings(job, cell, results):
            kept.append(found.to_dict() if isinstance(found, Finding) else found)
            results.seconds = round(before + time.monotonic() - started, 1)
            results.save(job.results)
            _say(job, found)
    return results


def _findings(
    job: Job, cell: Prepared, results: Results
) -> Iterator[tuple[list[Any], Finding | str]]:
    if FALSE_ALARMS in job.kinds:
        known = {one["name"] for one in results.false_alarms}
        for one in islice(disturbances(cell, job.work, job.effort, job.pythons), job.most):
            if one.name not in known:
                yield results.false_alarms, timed(one.name, one.judge)
    if MISSES in job.kinds:
        planted = shared_out(faults_of(job.target), RECIPES[job.target])[job.recipe]
        done = {*(one["name"] for one in results.misses), *results.without_place}
        for found in findings(cell, [one for one in planted if one.name not in done]):
            is_finding = isinstance(found, Finding)
            yield results.misses if is_finding else results.without_place, found


def _say(job: Job, found: Finding | str) -> None:
    if isinstance(found, str):
        word = f"no place for: {found}"
    else:
        word = f"{' '.join(found.gates) or 'passed':15} {found.seconds:6.1f} s  {found.name}"
    print(f"{job.target} {job.recipe:5} {word}", flush=True)
