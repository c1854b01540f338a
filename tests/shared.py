"""What is expensive to make and the same for every worker: made once in a run of the tests."""

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from .exporter.commands import command

QUESTIONS = 150  # half as many as users have asked; the export that `command_line` types asks 300
STEPS = 32
CAPABILITIES = {"tensorrt": ("80", "120")}  # target -> the GPUs that engines are built for

_programs: dict[tuple[str, str], Mapping[str, Any]] = {}
_originals: dict[tuple[int | None, int], Any] = {}


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first to ask makes, whichever worker that is; the others wait for it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own below the run's
        root = root.parent
    folder, made = root / name, root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a test that failed
            make(folder)
            made.touch()
    return folder


def whole_export(factory: pytest.TempPathFactory, target: str, recipe: str) -> Path:
    """A bundle of the trained model that passed its proof, for all workers: not to be changed."""

    def make(out: Path) -> None:
        if (target, recipe) == ("onnx", "fp32"):
            _typed(out)
            return
        with _remembered(target, recipe):
            if recipe == "fp32":
                _typed_here(out, target)
            else:
                _exported(out, target, recipe)

    return once(factory, f"{target}-{recipe}", make)


def programs(target: str, recipe: str) -> Mapping[str, Any] | None:
    """The programs that `whole_export` lowered; None where another worker did."""
    return _programs.get((target, recipe))


def said(bundle: Path) -> dict[str, Any]:
    """What the command that made the bundle in float32 for ONNX printed, as JSON."""
    printed: dict[str, Any] = json.loads(_printed(bundle).read_text("utf-8"))
    return printed


def _printed(bundle: Path) -> Path:
    return bundle.with_name(f"{bundle.name}.json")


def _typed(out: Path) -> None:
    """As a user exports, proves and times the bundled model: in a process of its own."""
    line = command("--target", "onnx", "--out", out, "--runs", 1, "--json")
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    _printed(out).write_text(done.stdout, "utf-8")


def _typed_here(out: Path, target: str) -> None:
    """The same in this process, with neither a warm-up nor processes that load and do no more."""
    from fastvlm_export.exporter import cli  # noqa: PLC0415 - most tests need nothing of it
    from fastvlm_export.validate import proof  # noqa: PLC0415

    def time_bundle(bundle: Any, sample: Any, plan: Any, *more: Any) -> Any:
        return real(bundle, sample, replace(plan, warmup=0, loads=0), *more)

    real, printed = proof.time_bundle, io.StringIO()
    line = ["--target", target, "--out", str(out), "--runs", "1", "--json"]
    if target in CAPABILITIES:
        line += ["--compute-capability", ",".join(CAPABILITIES[target])]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", ["fastvlm-export", *line])
        patch.setattr(proof, "time_bundle", time_bundle)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code, printed.getvalue()
    assert json.loads(printed.getvalue())["passed"]


def _exported(out: Path, target: str, recipe: str) -> None:
    """On half as many tokens, and not timed."""
    from fastvlm_export.exporter import pipeline  # noqa: PLC0415
    from fastvlm_export.exporter.source import SourceRequest  # noqa: PLC0415
    from fastvlm_export.targets.base import Options  # noqa: PLC0415

    request = pipeline.ExportRequest(
        source=SourceRequest(),
        out=out,
        targets=(target,),
        recipe=recipe,
        steps=STEPS,
        options=Options(compute_capabilities=CAPABILITIES.get(target)),
    )
    (outcome,) = pipeline.export(request)
    assert outcome.passed, outcome.report.verdict


@contextmanager
def _remembered(target: str, recipe: str) -> Iterator[None]:
    """Keep an export's programs; run the trained model itself once for all exports."""
    from fastvlm_export.exporter import pipeline  # noqa: PLC0415
    from fastvlm_export.validate import proof  # noqa: PLC0415

    def quantize(*given: Any) -> Any:
        found = real(*given)
        _programs[target, recipe] = found.programs
        return found

    def run_original(*given: Any) -> Any:
        key = given[-1], proof.QUESTIONS
        if key not in _originals:
            _originals[key] = proof.run_original(*given)
        return _originals[key]

    real = pipeline.quantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "QUESTIONS", QUESTIONS)
        patch.setattr(pipeline, "quantize", quantize)
        patch.setattr(pipeline, "run_original", run_original)
        yield
