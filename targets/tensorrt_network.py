"""ONNX graph -> TensorRT's network, and what can be said about it before it is built.

TensorRT tells for each of its layers which ONNX node it comes from; layers that the parser adds to
help one belong to the node that reads them. Networks are strongly typed, so that a layer's tensors
say what it computes in.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from ..exporter.errors import ExportError
from .tensorrt_lacking import REPLACEABLE, UNCHANGED, Older
from .tensorrt_log import Log, type_name
from .tensorrt_plan import GraphPlan, Profile, Range
from .tensorrt_record import Network

SMALL = 1024
"""Bytes up to which a stored tensor doesn't count: shapes and scalars, which folding takes in."""

ORIGIN = "[ONNX Layer: "
HALVES = ("float16", "bfloat16")
FLOATS = ("float32", *HALVES)
NO_ARITHMETIC = ("CONSTANT", "CAST", "SHAPE")
"""Types of layers that hold, convert or measure floats and compute nothing with them."""

QUANTIZATION = ("QUANTIZE", "DEQUANTIZE")

BITS = {
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
}
"""ONNX types that are less than a byte."""


def empty_network(package: ModuleType, builder: Any) -> Any:
    """A strongly typed network: TensorRT 11 knows no other, and older ones are told."""
    flag = getattr(package.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """TensorRT's network of a file, and what the parser lacked and was written in older operators.

    `parser` keeps the weights in memory.
    """

    network: Any
    parser: Any
    older: Older


def parse(package: ModuleType, builder: Any, log: Log, path: Path, graph: str) -> Parsed:
    """A network of the file. Operators that the parser lacks are written out, see `tensorrt_older`.

    What it says of an operator before may be wrong, so that what it refuses counts, too. Raises
    ExportError naming every node that was refused.
    """
    lacking: set[str] = set()
    while True:
        network = empty_network(package, builder)
        parser = package.OnnxParser(network, log.made)
        lacking |= {name for name in REPLACEABLE if not parser.supports_operator(name)}
        older = _without(path, lacking)
        if older.counts:
            taken = parser.parse(older.model, str(path))  # the path is where the weights lie
        else:
            taken = parser.parse_from_file(str(path))
        if taken and not parser.num_errors:
            return Parsed(network=network, parser=parser, older=older)
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        refused = {error.node_operator() for error in errors} & set(REPLACEABLE)
        if refused <= lacking:
            raise _refusal(package, errors, path, graph)
        lacking |= refused


def _without(path: Path, lacking: set[str]) -> Older:
    if not lacking:
        return UNCHANGED
    from .tensorrt_older import without  # noqa: PLC0415 - its imports take longer than most graphs

    return without(path, lacking)


def _refusal(package: ModuleType, errors: Iterable[Any], path: Path, graph: str) -> ExportError:
    parser = f"{package.__name__} {package.__version__}"
    lines = [
        f"{graph}: {parser} refuses node "
        f"'{error.node_name()}' ({error.node_operator()}): {error.desc().strip()[:300]}"
        if error.node_operator()
        else f"{graph}: {parser}: {error.desc().strip()[:300]}"
        for error in errors
    ]
    return ExportError(
        "\n".join(dict.fromkeys(lines)) or f"{graph}: {package.__name__} cannot read {path.name}.",
        "Export the bundle again, or install a newer version of the package.",
    )


def describe(parsed: Parsed, plan: GraphPlan, float_type: str, path: Path) -> Network:
    """What the parser made of the file, held against what the plan says it computes in."""
    network, older = parsed.network, parsed.older
    model = onnx.load(str(path), load_external_data=False)
    nodes = [node.name for node in model.graph.node]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    origins = {layer: older.origins.get(node, node) for layer, node in _origins(layers)}
    seen = set(origins.values())
    allowed = {**plan.float32_nodes, **older.float32}
    float32, odd = _floats(layers, origins, allowed, float_type)
    return Network(
        nodes=len(nodes),
        folded=tuple(name for name in nodes if name not in seen),
        layers=len(layers),
        kinds=dict(sorted(Counter(layer.type.name for layer in layers).items())),
        inputs=dict(_tensors(network.get_input, network.num_inputs)),
        outputs=dict(_tensors(network.get_output, network.num_outputs)),
        profiles=(),
        float32=float32,
        odd=odd,
        absent=tuple(sorted(set(plan.float32_nodes) - set(nodes))),
        weight_bytes=weight_bytes(model),
        written_out=older.counts,
    )


def _tensors(get: Any, number: int) -> Iterator[tuple[str, str]]:
    """Name and text of each input or output of the network."""
    for i in range(number):
        tensor = get(i)
        sizes = (
            str(size) if size >= 0 else tensor.get_dimension_name(axis) or "?"
            for axis, size in enumerate(tensor.shape)
        )
        yield tensor.name, f"{type_name(tensor.dtype)}[{','.join(sizes)}]"


def _origins(layers: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Layer name -> ONNX node, the readers of a layer before the layer itself."""
    found: dict[str, str] = {}
    readers: dict[str, str] = {}
    for layer in reversed(list(layers)):
        outputs = (layer.get_output(i).name for i in range(layer.num_outputs))
        read_by = next((readers[name] for name in outputs if name in readers), "")
        metadata = layer.metadata
        at = metadata.find(ORIGIN)
        origin = metadata[at + len(ORIGIN) :].split("]")[0] if at >= 0 else read_by
        found[layer.name] = origin
        for i in range(layer.num_inputs):
            if (tensor := layer.get_input(i)) is not None:
                readers[tensor.name] = origin
    return iter(found.items())


def _floats(
    layers: Iterable[Any], origins: Mapping[str, str], allowed: Mapping[str, str], float_type: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Nodes that compute in float32 by the plan's leave, and layers that do without any."""
    float32: Counter[str] = Counter()
    odd = []
    for layer in layers:
        for other in sorted(_computed_in(layer) - {float_type}):
            origin = origins[layer.name]
            if other == "float32" and origin in allowed:
                float32[origin] += 1
            else:
                where = f"node '{origin}'" if origin else f"layer '{layer.name}'"
                odd.append(f"{where} ({layer.type.name}) computes in {other}")
    return dict(sorted(float32.items())), tuple(dict.fromkeys(odd))


def _computed_in(layer: Any) -> set[str]:
    """The float types among a layer's tensors; none where it computes with none of them."""
    if layer.type.name in NO_ARITHMETIC:
        return set()
    # The parser gives a quantization its zero point, a third input, as a float32 zero.
    counted = min(layer.num_inputs, 2) if layer.type.name in QUANTIZATION else layer.num_inputs
    tensors = [layer.get_input(i) for i in range(counted)]
    tensors += [layer.get_output(i) for i in range(layer.num_outputs)]
    return {type_name(one.dtype) for one in tensors if one is not None} & set(FLOATS)


def weight_bytes(model: Any) -> int:
    """Bytes of all stored tensors of more than a kilobyte, those of equal content once."""
    sizes = {}
    for tensor in model.graph.initializer:
        bits = BITS.get(tensor.data_type)
        if bits is None:
            bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        size = -(-math.prod(tensor.dims) * bits // 8)
        if size > SMALL:
            external = tuple(sorted((one.key, one.value) for one in tensor.external_data))
            sizes[external or tensor.SerializeToString()[-size:]] = size
    return sum(sizes.values())


def add_profiles(
    builder: Any, config: Any, network: Any, plan: GraphPlan, graph: str
) -> tuple[Profile, ...]:
    """Add the plan's profiles to the configuration; returns them as TensorRT has them.

    Raises ExportError for a profile that it refuses.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    found = []
    for number, wanted in enumerate(plan.profiles):
        profile = builder.create_optimization_profile()
        for name, one in wanted.shapes.items():
            profile.set_shape(name, one.min, one.opt, one.max)
        if wanted.shapes and (not profile or config.add_optimization_profile(profile) != number):
            raise ExportError(
                f"{graph}: TensorRT refuses the profile '{wanted.name}' of the build plan.",
                "Export the bundle again.",
            )
        shapes = {
            tensor.name: Range(**_read_back(profile, tensor.name))
            for tensor in inputs
            if any(size < 0 for size in tensor.shape)
        }
        found.append(Profile(name=wanted.name, shapes=shapes))
    return tuple(found)


def _read_back(profile: Any, tensor: str) -> dict[str, tuple[int, ...]]:
    shapes = [tuple(shape) for shape in profile.get_shape(tensor)] or [(), (), ()]
    return dict(zip(("min", "opt", "max"), shapes, strict=True))
