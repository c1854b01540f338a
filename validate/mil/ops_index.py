"""Slices, and reading and writing by index."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .node import Kernel, Node
from .ops_shape import view

Operation = Callable[[Node], Kernel]
_Index = tuple[slice | int, ...]


class _Slices:
    """begin : end : stride of each dimension, with masks for what is left out.

    Indices count from the end where negative and are cut to the dimension, as in NumPy; where
    `squeeze_mask` is set, the dimension is indexed by `begin`.
    """

    def __init__(self, node: Node) -> None:
        rank = len(node.ref("x").type.shape)
        self._strides = node.numbers("stride", [1] * rank)
        self._begin_mask = node.numbers("begin_mask", [0] * rank)
        self._end_mask = node.numbers("end_mask", [0] * rank)
        self._squeeze_mask = node.numbers("squeeze_mask", [0] * rank)
        self.flips = [axis for axis, stride in enumerate(self._strides) if stride < 0]
        lengths = {len(self._strides), len(self._begin_mask), len(self._end_mask)}
        if lengths | {len(self._squeeze_mask)} != {rank} or 0 in self._strides:
            raise node.error("does not say begin, end and stride of each dimension")

    def index(self, begin: Sequence[int], end: Sequence[int]) -> _Index:
        """For strides that are positive."""
        index: list[slice | int] = []
        for axis, stride in enumerate(self._strides):
            if self._squeeze_mask[axis]:
                index.append(0 if self._begin_mask[axis] else begin[axis])
                continue
            start = None if self._begin_mask[axis] else begin[axis]
            stop = None if self._end_mask[axis] else end[axis]
            index.append(slice(start, stop, stride))
        return tuple(index)

    def gather(self, x: Tensor, index: _Index) -> Tensor:
        """Apply an index with negative strides, of which PyTorch has none."""
        for axis, part in reversed(list(enumerate(index))):
            if isinstance(part, int):
                x = x.select(axis, part)
            elif axis in self.flips:
                rows = range(*part.indices(x.shape[axis]))
                x = x.index_select(axis, torch.tensor(list(rows), dtype=torch.int64))
            else:
                x = x[(slice(None),) * axis + (part,)]
        return x


def _slice_by_index(node: Node) -> Kernel:
    slices = _Slices(node)
    take: Callable[[Tensor, _Index], Tensor] = (
        slices.gather if slices.flips else lambda x, index: x[index]
    )
    if node.is_constant("begin") and node.is_constant("end"):
        index = slices.index(node.numbers("begin"), node.numbers("end"))
        return view(node, lambda x: take(x, index), "x")

    def run(x: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        return take(x, slices.index(begin.tolist(), end.tolist()))

    return view(node, run, "x", "begin", "end")


def _slice_by_size(node: Node) -> Kernel:
    def index(x: Tensor, begin: Sequence[int], size: Sequence[int]) -> _Index:
        parts = []
        for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
            first = start + x.shape[axis] if start < 0 else start
            end = x.shape[axis] if count == -1 else first + count
            if not 0 <= first <= end <= x.shape[axis]:
                raise IndexError(f"[{first}:{end}] of {x.shape[axis]}")
            parts.append(slice(first, end))
        return tuple(parts)

    if node.is_constant("begin") and node.is_constant("size"):
        begin, size = node.numbers("begin"), node.numbers("size")
        return view(node, lambda x: x[index(x, begin, size)], "x")

    def run(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
        return x[index(x, begin.tolist(), size.tolist())]

    return view(node, run, "x", "begin", "size")


def _slice_update(node: Node) -> Kernel:
    slices = _Slices(node)
    if slices.flips:
        raise node.error("updates a slice of negative stride")
    fixed: _Index | None = None
    operands = ["x", "update"]
    if node.is_constant("begin") and node.is_constant("end"):
        fixed = slices.index(node.numbers("begin"), node.numbers("end"))
    else:
        operands += ["begin", "end"]

    def write(x: Tensor, update: Tensor, *bounds: Tensor) -> Tensor:
        index = fixed
        if index is None:
            begin, end = bounds
            index = slices.index(begin.tolist(), end.tolist())
        part = x[index]
        if part.shape != update.shape:
            raise ValueError(f"an update of {list(update.shape)} for a slice {list(part.shape)}")
        part.copy_(update)
        return x

    kernel = node.kernel(lambda x, *rest: write(x.clone(), *rest), *operands, rounds=False)
    return Kernel(run=kernel.run, operands=kernel.operands, rounds=False, in_place=write)


def _checked(node: Node, indices: Tensor, size: int) -> Tensor:
    """Indices from the end count where MIL's version has them (before iOS 17)."""
    indices = indices.to(torch.int64)
    if indices.numel() == 0:
        return indices
    low, high = int(indices.min()), int(indices.max())
    if low < (0 if node.opset >= 7 else -size) or high >= size:
        raise IndexError(f"an index of {low}..{high} into {size}")
    return torch.where(indices < 0, indices + size, indices) if low < 0 else indices


def _gather(node: Node) -> Kernel:
    axis, batch = int(node.number("axis", 0)), int(node.number("batch_dims", 0))

    def run(x: Tensor, indices: Tensor) -> Tensor:
        at = axis % x.dim()
        chosen = _checked(node, indices, x.shape[at])
        if batch == 0:
            picked = x.index_select(at, chosen.reshape(-1))
            return picked.reshape((*x.shape[:at], *chosen.shape, *x.shape[at + 1 :]))
        rows = [
            torch.arange(x.shape[i]).reshape(-1, *[1] * (at - 1 - i + chosen.dim() - batch))
            for i in range(at)
        ]
        spread = chosen.reshape(*chosen.shape[:batch], *[1] * (at - batch), *chosen.shape[batch:])
        return x[(*rows, spread)]

    return node.kernel(run, "x", "indices", rounds=False)


def _gather_along_axis(node: Node) -> Kernel:
    axis = int(node.number("axis", 0))
    return node.kernel(
        lambda x, indices: torch.gather(x, axis, _checked(node, indices, x.shape[axis])),
        "x",
        "indices",
        rounds=False,
    )


def _gather_nd(node: Node) -> Kernel:
    batch = int(node.number("batch_dims", 0))

    def run(x: Tensor, indices: Tensor) -> Tensor:
        rest = indices.dim() - 1 - batch
        rows = [
            torch.arange(x.shape[i]).reshape(-1, *[1] * (batch - 1 - i + rest))
            for i in range(batch)
        ]
        return x[(*rows, *_columns(node, indices, x.shape[batch:]))]

    return node.kernel(run, "x", "indices", rounds=False)


def _columns(node: Node, indices: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The last dimension's parts, each checked against its size."""
    return tuple(
        _checked(node, column, size)
        for column, size in zip(indices.unbind(-1), sizes, strict=False)
    )


def _combine(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of the old value and the update that `mode` names, but for `update`."""
    mode = node.text("mode", "add")
    modes: dict[str, Any] = {
        "update": lambda old, new: new,
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "div": torch.div,
        "max": torch.maximum,
        "min": torch.minimum,
    }
    if mode not in modes:
        raise node.error(f"scatters by {mode!r}")
    combine: Callable[[Tensor, Tensor], Tensor] = modes[mode]
    return combine


def _scattered(
    data: Tensor, index: tuple[Tensor, ...], updates: Tensor, combine: Callable[..., Tensor]
) -> Tensor:
    """data[index] combined with updates, one after another, as an index may come again."""
    result = data.clone()
    flat = torch.zeros(index[0].shape, dtype=torch.int64)
    for part, size in zip(index, data.shape, strict=False):
        flat = flat * size + part
    rows = result.reshape(-1, *data.shape[len(index) :])
    places = flat.reshape(-1)
    values = updates.reshape(places.numel(), *rows.shape[1:])
    if places.unique().numel() == places.numel():
        rows[places] = combine(rows[places], values).to(rows.dtype)
    else:
        for place, value in zip(places.tolist(), values, strict=True):
            rows[place] = combine(rows[place], value)
    return rows.reshape(data.shape)


def _scatter(node: Node) -> Kernel:
    axis, combine = int(node.number("axis", 0)), _combine(node)

    def run(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        chosen = _checked(node, indices, data.shape[axis])
        moved = _scattered(
            data.movedim(axis, 0), (chosen,), updates.movedim(axis % data.dim(), 0), combine
        )
        return moved.movedim(0, axis)

    return node.kernel(run, "data", "indices", "updates")


def _scatter_along_axis(node: Node) -> Kernel:
    axis, combine = int(node.number("axis", 0)), _combine(node)

    def run(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        chosen = _checked(node, indices, data.shape[axis])
        index = list(torch.meshgrid(*map(torch.arange, chosen.shape), indexing="ij"))
        index[axis % data.dim()] = chosen
        return _scattered(data, tuple(index), updates, combine)

    return node.kernel(run, "data", "indices", "updates")


def _scatter_nd(node: Node) -> Kernel:
    combine = _combine(node)

    def run(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        return _scattered(data, _columns(node, indices, data.shape), updates, combine)

    return node.kernel(run, "data", "indices", "updates")


OPERATIONS: dict[str, Operation] = {
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gather_nd": _gather_nd,
    "scatter": _scatter,
    "scatter_along_axis": _scatter_along_axis,
    "scatter_nd": _scatter_nd,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
}
