"""What is expensive to make and the same for every worker: made once in a run of the tests."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .exporter.commands import command


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first to ask makes, whichever worker that is; the others wait for it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own below the run's
        root = root.parent
    folder, unfinished = root / name, root / f"{name}.unfinished"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


def command_line(out: Path) -> None:
    """The bundled model in float32 on XNNPACK, as a user exports, proves and times it."""
    _exported("--target", "executorch", "--out", out, "--runs", 1, "--json")


def tensorrt(out: Path) -> None:
    """The bundled model in float32, its engines built for two generations of GPUs."""
    capabilities = ("--compute-capability", "80,120")
    _exported("--target", "tensorrt", *capabilities, "--out", out, "--runs", 1, "--json")


def _exported(*options: object) -> None:
    # Half as many questions as usual: test_cli's export asks all of them.
    line = command(*options, questions=150)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)["passed"]


def int4(out: Path) -> None:
    """The same with integers of 4 and 8 bits, on half as many tokens, and not timed."""
    _quantized(out, "executorch", "int4")


def int8(out: Path) -> None:
    """Likewise, of 8 bits alone."""
    _quantized(out, "executorch", "int8")


def tensorrt_int4(out: Path) -> None:
    """Of 4 and 8 bits, as engines."""
    _quantized(out, "tensorrt", "int4", compute_capabilities=("80", "120"))


def _quantized(out: Path, target: str, recipe: str, **options: Any) -> None:
    from fastvlm_export.exporter import pipeline  # noqa: PLC0415 - most tests need nothing of it
    from fastvlm_export.exporter.source import SourceRequest  # noqa: PLC0415
    from fastvlm_export.targets.base import Options  # noqa: PLC0415
    from fastvlm_export.validate import proof  # noqa: PLC0415

    request = pipeline.ExportRequest(
        source=SourceRequest(),
        out=out,
        targets=(target,),
        recipe=recipe,
        steps=32,
        options=Options(**options),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "QUESTIONS", 150)
        (outcome,) = pipeline.export(request)
    assert outcome.passed, outcome.report.verdict
