"""The build plan of a TensorRT bundle: everything that makes engines of its ONNX graphs.

`build_plan.json` goes with the bundle, so that `fastvlm-export build` makes the same engines on
another machine. It is read strictly: somebody else may have written it.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..exporter.errors import ExportError
from .tensorrt_package import Backend

PLAN = "build_plan.json"
SCHEMA = 1
GRAPHS = ("vision", "embedding", "decoder")
NEW, ATTENDED = "sequence_length", "attended_length"
"""Sizes that vary: the new positions of a call, and all that they may look at."""

PREFILL, DECODE, STATIC = "prefill", "decode", "static"
BUCKET = 256
"""Decoding looks at a multiple of so many positions, or at the whole context."""

ANSWER = 256
"""Tokens of an answer that decoding is tuned for."""

QUESTION = 32
"""Tokens beside the image's that a prefill is tuned for."""

HINT = "Export the bundle again: fastvlm-export --target tensorrt --out DIR --force"
FLOATS: dict[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""A recipe's float format -> its element type in the graphs."""

_TENSOR = re.compile(r"(\w+)\[([\w,]*)\]")
_NAME = re.compile(r"[\w.\-]{1,200}")

Shape = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The least shape of an input, the one to tune for, and the largest."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True, kw_only=True)
class Profile:
    """An optimization profile: input name -> its shapes, of those inputs whose sizes vary.

    A graph of static shapes has one without inputs.
    """

    name: str
    shapes: Mapping[str, Range]


@dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """One graph: its files, by paths inside of the bundle, its tensors and its profiles, in order.

    `inputs`, `outputs`: tensor name -> "float32[1,sequence_length,128]". `float32_nodes`: ONNX
    node -> why it computes in float32 where the plan's float type is another.
    """

    onnx: str
    engine: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    profiles: tuple[Profile, ...]
    float32_nodes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How engines are built. `float_type` is what layers compute in that no integers are in.

    `compute_capabilities` are spelled "80"; none: the GPU of the machine that builds. `context` is
    the most positions that the cache holds.
    """

    backend: Backend
    compute_capabilities: tuple[str, ...]
    float_type: str
    context: int
    graphs: Mapping[str, GraphPlan]

    def to_json(self) -> str:
        """Sorted, indented, with a final newline: the same plan is the same bytes."""
        values = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def parse_tensor(text: str) -> tuple[str, tuple[int | str, ...]]:
    """Element type and sizes of "float32[1,sequence_length]". Raises ValueError for other text."""
    found = _TENSOR.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is no tensor")
    sizes = found[2].split(",") if found[2] else []
    return found[1], tuple(int(size) if size.isdigit() else size for size in sizes)


def profiles(inputs: Mapping[str, str], context: int, image_tokens: int) -> tuple[Profile, ...]:
    """The profiles of a graph with these inputs.

    `prefill` takes 1 to `context` new positions, `decode` one; either looks at 1 to `context`. It
    is tuned for an image of `image_tokens`, a question and an answer.
    """
    sizes = {name: parse_tensor(text)[1] for name, text in inputs.items()}
    varying = {name for shape in sizes.values() for name in shape if isinstance(name, str)}
    if unknown := varying - {NEW, ATTENDED}:
        raise ValueError(f"no profile knows the sizes {sorted(unknown)}")
    if not varying:
        return (Profile(name=STATIC, shapes={}),)
    prompt = min(context, image_tokens + QUESTION)
    talk = min(context, -(-(prompt + ANSWER) // BUCKET) * BUCKET)
    prefill = {NEW: (1, prompt, context), ATTENDED: (1, prompt, context)}
    decode = {NEW: (1, 1, 1), ATTENDED: (1, talk, context)}
    return tuple(
        Profile(
            name=name,
            shapes={
                tensor: Range(
                    **{
                        kind: tuple(
                            values[one][i] if isinstance(one, str) else one for one in shape
                        )
                        for i, kind in enumerate(("min", "opt", "max"))
                    }
                )
                for tensor, shape in sizes.items()
                if any(isinstance(one, str) for one in shape)
            },
        )
        for name, values in ((PREFILL, prefill), (DECODE, decode))
    )


def read_plan(folder: Path) -> Plan:
    """The plan of a bundle. Raises ExportError for a missing file and for any oddity in it."""
    return read_strictly(folder, PLAN, _plan)


def read_strictly(folder: Path, name: str, make: Callable[[Any], T]) -> T:
    """What `make` makes of a bundle's JSON file. Raises ExportError where it can't be read.

    So it does where `make` raises AttributeError, KeyError, TypeError or ValueError.
    """
    path = folder / name
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{folder} has no {name}.", HINT) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read: {error}", HINT) from error
    try:
        return make(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{name} is damaged: {error!r}.", HINT) from error


def _plan(values: Any) -> Plan:
    _keys(values, "the plan", {"schema", *(f.name for f in dataclasses.fields(Plan))})
    if values["schema"] != SCHEMA:
        raise ValueError(f"schema {values['schema']!r}; this version reads {SCHEMA}")
    if values["float_type"] not in FLOATS.values():
        raise ValueError(f"float_type {values['float_type']!r}")
    graphs = values["graphs"]
    _keys(graphs, "graphs", set(GRAPHS))
    capabilities = values["compute_capabilities"]
    if not isinstance(capabilities, list) or not all(map(_is_capability, capabilities)):
        raise ValueError(f"compute_capabilities {capabilities!r}")
    return Plan(
        backend=Backend(values["backend"]),
        compute_capabilities=tuple(capabilities),
        float_type=values["float_type"],
        context=_size(values["context"]),
        graphs={name: _graph(name, graphs[name]) for name in GRAPHS},
    )


def _is_capability(value: object) -> bool:
    return isinstance(value, str) and value.isdecimal() and len(value) <= 3


def _graph(name: str, values: Any) -> GraphPlan:
    _keys(values, name, {f.name for f in dataclasses.fields(GraphPlan)})
    files = {"onnx": onnx_file(name), "engine": engine_file(name)}
    for key, expected in files.items():
        if values[key] != expected:
            raise ValueError(f"{name}'s {key} is {values[key]!r}, not {expected!r}")
    inputs = _tensors(values["inputs"])
    if not isinstance(values["profiles"], list):
        raise TypeError(f"{name}'s profiles are no list")
    nodes = values["float32_nodes"]
    if not all(isinstance(text, str) for pair in nodes.items() for text in pair):
        raise TypeError(f"{name}'s float32_nodes hold something that is no text")
    return GraphPlan(
        **files,
        inputs=inputs,
        outputs=_tensors(values["outputs"]),
        profiles=tuple(_profile(one, inputs) for one in values["profiles"]),
        float32_nodes=dict(nodes),
    )


def _tensors(values: Any) -> dict[str, str]:
    for tensor, text in values.items():
        if not _NAME.fullmatch(tensor):
            raise ValueError(f"{tensor!r} is no tensor's name")
        parse_tensor(text)
    return dict(values)


def _profile(values: Any, inputs: Mapping[str, str]) -> Profile:
    _keys(values, "a profile", {"name", "shapes"})
    shapes = {}
    for tensor, found in values["shapes"].items():
        _keys(found, f"the shapes of {tensor}", {"min", "opt", "max"})
        one = Range(**{key: tuple(map(_size, found[key])) for key in ("min", "opt", "max")})
        sizes = parse_tensor(inputs[tensor])[1]
        if not _fits(one, sizes):
            raise ValueError(f"{tensor}'s shapes {found} are none of {inputs[tensor]}")
        shapes[tensor] = one
    if values["name"] not in (PREFILL, DECODE, STATIC):
        raise ValueError(f"there is no profile {values['name']!r}")
    return Profile(name=values["name"], shapes=shapes)


def _fits(one: Range, sizes: tuple[int | str, ...]) -> bool:
    if {len(one.min), len(one.opt), len(one.max)} != {len(sizes)}:
        return False
    rows = zip(one.min, one.opt, one.max, sizes, strict=True)
    return all(
        low <= middle <= high if isinstance(size, str) else low == middle == high == size
        for low, middle, high, size in rows
    )


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise ValueError(f"{value!r} is no size")
    return value


def _keys(values: Any, what: str, wanted: Iterable[str]) -> None:
    """Raise where `values` is no table of exactly these keys."""
    if not isinstance(values, dict):
        raise TypeError(f"{what}: no table")
    wanted = set(wanted)
    if odd := sorted(wanted ^ set(values)):
        raise ValueError(f"{what}: {', '.join(odd)} missing or unknown")


def onnx_file(graph: str) -> str:
    """The graph's ONNX file, by its path in the bundle."""
    return f"onnx/{graph}.onnx"


def engine_file(graph: str) -> str:
    """The graph's engine likewise."""
    return f"engines/{graph}.engine"
