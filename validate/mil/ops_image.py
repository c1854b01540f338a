"""Pooling and resizing."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .node import Kernel, Node
from .ops_linear import same_padding, spatial_pad

_MAX: dict[int, Callable[..., Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVERAGE: dict[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}


class _Windows:
    """What all poolings have: the windows, and the padding of an input."""

    def __init__(self, node: Node) -> None:
        self.rank = len(node.ref("x").type.shape) - 2
        self.kernel = node.numbers("kernel_sizes")
        self.strides = node.numbers("strides", [1] * self.rank)
        self.ceil = bool(node.number("ceil_mode", False))
        self._kind = node.text("pad_type", "valid")
        self._pads = [0] * (2 * self.rank)
        if self._kind == "custom":
            self._pads = node.numbers("pad", self._pads)
        if self._kind not in ("custom", "valid", "same", "same_lower"):
            raise node.error(f"has the padding {self._kind!r}")
        if len(self._pads) != 2 * self.rank or len(self.kernel) != self.rank:
            raise node.error(f"has windows of {self.kernel} with padding {self._pads}")

    def pads(self, x: Tensor) -> list[int]:
        if self._kind.startswith("same"):
            lower = self._kind == "same_lower"
            return same_padding(x.shape[2:], self.kernel, self.strides, lower=lower)
        return self._pads

    def padded(self, x: Tensor, value: float) -> Tensor:
        """With what `ceil_mode` adds after, so that every window is whole.

        A last window that would start in the padding after the input is not made.
        """
        pads = list(self.pads(x))
        if self.ceil:
            for axis, (width, stride) in enumerate(zip(self.kernel, self.strides, strict=True)):
                before, after = pads[2 * axis : 2 * axis + 2]
                size = x.shape[2 + axis]
                windows = -(-(size + before + after - width) // stride) + 1
                if (windows - 1) * stride >= size + before:
                    windows -= 1
                pads[2 * axis + 1] = (windows - 1) * stride + width - size - before
        return spatial_pad(x, pads, value)


def _max_pool(node: Node) -> Kernel:
    windows = _Windows(node)
    pool = _MAX[windows.rank]

    def run(x: Tensor) -> Tensor:
        return pool(windows.padded(x, -torch.inf), windows.kernel, windows.strides)

    return node.kernel(run, "x", rounds=False)


def _avg_pool(node: Node) -> Kernel:
    """The mean of a window. What `ceil_mode` adds never counts, padding does unless excluded."""
    windows = _Windows(node)
    pool = _AVERAGE[windows.rank]
    exclude = bool(node.number("exclude_padding_from_average", False))

    def run(x: Tensor) -> Tensor:
        mean = pool(windows.padded(x, 0.0), windows.kernel, windows.strides)
        if not exclude and not windows.ceil:
            return mean
        ones = torch.ones((1, 1, *x.shape[2:]))
        if not exclude:
            pads = windows.pads(x)
            ones = functional.pad(ones, [0] * len(pads))
            counted = spatial_pad(ones, pads, 1.0)
            extra = [
                0 if i % 2 == 0 else whole - size
                for whole, size in zip(
                    windows.padded(ones, 0.0).shape[2:], counted.shape[2:], strict=True
                )
                for i in range(2)
            ]
            share = pool(spatial_pad(counted, extra), windows.kernel, windows.strides)
        else:
            share = pool(windows.padded(ones, 0.0), windows.kernel, windows.strides)
        return mean / share

    return node.kernel(run, "x")


def _l2_pool(node: Node) -> Kernel:
    windows = _Windows(node)
    pool = _AVERAGE[windows.rank]
    count = float(torch.tensor(windows.kernel).prod())

    def run(x: Tensor) -> Tensor:
        squares = windows.padded(x.square(), 0.0)
        return (pool(squares, windows.kernel, windows.strides) * count).sqrt()

    return node.kernel(run, "x")


def _sizes(node: Node) -> Callable[[Tensor], tuple[int, int]]:
    """The height and width that an operation makes of a tensor."""
    if node.has("target_size_height"):
        sizes = int(node.number("target_size_height")), int(node.number("target_size_width"))
        return lambda x: sizes
    factors = (
        float(node.number("scale_factor_height", 1)),
        float(node.number("scale_factor_width", 1)),
    )
    return lambda x: (int(x.shape[-2] * factors[0]), int(x.shape[-1] * factors[1]))


def _nearest(node: Node) -> Kernel:
    sizes = _sizes(node)

    def run(x: Tensor) -> Tensor:
        for axis, size in zip((-2, -1), sizes(x), strict=True):
            rows = torch.arange(size) * x.shape[axis] // size
            x = x.index_select(x.dim() + axis, rows)
        return x

    return node.kernel(run, "x", rounds=False)


def _points(mode: str, size: int, out: int) -> Tensor:
    """Where each of `out` numbers is taken from `size`, by the sampling mode."""
    steps = torch.arange(out, dtype=torch.float64)
    if mode == "ALIGN_CORNERS" and out == 1:
        return torch.tensor([(size - 1) / 2], dtype=torch.float64)
    offset_step = max(1, size - 1) / out
    points = {
        "STRICT_ALIGN_CORNERS": steps * ((size - 1) / max(1, out - 1)),
        "ALIGN_CORNERS": steps * ((size - 1) / max(1, out - 1)),
        "DEFAULT": steps * (size / out),
        "OFFSET_CORNERS": (steps + 0.5) * offset_step,
        "UNALIGN_CORNERS": (steps + 0.5) * (size / out) - 0.5,
    }[mode]
    return points.clamp(0, size - 1)


def _bilinear(node: Node) -> Kernel:
    sizes = _sizes(node)
    if node.has("sampling_mode") or node.has("target_size_height"):
        mode = node.text("sampling_mode", "DEFAULT")
    else:
        aligned = bool(node.number("align_corners", True))
        mode = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS"
        if bool(node.number("half_pixel_centers", not aligned)) == aligned:
            raise node.error("samples neither corners nor pixel centers")
    _points(mode, 2, 2)

    def run(x: Tensor) -> Tensor:
        for axis, size in zip((-2, -1), sizes(x), strict=True):
            x = _interpolated(x, x.dim() + axis, _points(mode, x.shape[axis], size))
        return x

    return node.kernel(run, "x")


def _interpolated(x: Tensor, axis: int, points: Tensor) -> Tensor:
    below = points.floor().to(torch.int64)
    above = (below + 1).clamp(max=x.shape[axis] - 1)
    share: Sequence[int] = [1] * x.dim()
    weight = (points - below).float().reshape(*share[:axis], -1, *share[axis + 1 :])
    return torch.lerp(x.index_select(axis, below), x.index_select(axis, above), weight)


OPERATIONS: dict[str, Callable[[Node], Kernel]] = {
    "avg_pool": _avg_pool,
    "l2_pool": _l2_pool,
    "max_pool": _max_pool,
    "resize_bilinear": _bilinear,
    "resize_nearest_neighbor": _nearest,
    "upsample_bilinear": _bilinear,
    "upsample_nearest_neighbor": _nearest,
}
