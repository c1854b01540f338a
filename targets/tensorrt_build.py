"""Engines from a bundle's ONNX graphs and its plan: each in a process of its own, checked after."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from ..exporter import child
from ..exporter.bundle import sha256_of
from ..exporter.errors import ExportError
from . import tensorrt_package as packages
from .tensorrt_package import Backend
from .tensorrt_plan import GRAPHS, PLAN, GraphPlan, Plan, read_plan
from .tensorrt_record import (
    RECORD,
    BuildRecord,
    Effort,
    Engine,
    GraphRecord,
    Network,
    network_from,
    write_times,
)

WORKER = "fastvlm_export.targets.tensorrt_worker"
HINT = "Export the bundle again: fastvlm-export --target tensorrt --out DIR --force"


def build(folder: Path, say: Callable[[str], None], *, engines: bool, gpu: str = "") -> BuildRecord:
    """Parse the graphs by the plan in the folder, build their engines, write the record of both.

    Without `engines` the graphs are only shown to a parser, if there is any. `gpu` is the name of
    the one that TensorRT builds on. Raises ExportError where TensorRT refuses something or dies.
    """
    plan = read_plan(folder)
    if engines:
        packages.load(plan.backend)
    efforts: dict[str, Effort] = {}
    graphs = {}
    for name in GRAPHS:
        one = plan.graphs[name]
        network = None
        if packages.installed():
            network, efforts[name] = run(folder, name, build=engines, say=say)
        graphs[name] = GraphRecord(
            sources=sources(folder, one),
            network=network,
            engine=engine_of(folder / one.engine) if engines else None,
        )
    record = BuildRecord(
        backend=plan.backend,
        **_parser(plan.backend, graphs.values()),
        compute_capabilities=plan.compute_capabilities,
        gpu=gpu if engines else "",
        graphs=graphs,
    )
    (folder / RECORD).write_text(record.to_json(), "utf-8")
    write_times(folder / "report", efforts)
    return record


def parser_for(backend: Backend) -> Backend | None:
    """The package whose parser is shown the graphs; None where none is installed."""
    there = packages.installed()
    return backend if backend in there else next(iter(there), None)


def _parser(backend: Backend, graphs: Iterable[GraphRecord]) -> dict[str, Any]:
    parser = parser_for(backend)
    if parser is None:
        return {"parser": "", "version": "", "lacks": ()}
    return {
        "parser": parser.value,
        "version": packages.version(parser),
        "lacks": packages.lacks(
            packages.load(parser),
            {name for one in graphs if one.network for name in one.network.written_out},
        ),
    }


def sources(folder: Path, graph: GraphPlan) -> dict[str, str]:
    """The graph's ONNX file and its weight files -> SHA-256."""
    onnx = folder / graph.onnx
    files = sorted(onnx.parent.glob(f"{onnx.name}*"))
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}


def engine_of(path: Path) -> Engine:
    """Size and hash of an engine's file. Raises ExportError where there is none."""
    if not path.is_file():
        raise ExportError(f"{path.name} was not written.", HINT)
    return Engine(bytes=path.stat().st_size, sha256=sha256_of(path))


def write_plan(folder: Path, plan: Plan) -> None:
    """Write `build_plan.json`."""
    (folder / PLAN).write_text(plan.to_json(), "utf-8")


def run(
    folder: Path, graph: str, *, build: bool, say: Callable[[str], None]
) -> tuple[Network, Effort]:
    """Have one graph parsed and, with `build`, its engine written, in a process of its own.

    Raises ExportError with what TensorRT says, also where the process dies.
    """
    job = {"folder": str(folder.absolute()), "graph": graph, "build": build}
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(  # noqa: S603 - our own module in our own interpreter
            child.command(WORKER),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
        )
        try:
            answer = _answer(process, job, lambda what: say(f"{graph}: {what}"))
            if not answer:
                raise _died(process.wait(), stderr, graph)
        finally:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
    if "error" in answer:
        raise ExportError(answer["error"], answer["hint"])
    return network_from(answer["network"]), Effort(**answer["effort"])


def _answer(
    process: "subprocess.Popen[str]", job: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """The process's last word; nothing where it died before."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("the process has no pipes")
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.close()
    for line in process.stdout:
        message = _message(line)
        if "at" not in message and message:
            return message
        say(str(message.get("at", "")))
    return {}


def _message(line: str) -> dict[str, Any]:
    """A line of the process; nothing where it is not the process's own but a library's."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _died(code: int, stderr: IO[bytes], graph: str) -> ExportError:
    stderr.seek(0)
    said = [line for line in stderr.read().decode(errors="replace").splitlines() if line.strip()]
    reason = f"killed by signal {-code}" if code < 0 else said[-1].strip()[:300] if said else ""
    if code == -9:
        reason += ", often for want of memory"
    return ExportError(
        f"{graph}: TensorRT's process ended without an engine: {reason or f'exit code {code}'}.",
        "Free some memory or use a smaller --context or --resolution.",
    )
