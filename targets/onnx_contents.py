"""What the operators of an ONNX file read that no input decides, number by number."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..exporter.errors import ExportError
from .onnx_numbers import Fingerprint, fingerprint

_KINDS = ("float32", "float16", "float64", "bfloat16", "int8", "uint8", "int32")
"""Types of weights, scales and zero points; others are shapes and places."""

_PACKED, _ZEROS = 1, 3
"""Where MatMulNBits has its integers and its zero points."""


_SETTINGS: dict[str, tuple[str, int | str]] = {
    "MatMulNBits": ("accuracy_level", 0),
    "Gelu": ("approximate", "none"),
}
"""Attributes that change what an operator makes by less than any comparison may find, and their
values where they are not given."""


def setting(name: str, value: int | str) -> Fingerprint:
    """Of an attribute that is no number: whether MatMulNBits rounds activations, Gelu's formula."""
    return name, str(value).encode()


class Contents:
    """`reads`: how often the graph's nodes read which numbers; `names`: what the file calls them.

    Numbers that are attributes (a norm's epsilon) and `_SETTINGS` count as read by their node.
    MatMulNBits's
    integers count as [N,K] int8 and its zero points as [N,blocks], whatever the bytes they lie in.
    One tensor is in memory at a time. Raises ExportError for a file that is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.reads: Counter[Fingerprint] = Counter()
        self.names: dict[Fingerprint, str] = {}
        self._known: dict[tuple[str, int], Fingerprint | None] = {}
        try:
            model = ir.load(path)
            if model.functions:
                raise ValueError("it has functions")
            for node in model.graph:
                self._add_node(node)
        except Exception as error:  # of protobuf, of onnx_ir and of the file system
            raise ExportError(
                f"{path} can't be read: {error}",
                "Export it again: fastvlm-export --target onnx --out DIR --force",
            ) from error

    def _add_node(self, node: ir.Node) -> None:
        for attribute in node.attributes.values():
            self._add_attribute(node, attribute)
        packed = node.op_type == "MatMulNBits"
        if node.op_type in _SETTINGS:
            name, usual = _SETTINGS[node.op_type]
            given = node.attributes.get(name)
            self._add(setting(name, given.value if given else usual), f"{node.name}'s {name}")
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.const_value is None:
                continue
            called = str(value.name)
            role = index if packed and index in (_PACKED, _ZEROS) else 0
            if (called, role) not in self._known:
                array = value.const_value.numpy()
                if role:
                    array = _unpacked(array, node, role)
                kept = str(array.dtype) in _KINDS
                self._known[called, role] = fingerprint(array) if kept else None
            found = self._known[called, role]
            if found is not None:
                self._add(found, called)

    def _add_attribute(self, node: ir.Node, attribute: ir.Attr) -> None:
        kind, value = attribute.type, attribute.value
        if kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            raise ValueError(f"{node.name} has a graph inside")
        arrays: list[NDArray[Any]] = []
        if kind is ir.AttributeType.FLOAT:
            arrays = [np.array(value, np.float32)]
        elif kind is ir.AttributeType.FLOATS:
            arrays = [np.array(one, np.float32) for one in value]
        elif kind is ir.AttributeType.TENSOR:
            arrays = [value.numpy()]
        for array in arrays:
            if str(array.dtype) in _KINDS:
                self._add(fingerprint(array), f"{node.name}'s {attribute.name}")

    def _add(self, found: Fingerprint, name: str) -> None:
        self.reads[found] += 1
        self.names.setdefault(found, name)


def _unpacked(packed: NDArray[Any], node: ir.Node, role: int) -> NDArray[np.int8]:
    """MatMulNBits's unsigned integers of 4 or 8 bits -> less 2^(bits-1), one to a number.

    [N,blocks,bytes] -> [N,K], or zero points [N,bytes] -> [N,blocks]. Of 4 bits the first of two
    lies in the low half of a byte; what lies past a row's end is not read.
    """
    bits, rows, depth, block = (
        node.attributes.get_int(name) for name in ("bits", "N", "K", "block_size")
    )
    if packed.dtype != np.uint8 or bits not in (4, 8):
        raise ValueError(f"{node.name} has {packed.dtype} of {bits} bits")
    flat = packed.reshape(rows, -1)
    if bits == 4:
        flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(rows, -1)
    width = depth if role == _PACKED else -(-depth // block)
    signed: NDArray[np.int8] = (flat[:, :width] - np.uint8(2 ** (bits - 1))).view(np.int8)
    return signed
