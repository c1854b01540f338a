"""What an engine says of itself, held against the bundle's plan. To read one needs a driver."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .tensorrt_engine import Loader, open_loader
from .tensorrt_log import type_name
from .tensorrt_plan import GraphPlan, Profile, parse_tensor

FLOATS = {"float32": r"FP32|Float\b", "float16": r"FP16|Half", "bfloat16": r"BF16", "fp8": r"FP8"}
"""Float type -> how the inspector may write it: TensorRT 10 and 11 differ."""

_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True, kw_only=True)
class EngineContents:
    """One engine as its inspector shows it, and what in it is not as planned.

    `kinds`: type of layer -> how many, `formats`: float type of an output -> of how many layers.
    `float32`: layers that write float32 and of whose ONNX nodes none is to, by the plan. One layer
    may stand for many nodes, so that this is something to look at, not a failure. `detailed` is
    False where the engine was built to tell its layers' names only.
    """

    graph: str
    layers: int
    kinds: Mapping[str, int] = field(default_factory=dict)
    formats: Mapping[str, int] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    device_memory_bytes: int = 0
    detailed: bool = False
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain data for the report."""
        return {
            "graph": self.graph,
            "layers": self.layers,
            "kinds": dict(self.kinds),
            "formats": dict(self.formats),
            "float32": list(self.float32),
            "in_place": list(self.in_place),
            "device_memory_bytes": self.device_memory_bytes,
            "detailed": self.detailed,
            "problems": list(self.problems),
        }


def interface_problems(engine: Any, plan: GraphPlan, package: ModuleType) -> list[str]:
    """Where the engine's inputs, outputs and profiles are not the plan's; none: they are."""
    modes = package.TensorIOMode
    found = {
        mode: {
            name: _text(engine, name)
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
            if engine.get_tensor_mode(name) == mode
        }
        for mode in (modes.INPUT, modes.OUTPUT)
    }
    problems = [
        *_differences("input", plan.inputs, found[modes.INPUT]),
        *_differences("output", plan.outputs, found[modes.OUTPUT]),
    ]
    if problems:
        return problems
    for name in (*plan.inputs, *plan.outputs):
        if engine.get_tensor_location(name) != package.TensorLocation.DEVICE:
            problems.append(f"{name} is read from the host's memory")
    if engine.num_optimization_profiles != len(plan.profiles):
        count = engine.num_optimization_profiles
        return [*problems, f"it has {count} profiles, not {len(plan.profiles)}"]
    for number, profile in enumerate(plan.profiles):
        problems += _profile_problems(engine, number, profile)
    return problems


def read_back(folder: Path, loader: Loader | None = None) -> tuple[EngineContents, ...]:
    """Load each engine of the bundle in the folder and read it.

    Raises ExportError where one can't be loaded: no driver, another GPU's, another version's, ...
    """
    loader = loader or open_loader(folder)
    return tuple(
        contents(loader.load(name), name, plan, loader.package, loader.plan.float_type)
        for name, plan in loader.plan.graphs.items()
    )


def contents(
    engine: Any, graph: str, plan: GraphPlan, package: ModuleType, float_type: str
) -> EngineContents:
    """One engine: interface, profiles, layers, what they compute in by the plan's `float_type`."""
    inspector = engine.create_engine_inspector()
    layers = _layers(inspector.get_engine_information(package.LayerInformationFormat.JSON))
    detailed = [layer for layer in layers if isinstance(layer, dict)]
    ask = getattr(engine, "get_aliased_input_tensor", None)
    return EngineContents(
        graph=graph,
        layers=len(layers) or int(engine.num_layers),
        kinds=dict(sorted(Counter(map(_kind, detailed)).items())),
        formats=dict(sorted(Counter(one for layer in detailed for one in _floats(layer)).items())),
        float32=tuple(_unplanned(detailed, plan)) if float_type != "float32" else (),
        in_place=tuple(name for name in plan.outputs if ask and ask(name)),
        device_memory_bytes=int(engine.device_memory_size_v2),
        detailed=bool(detailed),
        problems=tuple(interface_problems(engine, plan, package)),
    )


def _text(engine: Any, name: str) -> tuple[str, tuple[int, ...]]:
    """Type and shape, -1 where a size varies."""
    return type_name(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name))


def _differences(
    what: str, plan: Mapping[str, str], found: Mapping[str, tuple[str, tuple[int, ...]]]
) -> list[str]:
    """Tensors that are missing, too many or of another type or shape."""
    problems = [f"{what} {name} is missing" for name in plan if name not in found]
    problems += [f"{what} {name} is not in the plan" for name in found if name not in plan]
    for name in plan.keys() & found.keys():
        dtype, sizes = parse_tensor(plan[name])
        wanted = (dtype, tuple(-1 if isinstance(size, str) else size for size in sizes))
        if not _same(wanted, found[name], strict=what == "input"):
            problems.append(f"{what} {name} is {_written(found[name])}, not {_written(wanted)}")
    return sorted(problems)


def _same(
    planned: tuple[str, tuple[int, ...]], found: tuple[str, tuple[int, ...]], *, strict: bool
) -> bool:
    """Whether both are one type and shape.

    Unless `strict` a size may be open to TensorRT that the plan knows: it does not see through
    every slice. A session checks what comes out.
    """
    (dtype, sizes), (other, others) = planned, found
    if dtype != other or len(sizes) != len(others):
        return False
    rows = zip(sizes, others, strict=True)
    return all(size == one or (one == -1 and not strict) for size, one in rows)


def _written(tensor: tuple[str, tuple[int, ...]]) -> str:
    return f"{tensor[0]}[{','.join(str(size) for size in tensor[1])}]"


def _profile_problems(engine: Any, number: int, profile: Profile) -> list[str]:
    """Inputs whose shapes are others than the profile's."""
    problems = []
    for name, one in profile.shapes.items():
        wanted = [one.min, one.opt, one.max]
        found = [tuple(dims) for dims in engine.get_tensor_profile_shape(name, number)]
        if found != wanted:
            problems.append(f"profile {profile.name} has {found} for {name}, not {wanted}")
    return problems


def _layers(text: str) -> list[Any]:
    """The inspector's layers: tables where the engine tells all, names where it does not."""
    try:
        found = json.loads(text)
    except ValueError:
        return []
    layers = found.get("Layers") if isinstance(found, dict) else None
    return layers if isinstance(layers, list) else []


def _kind(layer: Mapping[str, Any]) -> str:
    return str(layer.get("LayerType", "unknown"))


def _floats(layer: Mapping[str, Any]) -> set[str]:
    """The float types of a layer's outputs, from what the inspector says of type and format."""
    outputs = layer.get("Outputs")
    texts = [
        str(value)
        for one in (outputs if isinstance(outputs, list) else [])
        if isinstance(one, dict)
        for key, value in one.items()
        if "format" in key.lower() or "type" in key.lower()
    ]
    return {
        name
        for name, pattern in FLOATS.items()
        if any(re.search(rf"\b(?:{pattern})", text) for text in texts)
    }


def _unplanned(layers: Iterable[Mapping[str, Any]], plan: GraphPlan) -> Iterator[str]:
    """Names of the layers that write float32 where none of their nodes is to.

    A node NODE/Where was written for NODE (`tensorrt_older`).
    """
    for layer in layers:
        nodes = _ORIGIN.findall(str(layer.get("Metadata", "")))
        named = {*nodes, *(node.rpartition("/")[0] for node in nodes)}
        if "float32" in _floats(layer) and nodes and not plan.float32_nodes.keys() & named:
            yield str(layer.get("Name", "unnamed"))
