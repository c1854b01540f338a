"""The process that parses and builds one engine, because it may be the process's last.

TensorRT is a large library that takes the memory it wants, and can end the process that runs out of
it. Reads one JSON line {"folder": PATH, "graph": NAME, "build": BOOL}, the plan from the folder and
the graph's ONNX file; writes the engine. Prints JSON lines: {"at": WHAT} while it goes on, and last
either {"network": ..., "effort": ...} or {"error": MESSAGE, "hint": HINT}. Run by `tensorrt_build`.
"""

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..exporter.errors import ExportError
from ..exporter.memory import peak_memory
from .tensorrt_log import Log
from .tensorrt_network import add_profiles, describe, parse
from .tensorrt_package import NAMES, Backend, installed, load, version
from .tensorrt_plan import Plan, read_plan
from .tensorrt_record import Effort, Network

PHASES = 2
"""How deep TensorRT's phases are told of: those below come by the thousand."""


def main() -> None:
    """Do the one job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # inside of TensorRT, Python's would wait
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415 - where there are core dumps

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job = json.loads(sys.stdin.readline())
    try:
        network, effort = work(Path(job["folder"]), job["graph"], build=job["build"], say=_at)
    except ExportError as error:
        _print({"error": error.message, "hint": error.hint})
    else:
        _print({"network": dataclasses.asdict(network), "effort": dataclasses.asdict(effort)})


def _at(what: str) -> None:
    _print({"at": what})


def _print(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def work(
    folder: Path, graph: str, *, build: bool, say: Callable[[str], None]
) -> tuple[Network, Effort]:
    """Parse the graph; with `build`, write its engine. Raises ExportError with TensorRT's words.

    Without `build` any package will do: its parser says whether it takes the graph.
    """
    plan = read_plan(folder)
    backend = plan.backend if build or plan.backend in installed() else next(iter(installed()))
    package, one = load(backend), plan.graphs[graph]
    log = Log(package)
    start = time.perf_counter()
    say("parsing")
    builder = package.Builder(log.made)
    parsed = parse(package, builder, log, folder / one.onnx, graph)
    network = parsed.network
    found = describe(parsed, one, plan.float_type, folder / one.onnx)
    config = _configuration(package, builder, plan if build else None, say)
    profiles = add_profiles(builder, config, network, one, graph)
    known = time.perf_counter()
    if build:
        _build(builder, network, config, log, folder / one.engine, graph, backend)
    del parsed  # the parser owns the weights until the engine is built
    effort = Effort(
        parse_seconds=known - start,
        build_seconds=time.perf_counter() - known if build else 0.0,
        peak_memory_bytes=peak_memory(),
    )
    return dataclasses.replace(found, profiles=profiles), effort


def _configuration(
    package: ModuleType, builder: Any, plan: Plan | None, say: Callable[[str], None]
) -> Any:
    """What to build for. float32 means float32: TF32, which is on by default, has ten bits."""
    config = builder.create_builder_config()
    config.clear_flag(package.BuilderFlag.TF32)
    config.profiling_verbosity = package.ProfilingVerbosity.DETAILED  # for the engine inspector
    config.progress_monitor = _monitor(package, say)
    if plan is not None and plan.backend is Backend.RTX:
        config.num_compute_capabilities = len(plan.compute_capabilities)
        for place, capability in enumerate(plan.compute_capabilities):
            member = getattr(package.ComputeCapability, f"SM{capability}", None)
            if member is None:
                raise ExportError(
                    f"{NAMES[plan.backend]} {version(plan.backend)} does not build for compute "
                    f"capability {capability}.",
                    "Name others with --compute-capability; `fastvlm-export targets` lists them.",
                )
            config.set_compute_capability(member, place)
    return config


def _monitor(package: ModuleType, say: Callable[[str], None]) -> Any:
    class Monitor(package.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Names the upper phases of a build."""

        def __init__(self) -> None:
            package.IProgressMonitor.__init__(self)
            self.open: list[str] = []

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if len(self.open) < PHASES:
                say(name)
            self.open.append(name)

        def phase_finish(self, name: str) -> None:
            if name in self.open:
                self.open.remove(name)

        def step_complete(self, name: str, step: int) -> bool:
            return True

    return Monitor()


def _build(
    builder: Any, network: Any, config: Any, log: Log, path: Path, graph: str, backend: Backend
) -> None:
    log.errors.clear()
    engine = builder.build_serialized_network(network, config)
    if engine is None or not engine.nbytes:
        raise ExportError(
            f"{graph}: {NAMES[backend]} {version(backend)} could not build the engine: {log.first}",
            "Where memory ran out, free some or use a smaller --context or --resolution; where an "
            "operation or a GPU is named, try another --recipe or --compute-capability.",
        )
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(engine)


if __name__ == "__main__":
    main()
