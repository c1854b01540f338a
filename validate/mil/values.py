"""Types and constants of a MIL program, from their protobuf messages."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .errors import damaged
from .numbers import DTYPES, STRING, Dtype, held, unpack
from .package import Package


@dataclass(frozen=True, kw_only=True)
class Type:
    """Of a tensor, or of the tensor in a state. A size that only a run tells is -1."""

    dtype: Dtype
    shape: tuple[int, ...]
    state: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape is of this type."""
        return len(shape) == len(self.shape) and all(
            declared in (-1, size) for declared, size in zip(self.shape, shape, strict=True)
        )


class Constant:
    """A constant tensor, read when it is asked for: as an array as stored, or as held.

    `key` tells equal bytes of one package apart from others, so that they are held once.
    """

    def __init__(
        self, package: Package, type_: Type, key: Any, read: Callable[[], NDArray[Any]]
    ) -> None:
        self.type = type_
        self.key = key
        self._package = package
        self._read = read

    def array(self) -> NDArray[Any]:
        """As stored; packed integers one to a byte."""
        return self._read()

    def tensor(self) -> Tensor:
        """As programs hold it; do not change it."""
        return self._package.shared(self.key, lambda: held(self._read(), self.type.dtype))


class Materialized(Constant):
    """What a `constexpr` operation makes of its constants; the tensor is held once."""

    def __init__(self, package: Package, type_: Type, key: Any, make: Callable[[], Tensor]) -> None:
        super().__init__(package, type_, key, lambda: self.tensor().numpy())
        self._make = make

    def tensor(self) -> Tensor:
        """As programs hold it; do not change it."""
        return self._package.shared(self.key, self._make)


def parse_type(package: Package, message: Any) -> Type:
    """Raises ExportError for what is no tensor (lists, dictionaries) or of unknown numbers."""
    kind = message.WhichOneof("type")
    if kind == "stateType":
        inner = parse_type(package, message.stateType.wrappedType)
        return Type(dtype=inner.dtype, shape=inner.shape, state=True)
    if kind != "tensorType":
        raise damaged(package.model_path, f"holds a value of {kind or 'no type'}, not a tensor")
    tensor = message.tensorType
    if tensor.dataType not in DTYPES:
        raise damaged(package.model_path, f"holds numbers of the unknown type {tensor.dataType}")
    shape = tuple(
        dim.constant.size if dim.WhichOneof("dimension") == "constant" else -1
        for dim in tensor.dimensions
    )
    if any(size > 1 << 40 for size in shape):
        raise damaged(package.model_path, f"holds a tensor of the impossible shape {shape}")
    return Type(dtype=DTYPES[tensor.dataType], shape=shape)


def is_text(message: Any) -> bool:
    """Whether a Value message is a string."""
    type_ = message.type
    return bool(type_.WhichOneof("type") == "tensorType" and type_.tensorType.dataType == STRING)


def text(package: Package, message: Any) -> str:
    """The string of a Value message."""
    values = message.immediateValue.tensor.strings.values
    if len(values) != 1:
        raise damaged(package.model_path, f"holds {len(values)} strings where one belongs")
    return str(values[0])


def parse_value(package: Package, message: Any) -> Constant:
    """A Value message: its numbers are in it or in a weight file."""
    type_ = parse_type(package, message.type)
    if any(size < 0 for size in type_.shape):
        raise damaged(package.model_path, "holds a constant of no fixed shape")
    count = math.prod(type_.shape)
    if message.WhichOneof("value") == "blobFileValue":
        file, offset = message.blobFileValue.fileName, message.blobFileValue.offset
        key: Any = (file, offset, type_.dtype.name, type_.shape)
        return Constant(
            package,
            type_,
            key,
            lambda: package.read(file, offset, type_.dtype, count).reshape(type_.shape),
        )
    array = _immediate(package, message.immediateValue, type_.dtype, count).reshape(type_.shape)
    key = (type_.dtype.name, type_.shape, array.tobytes())
    return Constant(package, type_, key, lambda: array)


def _immediate(package: Package, message: Any, dtype: Dtype, count: int) -> NDArray[Any]:
    if message.WhichOneof("value") != "tensor":
        raise damaged(package.model_path, "holds a constant that is no tensor")
    field = message.tensor.WhichOneof("value")
    if field == "bytes":
        packed = np.frombuffer(message.tensor.bytes.values, np.uint8)
        if packed.size != -(-count * dtype.bits // 8):
            raise damaged(package.model_path, f"holds {packed.size} bytes for {count} {dtype.name}")
        if dtype.bits < 8:
            return unpack(packed, dtype.bits, count, signed=dtype.name == "int4")
        return packed.view(dtype.numpy)
    if field not in ("floats", "ints", "bools", "longInts", "doubles"):
        if count == 0:
            return np.empty(0, dtype.numpy)
        raise damaged(package.model_path, f"holds {field or 'nothing'} where numbers belong")
    array = np.array(getattr(message.tensor, field).values)
    if array.size != count:
        raise damaged(package.model_path, f"holds {array.size} numbers where {count} belong")
    return array.astype(dtype.numpy)
