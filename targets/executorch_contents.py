"""Which numbers a method of an ExecuTorch file holds, and how often it reads them."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..exporter.errors import ExportError
from .executorch_file import Call, Delegate, Method, Tensor
from .executorch_model import EXPORT_HINT, PROGRAM
from .executorch_stored import Fingerprint, Numbers, Range, fingerprint
from .executorch_xnn import XNNPACK, xnn_constant, xnn_graph

_NUMPY = {"int4": "uint8", "bfloat16": "uint16"}
"""Kinds that NumPy has no type for -> the type that their bytes are read as."""

_XNN_KINDS = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "qint8": "int8",
    "qcint8": "int8",
    "qint32": "int32",
    "qcint32": "int32",
    "int32": "int32",
    "qcint4": "int4",
    "qbint4": "int4",
}

LARGEST_HELPER = 2**14
"""Numbers beyond which nothing counts as a tensor that only selects or averages."""


class Contents:
    """A method's numbers: `reads` of each tensor, where `names` says it is, and static `ranges`.

    Raises ExportError for what is damaged, and for backends whose files cannot be read.
    """

    def __init__(self, method: Method) -> None:
        self.reads: Counter[Fingerprint] = Counter()
        self.names: dict[Fingerprint, str] = {}
        self.ranges: Counter[Range] = Counter()
        self._helpers: dict[Fingerprint, Numbers] = {}
        delegates = 0
        for step in method.steps:
            if isinstance(step, Call):
                self._add_call(step)
                continue
            self._add_tensors(step.tensors, f"delegate {delegates}")
            self._add_graph(step, delegates)
            delegates += 1
        for number, buffer in enumerate(method.buffers):
            if buffer.data is not None and np.frombuffer(buffer.data, np.uint8).any():
                self._add_tensors((buffer,), f"first values of buffer {number}")

    def foreign(self, known: set[Fingerprint], scalars: frozenset[float]) -> list[str]:
        """Floats and small integers that are neither known nor helpers, by their names.

        Helpers are tensors of one number among `scalars`, or of 1/n for their n numbers (a mean as
        a product), and those that select: -1, 0 and 1.
        """
        return sorted(
            self.names[key]
            for key in self.reads
            if key[0] not in ("int64", "bool")
            and key not in known
            and not self._helps(key, scalars)
        )

    def _helps(self, key: Fingerprint, scalars: frozenset[float]) -> bool:
        numbers = self._helpers.get(key)
        if numbers is None or numbers.kind != "float32":
            return False
        values = np.unique(numbers.data)
        if len(values) > 1:
            return bool(np.isin(values, (-1, 0, 1)).all())
        allowed = np.array([*scalars, 1 / numbers.data.size], np.float32)
        return bool((values == allowed).any())

    def _add_call(self, call: Call) -> None:
        self._add_tensors(call.args, call.operator)

    def _add_tensors(self, values: tuple[Any, ...], reader: str) -> None:
        """Constants among an operator's arguments, or a delegate's."""
        for value in values:
            if isinstance(value, tuple):
                self._add_tensors(value, reader)
            elif isinstance(value, Tensor) and value.data is not None:
                self._count(value.dtype, value.data, f"{value.shape} of {reader}")

    def _add_graph(self, delegate: Delegate, number: int) -> None:
        if delegate.backend != XNNPACK:
            raise ExportError(f"{delegate.backend}'s numbers cannot be read.", EXPORT_HINT)
        graph = xnn_graph(delegate)
        values: dict[int, Any] = {}
        for entry in graph.xvalues:
            value = entry.xvalue_union
            tensor = getattr(value, "tensor_value", value)
            values[tensor.id_out] = value
            parameters = getattr(value, "quant_params", None)
            if parameters is not None and type(parameters).__name__ == "PerTensorQuant":
                self.ranges[Range(float(np.float32(parameters.scale)), parameters.zero_point)] += 1
        for entry in graph.xnodes:
            node = entry.xnode_union
            for index in _inputs(node):
                if index in values:  # others are absent, such as a bias
                    where = f"{type(node).__name__}, delegate {number}"
                    self._add_value(delegate, graph, values[index], where)

    def _add_value(self, delegate: Delegate, graph: Any, value: Any, reader: str) -> None:
        tensor = getattr(value, "tensor_value", value)
        if not tensor.constant_buffer_idx:
            return
        kind = tensor.datatype.name.removeprefix("xnn_datatype_")
        where = f"{kind}{list(tensor.dims)} of {reader}"
        data = xnn_constant(delegate, graph, tensor.constant_buffer_idx)
        self._count(_XNN_KINDS.get(kind, kind), data, where)
        parameters = getattr(value, "quant_params", None)
        index = getattr(parameters, "scale_buffer_idx", -1)
        if parameters is None or type(parameters).__name__ == "PerTensorQuant":
            return
        grouped = type(parameters).__name__ == "PerChannelGroupQuant"
        if index <= 0:
            raise ExportError(
                f"{where}: its scales are not where ExecuTorch 1.5 has them.", EXPORT_HINT
            )
        scales = xnn_constant(delegate, graph, index)
        self._count("bfloat16" if grouped else "float32", scales, f"scales of {where}")

    def _count(self, kind: str, data: memoryview, name: str) -> None:
        try:
            numbers = Numbers(kind, np.frombuffer(data, _NUMPY.get(kind, kind)))
        except (TypeError, ValueError) as error:  # no such kind; bytes that are no whole numbers
            raise ExportError(f"{PROGRAM} is damaged: {name}: {error}.", EXPORT_HINT) from error
        key = fingerprint(numbers)
        self.reads[key] += 1
        single = f" ({numbers.data.item():g})" if numbers.data.size == 1 else ""
        self.names.setdefault(key, f"{name}{single}")
        if numbers.data.size <= LARGEST_HELPER:
            self._helpers.setdefault(key, numbers)


def _inputs(node: Any) -> Iterator[int]:
    """The values that a node of XNNPACK reads."""
    for one in dataclasses.fields(node):
        if one.name.endswith("_id") and not one.name.startswith("output"):
            yield getattr(node, one.name)
