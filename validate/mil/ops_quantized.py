"""`quantize` and `dequantize` of activations."""

from collections.abc import Callable

import torch
from torch import Tensor

from .node import Kernel, Node
from .numbers import range_of


def _spread(node: Node, parameter: str) -> Tensor | None:
    """Scale or zero point as float32, shaped to multiply the input."""
    if not node.has(parameter):
        return None
    values = node.constant(parameter).tensor().float()
    if values.dim() == 0:
        return values
    rank = len(node.ref("input").type.shape)
    shape = [1] * rank
    shape[int(node.number("axis"))] = -1
    return values.reshape(shape)


def _quantize(node: Node) -> Kernel:
    """clip(round(input / scale) + zero_point), halves to even; exact, without the round."""
    scale, zero = _spread(node, "scale"), _spread(node, "zero_point")
    dtype = node.type.dtype
    low, high = range_of(dtype)
    if scale is None or node.text("output_dtype") != dtype.name:
        raise node.error(f"has no scale, or an output that is not {dtype.name}")

    def exact(x: Tensor) -> Tensor:
        steps = x / scale
        return (steps if zero is None else steps.add_(zero)).clamp_(low, high)

    def typed(x: Tensor) -> Tensor:
        steps = (x / scale).round_()
        return (steps if zero is None else steps.add_(zero)).clamp_(low, high).to(dtype.torch)

    return node.kernel(exact if node.exact else typed, "input", rounds=False)


def _dequantize(node: Node) -> Kernel:
    """scale * (input - zero_point)."""
    scale, zero = _spread(node, "scale"), _spread(node, "zero_point")
    if scale is None:
        raise node.error("has no scale")

    def run(x: Tensor) -> Tensor:
        steps = x.to(torch.float32, copy=True)
        return (steps if zero is None else steps.sub_(zero)).mul_(scale)

    return node.kernel(run, "input")


OPERATIONS: dict[str, Callable[[Node], Kernel]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
}
