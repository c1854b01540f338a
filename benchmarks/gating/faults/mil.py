"""One function of a Core ML package whose operations and numbers can be changed one by one."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_export.quantize.quiet import quiet_import

from .base import NoPlaceError

with quiet_import():
    from coremltools.proto import MIL_pb2, Model_pb2

DATA = Path("Data/com.apple.CoreML")
_ENTRY = struct.Struct("<IIQQ")
"""Of a weight file: sentinel, kind, size in bytes, place of the numbers."""
_NUMPY = {
    MIL_pb2.DataType.FLOAT16: np.float16,
    MIL_pb2.DataType.FLOAT32: np.float32,
    MIL_pb2.DataType.INT8: np.int8,
    MIL_pb2.DataType.UINT8: np.uint8,
    MIL_pb2.DataType.INT32: np.int32,
    MIL_pb2.DataType.UINT16: np.uint16,
}
"""Types narrower than a byte are read as the bytes that hold them."""


class Function:
    """`block` holds the operations in the order that they run in."""

    def __init__(self, package: Path, name: str) -> None:
        self.path = package / DATA / "model.mlmodel"
        self.weights = package / DATA / "weights" / "weight.bin"
        self.model = Model_pb2.Model.FromString(self.path.read_bytes())
        function = self.model.mlProgram.functions[name]
        self.block = function.block_specializations[function.opset]
        self.makers = {out.name: op for op in self.block.operations for out in op.outputs}

    def save(self) -> None:
        """Write the model anew."""
        self.path.write_bytes(self.model.SerializeToString())

    def operations(self, kind: str) -> list[Any]:
        """Those of a kind. Raises NoPlaceError where there are none."""
        found = [op for op in self.block.operations if op.type == kind]
        if not found:
            raise NoPlaceError(f"there is no {kind}")
        return found

    def source(self, op: Any, name: str) -> str:
        """The value that an operation reads as `name`."""
        if name not in op.inputs or not op.inputs[name].arguments[0].name:
            raise NoPlaceError(f"{op.type} reads no {name}")
        return str(op.inputs[name].arguments[0].name)

    def read(self, op: Any, name: str, value: str) -> None:
        """Have it read another value."""
        op.inputs[name].arguments[0].name = value

    def value_of(self, op: Any, name: str) -> Any:
        """The constant that an operation reads as `name`, through what unpacks weights."""
        argument = op.inputs[name].arguments[0] if name in op.inputs else None
        if argument is None:
            raise NoPlaceError(f"{op.type} has no {name}")
        if argument.WhichOneof("binding") == "value":
            return argument.value
        maker = self.makers.get(argument.name)
        if maker is None or maker.type != "const":
            raise NoPlaceError(f"{name} of {op.type} is no constant")
        return maker.attributes["val"]

    def numbers(self, value: Any) -> NDArray[Any]:
        """A copy of a constant's numbers, in its shape where that is of whole bytes."""
        kind = value.type.tensorType.dataType
        dtype = _NUMPY.get(kind, np.uint8)
        shape = [one.constant.size for one in value.type.tensorType.dimensions]
        if value.HasField("blobFileValue"):
            data = self.weights.read_bytes()
            start, size = self._place(data, value.blobFileValue.offset)
            found = np.frombuffer(data[start : start + size], dtype).copy()
        else:
            found = self._immediate(value, dtype)
        return found.reshape(shape) if found.size == np.prod(shape, dtype=int) else found

    def store(self, value: Any, numbers: NDArray[Any]) -> None:
        """Put other numbers in a constant's place."""
        if value.HasField("blobFileValue"):
            data = bytearray(self.weights.read_bytes())
            start, size = self._place(bytes(data), value.blobFileValue.offset)
            made = np.ascontiguousarray(numbers).tobytes()
            if len(made) != size:
                raise ValueError("the numbers have another size")
            data[start : start + size] = made
            self.weights.write_bytes(bytes(data))
            return
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind == "bytes":
            tensor.bytes.values = np.ascontiguousarray(numbers).tobytes()
        else:
            values = getattr(tensor, kind).values
            del values[:]
            values.extend(numbers.reshape(-1).tolist())

    def _place(self, data: bytes, offset: int) -> tuple[int, int]:
        _, _, size, start = _ENTRY.unpack_from(data, offset)
        return start, size

    def _immediate(self, value: Any, dtype: Any) -> NDArray[Any]:
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind == "bytes":
            return np.frombuffer(tensor.bytes.values, dtype).copy()
        return np.array(getattr(tensor, kind).values, dtype)

    def scale(self, op: Any, *factors: float) -> None:
        """Multiply an operation's first output before anything reads it, by factor after factor."""
        place = list(self.block.operations).index(op)
        output = op.outputs[0]
        final, dtype = output.name, output.type.tensorType.dataType
        names = [f"{final}_times_{number}" for number in range(len(factors))]
        output.name = names[0]
        for number, (factor, given) in enumerate(zip(factors, names, strict=True)):
            added = MIL_pb2.Operation(type="mul")
            made = added.outputs.add()
            made.CopyFrom(output)
            made.name = names[number + 1] if number + 1 < len(names) else final
            added.inputs["x"].arguments.add().name = given
            value = added.inputs["y"].arguments.add().value
            value.type.tensorType.dataType = dtype
            if dtype == MIL_pb2.DataType.FLOAT16:
                value.immediateValue.tensor.bytes.values = np.float16(factor).tobytes()
            else:
                value.immediateValue.tensor.floats.values.append(factor)
            self.block.operations.insert(place + 1 + number, added)

    def bypass(self, op: Any, name: str) -> None:
        """What read the operation's output reads its input `name` instead."""
        source, output = self.source(op, name), op.outputs[0].name
        for reader in self.block.operations:
            for given in reader.inputs.values():
                for argument in given.arguments:
                    if argument.name == output:
                        argument.name = source


Change = Callable[[Function], None]


def edited(package: str, function: str, change: Change) -> Callable[[Path], None]:
    """Plant a change into a function of a package in a bundle's folder."""

    def plant(folder: Path) -> None:
        opened = Function(folder / package, function)
        change(opened)
        opened.save()

    return plant
