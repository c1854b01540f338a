"""TensorRT's engines in words and as tables, for the page and a terminal."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .formats import duration, size
from .tensorrt_build import EngineProof, GraphProof

SHOWN = 8
"""Types of layers, and nodes in float32, that a line names."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One graph. Empty where nothing is known."""

    graph: str
    nodes: str
    layers: str
    float32: str
    weights: str
    engine: str
    effort: str
    passed: bool


def rows(found: EngineProof) -> list[Row]:
    """A row for each graph: nodes, layers, those in float32, sizes, what building it took."""
    return [_row(name, one) for name, one in found.graphs.items()]


def _row(name: str, one: GraphProof) -> Row:
    network, engine, effort = one.network, one.record.engine, one.effort
    return Row(
        graph=name,
        nodes=f"{network.nodes:,}" if network else "",
        layers=f"{network.layers:,}" if network else "",
        float32=str(sum(network.float32.values())) if network else "",
        weights=size(network.weight_bytes) if network else "",
        engine=size(engine.bytes) if engine else "not built",
        effort=f"{duration(effort.parse_seconds + effort.build_seconds)}, "
        f"{size(effort.peak_memory_bytes)}"
        if effort
        else "",
        passed=one.passed,
    )


def details(found: EngineProof) -> Iterator[tuple[str, str]]:
    """(what, words) of each graph: its types of layers, what is in float32 and why, profiles."""
    for name, one in found.graphs.items():
        if one.network is None:
            continue
        kinds = sorted(one.network.kinds.items(), key=lambda pair: -pair[1])
        yield f"{name}, layers", _some([f"{count} {kind.lower()}" for kind, count in kinds])
        if one.network.written_out:
            nodes = [f"{count} {kind}" for kind, count in one.network.written_out.items()]
            yield f"{name}, nodes in older operators", _some(nodes)
        if one.reasons:
            yield (
                f"{name}, in float32",
                _some([f"{node} ({why})" for node, (_, why) in one.reasons.items()]),
            )
        for profile in one.network.profiles:
            shapes = [
                f"{tensor} {_sizes(r.min)} to {_sizes(r.max)}, tuned for {_sizes(r.opt)}"
                for tensor, r in profile.shapes.items()
            ]
            yield f"{name}, profile {profile.name}", "; ".join(shapes) or "one shape"


def _some(names: list[str]) -> str:
    more = f", {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _sizes(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"


def notes(found: EngineProof) -> Iterator[str]:
    """What else there is to say: versions, what the package lacks, what ran on a GPU."""
    record = found.record
    if record.parser:
        lacks = f"; it lacks {', '.join(record.lacks)}" if record.lacks else ""
        done = "Built" if record.built else "Parsed, not built,"
        yield f"{done} by {record.parser} {record.version}{lacks}."
    if found.parsed:
        yield f"Parsed anew for this report by {found.parsed}."
    else:
        yield "Not parsed anew for this report: no package of TensorRT is installed here."
    yield found.on_gpu
    for name, one in found.inspected.items():
        kinds = _some([f"{count} {kind}" for kind, count in one.kinds.items()])
        yield (
            f"On {found.gpu}, {name}: {one.layers} layers after fusion ({kinds}), "
            f"{len(one.in_place)} outputs written in place, {size(one.device_memory_bytes)} of "
            "its memory."
        )


def terminal(found: EngineProof) -> Group:
    """The table, and below it what ran on a GPU or what is wrong."""
    table = Table(
        title=Text(f"Engines of {found.record.backend}, {found.plan.float_type}", "bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("Graph", no_wrap=True)
    for name in ("Nodes", "Layers", "In float32", "Weights", "Engine", "Time, peak memory"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows(found):
        sign = Text("✓", "green") if row.passed else Text("✗", "bold red")
        cells = (row.nodes, row.layers, row.float32, row.weights, row.engine, row.effort)
        table.add_row(row.graph, *cells, sign)
    said: list[RenderableType] = [Text(note, "dim") for note in notes(found)]
    if not found.passed:
        said.append(Text(found.verdict, "red"))
    return Group(table, *said)
