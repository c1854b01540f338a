"""Faults in the files of an ONNX bundle: each changes one thing that an export may get wrong."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from .conftest import Small

Fault = Callable[[GraphProto], None]
"""Changes a graph in place; its weights are all inside."""


def altered(small: Small, graph: str, fault: Fault, folder: Path) -> Small:
    """A copy with one of its graphs changed; that graph's weights are then inside its file."""
    shutil.copytree(small.folder, folder)
    copied = replace(small, folder=folder)
    path = copied.paths[graph]
    model = onnx.load(path)
    fault(model.graph)
    path.write_bytes(model.SerializeToString())
    return copied


def nth(graph: GraphProto, operator: str, index: int = 0) -> NodeProto:
    """One of the nodes of an operator."""
    return [node for node in graph.node if node.op_type == operator][index]


def with_attribute(operator: str, name: str, value: Any, index: int = 0) -> Fault:
    """Give one node's attribute another value."""

    def fault(graph: GraphProto) -> None:
        node = nth(graph, operator, index)
        kept = [one for one in node.attribute if one.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return fault


def scaled(operator: str, index: int = 0, factor: float = 1.001) -> Fault:
    """Multiply what one node makes, by a node behind it."""

    def fault(graph: GraphProto) -> None:
        node = nth(graph, operator, index)
        name = node.output[0]
        node.output[0] = f"{name}.before"
        number = numpy_helper.from_array(np.array(factor, _float_of(graph)), f"{name}.factor")
        graph.initializer.append(number)
        nodes = list(graph.node)
        behind = helper.make_node("Mul", [node.output[0], number.name], [name])
        nodes.insert(nodes.index(node) + 1, behind)
        del graph.node[:]
        graph.node.extend(nodes)

    return fault


def _float_of(graph: GraphProto) -> type[np.floating[Any]]:
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.initializer)
    return np.float16 if half else np.float32


def swapped(operator: str, index: int, first: int, second: int) -> Fault:
    """Exchange two of a node's inputs."""

    def fault(graph: GraphProto) -> None:
        node = nth(graph, operator, index)
        node.input[first], node.input[second] = node.input[second], node.input[first]

    return fault


def constant(
    operator: str, place: int, alter: Callable[[np.ndarray[Any, Any]], None], index: int = 0
) -> Fault:
    """Alter a constant that one node reads, for that node alone."""

    def fault(graph: GraphProto) -> None:
        node = nth(graph, operator, index)
        name = node.input[place]
        (tensor,) = [one for one in graph.initializer if one.name == name]
        array = numpy_helper.to_array(tensor).copy()
        alter(array)
        own = numpy_helper.from_array(array, f"{name}.altered")
        graph.initializer.append(own)
        node.input[place] = own.name

    return fault


def add(number: float, at: int = 0) -> Callable[[np.ndarray[Any, Any]], None]:
    """Add to one of the numbers."""

    def alter(array: np.ndarray[Any, Any]) -> None:
        array.reshape(-1)[at] += number

    return alter


def multiply(factor: float, at: int | None = None) -> Callable[[np.ndarray[Any, Any]], None]:
    """Multiply all of the numbers, or one."""

    def alter(array: np.ndarray[Any, Any]) -> None:
        flat = array.reshape(-1)
        flat[slice(None) if at is None else at] *= array.dtype.type(factor)

    return alter
