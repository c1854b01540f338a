"""Integer weights in the layouts of ONNX Runtime's operators: the same integers, other bytes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .onnx_build import lazy, values_of
from .onnx_recipes import BLOCK_SIZES

Integers = NDArray[np.integer[Any]]

CHANNEL_BLOCKS = (128, 64, 32)
"""Block sizes for weights with one scale per channel, which is repeated for each block."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Signed integers [N,K] with a scale, and perhaps a zero point, for every K/G of a row.

    Each method is a tensor of the file, named after the layer's own.
    """

    name: str
    scale_name: str
    integers: Integers
    scale: NDArray[np.float32]
    zero_point: Integers | None
    bits: int

    @classmethod
    def of(
        cls, weight: ir.Value | None, scale: ir.Value | None, zeros: ir.Value | None, *, bits: int
    ) -> "Weights":
        """Read a layer's constants: weight [N,K], scale and zero point [N,G]."""
        return cls(
            name=str(weight and weight.name),
            scale_name=str(scale and scale.name),
            integers=values_of(weight),
            scale=values_of(scale),
            zero_point=None if zeros is None else values_of(zeros),
            bits=bits,
        )

    @property
    def rows(self) -> int:
        """Output channels N, or words of a table."""
        return int(self.integers.shape[0])

    @property
    def depth(self) -> int:
        """Input channels K."""
        return int(self.integers.shape[1])

    @property
    def groups(self) -> int:
        """Scales of one row, G."""
        return int(self.scale.shape[1])

    @property
    def width(self) -> int:
        """Weights that share a scale, K/G."""
        return self.depth // self.groups

    @property
    def block(self) -> int:
        """MatMulNBits's `block_size`: the group, or what divides a channel best.

        A channel's last block may reach past its end: nothing is read there.
        """
        if self.width in BLOCK_SIZES:
            return self.width
        fitting = (size for size in CHANNEL_BLOCKS if self.depth % size == 0)
        return next(fitting, CHANNEL_BLOCKS[-1])

    @property
    def blocks(self) -> int:
        """Blocks of one row."""
        return -(-self.depth // self.block)

    def attributes(self, accuracy_level: int) -> dict[str, int]:
        """MatMulNBits's: at level 4 ONNX Runtime rounds x as `round_activations` does, at 1 not."""
        return {
            "K": self.depth,
            "N": self.rows,
            "bits": self.bits,
            "block_size": self.block,
            "accuracy_level": accuracy_level,
        }

    def table(self) -> ir.TensorProtocol:
        """[N,K] int8, as it is."""
        shape = (self.rows, self.depth)
        return lazy(f"{self.name}.table", ir.DataType.INT8, shape, lambda: self.integers)

    def columns(self) -> ir.TensorProtocol:
        """[K,N] int8."""
        shape = (self.depth, self.rows)
        return lazy(f"{self.name}.columns", ir.DataType.INT8, shape, lambda: self.integers.T)

    def row_scales(self) -> ir.TensorProtocol:
        """[N,1]."""
        return ir.tensor(self.scale, name=f"{self.scale_name}.rows")

    def channel_scales(self) -> ir.TensorProtocol:
        """[N]."""
        return ir.tensor(self.scale[:, 0].copy(), name=f"{self.scale_name}.channels")

    def packed(self) -> ir.TensorProtocol:
        """[N, blocks, bytes of a block] uint8, as MatMulNBits reads it."""
        shape = (self.rows, self.blocks, self.block * self.bits // 8)

        def compute() -> NDArray[np.uint8]:
            past_the_end = self.blocks * self.block - self.depth
            padded = np.pad(self.integers, ((0, 0), (0, past_the_end)))
            packed: NDArray[np.uint8] = pack_bits(padded, self.bits).reshape(shape)
            return packed

        return lazy(f"{self.name}.packed", ir.DataType.UINT8, shape, compute)

    def packed_zeros(self) -> ir.TensorProtocol:
        """[N, bytes of a row's zero points] uint8; a byte that is half used ends in a zero."""
        if self.zero_point is None:
            raise ValueError(f"{self.name} is symmetric")
        odd = self.blocks % 2 if self.bits == 4 else 0
        packed = pack_bits(np.pad(self.zero_point, ((0, 0), (0, odd))), self.bits)
        return ir.tensor(packed, name=f"{self.name}.packed_zeros")

    def block_scales(self) -> ir.TensorProtocol:
        """[N, blocks]."""
        repeated = np.repeat(self.scale, self.blocks // self.groups, axis=1)
        return ir.tensor(repeated, name=f"{self.scale_name}.blocks")


def pack_bits(values: Integers, bits: int) -> NDArray[np.uint8]:
    """Signed integers -> value + 2^(bits-1); of 4 bits two to a byte, the first in the low half.

    [..., K] -> [..., K * bits / 8] uint8.
    """
    shifted: NDArray[np.uint8] = (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 8:
        return shifted
    if bits != 4:
        raise NotImplementedError(f"{bits} bits: ONNX Runtime packs 4 and 8")
    packed: NDArray[np.uint8] = shifted[..., 0::2] + shifted[..., 1::2] * np.uint8(16)
    return packed
