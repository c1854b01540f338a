"""XNNPACK's graphs, as the delegates of a program hold them."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

from ..quantize.quiet import quiet_import
from .executorch_flatbuffer import DamagedError, Schema, Table, installed_schema, read_table
from .executorch_layout import cut, damage_named, item

if TYPE_CHECKING:
    from .executorch_file import Delegate

XNNPACK = "XnnpackBackend"
"""The backend's name in a program."""


@functools.cache
def _schema() -> Schema:
    return installed_schema("backends/xnnpack/serialization/schema.fbs")


def xnn_table(delegate: "Delegate") -> Table:
    """The graph of an XNNPACK delegate as its schema has it; imports nothing of ExecuTorch.

    Raises ExportError where the payload is no such graph.
    """
    with damage_named(delegate.file.source):
        payload, start, size, _, _ = _parts(delegate)
        return read_table(cut(payload, start, size, "XNNPACK's graph"), _schema(), "XNNGraph")


def xnn_graph(delegate: "Delegate") -> Any:
    """The graph of an XNNPACK delegate, as `XNNGraph` of `xnnpack_graph_schema`.

    Raises ExportError where the payload is none, or names what that schema does not have.
    """
    with damage_named(delegate.file.source):
        graph = _as_dataclass(xnn_table(delegate))
        values = [entry.xvalue_union for entry in graph.xvalues]
        nodes = [entry.xnode_union for entry in graph.xnodes]
        tensors = [getattr(value, "tensor_value", value) for value in values]
        if any(one is None for one in (*nodes, *tensors)):
            raise DamagedError("XNNPACK's graph has a node or value of no kind")
        return graph


def xnn_kind(tensor: Table) -> str:
    """The data type of a value of `xnn_table`'s graph, such as `fp32`; "" for an unknown one."""
    names = _schema().names("XNNDatatype")
    return names.get(tensor.datatype, "").removeprefix("xnn_datatype_")


def xnn_constant(delegate: "Delegate", graph: Any, index: int) -> memoryview:
    """The bytes of a constant, by the index that values and scales of the graph give.

    They are in the payload itself or among the file's named data. `graph` is what `xnn_graph` or
    `xnn_table` gives. Raises ExportError.
    """
    with damage_named(delegate.file.source):
        if index == 0:
            raise DamagedError("XNNPACK's constant 0 is asked for, which is none")
        place = item(graph.constant_data, index, "XNNPACK's constant")
        if place.named_key:
            data = delegate.file.named_data(place.named_key)
            return cut(data, 0, place.size or len(data), f"XNNPACK's constant {index}")
        payload, _, _, start, size = _parts(delegate)
        constants = cut(payload, start, size, "XNNPACK's constants")
        return cut(constants, place.offset, place.size, f"XNNPACK's constant {index}")


def _parts(delegate: "Delegate") -> tuple[memoryview, int, int, int, int]:
    """Payload, place and size of its graph, place and size of its constants.

    Behind four zeros: `XH00`, the header's length (uint16), then place and size of the graph
    (uint32 each), of the constants (uint32, uint64).
    """
    payload = delegate.processed
    header = cut(payload, 0, 30, "XNNPACK's header")
    if delegate.backend != XNNPACK or bytes(header[4:8]) != b"XH00":
        raise DamagedError(f"a delegate of {delegate.backend} is no graph of XNNPACK")
    graph, size, constants = (int.from_bytes(header[at : at + 4], "little") for at in (10, 14, 18))
    return payload, graph, size, constants, int.from_bytes(header[22:30], "little")


def _as_dataclass(table: Table) -> Any:
    """A table as the class of its name; what the class does not know stays out."""
    with quiet_import():
        from executorch.backends.xnnpack.serialization import (  # noqa: PLC0415 - imports torch
            xnnpack_graph_schema,
        )
    kinds = {"datatype": xnnpack_graph_schema.XNNDatatype}

    def converted(name: str, value: Any) -> Any:
        if isinstance(value, Table):
            kind = getattr(xnnpack_graph_schema, value.kind)
            names = [one.name for one in dataclasses.fields(kind)]
            return kind(
                **{one: converted(one, value.fields[one]) for one in names if one in value.fields}
            )
        if isinstance(value, list):
            return [converted(name, one) for one in value]
        return kinds[name](value) if name in kinds else value

    try:
        return converted("", table)
    except (TypeError, ValueError) as error:  # a required field, or an unknown type
        raise DamagedError(f"XNNPACK's graph has {error}") from error


_BITS = {
    **dict.fromkeys(("fp32", "pfp32", "qint32", "qcint32", "int32"), 32),
    **dict.fromkeys(("fp16", "bf16"), 16),
    **dict.fromkeys(("qint8", "quint8", "qcint8"), 8),
    **dict.fromkeys(("qcint4", "qbint4"), 4),
}
"""Data type, as the schema names it behind `xnn_datatype_` -> bits of a constant's number."""
_SCALE_BYTES = {"PerChannelQuant": 4, "PerChannelGroupQuant": 2}


def check_constants(delegate: "Delegate") -> None:
    """Raise ExportError where a constant, or its scales, are missing or fewer than its tensor's.

    The runtime does not look: it would read what lies behind them.
    """
    graph = xnn_table(delegate)
    with damage_named(delegate.file.source):
        for entry in graph.xvalues:
            value = entry.xvalue_union
            if value is None:
                raise DamagedError("XNNPACK's graph has a value of no kind")
            tensor = value if value.kind == "XNNTensorValue" else value.tensor_value
            if tensor is None or not tensor.constant_buffer_idx:
                continue
            bits = _BITS.get(xnn_kind(tensor))
            if bits is None:
                raise DamagedError(f"XNNPACK's constant has the data type {tensor.datatype}")
            rows, columns = math.prod(tensor.dims[:-1]), math.prod(tensor.dims[-1:])
            needed = [(tensor.constant_buffer_idx, rows * math.ceil(columns * bits / 8))]
            scales = value.fields.get("quant_params")
            if scales is not None and scales.fields.get("scale_buffer_idx"):
                needed.append(
                    (scales.scale_buffer_idx, scales.num_scales * _SCALE_BYTES[scales.kind])
                )
            for index, size in needed:
                found = len(xnn_constant(delegate, graph, index))
                if found < size:
                    raise DamagedError(
                        f"XNNPACK's constant {index} has {found} bytes, its tensor {size}"
                    )
