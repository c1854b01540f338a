"""Writing nodes in the place of one: the few lines that every pass over an ONNX graph needs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape


class Builder:
    """Nodes and initializers that take the place of `node` in `graph`.

    Constants of one value are one initializer, so that equal nodes are merged later.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.tape = Tape()

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """One node with one output."""
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        return self.tape.op(op_type, inputs, attributes=attributes, domain=domain)

    def weight(self, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer under the tensor's own name, which must be new or mean the same tensor."""
        name = str(tensor.name)
        if name not in self.graph.initializers:
            value = ir.Value(
                name=name,
                const_value=tensor,
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def constant(self, value: NDArray[Any] | np.generic) -> ir.Value:
        """A small initializer, named after its type and value."""
        array = np.asarray(value)
        label = "_".join(map(str, array.reshape(-1).tolist()))
        shape = "x".join(map(str, array.shape))
        return self.weight(ir.tensor(array, name=f"constant.{array.dtype}[{shape}].{label}"))

    def replace(self, out: ir.Value) -> None:
        """Put what was written in the node's place, `out` in that of its only output."""
        ir.convenience.replace_nodes_and_values(
            self.graph, self.node, [self.node], self.tape.nodes, self.node.outputs, [out]
        )


def lazy(
    name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Callable[[], NDArray[Any]]
) -> ir.LazyTensor:
    """A tensor that is computed each time it is asked for: in the end, as the file is written."""
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(compute()), name=name, dtype=dtype),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
    )


def values_of(value: ir.Value | None) -> NDArray[Any]:
    """The numbers of an initializer or constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ValueError(f"{value and value.name} is not a constant")
    return tensor.numpy()
