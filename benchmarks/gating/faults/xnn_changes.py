"""Faults in XNNPACK's graphs: changes of one `Program` each."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fastvlm_export.targets.executorch_flatbuffer import Table

from .base import NoPlaceError
from .numbers import THOUSANDTH, ChangeNumbers, times
from .pte import Change, Graph, Program

Find = Callable[[Graph], Table]


def node(name: str, index: int) -> Find:
    """The node of a kind at that place among its like."""
    return lambda graph: graph.nodes(name)[index]


def layer(index: int) -> Find:
    """Of those with a weight of a layer."""
    return lambda graph: graph.layers()[index]


def convolution(index: int) -> Find:
    """Of both kinds."""
    return lambda graph: graph.convolutions()[index]


def numbers_of(graph: Graph, index: int) -> Any:
    """A constant's numbers in its shape, 4-bit ones two to a byte."""
    view = graph.constant(index)
    dims = tuple(graph.tensor(index).dims)
    for dtype in (np.float32, np.int8):
        if np.prod(dims) * np.dtype(dtype).itemsize == len(view):
            is_sum = dtype is np.float32 and "quant_params" in graph.values[index].fields
            return np.frombuffer(view, np.int32 if is_sum else dtype).reshape(dims)
    return np.frombuffer(view, np.uint8)


def weight(find: Find, change: ChangeNumbers) -> Change:
    """Other numbers in a node's weight; every node that shares it reads them."""
    return _stored(find, "filter_id", change)


def bias(find: Find, change: ChangeNumbers) -> Change:
    """Likewise in its bias."""
    return _stored(find, "bias_id", change)


def _stored(find: Find, name: str, change: ChangeNumbers) -> Change:
    def altered(program: Program) -> None:
        graph = program.graph
        index = getattr(find(graph), name)
        if index not in graph.values:
            raise NoPlaceError(f"there is no {name}")
        program.store(graph.constant(index), change(numbers_of(graph, index)))

    return altered


def scales(find: Find, change: ChangeNumbers) -> Change:
    """Other numbers in the scales of a node's weight; bfloat16's bits are integers here."""

    def altered(program: Program) -> None:
        graph = program.graph
        index = find(graph).filter_id
        view = graph.scales(index)
        wide = len(view) == 4 * graph.parameters(index).num_scales
        numbers = np.frombuffer(view, np.float32 if wide else np.uint16)
        program.store(view, change(numbers))

    return altered


def output_scaled(find: Find) -> Change:
    """What a node gives, times 1.001: by its output's scale, or by its weight's and its bias."""

    def altered(program: Program) -> None:
        graph = program.graph
        found = find(graph)
        union = graph.values[found.output_id]
        if "quant_params" in union.fields and "scale" in union.quant_params.places:
            graph.put(union.quant_params, scale=union.quant_params.scale * THOUSANDTH)
            return
        index = found.filter_id
        if "quant_params" in graph.values[index].fields:
            view = graph.scales(index)
            if len(view) != 4 * graph.parameters(index).num_scales:
                _bfloat16_scaled(program, view)
            else:
                program.store(view, times(THOUSANDTH)(np.frombuffer(view, np.float32)))
        else:
            view = graph.constant(index)
            program.store(view, times(THOUSANDTH)(np.frombuffer(view, np.float32)))
        if found.bias_id in graph.values:
            numbers = numbers_of(graph, found.bias_id)
            if numbers.dtype == np.float32:
                program.store(graph.constant(found.bias_id), times(THOUSANDTH)(numbers))

    return altered


def _bfloat16_scaled(program: Program, view: memoryview) -> None:
    """Each scale's next neighbour: bfloat16 has none nearer."""
    program.store(view, np.frombuffer(view, np.uint16) + np.uint16(1))


def swapped(find: Find) -> Change:
    """A node's two inputs in each other's places."""

    def altered(program: Program) -> None:
        graph = program.graph
        found = find(graph)
        graph.put(found, input1_id=found.input2_id, input2_id=found.input1_id)

    return altered


def exchanged(find: Find, other: Find) -> Change:
    """Two layers read each other's weights, their biases stay."""

    def altered(program: Program) -> None:
        graph = program.graph
        one, two = find(graph), other(graph)
        if graph.tensor(one.filter_id).dims != graph.tensor(two.filter_id).dims:
            raise NoPlaceError("the weights have other shapes")
        graph.put(one, filter_id=two.filter_id)
        graph.put(two, filter_id=one.filter_id)

    return altered


def bypassed(find: Find, name: str) -> Change:
    """A node that hands one of its inputs on."""

    def altered(program: Program) -> None:
        graph = program.graph
        graph.bypass(find(graph), name)

    return altered


def kind(find: Find, name: str) -> Change:
    """Another operator of one input."""

    def altered(program: Program) -> None:
        graph = program.graph
        graph.put_kind(find(graph), name)

    return altered
