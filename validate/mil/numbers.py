"""MIL's number types: how each is stored in a file and held while a program runs.

Floats of every width are held as float32, whose values are float16 numbers where a program says
fp16: PyTorch has no fast float16 arithmetic on a CPU, and sums are to be float32 anyway. Integers
are held as they are, packed ones one to a byte.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Dtype:
    """A number type of MIL: `bits` wide in a file, an array of `numpy` read, `torch` held."""

    name: str
    bits: int
    numpy: type[np.generic]
    torch: torch.dtype

    @property
    def is_float(self) -> bool:
        """fp16, fp32 or fp64."""
        return self.name.startswith("fp")


def _dtype(name: str, bits: int, stored: type[np.generic], held: torch.dtype) -> Dtype:
    return Dtype(name=name, bits=bits, numpy=stored, torch=held)


# The numbers are those of MIL.proto's DataType. uint16 and uint32 are held wider, as PyTorch
# computes little on its own unsigned types.
DTYPES = {
    1: _dtype("bool", 8, np.bool_, torch.bool),
    10: _dtype("fp16", 16, np.float16, torch.float32),
    11: _dtype("fp32", 32, np.float32, torch.float32),
    12: _dtype("fp64", 64, np.float64, torch.float32),
    21: _dtype("int8", 8, np.int8, torch.int8),
    22: _dtype("int16", 16, np.int16, torch.int16),
    23: _dtype("int32", 32, np.int32, torch.int32),
    24: _dtype("int64", 64, np.int64, torch.int64),
    25: _dtype("int4", 4, np.int8, torch.int8),
    31: _dtype("uint8", 8, np.uint8, torch.uint8),
    32: _dtype("uint16", 16, np.uint16, torch.int32),
    33: _dtype("uint32", 32, np.uint32, torch.int64),
    35: _dtype("uint4", 4, np.uint8, torch.uint8),
    36: _dtype("uint2", 2, np.uint8, torch.uint8),
    37: _dtype("uint1", 1, np.uint8, torch.uint8),
    38: _dtype("uint6", 6, np.uint8, torch.uint8),
    39: _dtype("uint3", 3, np.uint8, torch.uint8),
}
STRING = 2
BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}


def unpack(packed: NDArray[np.uint8], bits: int, count: int, signed: bool) -> NDArray[np.generic]:
    """`count` integers of `bits` bits, the lowest bit first, one to a byte.

    An index may cross a byte's border (3 and 6 bits do).
    """
    if bits == 4:
        pairs = np.empty((packed.size, 2), np.uint8)
        np.bitwise_and(packed, 15, out=pairs[:, 0])
        np.right_shift(packed, 4, out=pairs[:, 1])
        values = pairs.reshape(-1)[:count]
    else:
        digits = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
        values = np.packbits(digits, axis=1, bitorder="little").reshape(-1)
    if signed:
        sign = 1 << (bits - 1)
        return (values ^ sign).view(np.int8) - np.int8(sign)
    return values


def held(array: NDArray[np.generic], dtype: Dtype) -> Tensor:
    """The array as a program's tensor; a copy that nobody else writes to."""
    tensor = torch.from_numpy(np.array(array, order="C"))
    return tensor.to(dtype.torch)


def round_half(x: Tensor) -> Tensor:
    """Round a float32 tensor to float16's numbers, in place; beyond 65504 is infinite."""
    return x.copy_(x.half())


def halved(x: Tensor) -> Tensor:
    """`round_half` into a new tensor."""
    return x.half().float()


def range_of(dtype: Dtype) -> tuple[int, int]:
    """Least and greatest number of an integer type."""
    if dtype.name.startswith("u"):
        return 0, (1 << dtype.bits) - 1
    return -(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1
