"""Read flatbuffers by their schema's own text, every offset and length checked.

ExecuTorch writes three (programs, XNNPACK's graphs, weight files) and installs their schemas. The
readers that come with it trust the bytes: a wrong offset or length in a damaged file makes them
read elsewhere or ask for gigabytes. This one reads no byte twice, so that what it makes is never
larger than a fixed multiple of the file.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..exporter.errors import ExportError

_SCALARS: Mapping[str, str] = {
    **dict.fromkeys(("bool",), "?"),
    **dict.fromkeys(("byte", "int8"), "b"),
    **dict.fromkeys(("ubyte", "uint8"), "B"),
    **dict.fromkeys(("short", "int16"), "h"),
    **dict.fromkeys(("ushort", "uint16"), "H"),
    **dict.fromkeys(("int", "int32"), "i"),
    **dict.fromkeys(("uint", "uint32"), "I"),
    **dict.fromkeys(("long", "int64"), "q"),
    **dict.fromkeys(("ulong", "uint64"), "Q"),
    **dict.fromkeys(("float", "float32"), "f"),
    **dict.fromkeys(("double", "float64"), "d"),
}
"""Scalar type of a schema -> `struct`'s letter."""

_OFFSET = 4
MAX_TABLES = 1_000_000
"""A decoder of 24 layers has ten thousand; each takes some hundred bytes of Python's memory."""

_DECLARATION = re.compile(r"\b(table|union|enum)\s+(\w+)\s*(?::\s*(\w+)\s*)?\{([^}]*)\}")
_FIELD = re.compile(r"(\w+)\s*:\s*(\[?)([\w.]+)\]?\s*(?:=\s*([\w.+-]+)\s*)?(\([^)]*\))?\s*;")


class DamagedError(ValueError):
    """The bytes are no such flatbuffer: what is wrong, for people."""


@dataclass(frozen=True, kw_only=True)
class _Field:
    name: str
    type: str
    vector: bool
    default: str
    deprecated: bool


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Tables with their fields, unions with their members' tables, enums with their values."""

    tables: Mapping[str, tuple[_Field, ...]]
    unions: Mapping[str, tuple[tuple[str, str], ...]]
    """Union -> (member, its table), by number less one: 0 is none."""
    enums: Mapping[str, Mapping[str, int]]
    letters: Mapping[str, str]
    """Scalar type, enums among them -> `struct`'s letter."""

    def names(self, enum: str) -> dict[int, str]:
        """Value -> name of an enum."""
        return {value: name for name, value in self.enums[enum].items()}


def parse_schema(text: str) -> Schema:
    """A schema's text, and that of what it includes, one after the other."""
    text = re.sub(r"//[^\n]*", "", text)
    tables: dict[str, tuple[_Field, ...]] = {}
    unions: dict[str, tuple[tuple[str, str], ...]] = {}
    enums: dict[str, dict[str, int]] = {}
    letters = dict(_SCALARS)
    for kind, name, base, body in _DECLARATION.findall(text):
        entries = [entry.strip() for entry in body.split(",") if entry.strip()]
        if kind == "table":
            tables[name] = tuple(_field(*match) for match in _FIELD.findall(body))
        elif kind == "union":
            pairs = [re.split(r"\s*:\s*", entry) for entry in entries]
            unions[name] = tuple((pair[0], pair[-1]) for pair in pairs)
        else:
            enums[name] = _enum_values(entries)
            letters[name] = _SCALARS[base]
    return Schema(tables=tables, unions=unions, enums=enums, letters=letters)


def installed_schema(*paths: str) -> Schema:
    """Schemas of the installed ExecuTorch, by their paths in it; imports nothing of it."""
    spec = find_spec("executorch")
    if spec is None:
        raise ExportError(
            "executorch not found.", "Install it: pip install 'fastvlm-export[executorch]'"
        )
    folder = Path((spec.submodule_search_locations or [""])[0])
    return parse_schema("".join((folder / path).read_text("utf-8") for path in paths))


def _field(name: str, vector: str, kind: str, default: str, attributes: str) -> _Field:
    return _Field(
        name=name,
        type=kind.rpartition(".")[2],
        vector=bool(vector),
        default=default,
        deprecated="deprecated" in attributes,
    )


def _enum_values(entries: list[str]) -> dict[str, int]:
    values: dict[str, int] = {}
    following = 0
    for entry in entries:
        name, _, number = entry.partition("=")
        following = int(number) if number else following
        values[name.strip()] = following
        following += 1
    return values


class Table:
    """One table's fields, by their names in the schema, as attributes.

    Vectors of bytes are memoryviews of the data, other vectors lists; what is absent is the
    schema's default, an empty vector or string, or None. `kind` is the table's name, of a union's
    member the member's; `places` is the byte offset of every number that is there, of a
    vector's first one, and of the number of a union's kind.
    """

    def __init__(self, kind: str, fields: dict[str, Any], places: dict[str, int]) -> None:
        self.kind = kind
        self.fields = fields
        self.places = places

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(f"{self.kind} has no {name}") from None


def read_table(data: memoryview, schema: Schema, root: str) -> Table:
    """The root table of a whole flatbuffer. Raises DamagedError where it is not one."""
    return _Reader(data, schema).table(0, root)


class _Reader:
    """Reads each byte at most once: a sound flatbuffer has no table, string or vector twice."""

    def __init__(self, data: memoryview, schema: Schema) -> None:
        self.data = data
        self.schema = schema
        self.unread = len(data)
        self.tables = 0

    def scalar(self, letter: str, at: int) -> Any:
        """One number, little-endian, at a byte offset."""
        if at < 0:
            raise DamagedError(f"byte {at} is asked for")
        try:
            return struct.unpack_from(f"<{letter}", self.data, at)[0]
        except struct.error:
            raise DamagedError(f"byte {at} of {len(self.data)} is asked for") from None

    def spend(self, count: int, at: int) -> None:
        """Count bytes as read."""
        self.unread -= count
        if at < 0 or at + count > len(self.data):
            raise DamagedError(f"bytes {at} to {at + count} of {len(self.data)} are asked for")
        if self.unread < 0:
            raise DamagedError("its parts lie over each other")

    def table(self, reference: int, kind: str, member: str = "") -> Table:
        """The table that the offset at `reference` points to."""
        start = reference + self.scalar("I", reference)
        self.tables += 1
        if self.tables > MAX_TABLES:
            raise DamagedError(f"it has more than {MAX_TABLES} tables")
        slots = start - self.scalar("i", start)
        size = self.scalar("H", slots)
        self.spend(_OFFSET, start)
        fields: dict[str, Any] = {}
        numbers: dict[str, int] = {}
        slot = slots + 4  # behind the sizes of the slots and of the table
        for field in self.schema.tables[kind]:
            union = not field.vector and field.type in self.schema.unions
            places = [
                self.scalar("H", at) if at + 2 <= slots + size else 0
                for at in (slot, slot + 2)[: 1 + union]
            ]
            slot += 2 * len(places)
            if field.deprecated:
                continue
            ends = [start + place if place else None for place in places]
            fields[field.name] = self.union(field, *ends) if union else self.value(field, ends[0])
            if ends[0] is not None and (union or field.type in self.schema.letters):
                numbers[field.name] = ends[0] if not field.vector else self.first(ends[0])
        return Table(member or kind, fields, numbers)

    def first(self, at: int) -> int:
        """Where the first item of the vector lies that the offset at `at` points to."""
        return at + int(self.scalar("I", at)) + _OFFSET

    def union(self, field: _Field, tag: int | None, at: int | None) -> Table | None:
        """The union's member by its number; None where there is none."""
        number = self.scalar("B", tag) if tag is not None else 0
        if not number:
            return None
        members = self.schema.unions[field.type]
        if number > len(members) or at is None:
            raise DamagedError(f"{field.name} is of the unknown kind {number}")
        member, kind = members[number - 1]
        return self.table(at, kind, member)

    def value(self, field: _Field, at: int | None) -> Any:
        """A field that is no union; `at` is None where it is absent."""
        if field.vector:
            return self.vector(field, at)
        if field.type == "string":
            return self.string(at) if at is not None else ""
        if field.type in self.schema.tables:
            return self.table(at, field.type) if at is not None else None
        if at is None:
            return self.default(field)
        return self.scalar(self.schema.letters[field.type], at)

    def default(self, field: _Field) -> Any:
        letter = self.schema.letters[field.type]
        named = self.schema.enums.get(field.type, {})
        if field.default in named:
            return named[field.default]
        if letter == "?":
            return field.default == "true"
        return float(field.default or 0) if letter in "fd" else int(field.default or 0)

    def vector(self, field: _Field, at: int | None) -> Any:
        """Numbers, bytes, strings or tables."""
        letter = self.schema.letters.get(field.type)
        if at is None:
            return memoryview(b"") if letter == "B" else []
        start = at + self.scalar("I", at)
        count = self.scalar("I", start)
        start += _OFFSET
        width = struct.calcsize(letter) if letter else _OFFSET
        self.spend(count * width, start)
        if letter == "B":
            return self.data[start : start + count]
        if letter:
            return list(struct.unpack_from(f"<{count}{letter}", self.data, start))
        places = range(start, start + count * width, width)
        if field.type == "string":
            return [self.string(place) for place in places]
        return [self.table(place, field.type) for place in places]

    def string(self, at: int) -> str:
        start = at + self.scalar("I", at)
        length = self.scalar("I", start)
        self.spend(length, start + _OFFSET)
        try:
            return str(self.data[start + _OFFSET : start + _OFFSET + length], "utf-8")
        except UnicodeDecodeError:
            raise DamagedError(f"the text at byte {start} is not UTF-8") from None
