"""The values of one loaded method, kept where ExecuTorch's runtime keeps them.

The compiler plans an address for each tensor, and several tensors may share one: a slice of the
cache lies where the cache lies, and a tensor that is no longer read gives its memory to another.
So values are bytes in planned memory here, too, and a program that plans two of them over each
other computes what it computes on a device.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ...targets.executorch_types import Method, Tensor
from .errors import RefusedError

DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Types whose numbers are computed as they are; 16-bit floats would be rounded."""


class Memory:
    """Values of a method by their numbers in the file. They stay from one run to the next.

    Raises RefusedError for tensors of types that would be rounded, or that lie outside of the
    memory that is planned.
    """

    def __init__(self, method: Method) -> None:
        self._values, self._lists = method.values, method.lists
        self._arenas = [torch.zeros(size, dtype=torch.uint8) for size in method.planned_bytes]
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._bytes: dict[int, torch.Tensor] = {}
        self._unrounded: dict[int, torch.Tensor] = {}
        self._numbers: dict[int, Any] = {}
        for index, value in enumerate(self._values):
            if isinstance(value, Tensor):
                self._place(index, value)

    def tensor(self, index: int) -> Tensor:
        """What the file says of a tensor."""
        value = self._values[index]
        if not isinstance(value, Tensor):
            raise RefusedError(f"value {index} is no tensor")
        return value

    def read(self, index: int) -> Any:
        """A tensor as a view of its memory, a list as a tuple of its values, or a number."""
        value = self._values[index]
        if index in self._lists:
            return tuple(None if one == -1 else self.read(one) for one in self._lists[index])
        if not isinstance(value, Tensor):
            return self._numbers.get(index, value)
        return self._unrounded[index] if index in self._unrounded else self._view(index, value)

    def write(self, index: int, result: Any) -> None:
        """Set a value; a tensor takes the size of what is written.

        Fractions written to a tensor of integers are kept beside it: they are integers that
        nothing has rounded.
        """
        if not isinstance(self._values[index], Tensor):
            self._numbers[index] = result
            return
        tensor = self.tensor(index)
        self.check_writable(index)
        self.resize(index, result.shape)
        if result.is_floating_point() and not DTYPES[tensor.dtype].is_floating_point:
            self._unrounded[index] = result.clone()
            return
        if result.dtype != DTYPES[tensor.dtype]:
            raise RefusedError(f"it writes {result.dtype} to {tensor.shape}")
        self._view(index, tensor).copy_(result)

    def check_writable(self, index: int) -> None:
        """Raise RefusedError for a constant: its bytes are the file's, which is mapped."""
        tensor = self.tensor(index)
        if tensor.data is not None and tensor.place is None:
            raise RefusedError(f"it writes the constant {tensor.shape}")

    def resize(self, index: int, sizes: Sequence[int]) -> None:
        """Change a tensor's size within its bounds; its bytes stay as they are."""
        tensor, sizes = self.tensor(index), tuple(sizes)
        if len(sizes) != len(tensor.sizes) or not (
            math.prod(sizes) <= math.prod(tensor.sizes) if tensor.dynamic else sizes == tensor.sizes
        ):
            raise RefusedError(f"it makes {list(sizes)} where the file has {tensor.shape}")
        self._sizes[index] = sizes
        self._unrounded.pop(index, None)

    def share(self, index: int, source: int, sizes: Sequence[int]) -> None:
        """Let a tensor lie where another one does, with a size of its own."""
        self._bytes[index] = self._bytes[source]
        self.resize(index, sizes)
        if source in self._unrounded:
            self._unrounded[index] = self._unrounded[source].reshape(tuple(sizes))

    def _place(self, index: int, tensor: Tensor) -> None:
        if tensor.dtype not in DTYPES:
            raise RefusedError(f"it has {tensor.shape}, whose numbers are rounded")
        self._sizes[index] = tensor.sizes
        size = math.prod(tensor.sizes) * DTYPES[tensor.dtype].itemsize
        if tensor.place is None:
            # Inputs and outputs may come with memory of their own.
            self._bytes[index] = torch.zeros(size, dtype=torch.uint8)
            if tensor.data is not None:
                self._bytes[index] = _as_bytes(tensor.data)
            return
        number, offset = tensor.place
        if number not in range(len(self._arenas)) or offset + size > len(self._arenas[number]):
            raise RefusedError(f"{tensor.shape} lies outside of the memory that is planned")
        if offset % DTYPES[tensor.dtype].itemsize:
            raise RefusedError(f"{tensor.shape} lies at byte {offset}, between two numbers")
        self._bytes[index] = self._arenas[number][offset : offset + size]
        if tensor.data is not None:
            self._bytes[index].copy_(_as_bytes(tensor.data))

    def _view(self, index: int, tensor: Tensor) -> torch.Tensor:
        sizes, dtype = self._sizes[index], DTYPES[tensor.dtype]
        order = tensor.dim_order or tuple(range(len(sizes)))
        lying = [sizes[axis] for axis in order]
        found = self._bytes[index][: math.prod(sizes) * dtype.itemsize].view(dtype).view(lying)
        return found.permute([order.index(axis) for axis in range(len(sizes))])


def _as_bytes(data: memoryview) -> torch.Tensor:
    """A view of what the file holds, which is never written."""
    if not len(data):
        return torch.zeros(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(data, dtype=torch.uint8)
