"""An ExecuTorch program whose graphs and numbers can be changed in place, byte by byte."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_export.targets.executorch_file import Delegate, Tensor, parse, program_schema
from fastvlm_export.targets.executorch_flatbuffer import Table, read_table
from fastvlm_export.targets.executorch_layout import layout
from fastvlm_export.targets.executorch_model import PROGRAM
from fastvlm_export.targets.executorch_xnn import xnn_constant, xnn_table

from .base import NoPlaceError

_GRAPH = slice(10, 14)
"""Where an XNNPACK payload says where its graph begins."""
_KINDS = {"fp32": np.float32, "qcint8": np.int8, "qint8": np.int8, "qcint32": np.int32}
_UNARY = {"XNNSoftmax": 3, "XNNSigmoid": 4, "XNNClamp": 6, "XNNTanh": 43, "XNNHardswish": 24}
"""Operators of one input -> their number in the schema's union."""


class Program:
    """The bytes of a program, and one of its methods."""

    def __init__(self, path: Path, method: str) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self._view = memoryview(bytes(self.data))
        self.file = parse(self._view, PROGRAM)
        self.method = self.file.methods[method]
        size = layout(self._view, PROGRAM).program_size
        table = read_table(self._view[:size], program_schema(), "Program")
        [self.plan] = [one for one in table.execution_plan if one.name == method]

    def save(self) -> None:
        """Write the file anew."""
        self.path.write_bytes(self.data)

    def place(self, view: memoryview) -> int:
        """Where a part of the file lies in it."""
        start = np.frombuffer(self._view, np.uint8).ctypes.data
        return int(np.frombuffer(view, np.uint8).ctypes.data) - start

    def put(self, at: int, content: bytes) -> None:
        """Other bytes from there on."""
        self.data[at : at + len(content)] = content

    def store(self, view: memoryview, numbers: NDArray[Any]) -> None:
        """Other numbers in the place of a part of the file."""
        made = np.ascontiguousarray(numbers).tobytes()
        if len(made) != len(view):
            raise ValueError("the numbers have another size")
        self.put(self.place(view), made)

    @property
    def delegate(self) -> Delegate:
        """The method's only one."""
        [found] = self.method.delegates
        return found

    @property
    def graph(self) -> "Graph":
        """XNNPACK's."""
        return Graph(self, self.delegate)

    def tensors(self, *shape: int) -> list[Tensor]:
        """Constants of the method itself, of a shape."""
        found = [one for one in self.method.constants if one.sizes == shape]
        if not found:
            raise NoPlaceError(f"no constant is {list(shape)}")
        return found

    def calls(self, operator: str) -> list[Table]:
        """Instructions that run a kernel of that name."""
        names = [one.name for one in self.plan.operators]
        return [
            one.instr_args
            for chain in self.plan.chains
            for one in chain.instructions
            if one.instr_args is not None
            and one.instr_args.kind == "KernelCall"
            and names[one.instr_args.op_index] == operator
        ]

    def set_argument(self, call: Table, number: int, value: int) -> None:
        """The index of another value, in the place of an argument."""
        self.put(call.places["args"] + 4 * number, struct.pack("<i", value))


class Graph:
    """The graph of an XNNPACK delegate: nodes, and values by their ids."""

    def __init__(self, program: Program, delegate: Delegate) -> None:
        self.program, self.delegate = program, delegate
        self.table = xnn_table(delegate)
        payload = delegate.processed
        self.begin = program.place(payload) + int.from_bytes(payload[_GRAPH], "little")
        unions = [entry.xvalue_union for entry in self.table.xvalues]
        self.values = {union.fields.get("tensor_value", union).id_out: union for union in unions}

    def nodes(self, kind: str) -> list[Table]:
        """Those of a kind, `Gelu`. Raises NoPlaceError where there are none."""
        found = [
            entry.xnode_union
            for entry in self.table.xnodes
            if entry.xnode_union.kind == f"XNN{kind}"
        ]
        if not found:
            raise NoPlaceError(f"there is no {kind}")
        return found

    def convolutions(self) -> list[Table]:
        """Of both kinds, in the order that they run in."""
        return [
            entry.xnode_union
            for entry in self.table.xnodes
            if entry.xnode_union.kind in ("XNNConv2d", "XNNDepthwiseConv2d")
        ]

    def layers(self) -> list[Table]:
        """Fully connected nodes whose weights are a layer's, and no helper's."""
        found = [
            node
            for node in self.nodes("FullyConnected")
            if np.prod(self.tensor(node.filter_id).dims) >= 4096
        ]
        if not found:
            raise NoPlaceError("there are no layers")
        return found

    def tensor(self, index: int) -> Table:
        """The tensor of a value, without what quantizes it."""
        union: Table = self.values[index]
        found: Table = union.fields.get("tensor_value", union)
        return found

    def parameters(self, index: int) -> Table:
        """What quantizes a value. Raises NoPlaceError for a float."""
        found = self.values[index].fields.get("quant_params")
        if found is None:
            raise NoPlaceError("the value is a float")
        return found  # type: ignore[no-any-return]

    def constant(self, index: int) -> memoryview:
        """The bytes of a value that the file holds."""
        tensor = self.tensor(index)
        if tensor.constant_buffer_idx:
            return xnn_constant(self.delegate, self.table, tensor.constant_buffer_idx)
        given = self.delegate.tensors
        if tensor.external_id < len(given) and given[tensor.external_id].data is not None:
            handed: memoryview = given[tensor.external_id].data
            return handed
        raise NoPlaceError("the value is no constant")

    def is_constant(self, index: int) -> bool:
        """Whether the file holds its numbers: in the graph, or for what hands it to the graph."""
        try:
            return bool(len(self.constant(index)))
        except NoPlaceError:
            return False

    def scales(self, index: int) -> memoryview:
        """The bytes of a weight's scales."""
        buffer = self.parameters(index).fields.get("scale_buffer_idx")
        if not buffer:
            raise NoPlaceError("the value has one scale")
        return xnn_constant(self.delegate, self.table, buffer)

    def put(self, table: Table, **numbers: float) -> None:
        """Other numbers of four bytes each in a table: floats where they are written as such."""
        for name, number in numbers.items():
            if name not in table.places:
                raise NoPlaceError(f"{table.kind} leaves {name} at its default")
            kind = "<f" if isinstance(number, float) else "<I"
            made = struct.pack(kind, number if isinstance(number, float) else int(number))
            self.program.put(self.begin + table.places[name], made)

    def put_kind(self, node: Table, kind: str) -> None:
        """Another operator of one input in the place of a node."""
        [entry] = [one for one in self.table.xnodes if one.xnode_union is node]
        at = self.begin + entry.places["xnode_union"]
        self.program.put(at, bytes([_UNARY[f"XNN{kind}"]]))

    def readers(self, index: int) -> list[tuple[Table, str]]:
        """Nodes that read a value, and the name that they read it by."""
        return [
            (entry.xnode_union, name)
            for entry in self.table.xnodes
            for name, value in entry.xnode_union.fields.items()
            if name.endswith("_id") and not name.startswith("output") and value == index
        ]

    def bypass(self, node: Table, name: str) -> None:
        """What read the node's output reads its input `name` instead."""
        found = self.readers(node.output_id)
        if not found:
            raise NoPlaceError("nothing in the graph reads it")
        for reader, by in found:
            self.put(reader, **{by: getattr(node, name)})


Change = Callable[[Program], None]


def edited(method: str, change: Change) -> Callable[[Path], None]:
    """Plant a change into a method of a bundle's program."""

    def plant(folder: Path) -> None:
        program = Program(folder / PROGRAM, method)
        change(program)
        program.save()

    return plant
