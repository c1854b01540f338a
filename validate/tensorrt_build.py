"""What TensorRT made of a bundle's graphs, and whether that is what the manifest says.

An engine can only be loaded where a driver is, so that what can be seen of it elsewhere is seen
while it is built: the parser's network, which is strongly typed. Each graph is shown to the
installed parser once more, in a process of its own, and held against plan, manifest and record.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..exporter.bundle import REPORT_FOLDER, Bundle
from ..exporter.errors import ExportError
from ..targets import TargetName, tensorrt, tensorrt_build, tensorrt_header
from ..targets import tensorrt_device as device
from ..targets import tensorrt_package as packages
from ..targets.tensorrt_package import NAMES, NO_FUSED_ATTENTION, Backend
from ..targets.tensorrt_plan import GRAPHS, GraphPlan, Plan, parse_tensor, read_plan
from ..targets.tensorrt_record import (
    BuildRecord,
    Effort,
    GraphRecord,
    Network,
    read_record,
    read_times,
)
from .checks import Check

if TYPE_CHECKING:
    from ..targets.tensorrt_inspect import EngineContents

SHOWN = 3
"""Names in a check's message; the report lists every one."""


@dataclass(frozen=True, kw_only=True)
class GraphProof:
    """One graph: its network as it was parsed last, what its building took, and what was checked.

    `network` is None where no parser is installed, neither here nor where the bundle was made;
    `effort` where that is not known any more. `problems` say by name what the checks count.
    """

    plan: GraphPlan
    record: GraphRecord
    network: Network | None
    effort: Effort | None
    checks: tuple[Check, ...]
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether anything was checked and every limit held."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def reasons(self) -> dict[str, tuple[int, str]]:
        """Node -> layers of it that compute in float32 among narrower floats, and why."""
        found = self.network.float32 if self.network else {}
        why = self.plan.float32_nodes
        return {node: (count, why.get(node, NO_FUSED_ATTENTION)) for node, count in found.items()}


@dataclass(frozen=True, kw_only=True)
class EngineProof:
    """All graphs of a bundle. `parsed` names the parser that has taken them in this very run.

    `inspected` is what a driver has read back from the engines, by graph; `gpu` the one it has.
    """

    plan: Plan
    record: BuildRecord
    parsed: str
    graphs: Mapping[str, GraphProof]
    inspected: Mapping[str, "EngineContents"] = field(default_factory=dict)
    gpu: str = ""

    @property
    def passed(self) -> bool:
        """Whether every check of every graph held."""
        return all(one.passed for one in self.graphs.values())

    @property
    def engine_bytes(self) -> int:
        """Size of all engines."""
        return sum(one.engine.bytes for one in self.record.graphs.values() if one.engine)

    @property
    def verdict(self) -> str:
        """One sentence: what broke, or what was built; and one of what a GPU has seen of it."""
        broken = [f"{name}: {why}" for name, one in self.graphs.items() for why in one.problems]
        if broken or not self.passed:
            more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
            return f"The engines are not what they should be: {'; '.join(broken[:SHOWN])}{more}."
        return f"{self._made} {self.on_gpu}"

    @property
    def _made(self) -> str:
        record = self.record
        nodes = sum(one.network.nodes for one in self.graphs.values() if one.network)
        if not nodes:
            return "No parser of TensorRT has seen the graphs."
        parser = f"{NAMES[Backend(record.parser)]} {record.version}"
        if not record.built:
            return f"{parser} takes every one of {nodes} nodes; no engines are built yet."
        where = f"on {record.gpu}" if record.gpu else "without a GPU"
        return (
            f"{parser} took every one of {nodes} nodes and built three engines {where}, "
            f"{self.engine_bytes / 1e6:.1f} MB{self._for}."
        )

    @property
    def _for(self) -> str:
        names = self.record.compute_capabilities
        return f", for compute capabilities {', '.join(names)}" if names else ""

    @property
    def on_gpu(self) -> str:
        """What ran on a GPU, and what did not."""
        if self.inspected:
            return f"They were loaded on {self.gpu} and read back: as planned."
        if not self.record.built:
            return (
                f"Build them where an NVIDIA GPU is: fastvlm-export build BUNDLE "
                f"--backend {self.record.backend}."
            )
        if self.gpu:
            return f"No engine was loaded or run: they are not for the {self.gpu} of this machine."
        return "No engine was loaded or run: that takes an NVIDIA GPU."

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {
            "definition": (__doc__ or "").strip(),
            "passed": self.passed,
            "verdict": self.verdict,
            "on_gpu": {
                "loaded_and_read_back": {k: one.to_dict() for k, one in self.inspected.items()},
                "gpu": self.gpu or None,
                "note": self.on_gpu,
            },
            "backend": self.record.backend,
            "parser": self.record.parser,
            "version": self.record.version,
            "lacks": list(self.record.lacks),
            "parsed_anew_by": self.parsed or None,
            "compute_capabilities": list(self.record.compute_capabilities),
            "float_type": self.plan.float_type,
            "built_on": self.record.gpu or None,
            "graphs": {name: _plain(one) for name, one in self.graphs.items()},
        }


def _plain(one: GraphProof) -> dict[str, object]:
    return {
        "passed": one.passed,
        "checks": [asdict(check) | {"passed": check.passed} for check in one.checks],
        "problems": list(one.problems),
        "onnx": one.plan.onnx,
        "engine": one.plan.engine if one.record.engine else None,
        "engine_bytes": one.record.engine.bytes if one.record.engine else None,
        "effort": one.effort,
        "network": one.network,
        "float32_reasons": {node: why for node, (_, why) in one.reasons.items()},
    }


def has_engines(bundle: Bundle) -> bool:
    """Whether a bundle is one that engines are built of: TensorRT's."""
    return bundle.manifest.target == TargetName.TENSORRT


def engines(bundle: Bundle, say: Callable[[str], None] = lambda _: None) -> EngineProof:
    """Hold the bundle's plan, record and engines against its manifest, and parse its graphs anew.

    Raises ExportError for a plan or record that can't be read, and where the parser refuses a node.
    """
    plan, record = read_plan(bundle.path), read_record(bundle.path)
    if record.backend is not plan.backend:
        raise ExportError(
            f"{bundle.path}: the plan is for {plan.backend}, the engines are of {record.backend}.",
            "Build them by the plan: fastvlm-export build BUNDLE",
        )
    inspected, gpu = _read_back(bundle, record, say)
    times = read_times(bundle.path / REPORT_FOLDER)
    parser = tensorrt_build.parser_for(plan.backend)
    graphs = {}
    for name in GRAPHS:
        recorded = record.graphs[name]
        network, anew = recorded.network, parser is not None
        if anew:
            network, effort = tensorrt_build.run(bundle.path, name, build=False, say=say)
            times.setdefault(name, effort)
        found = _found(bundle, plan, record, name, network, same=anew)
        if name in inspected:
            found["differences on the GPU"] = list(inspected[name].problems)
        graphs[name] = GraphProof(
            plan=plan.graphs[name],
            record=recorded,
            network=network,
            effort=times.get(name) if recorded.engine else None,
            checks=tuple(Check(name=k, value=len(names), limit=0) for k, names in found.items()),
            problems=tuple(one for names in found.values() for one in names),
        )
    parsed = f"{NAMES[parser]} {packages.version(parser)}" if parser else ""
    return EngineProof(
        plan=plan, record=record, parsed=parsed, graphs=graphs, inspected=inspected, gpu=gpu
    )


def _read_back(
    bundle: Bundle, record: BuildRecord, say: Callable[[str], None]
) -> tuple[dict[str, "EngineContents"], str]:
    """What the engines say of themselves where they can be loaded, and the name of this GPU."""
    gpu = device.find_gpu()
    if gpu is None or not record.built or not tensorrt.availability().run:
        return {}, ""
    served = record.compute_capabilities
    if served and gpu.capability not in served:
        return {}, f"{gpu.name} of compute capability {gpu.capability}"
    from ..targets import tensorrt_inspect  # noqa: PLC0415 - imports TensorRT and CUDA

    say(f"reading the engines back on {gpu.name}")
    return {one.graph: one for one in tensorrt_inspect.read_back(bundle.path)}, gpu.name


def _found(
    bundle: Bundle,
    plan: Plan,
    record: BuildRecord,
    name: str,
    network: Network | None,
    *,
    same: bool,
) -> dict[str, list[str]]:
    """Check of one graph -> what is wrong, by name; empty where it held."""
    graph, recorded = plan.graphs[name], record.graphs[name]
    found: dict[str, list[str]] = {
        "tensors unlike the manifest's": _interface(bundle, graph, name),
        "files unlike the record's": list(_files(bundle, graph, recorded)),
    }
    if network is not None:
        found |= {
            "tensors unlike the plan's": _tensors(graph, network),
            "profiles unlike the plan's": _profiles(graph, network),
            "nodes without a layer": [f"node '{node}' has no layer" for node in network.folded],
            "layers in another float type": list(network.odd),
            "exceptions for no node": [f"there is no node '{node}'" for node in network.absent],
        }
    if same and network is not None and _comparable(record):
        found["facts unlike the record's"] = _facts(recorded.network, network)
    if recorded.engine is not None:
        found["flaws of the engine"] = list(_engine(bundle.path / graph.engine, record, network))
    return found


def _comparable(record: BuildRecord) -> bool:
    """Whether the record was made by the parser that is installed here: others may fuse more."""
    parser = tensorrt_build.parser_for(record.backend)
    return parser is not None and (parser, packages.version(parser)) == (
        record.parser,
        record.version,
    )


def _interface(bundle: Bundle, graph: GraphPlan, name: str) -> list[str]:
    stated = bundle.manifest.graphs.get(name, {})
    ours = {"inputs": dict(graph.inputs), "outputs": dict(graph.outputs)}
    return [
        f"{part} {sorted(set(values.items()) ^ set(stated.get(part, {}).items()))[:SHOWN]}"
        for part, values in ours.items()
        if dict(stated.get(part, {})) != values
    ]


def _files(bundle: Bundle, graph: GraphPlan, recorded: GraphRecord) -> Iterable[str]:
    """Whether the files that the record was made of are those of the bundle, weights and all."""
    there = bundle.manifest.files
    ours = {file: sha256 for file, sha256 in there.items() if file.startswith(graph.onnx)}
    if ours != dict(recorded.sources):
        yield f"{graph.onnx} is not what the engine was built from"
    if recorded.engine is not None and there.get(graph.engine) != recorded.engine.sha256:
        yield f"{graph.engine} is not the engine that was built"
    if recorded.engine is None and graph.engine in there:
        yield f"{graph.engine} is there, and nothing says what it was built from"


def _tensors(graph: GraphPlan, network: Network) -> list[str]:
    """Names, types and sizes of what goes in and out; of an output the parser may not know a size.

    The order of names is the parser's own.
    """
    problems = []
    for planned, found in ((graph.inputs, network.inputs), (graph.outputs, network.outputs)):
        problems += [f"there is no tensor '{name}'" for name in planned if name not in found]
        problems += [f"tensor '{name}' is foreign" for name in found if name not in planned]
        problems += [
            f"{name} is {found[name]}, not {text}"
            for name, text in planned.items()
            if name in found and not _alike(text, found[name])
        ]
    return problems


def _alike(planned: str, found: str) -> bool:
    (dtype, sizes), (other, others) = parse_tensor(planned), parse_tensor(found.replace("?", "_"))
    return (
        dtype == other
        and len(sizes) == len(others)
        and all(
            size == found_size or (isinstance(size, str) and found_size == "_")
            for size, found_size in zip(sizes, others, strict=True)
        )
    )


def _profiles(graph: GraphPlan, network: Network) -> list[str]:
    if len(graph.profiles) != len(network.profiles):
        return [f"{len(network.profiles)} profiles, not {len(graph.profiles)}"]
    return [
        f"profile '{planned.name}' has other shapes"
        for planned, found in zip(graph.profiles, network.profiles, strict=True)
        if planned != found
    ]


def _facts(recorded: Network | None, found: Network) -> list[str]:
    then, now = (asdict(one) if one else {} for one in (recorded, found))
    return [f"{key} was {then.get(key)!r}"[:200] for key in now if then.get(key) != now[key]]


def _engine(path: Path, record: BuildRecord, network: Network | None) -> Iterable[str]:
    """What can be said of an engine without a driver: its size, and what its header says."""
    if not path.is_file():
        yield f"{path.name} is missing"
        return
    size = path.stat().st_size
    if network is not None and size < network.weight_bytes:
        yield f"{path.name} has {size:,} bytes, its weights alone {network.weight_bytes:,}"
    least = network.weight_bytes if network else 0
    served = record.compute_capabilities
    yield from tensorrt_header.problems(path, record.backend, record.version, served, least)
