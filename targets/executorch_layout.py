"""Where the parts of ExecuTorch's files lie: headers, segments, named data.

Files are mapped, not loaded: weights are views of the map. Every offset and length that a file
gives is checked.
"""

import functools
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..exporter.errors import ExportError
from .executorch_flatbuffer import DamagedError, Schema, installed_schema, read_table
from .executorch_model import EXPORT_HINT

_HEADER = 8  # a flatbuffer's root offset and identifier: what is inserted comes behind them


def mapped(path: Path) -> memoryview:
    """A file's bytes, mapped. Raises ExportError where there are none."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:
        raise ExportError(f"{path} is empty.", EXPORT_HINT) from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}.", EXPORT_HINT) from error


@contextmanager
def damage_named(source: str) -> Iterator[None]:
    """Turn what is wrong with the bytes into the one error that names the file."""
    try:
        yield
    except DamagedError as error:
        raise ExportError(f"{source} is damaged: {error}.", EXPORT_HINT) from error


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of a .pte lie: the program, then its segments."""

    program_size: int
    base: int
    """Where segments' offsets count from."""
    segment_size: int


def layout(data: memoryview, source: str) -> Layout:
    """Read a program's header. Raises ExportError for a foreign file, DamagedError for a cut one.

    The header is inserted behind the identifier: `eh00`, its own length (uint32), then as uint64
    the program's size, the first segment's place, the segments' size.
    """
    if bytes(data[4:6]) != b"ET":
        raise ExportError(f"{source} is not an ExecuTorch program (.pte).", EXPORT_HINT)
    if bytes(data[_HEADER : _HEADER + 4]) != b"eh00":
        return Layout(program_size=len(data), base=0, segment_size=0)
    header = data[_HEADER : _HEADER + 32]
    if len(header) < 32:
        raise DamagedError(f"it ends after {len(data)} bytes, inside its header")
    length = int.from_bytes(header[4:8], "little")
    program, base, size = (int.from_bytes(header[at : at + 8], "little") for at in (8, 16, 24))
    size = size if length >= 32 else max(0, len(data) - base)
    if max(program, base + size) > len(data):
        needed = max(program, base + size)
        raise DamagedError(f"it is truncated: {len(data)} bytes of {needed}")
    return Layout(program_size=program, base=base, segment_size=size)


def item(found: Sequence[Any], index: int, what: str) -> Any:
    """An element by an index that the file gives."""
    if not 0 <= index < len(found):
        raise DamagedError(f"{what} {index} of {len(found)} is asked for")
    return found[index]


def cut(data: memoryview, offset: int, size: int, what: str) -> memoryview:
    """A range of bytes that the file gives."""
    if offset < 0 or size < 0 or offset + size > len(data):
        raise DamagedError(f"{what} lies at bytes {offset} to {offset + size} of {len(data)}")
    return data[offset : offset + size]


@functools.cache
def _weights_schema() -> Schema:
    folder = "extension/flat_tensor/serialize"
    return installed_schema(f"{folder}/scalar_type.fbs", f"{folder}/flat_tensor.fbs")


def named_weights(data: memoryview, source: str) -> dict[str, memoryview]:
    """Key -> bytes of a weight file (.ptd). Raises ExportError.

    Behind the identifier: `FH01`, its own length (uint32), then as uint64 the flatbuffer's place
    and size, the first segment's place, the segments' size.
    """
    if bytes(data[4:6]) != b"FT" or bytes(data[_HEADER : _HEADER + 4]) != b"FH01":
        raise ExportError(f"{source} is not an ExecuTorch weight file (.ptd).", EXPORT_HINT)
    with damage_named(source):
        header = cut(data, _HEADER, 40, "its header")
        # The identifier's own offset leads to the root: the flatbuffer begins with the file.
        place, size, base, _ = (
            int.from_bytes(header[at : at + 8], "little") for at in (8, 16, 24, 32)
        )
        flatbuffer = cut(data, 0, place + size, "its table")
        table = read_table(flatbuffer, _weights_schema(), "FlatTensor")
        segments = [
            cut(data, base + one.offset, one.size, f"segment {number}")
            for number, one in enumerate(table.segments)
        ]
        return {one.key: item(segments, one.segment_index, "segment") for one in table.named_data}
