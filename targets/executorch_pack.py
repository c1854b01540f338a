"""Store equal bytes of an ExecuTorch program once; hand its large weights to a file beside it.

A tied embedding table is in a program twice: as a constant that `token_embedding` gathers from,
and as the data that XNNPACK's head looks up by name. Segments are mere ranges of bytes behind the
program, so that one may lie inside another: the head's is pointed to where the table is, and what
nothing points to any more is left out.
"""

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .executorch_file import program_schema
from .executorch_flatbuffer import Table, read_table
from .executorch_layout import cut, damage_named, layout
from .executorch_model import PROGRAM

if TYPE_CHECKING:
    from torch.fx import Node

ALIGNMENT = 128
"""Where segments begin: what ExecuTorch's own serializer does, a multiple of what loaders need."""
SMALLEST_SHARED = 4096
"""Bytes from which on a range is worth looking for."""
SMALLEST_EXTERNAL = 64 * 1024
"""Bytes from which on a weight goes to the file beside the program."""
WEIGHTS_TAG = "model"
"""What ExecuTorch calls that file: its name without `.ptd`."""

_BEGIN = 64  # bytes by which ranges that may be equal are found
_SEGMENT_SIZE_AT = 32  # in the file: identifier (8), `eh00`, length, program size, base, this


def share(pte: bytes) -> bytes:
    """The same program, every range of bytes that is in it twice stored once.

    Offsets in the program are rewritten in place: nothing else of it changes. Raises ExportError
    where `pte` is no program.
    """
    data = memoryview(pte)
    with damage_named(PROGRAM):
        places = layout(data, PROGRAM)
        table = read_table(data[: places.program_size], program_schema(), "Program")
        homes = _homes(data[places.base :], table)
    if all(home is None for home in homes):
        return pte
    program = bytearray(data[: places.base])
    kept: list[memoryview] = []
    moved: list[int] = []
    end = 0
    for segment, home in zip(table.segments, homes, strict=True):
        if home is None:
            padding = -end % ALIGNMENT
            kept += [memoryview(bytes(padding)), _range(data, places.base, segment)]
            moved.append(end + padding)
            end = moved[-1] + segment.size
        else:
            inside, offset = home
            moved.append(moved[inside] + offset)
    for segment, offset in zip(table.segments, moved, strict=True):
        # A field that is its default is not in the file: the first segment's offset, 0, stays.
        if offset != segment.offset:
            struct.pack_into("<Q", program, segment.places["offset"], offset)
    struct.pack_into("<Q", program, _SEGMENT_SIZE_AT, end)
    return b"".join([program, *kept])


def _range(data: memoryview, base: int, segment: Table) -> memoryview:
    return cut(data, base + segment.offset, segment.size, "a segment")


def _homes(data: memoryview, table: Table) -> list[tuple[int, int] | None]:
    """Per segment: the earlier segment that holds its bytes, and where in it; None: none does."""
    places: dict[bytes, list[tuple[int, int]]] = {}
    homes: list[tuple[int, int] | None] = []
    for number, segment in enumerate(table.segments):
        content = _range(data, 0, segment)
        begin = bytes(content[:_BEGIN])
        found = None
        # A field that is its default is not in the file, so that it cannot be changed.
        if segment.size >= SMALLEST_SHARED and "offset" in segment.places:
            for inside, offset in places.get(begin, ()):
                other = _range(data, 0, table.segments[inside])[offset : offset + segment.size]
                if np.array_equal(np.frombuffer(other, np.uint8), np.frombuffer(content, np.uint8)):
                    found = inside, offset
                    break
        homes.append(found)
        if found is None:
            for offset in _starts(table, number):
                key = bytes(content[offset : offset + _BEGIN])
                places.setdefault(key, []).append((number, offset))
    return homes


def _starts(table: Table, number: int) -> Iterable[int]:
    """Where in a segment data of their own begin: its constants, else the whole."""
    constants = table.constant_segment
    if constants is None or constants.segment_index != number:
        return (0,)
    return dict.fromkeys(constants.offsets)


def externalize(edge: Any) -> None:
    """Mark what XNNPACK looks up by name, where it is large, as the weight file's.

    `edge` is an `EdgeProgramManager` before `to_executorch`, and is changed.
    """
    store = edge._named_data_store
    large = {
        key: entry
        for key, entry in store.pte_data.items()
        if len(store.buffers[entry.buffer_index]) >= SMALLEST_EXTERNAL
    }
    store.external_data.setdefault(WEIGHTS_TAG, {}).update(large)
    store.pte_data = {key: one for key, one in store.pte_data.items() if key not in large}


def external_constant(node: "Node") -> str | None:
    """`ExecutorchBackendConfig.external_constants`: large constants go to the weight file, too."""
    spec = node.meta["spec"]
    return WEIGHTS_TAG if spec.nbytes() >= SMALLEST_EXTERNAL else None
