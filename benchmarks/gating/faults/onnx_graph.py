"""An ONNX file whose nodes and numbers can be changed one by one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .base import NoPlaceError

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
MATRIX = ("MatMul", "MatMulInteger", "MatMulNBits", "Gemm")
"""What multiplies by a stored matrix; MatMul without one multiplies two tensors."""
_TYPE_OF = {"DequantizeLinear": 1, "Gather": 0, "SkipSimplifiedLayerNormalization": 0}
"""Which input has the type of the output, where that is not the first."""


class Graph:
    """A model of one file. `nodes` are its operators in the order that they run in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(path)
        self.graph = self.model.graph
        self.initializers = {one.name: one for one in self.graph.initializer}
        self._makers = {name: node for node in self.graph.node for name in node.output}

    def save(self) -> None:
        """Write the file anew, all numbers inside."""
        for one in self.graph.initializer:
            one.ClearField("data_location")
            del one.external_data[:]
        onnx.save(self.model, self.path)

    def nodes(self, *kinds: str) -> list[Any]:
        """The operators of these kinds. Raises NoPlaceError where there are none."""
        found = [node for node in self.graph.node if node.op_type in kinds]
        if not found:
            raise NoPlaceError(f"{self.path.name} has no {' or '.join(kinds)}")
        return found

    def layers(self) -> list[Any]:
        """What multiplies by a stored matrix, convolutions apart."""
        return [node for node in self.nodes(*MATRIX) if self.weight(node) is not None]

    def maker(self, value: str) -> Any:
        """The operator that gives a value; None for inputs and stored tensors."""
        return self._makers.get(value)

    def readers(self, value: str) -> list[Any]:
        """The operators that read a value."""
        return [node for node in self.graph.node if value in node.input]

    def weight(self, node: Any) -> Any:
        """The stored tensor behind the second input: as it is, dequantized, transposed or cast."""
        return self.stored(node.input[1])

    def stored(self, value: str) -> Any:
        """The initializer that a value is made of by operators that add no others, or None."""
        while value not in self.initializers:
            node = self.maker(value)
            if node is None or node.op_type not in (
                "DequantizeLinear",
                "Transpose",
                "Cast",
                "Reshape",
                "Unsqueeze",
            ):
                return None
            value = node.input[0]
        return self.initializers[value]

    def type_of(self, value: str) -> int:
        """The element type of a value."""
        if value in self.initializers:
            return int(self.initializers[value].data_type)
        for one in self.graph.input:
            if one.name == value:
                return int(one.type.tensor_type.elem_type)
        node = self.maker(value)
        if node.op_type == "Cast":
            return int(next(a.i for a in node.attribute if a.name == "to"))
        if node.op_type == "MatMulInteger":
            return int(TensorProto.INT32)
        return self.type_of(node.input[_TYPE_OF.get(node.op_type, 0)])

    def numbers(self, tensor: Any) -> NDArray[Any]:
        """A copy of a stored tensor's numbers."""
        return np.array(numpy_helper.to_array(tensor))

    def store(self, tensor: Any, numbers: NDArray[Any]) -> None:
        """Put other numbers in a tensor's place, in its type."""
        name, kind = tensor.name, tensor.data_type
        made = numpy_helper.from_array(np.ascontiguousarray(numbers), name)
        if made.data_type != kind:
            raise TypeError(f"{name} would be of another type")
        tensor.CopyFrom(made)

    def scale(self, value: str, *factors: float) -> None:
        """Multiply a value before anything reads it, by one factor after the other."""
        node = self.maker(value)
        kind = self.type_of(value)
        place = list(self.graph.node).index(node)
        names = [f"{value}_times_{number}" for number in range(len(factors))]
        for number, output in enumerate(node.output):
            if output == value:
                node.output[number] = names[0]
        for number, factor in enumerate(factors):
            given = names[number]
            made = names[number + 1] if number + 1 < len(names) else value
            constant = f"{made}_factor_{number}"
            self.graph.initializer.append(helper.make_tensor(constant, kind, [], [factor]))
            added = helper.make_node("Mul", [given, constant], [made], name=constant)
            self.graph.node.insert(place + 1 + number, added)

    def replace(self, node: Any, made: Sequence[Any]) -> None:
        """Other operators in the place of one, which give what it gave."""
        place = list(self.graph.node).index(node)
        self.graph.node.remove(node)
        for number, one in enumerate(made):
            self.graph.node.insert(place + number, one)

    def bypass(self, node: Any, source: str) -> None:
        """What read the node's first output reads another value instead."""
        for reader in self.readers(node.output[0]):
            for number, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[number] = source
        for one in self.graph.output:
            if one.name == node.output[0]:
                raise NoPlaceError(f"{node.name} gives the graph's output")

    def attribute(self, node: Any, name: str, value: Any) -> None:
        """Set an attribute, whether it is there or not."""
        kept = [one for one in node.attribute if one.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    def read_attribute(self, node: Any, name: str) -> Any:
        """An attribute's value; None where it is not there."""
        for one in node.attribute:
            if one.name == name:
                return helper.get_attribute_value(one)
        return None


Change = Callable[[Graph], None]


def edited(path: str, change: Change) -> Callable[[Path], None]:
    """Plant a change into the file that matches a pattern in a bundle's folder."""

    def plant(folder: Path) -> None:
        [file] = sorted(folder.glob(path))
        graph = Graph(file)
        change(graph)
        graph.save()

    return plant
