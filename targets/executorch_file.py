"""What an ExecuTorch program (.pte) and its weight file (.ptd) hold, without running them.

Files are mapped, not loaded: weights are views of the map. Nothing in a file is trusted, since the
runtime's own loader checks little and may end the process: every offset, length and index is
checked, and what is wrong is one ExportError.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .executorch_flatbuffer import DamagedError, Schema, Table, installed_schema, read_table
from .executorch_layout import cut, damage_named, item, layout, mapped, named_weights
from .executorch_types import Call, Delegate, Method, PteFile, Segment, Tensor

_ITEM_BYTES = {
    **dict.fromkeys(("uint8", "int8", "bool", "float8e5m2", "float8e4m3fn"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64"), 8),
}
_DTYPES = {
    "BYTE": "uint8",
    "CHAR": "int8",
    "SHORT": "int16",
    "INT": "int32",
    "LONG": "int64",
    "HALF": "float16",
    "FLOAT": "float32",
    "DOUBLE": "float64",
}
"""ScalarType's names where they are not the type's own in lower case."""
_LISTS = ("TensorList", "OptionalTensorList", "IntList")
"""Lists whose items are other values' numbers."""
_COMPUTES = ("KernelCall", "DelegateCall")


def read(path: Path, weights: Path | None = None) -> PteFile:
    """Map a program and, where its weights are outside of it, their file.

    Raises ExportError where one of them is missing, foreign, truncated or damaged.
    """
    named = named_weights(mapped(weights), str(weights)) if weights else {}
    return parse(mapped(path), str(path), named)


def parse(data: memoryview, source: str, named: Mapping[str, memoryview] | None = None) -> PteFile:
    """What a program's bytes hold; `named` is what its weight file does. Raises ExportError."""
    with damage_named(source):
        return _Program(data, source, named or {}).file


@functools.cache
def program_schema() -> Schema:
    """The schema of programs that is installed."""
    return installed_schema("schema/scalar_type.fbs", "schema/program.fbs")


class _Program:
    """Puts a parsed program together: indices become what they point to."""

    def __init__(self, data: memoryview, source: str, named: Mapping[str, memoryview]) -> None:
        places = layout(data, source)
        self.table = read_table(data[: places.program_size], program_schema(), "Program")
        self.dtypes = program_schema().names("ScalarType")
        self.segments = [
            cut(data, places.base + one.offset, one.size, f"segment {number}")
            for number, one in enumerate(self.table.segments)
        ]
        self.named = dict(named)
        for one in self.table.named_data:
            self.named[one.key] = item(self.segments, one.segment_index, "segment")
        methods: dict[str, Method] = {}
        constants: dict[str, tuple[Any, ...]] = {}
        self.file = PteFile(
            source=source,
            methods=methods,
            constant_methods=constants,
            named=self.named,
            segments=tuple(Segment(one.offset, one.size) for one in self.table.segments),
            program_bytes=places.program_size,
            total_bytes=len(data),
        )
        if not self.table.execution_plan:
            raise DamagedError("it has no methods")
        for plan in self.table.execution_plan:
            method = _Plan(plan, self).method
            if plan.name in methods or plan.name in constants:
                raise DamagedError(f"it has two methods named '{plan.name}'")
            if method.inputs or method.steps:
                methods[plan.name] = method
            else:
                constants[plan.name] = method.outputs

    def tensor(self, table: Table) -> Tensor:
        """A tensor with its numbers, where the file has any."""
        name = self.dtypes.get(table.scalar_type, "")
        if not name or any(size < 0 for size in table.sizes):
            raise DamagedError(f"a tensor has type {table.scalar_type}, sizes {table.sizes}")
        extra = table.extra_tensor_info
        tensor = Tensor(
            dtype=_DTYPES.get(name, name.lower()),
            sizes=tuple(table.sizes),
            dim_order=tuple(table.dim_order),
            dynamic=bool(table.shape_dynamism),
            name=extra.fully_qualified_name if extra else "",
            place=_place(table.allocation_info),
        )
        find = self.data_of(table, extra)
        if find is None:
            return tensor
        if tensor.dtype not in _ITEM_BYTES:
            raise DamagedError(f"a tensor of numbers has type {tensor.dtype}")
        size = math.prod(tensor.sizes) * _ITEM_BYTES[tensor.dtype]
        return Tensor(**{**tensor.__dict__, "data": find(size)})

    def data_of(self, table: Table, extra: Table | None) -> Callable[[int], memoryview] | None:
        """What gives the first numbers of a tensor, told their bytes; None where it has none."""
        if extra is not None and extra.location:  # EXTERNAL
            name = extra.fully_qualified_name
            if name not in self.named:
                raise DamagedError(f"its tensor '{name}' is in a weight file that was not given")
            return lambda size: cut(self.named[name], 0, size, f"the tensor '{name}'")
        index = table.data_buffer_idx
        if not index:
            return None
        if table.allocation_info is None and self.table.constant_buffer:
            inline = item(self.table.constant_buffer, index, "constant").storage
            return lambda size: cut(inline, 0, size, f"constant {index}")
        place = self.table.constant_segment
        if table.allocation_info is not None:
            which = extra.mutable_data_segments_idx if extra else 0
            place = item(self.table.mutable_data_segments, which, "segment of first values")
        if place is None:
            raise DamagedError(f"constant {index} has no segment")
        segment = item(self.segments, place.segment_index, "segment")
        offset = item(place.offsets, index, "constant")
        return lambda size: cut(segment, offset, size, f"constant {index}")


class _Plan:
    """One method of a program."""

    def __init__(self, plan: Table, program: _Program) -> None:
        self.plan, self.program = plan, program
        self.raw = [entry.val for entry in plan.values]
        self.values = [self.simple(value) for value in self.raw]
        # Lists name other values, and only tensors and numbers are in them.
        for number, value in enumerate(self.raw):
            if value is not None and value.kind in _LISTS:
                self.values[number] = self.listed(value.items)
        if len(plan.chains) != 1 and (plan.chains or plan.inputs):
            raise DamagedError(f"method '{plan.name}' has {len(plan.chains)} chains")
        instructions = [one.instr_args for chain in plan.chains for one in chain.instructions]
        made, written = self.find_written(instructions)
        self.method = Method(
            name=plan.name,
            inputs=self.at(plan.inputs),
            outputs=self.at(plan.outputs),
            steps=tuple(step for one in instructions for step in self.steps(one)),
            constants=tuple(
                self.values[number]
                for number, value in enumerate(self.raw)
                if _is_tensor(value) and value.allocation_info is None and self.has_data(number)
            ),
            buffers=self.at([index for index in written if index not in made]),
            planned_bytes=tuple(plan.non_const_buffer_sizes[1:]),
            values=tuple(self.values),
            lists={
                number: tuple(value.items)
                for number, value in enumerate(self.raw)
                if value is not None and value.kind in _LISTS
            },
            ends=(tuple(plan.inputs), tuple(plan.outputs)),
            control=tuple(one.kind for one in instructions if one and one.kind not in _COMPUTES),
        )

    def has_data(self, number: int) -> bool:
        value = self.values[number]
        return isinstance(value, Tensor) and value.data is not None

    def at(self, indices: Sequence[int]) -> tuple[Any, ...]:
        """Values by their indices."""
        return tuple(item(self.values, index, "value") for index in indices)

    def simple(self, value: Table | None) -> Any:
        """A value that names no others."""
        if value is None or value.kind == "Null":
            return None
        if value.kind == "Tensor":
            return self.program.tensor(value)
        if value.kind in ("DoubleList", "BoolList"):
            return tuple(value.items)
        return next(iter(value.fields.values()))

    def listed(self, indices: Sequence[int]) -> tuple[Any, ...]:
        """The values that a list names; -1 is None."""
        found = [None if one == -1 else item(self.raw, one, "value") for one in indices]
        if any(one is not None and one.kind.endswith("List") for one in found):
            raise DamagedError("a list holds another")
        return tuple(None if one == -1 else self.values[one] for one in indices)

    def steps(self, one: Table | None) -> Iterator[Call | Delegate]:
        """What an instruction runs; moves and jumps run nothing."""
        if one is None:
            raise DamagedError(f"method '{self.plan.name}' has an unknown instruction")
        if one.kind == "KernelCall":
            operator = item(self.plan.operators, one.op_index, "operator")
            name = f"{operator.name}.{operator.overload}".rstrip(".")
            yield Call(operator=name, args=self.at(one.args), indices=tuple(one.args))
        elif one.kind == "DelegateCall":
            table = item(self.plan.delegates, one.delegate_index, "delegate")
            yield Delegate(
                backend=table.id,
                tensors=self.at(one.args),
                compile_specs={spec.key: bytes(spec.value) for spec in table.compile_specs},
                processed=self.processed(table.processed),
                file=self.program.file,
                indices=tuple(one.args),
            )

    def processed(self, place: Table | None) -> memoryview:
        """A delegate's payload: a segment, or in the program itself."""
        if place is None:
            raise DamagedError(f"a delegate of '{self.plan.name}' has no payload")
        if place.location:  # SEGMENT
            found: memoryview = item(self.program.segments, place.index, "segment")
        else:
            found = item(self.program.table.backend_delegate_data, place.index, "payload").data
        return found

    def find_written(self, instructions: Sequence[Table | None]) -> tuple[set[int], list[int]]:
        """Values that some instruction makes, and those that an in-place operator changes.

        An operator's last argument is its output; in place (`copy_`, `index_put_`) that is its
        first one, too.
        """
        made: set[int] = set()
        written: dict[int, None] = {}
        for one in instructions:
            if one is None or one.kind != "KernelCall" or not one.args:
                continue
            first, last = one.args[0], one.args[-1]
            name = item(self.plan.operators, one.op_index, "operator").name
            if name.endswith("_") and _is_tensor(item(self.raw, first, "value")):
                written[first] = None
            else:
                made.add(last)
        return made | set(self.plan.inputs), list(written)


def _is_tensor(value: Table | None) -> bool:
    return value is not None and value.kind == "Tensor"


def _place(info: Table | None) -> tuple[int, int] | None:
    """Where a tensor is planned; the file counts its memories from 1."""
    if info is None:
        return None
    return info.memory_id - 1, info.memory_offset_high << 32 | info.memory_offset_low


__all__ = [
    "Call",
    "Delegate",
    "Method",
    "PteFile",
    "Segment",
    "Tensor",
    "parse",
    "program_schema",
    "read",
]
