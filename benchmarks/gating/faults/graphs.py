"""Faults in ONNX graphs, whichever target they were written for: changes of one `Graph` each."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .base import NoPlaceError
from .numbers import NEXT_BFLOAT16, THOUSANDTH, ChangeNumbers
from .onnx_graph import FLOATS, Change, Graph

NORMS = ("RMSNormalization", "SkipSimplifiedLayerNormalization", "LayerNormalization")
Find = Callable[[Graph], Any]
"""Finds the operator to be changed."""


def nth(kind: str, index: int) -> Find:
    """The operator of a kind at that place among its like."""
    return lambda graph: graph.nodes(kind)[index]


def layer(index: int) -> Find:
    """Of those that multiply by a stored matrix."""
    return lambda graph: graph.layers()[index]


def output_scaled(find: Find) -> Change:
    """What an operator gives, times 1.001, or the next number that its type has.

    Of a layer of integers that is what comes of it once it is a float again.
    """

    def change(graph: Graph) -> None:
        node = find(graph)
        while graph.type_of(node.output[0]) not in FLOATS:
            [node] = graph.readers(node.output[0])
        value = node.output[0]
        narrow = graph.type_of(value) == TensorProto.BFLOAT16
        graph.scale(value, NEXT_BFLOAT16 if narrow else THOUSANDTH)

    return change


def overflowing(find: Find) -> Change:
    """Times 2^26 and back in four steps: harmless to real numbers, infinite in float16."""

    def change(graph: Graph) -> None:
        graph.scale(find(graph).output[0], 8192.0, 8192.0, 1 / 8192.0, 1 / 8192.0)

    return change


def gelu_by_tanh(*indices: int) -> Change:
    """The approximation in the place of some, or (no index) of all."""

    def change(graph: Graph) -> None:
        found = graph.nodes("Gelu")
        for node in [found[index] for index in indices] or found:
            graph.attribute(node, "approximate", "tanh")

    return change


def epsilon(find: Find, factor: float) -> Change:
    """A norm's, times a factor: an attribute, or a constant that is added before the root."""

    def change(graph: Graph) -> None:
        node = find(graph)
        before = graph.read_attribute(node, "epsilon")
        if before is None:
            raise NoPlaceError(f"{node.name} has no epsilon")
        graph.attribute(node, "epsilon", before * factor)

    return change


def norm(index: int) -> Find:
    """An operator that normalizes and has an epsilon."""
    return lambda graph: graph.nodes(*NORMS)[index]


def attribute(find: Find, name: str, value: Any) -> Change:
    """Another value; of a function, what it makes of the one that is there."""

    def change(graph: Graph) -> None:
        node = find(graph)
        made = value(graph.read_attribute(node, name)) if callable(value) else value
        graph.attribute(node, name, made)

    return change


def inputs_swapped(find: Find, first: int = 0, second: int = 1) -> Change:
    """Two inputs of an operator in each other's places."""

    def change(graph: Graph) -> None:
        node = find(graph)
        node.input[first], node.input[second] = node.input[second], node.input[first]

    return change


def operator(find: Find, kind: str) -> Change:
    """Another operator on the same inputs."""

    def change(graph: Graph) -> None:
        find(graph).op_type = kind

    return change


def skipped(find: Find, source: int = 0) -> Change:
    """An operator that hands one of its inputs on."""

    def change(graph: Graph) -> None:
        node = find(graph)
        graph.bypass(node, node.input[source])

    return change


def weights_of(find: Find, change: Callable[[NDArray[Any]], NDArray[Any]], at: int = 1) -> Change:
    """Other numbers in the stored tensor behind an input."""

    def altered(graph: Graph) -> None:
        node = find(graph)
        if at >= len(node.input) or not node.input[at]:
            raise NoPlaceError(f"{node.name} has no input {at}")
        tensor = graph.stored(node.input[at])
        if tensor is None:
            raise NoPlaceError(f"input {at} of {node.name} is not stored")
        numbers = graph.numbers(tensor)
        graph.store(tensor, change(numbers).astype(numbers.dtype))

    return altered


def weights_swapped(find: Find, other: Find, at: int = 1) -> Change:
    """Two layers read each other's stored tensors."""

    def change(graph: Graph) -> None:
        one, two = find(graph), find(graph) if other is find else other(graph)
        first, second = graph.stored(one.input[at]), graph.stored(two.input[at])
        if first is None or second is None or list(first.dims) != list(second.dims):
            raise NoPlaceError("no two tensors of one shape")
        one.input[at], two.input[at] = two.input[at], one.input[at]

    return change


def named(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    """Other numbers in the first stored tensor whose name ends like that."""

    def altered(graph: Graph) -> None:
        for tensor in graph.graph.initializer:
            if tensor.name.endswith(name):
                numbers = graph.numbers(tensor)
                graph.store(tensor, change(numbers).astype(numbers.dtype))
                return
        raise NoPlaceError(f"no tensor is named *{name}")

    return altered


def another_theta(after: float) -> Change:
    """Both rotary tables, of another base."""

    def change(graph: Graph) -> None:
        tables = {one.name: one for one in graph.graph.initializer}
        if not {"cos", "sin"} <= set(tables):
            raise NoPlaceError("there are no rotary tables")
        rows, half = tables["cos"].dims[:2]
        powers = after ** -(np.arange(half) / half)
        angles = np.outer(np.arange(rows), powers)
        for name, function in (("cos", np.cos), ("sin", np.sin)):
            kind = graph.numbers(tables[name]).dtype
            graph.store(tables[name], function(angles).astype(kind))

    return change


def fixed_pool(graph: Graph) -> None:
    """Squeeze-and-excite over a window of three by three cells instead of all."""
    node = graph.nodes("ReduceMean")[-1]
    made = helper.make_node(
        "AveragePool",
        [node.input[0]],
        [node.output[0]],
        name="pool",
        kernel_shape=[3, 3],
        strides=[4, 4],
    )
    graph.replace(node, [made])


def convolutions_swapped(graph: Graph) -> None:
    """Two convolutions of one shape read each other's weights."""
    seen: dict[tuple[int, ...], Any] = {}
    for node in graph.nodes("Conv")[10:]:
        tensor = graph.weight(node)
        shape = tuple(tensor.dims)
        if shape in seen and graph.weight(seen[shape]).name != tensor.name:
            node.input[1], seen[shape].input[1] = seen[shape].input[1], node.input[1]
            return
        seen.setdefault(shape, node)
    raise NoPlaceError("no two convolutions have one shape")


def integer_convolution(graph: Graph) -> Any:
    """A convolution in the middle whose weight is integers."""
    found = [
        node
        for node in graph.nodes("Conv")
        if graph.maker(node.input[1]) is not None
        and graph.maker(node.input[1]).op_type == "DequantizeLinear"
    ]
    if not found:
        raise NoPlaceError("no convolution has integers")
    return found[len(found) // 2]


def weight_dequantized(graph: Graph) -> Any:
    """What makes its weight a float."""
    return graph.maker(integer_convolution(graph).input[1])


def one_side(at: int, change: ChangeNumbers) -> Change:
    """A static range's scale (1) or zero point (2) where it is dequantized, not where rounded."""

    def altered(graph: Graph) -> None:
        for node in graph.nodes("DequantizeLinear")[::-1]:
            maker = graph.maker(node.input[0])
            has_one = at < len(node.input) and node.input[at] in graph.initializers
            if has_one and maker is not None and maker.op_type == "QuantizeLinear":
                tensor = graph.initializers[node.input[at]]
                made = numpy_helper.from_array(change(graph.numbers(tensor)), f"{tensor.name}_own")
                graph.graph.initializer.append(made)
                node.input[at] = made.name
                return
        raise NoPlaceError("no activation is rounded to a static range")

    return altered
