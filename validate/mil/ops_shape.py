"""Operations that only move numbers: shapes, concatenation, padding, new tensors."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .node import Kernel, Node

Operation = Callable[[Node], Kernel]


def view(node: Node, run: Callable[..., Tensor], *parameters: str) -> Kernel:
    """A kernel whose result may share the first operand's memory."""
    return node.kernel(run, *parameters, rounds=False, views=True)


def _moves(node: Node, run: Callable[..., Tensor], *parameters: str) -> Kernel:
    """A kernel whose results are new tensors of numbers that need no rounding."""
    return node.kernel(run, *parameters, rounds=False)


def _reshape(node: Node) -> Kernel:
    def shape_of(x: Tensor, sizes: Sequence[int]) -> list[int]:
        """0 inherits x's size, -1 is what remains."""
        if 0 in sizes and len(sizes) != x.dim():
            raise ValueError(f"a size of 0 in {list(sizes)} inherits from {list(x.shape)}")
        return [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]

    if node.is_constant("shape"):
        sizes = node.numbers("shape")
        if 0 not in sizes:
            return view(node, lambda x: x.reshape(sizes), "x")
        return view(node, lambda x: x.reshape(shape_of(x, sizes)), "x")
    return view(node, lambda x, shape: x.reshape(shape_of(x, shape.tolist())), "x", "shape")


def _reshape_like(node: Node) -> Kernel:
    begins, ends = node.scalars("begins"), node.scalars("ends")
    masks = node.scalars("end_masks")

    def run(x: Tensor, *references: Tensor) -> Tensor:
        sizes: list[int] = []
        for reference, begin, end, mask in zip(references, begins, ends, masks, strict=True):
            sizes += reference.shape[begin : None if mask else end]
        return x.reshape(sizes)

    return view(node, run, "x", "ref_tensors")


def _transpose(node: Node) -> Kernel:
    order = node.numbers("perm")
    return view(node, lambda x: x.permute(order), "x")


def _squeeze(node: Node) -> Kernel:
    if not node.has("axes"):
        return view(node, torch.squeeze, "x")
    axes = tuple(node.numbers("axes"))
    return view(node, lambda x: x.squeeze(axes), "x")


def _expand_dims(node: Node) -> Kernel:
    axes = node.numbers("axes")
    rank = len(node.ref("x").type.shape) + len(axes)
    order = sorted(axis % rank for axis in axes)

    def run(x: Tensor) -> Tensor:
        for axis in order:
            x = x.unsqueeze(axis)
        return x

    return view(node, run, "x")


def _flatten2d(node: Node) -> Kernel:
    axis = int(node.number("axis", 1))
    rank = len(node.ref("x").type.shape)
    # axis == rank is allowed: everything is before it.
    split = axis + rank if axis < 0 else axis
    return view(node, lambda x: x.reshape(math.prod(x.shape[:split]), -1), "x")


def _identity(node: Node) -> Kernel:
    return view(node, lambda x: x, "x")


def _concat(node: Node) -> Kernel:
    axis = int(node.number("axis"))
    if node.number("interleave", False):
        return _moves(
            node,
            lambda *values: torch.stack(values, axis % values[0].dim() + 1).flatten(
                axis % values[0].dim(), axis % values[0].dim() + 1
            ),
            "values",
        )
    if any(not ref.type.shape for ref in node.refs("values")):
        # Scalars, which coremltools lets through, make a vector.
        return _moves(node, lambda *values: torch.cat([v.reshape(-1) for v in values]), "values")
    return _moves(node, lambda *values: torch.cat(values, axis), "values")


def _stack(node: Node) -> Kernel:
    axis = int(node.number("axis"))
    return _moves(node, lambda *values: torch.stack(values, axis), "values")


def _split(node: Node) -> Kernel:
    axis = int(node.number("axis"))
    if node.has("split_sizes"):
        sizes: int | list[int] = node.numbers("split_sizes")
        return view(node, lambda x: torch.split(x, sizes, axis), "x")  # type: ignore[arg-type, return-value]
    count = int(node.number("num_splits"))

    def run(x: Tensor) -> tuple[Tensor, ...]:
        if x.shape[axis] % count:
            raise ValueError(f"{x.shape[axis]} rows do not split evenly in {count}")
        return torch.split(x, x.shape[axis] // count, axis)

    return view(node, run, "x")  # type: ignore[arg-type]


def _tile(node: Node) -> Kernel:
    if node.is_constant("reps"):
        counts = node.numbers("reps")
        return _moves(node, lambda x: x.repeat(counts), "x")
    return _moves(node, lambda x, reps: x.repeat(reps.tolist()), "x", "reps")


def _pad(node: Node) -> Kernel:
    mode = node.text("mode", "constant")
    value = node.number("constant_val", 0.0)
    if mode not in ("constant", "reflect", "replicate"):
        raise node.error(f"pads by {mode!r}")

    def run(x: Tensor, pads: Sequence[int]) -> Tensor:
        if len(pads) % 2 or len(pads) > 2 * x.dim():
            raise ValueError(f"{len(pads)} paddings for {x.dim()} dimensions")
        if mode == "constant":
            order = [pads[i + j] for i in range(len(pads) - 2, -2, -2) for j in (0, 1)]
            return functional.pad(x, order, value=value)
        for i in range(0, len(pads), 2):
            axis = x.dim() - len(pads) // 2 + i // 2
            x = x.index_select(axis, _border(x.shape[axis], pads[i], pads[i + 1], mode))
        return x

    if node.is_constant("pad"):
        pads = node.numbers("pad")
        return _moves(node, lambda x: run(x, pads), "x")
    return _moves(node, lambda x, pad: run(x, pad.tolist()), "x", "pad")


def _border(size: int, before: int, after: int, mode: str) -> Tensor:
    """Indices that mirror, or repeat, a dimension's ends."""
    limit = size - 1 if mode == "reflect" else size
    if not (0 <= before <= limit and 0 <= after <= limit):
        raise ValueError(f"{mode} of {before} before and {after} after {size}")
    indices = torch.arange(-before, size + after)
    if mode == "replicate":
        return indices.clamp(0, size - 1)
    indices = indices.abs()
    return torch.where(indices >= size, 2 * (size - 1) - indices, indices)


def _shape(node: Node) -> Kernel:
    return _moves(node, lambda x: torch.tensor(x.shape, dtype=torch.int32), "x")


def _fill(node: Node) -> Kernel:
    value, held = node.number("value", 0.0), node.type.dtype.torch
    if node.is_constant("shape"):
        sizes = node.numbers("shape")
        return _moves(node, lambda: torch.full(sizes, value, dtype=held))
    return _moves(node, lambda shape: torch.full(shape.tolist(), value, dtype=held), "shape")


def _fill_like(node: Node) -> Kernel:
    value, held = node.number("value", 0.0), node.type.dtype.torch
    return _moves(node, lambda x: torch.full(x.shape, value, dtype=held), "ref_tensor")


def _range(node: Node) -> Kernel:
    held = node.type.dtype.torch

    def run(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
        return torch.arange(start.item(), end.item(), step.item(), dtype=held)

    return node.kernel(run, "start", "end", "step")


def _one_hot(node: Node) -> Kernel:
    axis = int(node.number("axis", -1))
    on, off = node.number("on_value", 1), node.number("off_value", 0)
    held = node.type.dtype.torch

    def run(indices: Tensor, size: Tensor) -> Tensor:
        classes = torch.arange(int(size.item()))
        place = axis % (indices.dim() + 1)
        hot = indices.unsqueeze(place) == classes.reshape(-1, *[1] * (indices.dim() - place))
        return torch.where(hot, torch.tensor(on, dtype=held), torch.tensor(off, dtype=held))

    return _moves(node, run, "indices", "one_hot_vector_size")


def _band_part(node: Node) -> Kernel:
    lower, upper = int(node.number("lower", -1)), int(node.number("upper", -1))

    def run(x: Tensor) -> Tensor:
        row = torch.arange(x.shape[-2]).unsqueeze(1)
        column = torch.arange(x.shape[-1])
        keep = torch.ones(x.shape[-2:], dtype=torch.bool)
        if lower >= 0:
            keep &= row - column <= lower
        if upper >= 0:
            keep &= column - row <= upper
        return torch.where(keep, x, torch.zeros((), dtype=x.dtype))

    return _moves(node, run, "x")


def _reverse(node: Node) -> Kernel:
    axes = node.numbers("axes", range(len(node.ref("x").type.shape)))
    return _moves(node, lambda x: x.flip(axes), "x")


def _non_zero(node: Node) -> Kernel:
    return node.kernel(torch.nonzero, "x")


def _sliding_windows(node: Node) -> Kernel:
    axis, size = int(node.number("axis")), int(node.number("size"))
    stride = int(node.number("stride", 1))

    def run(x: Tensor) -> Tensor:
        at = axis % x.dim()
        return x.unfold(at, size, stride).movedim(-1, at + 1).clone()

    return _moves(node, run, "x")


def _depth_to_space(node: Node) -> Kernel:
    """A channel is (row, column, channel) of a block."""
    block = int(node.number("block_size"))

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        blocks = x.reshape(n, block, block, c // block**2, h, w)
        return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, c // block**2, h * block, w * block)

    return view(node, run, "x")


def _space_to_depth(node: Node) -> Kernel:
    """The inverse of `depth_to_space`."""
    block = int(node.number("block_size"))

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // block, block, w // block, block)
        return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block**2, h // block, w // block)

    return view(node, run, "x")


def _pixel_shuffle(node: Node) -> Kernel:
    factor = int(node.number("upscale_factor"))
    return _moves(node, lambda x: functional.pixel_shuffle(x, factor), "x")


def _pixel_unshuffle(node: Node) -> Kernel:
    factor = int(node.number("downscale_factor"))
    return _moves(node, lambda x: functional.pixel_unshuffle(x, factor), "x")


OPERATIONS: dict[str, Operation] = {
    "band_part": _band_part,
    "concat": _concat,
    "depth_to_space": _depth_to_space,
    "expand_dims": _expand_dims,
    "fill": _fill,
    "fill_like": _fill_like,
    "flatten2d": _flatten2d,
    "identity": _identity,
    "non_zero": _non_zero,
    "one_hot": _one_hot,
    "pad": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "range_1d": _range,
    "reshape": _reshape,
    "reshape_like": _reshape_like,
    "reverse": _reverse,
    "shape": _shape,
    "sliding_windows": _sliding_windows,
    "space_to_depth": _space_to_depth,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
}
