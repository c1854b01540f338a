"""What TensorRT made of the graphs, as data: `build_record.json` in the bundle.

Nothing in it depends on how long something took, so that the same graphs and the same version give
the same bytes. Times are kept apart, in the report's folder, which is not part of the artifact.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from .tensorrt_package import Backend
from .tensorrt_plan import GRAPHS, Profile, Range, read_strictly

RECORD = "build_record.json"
TIMES = "engines.json"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A serialized engine: its size and the SHA-256 of its bytes."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Network:
    """One graph as the parser took it.

    `nodes` are the ONNX graph's; `folded` names those of them that became constants, or nothing;
    `layers` are TensorRT's, `kinds` their types with numbers. `inputs`, `outputs`: tensor name ->
    "float32[1,sequence_length,128]", a size that varies as the file names it, else "?".

    `float32` names the nodes of which layers compute in float32 where the plan's float type is
    another, with the number of those layers; `odd` are layers that compute in a float type that
    neither the plan nor its exceptions allow. `absent` are exceptions for nodes that there are not.
    `weight_bytes` counts every stored tensor of more than a kilobyte once, in its own type.
    `written_out`: operator that the parser lacks -> its nodes, which other operators stand for.
    """

    nodes: int
    folded: tuple[str, ...]
    layers: int
    kinds: Mapping[str, int]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    profiles: tuple[Profile, ...]
    float32: Mapping[str, int]
    odd: tuple[str, ...]
    absent: tuple[str, ...]
    weight_bytes: int
    written_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """One graph: the files that it was read from with their SHA-256, and what came of it.

    `network` is None where no parser was at hand, `engine` where none could be built.
    """

    sources: Mapping[str, str]
    network: Network | None
    engine: Engine | None


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """All graphs. `parser` names the package that took the graphs and `version` is its version.

    Both are empty where none was installed. `compute_capabilities` are the engines' own; `gpu` is
    where TensorRT built them, empty where that needed none.
    """

    backend: Backend
    parser: str
    version: str
    lacks: tuple[str, ...]
    compute_capabilities: tuple[str, ...]
    gpu: str
    graphs: Mapping[str, GraphRecord]

    @property
    def built(self) -> bool:
        """Whether every graph has an engine."""
        return all(graph.engine for graph in self.graphs.values())

    def to_json(self) -> str:
        """Sorted, indented, with a final newline: the same record is the same bytes."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a graph's parsing and building took: seconds, and the most memory of that process."""

    parse_seconds: float
    build_seconds: float
    peak_memory_bytes: int


def network_from(values: Any) -> Network:
    """Read a network back from plain data. Raises KeyError, TypeError or ValueError."""
    found = tuple(
        Profile(
            name=one["name"],
            shapes={
                tensor: Range(**{kind: tuple(shape) for kind, shape in ranges.items()})
                for tensor, ranges in one["shapes"].items()
            },
        )
        for one in values["profiles"]
    )
    texts = {key: tuple(values[key]) for key in ("folded", "odd", "absent")}
    network = Network(**{**values, **texts, "profiles": found})
    _check(network)
    return network


def read_record(folder: Path) -> BuildRecord:
    """The record of a bundle. Raises ExportError for a missing file and for any oddity in it."""
    return read_strictly(folder, RECORD, _record)


def _record(values: Any) -> BuildRecord:
    if set(values["graphs"]) != set(GRAPHS):
        raise ValueError(f"graphs {sorted(values['graphs'])}")
    texts = {key: tuple(values[key]) for key in ("lacks", "compute_capabilities")}
    graphs = {name: _graph(values["graphs"][name]) for name in GRAPHS}
    record = BuildRecord(
        **{**values, **texts, "backend": Backend(values["backend"]), "graphs": graphs}
    )
    _check(record)
    return record


def _graph(values: Any) -> GraphRecord:
    network, engine = values["network"], values["engine"]
    made = Engine(**engine) if engine is not None else None
    if made is not None:
        _check(made)
    return GraphRecord(
        sources=_texts(values["sources"]),
        network=network_from(network) if network is not None else None,
        engine=made,
    )


def _texts(values: Any) -> dict[str, str]:
    if not all(isinstance(text, str) for pair in values.items() for text in pair):
        raise TypeError("something is no text")
    return dict(values)


def _check(instance: Any) -> None:
    """Raise TypeError where a plain field of a dataclass holds another type than it should."""
    for name, wanted in get_type_hints(type(instance)).items():
        value = getattr(instance, name)
        if wanted in (int, str) and type(value) is not wanted:
            raise TypeError(f"{name} is {value!r}, no {wanted.__name__}")
        if wanted == tuple[str, ...] and not all(isinstance(one, str) for one in value):
            raise TypeError(f"{name} holds something that is no text")
        if wanted in (Mapping[str, int], Mapping[str, str]):
            inner = int if wanted == Mapping[str, int] else str
            if not all(type(one) is inner for one in value.values()):
                raise TypeError(f"{name} holds something that is no {inner.__name__}")


def write_times(folder: Path, efforts: Mapping[str, Effort]) -> None:
    """Keep what the building took in a folder that is no part of the artifact."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: dataclasses.asdict(effort) for name, effort in efforts.items()}
    (folder / TIMES).write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def read_times(folder: Path) -> dict[str, Effort]:
    """What `write_times` kept; nothing where it is missing or unreadable: nothing hangs on it."""
    try:
        values = json.loads((folder / TIMES).read_text("utf-8"))
        return {
            str(name): Effort(
                parse_seconds=float(one["parse_seconds"]),
                build_seconds=float(one["build_seconds"]),
                peak_memory_bytes=int(one["peak_memory_bytes"]),
            )
            for name, one in values.items()
            if name in GRAPHS
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
