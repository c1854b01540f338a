"""Whether a program may be loaded into this process: ExecuTorch's runtime trusts what it loads.

A program with wrong indices or sizes can end the process. What can be read of it is checked here;
the rest is tried in a process of its own, once per file.
"""

import functools
import json
import os
import signal
import subprocess
from pathlib import Path

import psutil

from ..exporter import child
from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError, raise_together
from ..exporter.tokenizer import read_tokenizer
from .executorch_contract import contract_problems, runtime_problems
from .executorch_file import PteFile, Tensor, read
from .executorch_model import DECODER, EMBEDDING, EXPORT_HINT, PROGRAM, VISION, WEIGHTS
from .executorch_xnn import XNNPACK, check_constants

PROBE = "fastvlm_export.targets.executorch_probe"
PROBE_SECONDS = 600
"""A program of a billion weights takes some ten seconds to load and run once."""

EXPENDABLE = "FASTVLM_EXPORT_EXPENDABLE"
"""Set for processes whose end their parent reports: they need not try a program elsewhere first."""


def files_of(bundle: Bundle) -> tuple[Path, Path | None]:
    """The program, and the file of its weights where it has one. Raises ExportError."""
    program, weights = bundle.path / PROGRAM, bundle.path / WEIGHTS
    external = bool(bundle.manifest.artifact.get("external_weights"))
    missing = [path.name for path in (program, *[weights] * external) if not path.is_file()]
    if missing:
        raise ExportError(f"{bundle.path} has no {' and no '.join(missing)}.", EXPORT_HINT)
    return program, weights if external else None


def prove(bundle: Bundle, backends: list[str], operators: list[str]) -> PteFile:
    """Check the bundle's program, and run it once elsewhere unless this very file has been.

    Raises one ExportError with everything that is wrong.
    """
    program, weights = files_of(bundle)
    file = read(program, weights)
    for method in file.methods.values():
        for delegate in method.delegates:
            if delegate.backend == XNNPACK:
                check_constants(delegate)
    memory = psutil.virtual_memory().total
    raise_together(
        [
            *contract_problems(file, bundle, read_tokenizer(bundle.path).vocab_size),
            *runtime_problems(file, backends, operators, memory),
        ]
    )
    if not os.environ.get(EXPENDABLE):
        _probe(program, weights, _runs(file), tuple(map(_stamp, filter(None, (program, weights)))))
    return file


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes with the file; reads none of it."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _runs(file: PteFile) -> str:
    """An image, and texts of one token and of several: [method, [[dtype, sizes], ...]] each."""
    pixels: Tensor = file.methods[VISION].inputs[0]
    embeds: Tensor = file.methods[DECODER].inputs[0]
    runs: list[object] = [[VISION, [["float32", pixels.sizes]]]]
    for length in sorted({1, min(3, embeds.sizes[1])}):
        runs.append([EMBEDDING, [["int64", [1, length]]]])
        rows = [1, length, embeds.sizes[-1]]
        runs.append([DECODER, [["float32", rows], ["int64", [length]]]])
    return json.dumps(runs)


@functools.cache
def _probe(
    program: Path, weights: Path | None, runs: str, stamps: tuple[tuple[int, ...], ...]
) -> None:
    """Run the program in a process of its own; raises ExportError where that ends badly.

    What raises is not kept: a file that did not run is tried again, one that did is not until its
    stamp changes.
    """
    job = {"program": str(program), "weights": str(weights) if weights else None}
    try:
        done = subprocess.run(  # noqa: S603 - our own module in our own interpreter
            child.command(PROBE),
            input=json.dumps(job | {"runs": json.loads(runs)}) + "\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"{program} does not come to an end in ExecuTorch's runtime: {PROBE_SECONDS} s.",
            EXPORT_HINT,
        ) from None
    if done.returncode < 0:
        raise ExportError(
            f"{program} ends the process that runs it ({_signal_name(-done.returncode)}): "
            "it is damaged.",
            EXPORT_HINT,
        )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = said[-1].strip() if said else f"exit code {done.returncode}"
        raise ExportError(f"{program} cannot be run by ExecuTorch: {reason}", EXPORT_HINT)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
