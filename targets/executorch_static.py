"""Static integers in the form that XNNPACK takes.

- Activations: its types are signed, so an unsigned integer and its zero point both lose 128.
- Biases: its partitioner wants floats, which the lowering rounds to int32 by q = round(b r) with
  r = 1 / (s_x s_w), all in float32. What is given here is a float that is rounded to the recipe's
  very integer: integer times scale, or one of its neighbours.

Weights stay as they are: `dequantize_per_channel` of int8.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..quantize.ranges import DEQUANTIZE_TENSOR, DEQUANTIZE_WEIGHT, QUANTIZE
from .executorch_edit import EditedGraph

SHIFT = 128
NEIGHBOURS = 4
"""Floats either side of integer times scale: the products above err by a few roundings."""


def sign_integers(edited: EditedGraph) -> None:
    """Make static activations signed and biases floats, in place."""
    for node in list(edited.graph.nodes):
        if str(node.target) in (QUANTIZE, DEQUANTIZE_TENSOR):
            _sign(node)
        elif str(node.target) == DEQUANTIZE_WEIGHT:
            bias, scale = node.all_input_nodes[:2]
            if edited.values[bias].dtype is torch.int32:
                found = float_bias(edited.values[bias], edited.values[scale])
                node.replace_all_uses_with(edited.add(f"{bias.name}_float", found))


def _sign(node: Node) -> None:
    arguments: tuple[Any, ...] = node.args
    x, scale, zero_point, low, high, dtype, *rest = arguments
    if dtype is not torch.uint8:
        raise NotImplementedError(f"activations in {dtype}")
    shifted = [value - SHIFT for value in (zero_point, low, high)]
    node.args = (x, scale, *shifted, torch.int8, *rest)


def float_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Floats that are rounded to `bias` int32 [O] by the reciprocal of `scale` float32 [O].

    Beyond 2^22 a float32 is no integer's own: there, the nearest.
    """
    middle = bias * scale
    reciprocal = 1.0 / scale
    found, error = middle, (torch.round(middle * reciprocal) - bias).abs()
    for direction in (-torch.inf, torch.inf):
        near = middle
        for _ in range(NEIGHBOURS):
            near = torch.nextafter(near, torch.full_like(near, direction))
            off = (torch.round(near * reciprocal) - bias).abs()
            found = torch.where(off < error, near, found)
            error = torch.minimum(off, error)
    return found
