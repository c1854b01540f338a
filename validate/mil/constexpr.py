"""Weights that a package stores compressed: each is expanded once, when a function is opened.

The results are float32: exact, integer times scale in float32; typed, rounded to the declared type.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .node import Node
from .numbers import round_half, unpack
from .values import Materialized


def _made(
    node: Node, make: Callable[[], Tensor], *parameters: str, output: int = 0
) -> Materialized:
    """The output, held once for equal operands."""
    type_ = node.outputs[output][1]
    rounds = type_.dtype.name == "fp16" and not node.exact
    keys = tuple((name, node.constant(name).key) for name in parameters if node.has(name))

    def checked() -> Tensor:
        with node.blamed("cannot be expanded"):
            tensor = make()
        if not type_.fits(tuple(tensor.shape)):
            raise node.error(f"makes {list(tensor.shape)}, declared {list(type_.shape)}")
        return round_half(tensor) if rounds else tensor.to(type_.dtype.torch)

    return Materialized(node.package, type_, (node.kind, output, node.exact, keys), checked)


def _integers(node: Node, parameter: str) -> Tensor:
    """A new float32 tensor of a constant's numbers."""
    return torch.from_numpy(node.array(parameter).astype(np.float32))


def _blocks(data: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """scale * (data - offset), each entry of scale for a block of data; overwrites data."""
    if data.dim() != scale.dim() or any(
        count == 0 or size % count for size, count in zip(data.shape, scale.shape, strict=True)
    ):
        raise ValueError(f"blocks of {list(data.shape)} for scales {list(scale.shape)}")
    inner = [(n, size // n) for size, n in zip(data.shape, scale.shape, strict=True)]
    split = data.view([size for pair in inner for size in pair])
    spread = [size for n in scale.shape for size in (n, 1)]
    if offset is not None:
        split.sub_(offset.reshape(spread))
    return split.mul_(scale.reshape(spread)).view(data.shape)


def _blockwise_shift_scale(node: Node) -> tuple[Materialized, ...]:
    def make() -> Tensor:
        offset = _integers(node, "offset") if node.has("offset") else None
        return _blocks(_integers(node, "data"), _integers(node, "scale"), offset)

    return (_made(node, make, "data", "scale", "offset"),)


def _affine_dequantize(node: Node) -> tuple[Materialized, ...]:
    axis = int(node.number("axis"))

    def make() -> Tensor:
        data = _integers(node, "quantized_data")
        shape = [1] * data.dim()
        shape[axis] = -1
        scale, zero = _integers(node, "scale"), _integers(node, "zero_point")
        zero = zero.reshape(shape) if zero.dim() else zero
        return data.sub_(zero).mul_(scale.reshape(shape) if scale.dim() else scale)

    return (_made(node, make, "quantized_data", "scale", "zero_point", "axis"),)


def _lut_to_dense(node: Node) -> tuple[Materialized, ...]:
    """iOS 16: indices packed into bytes, one table. iOS 18: a table per group, of vectors."""
    if node.has("shape"):
        shape = node.numbers("shape")

        def make_flat() -> Tensor:
            table = node.array("lut")
            bits = int(math.log2(table.size))
            count = math.prod(shape)
            packed = node.array("indices").astype(np.uint8)
            if packed.size != -(-count * bits // 8) or table.size != 1 << bits:
                raise node.error(f"has {packed.size} bytes of indices for {shape}")
            indices = unpack(packed, bits, count, signed=False) if bits else np.zeros(count)
            return torch.from_numpy(table.astype(np.float32))[
                torch.from_numpy(indices.astype(np.int64))
            ].reshape(shape)

        return (_made(node, make_flat, "indices", "lut", "shape"),)

    axis = int(node.number("vector_axis", 0))

    def make() -> Tensor:
        return _looked_up(node.array("indices"), _integers(node, "lut"), axis)

    return (_made(node, make, "indices", "lut", "vector_axis"),)


def _looked_up(indices: NDArray[Any], table: Tensor, axis: int) -> Tensor:
    """table's first dimensions are the groups of indices', then its entries, then vectors."""
    groups = table.shape[:-2]
    if table.dim() != indices.ndim + 2 or any(
        count == 0 or size % count for size, count in zip(indices.shape, groups, strict=True)
    ):
        raise ValueError(f"tables {list(table.shape)} for indices {list(indices.shape)}")
    entries, vector = table.shape[-2:]
    # Group and index together say which row of all tables it is: in int32, as there are many.
    split = [
        size for n, whole in zip(groups, indices.shape, strict=True) for size in (n, whole // n)
    ]
    first = torch.arange(math.prod(groups), dtype=torch.int32) * entries
    rows = torch.from_numpy(indices.astype(np.int32)).view(split)
    rows += first.reshape([size for n in groups for size in (n, 1)])
    if indices.size and int(indices.max()) >= entries:
        raise ValueError(f"an index of {int(indices.max())} into {entries} entries")
    dense = table.reshape(-1, vector)[rows.reshape(-1)].reshape(*indices.shape, vector)
    if vector == 1:
        return dense.squeeze(-1)
    at = axis % indices.ndim
    return dense.movedim(-1, at + 1).flatten(at, at + 1)


def _sparse(node: Node, data: str, mask: str) -> Tensor:
    """The dense tensor whose numbers are those of `data` where the mask is set."""
    values = _integers(node, data)
    if node.has("shape"):
        shape = node.numbers("shape")
        count = math.prod(shape)
        chosen = np.unpackbits(node.array(mask).astype(np.uint8), count=count, bitorder="little")
    else:
        chosen = node.array(mask)
        shape = list(chosen.shape)
    places = torch.from_numpy(chosen.reshape(-1) != 0)
    if int(places.sum()) != values.numel():
        raise ValueError(f"{int(places.sum())} places for {values.numel()} numbers")
    dense = torch.zeros(places.numel())
    dense[places] = values.reshape(-1)
    return dense.reshape(shape)


def _sparse_to_dense(node: Node) -> tuple[Materialized, ...]:
    return (
        _made(
            node,
            lambda: _sparse(node, "nonzero_data", "mask"),
            "nonzero_data",
            "mask",
            "shape",
        ),
    )


def _sparse_shift_scale(node: Node) -> tuple[Materialized, ...]:
    """Expands only what is not zero: the mask passes, then the numbers in order."""

    def make() -> Tensor:
        dense = _sparse(node, "nonzero_data", "data_mask")
        offset = _integers(node, "offset") if node.has("offset") else None
        mask = torch.from_numpy(node.array("data_mask") != 0)
        return _blocks(dense, _integers(node, "scale"), offset)[mask]

    def mask() -> Tensor:
        return torch.from_numpy(node.array("data_mask").copy())

    operands = ("data_mask", "nonzero_data", "scale", "offset")
    return (_made(node, mask, "data_mask"), _made(node, make, *operands, output=1))


def _lut_to_sparse(node: Node) -> tuple[Materialized, ...]:
    """As `_sparse_shift_scale`, by tables of vectors."""
    axis = int(node.number("vector_axis", 0))
    vector = node.constant("lut").type.shape[-1]

    def mask() -> Tensor:
        chosen = torch.from_numpy(node.array("indices_mask").copy())
        return chosen.repeat_interleave(vector, axis) if vector > 1 else chosen

    def make() -> Tensor:
        indices = _sparse(node, "indices_nonzero_data", "indices_mask").numpy()
        return _looked_up(indices, _integers(node, "lut"), axis)[mask() != 0]

    operands = ("indices_mask", "indices_nonzero_data", "lut", "vector_axis")
    return (_made(node, mask, *operands), _made(node, make, *operands, output=1))


def _cast(node: Node) -> tuple[Materialized, ...]:
    def make() -> Tensor:
        return _integers(node, "source_val")

    return (_made(node, make, "source_val"),)


OPERATIONS: dict[str, Callable[[Node], tuple[Materialized, ...]]] = {
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_cast": _cast,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_lut_to_sparse": _lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": _sparse_shift_scale,
    "constexpr_sparse_to_dense": _sparse_to_dense,
}
