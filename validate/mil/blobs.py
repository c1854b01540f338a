"""Read a package's weight file: entries of 64 bytes that say where their data lies.

The layout is MILBlob's, version 2: a header of 64 bytes, then data aligned to 64 bytes, each
announced by an entry (sentinel, type, size and offset in bytes, bits of padding in the last byte).
Everything an entry says is checked against the file before it is believed.
"""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import damaged
from .numbers import Dtype, unpack

_SENTINEL = 0xDEADBEEF
_ENTRY = struct.Struct("<IIQQQ")
_VERSION = struct.Struct("<II")

# MILBlob's own numbering of the types.
_TYPES = {
    1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1",
    10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip


class BlobFile:
    """An open weight file. `path` is named in errors."""

    def __init__(self, path: Path) -> None:
        try:
            self._size = path.stat().st_size
            with path.open("rb") as file:
                header = file.read(64)
        except OSError as error:
            raise damaged(path, f"cannot be read ({error.strerror or error})") from error
        if len(header) < 64 or _VERSION.unpack_from(header)[1] != 2:
            raise damaged(path, "is no weight file of version 2")
        self._path = path

    def read(self, offset: int, dtype: Dtype, count: int) -> NDArray[np.generic]:
        """`count` numbers of `dtype` announced by the entry at `offset`.

        Raises ExportError where the entry is none, announces something else or points outside.
        """
        start, size = self._entry(offset, dtype, count)
        with self._path.open("rb") as file:
            file.seek(start)
            data = np.fromfile(file, np.uint8, size)
        if data.size != size:
            raise damaged(self._path, f"ends within the data at {start}")
        if dtype.bits < 8:
            return unpack(data, dtype.bits, count, signed=dtype.name == "int4")
        return data.view(dtype.numpy)

    def _entry(self, offset: int, dtype: Dtype, count: int) -> tuple[int, int]:
        """Where the data lies: offset and size in bytes."""
        if offset + 64 > self._size:
            raise damaged(self._path, f"has {self._size} bytes, but an entry is said at {offset}")
        with self._path.open("rb") as file:
            file.seek(offset)
            sentinel, code, size, start, _padding = _ENTRY.unpack(file.read(_ENTRY.size))
        if sentinel != _SENTINEL:
            raise damaged(self._path, f"has no entry at {offset}")
        if _TYPES.get(code) != dtype.name:
            raise damaged(
                self._path,
                f"holds {_TYPES.get(code, f'type {code}')} at {offset}, not {dtype.name}",
            )
        wanted = -(-count * dtype.bits // 8)
        if size != wanted:
            raise damaged(self._path, f"holds {size} bytes at {offset}, not {wanted}")
        if start + size > self._size:
            raise damaged(
                self._path,
                f"has {self._size} bytes, but data up to {start + size}: it is truncated",
            )
        return start, size
