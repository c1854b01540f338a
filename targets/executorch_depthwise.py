"""Depthwise convolutions in the sizes that XNNPACK has kernels for.

XNNPACK computes depthwise convolutions of up to 25 taps and one output per input channel with
kernels of their own. Any other is a matrix product with a single column per channel there, which
takes tens of times as long: FastViTHD's 7x7 layers would take longer than everything else.

A sum of smaller ones is the same function. The middle rows of a kernel are a convolution with
fewer rows; the rows k above and below the middle are one with two rows, dilated by 2k: all of them
padded alike above and below, as XNNPACK's operators want it. Outputs m c .. m c + m - 1 of an input
channel c become m convolutions whose results take turns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from .executorch_edit import EditedGraph

CONV = torch.ops.aten.conv2d.default
LARGEST = 25
"""Taps of XNNPACK's largest depthwise kernel."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows `first`, `first + step`, ... of a kernel, as many above its middle as below."""

    first: int
    step: int
    count: int

    def of(self, weight: Tensor) -> Tensor:
        """Those rows of [O,1,kh,kw]."""
        return weight[:, :, self.first :: self.step][:, :, : self.count].contiguous()


def pieces(height: int, width: int) -> list[Rows]:
    """The rows of a kernel, each once, in pieces of at most 25 taps; one piece if there are none.

    7x7 is three: rows 2, 3, 4, then 1 and 5, then 0 and 6.
    """
    whole = [Rows(first=0, step=1, count=height)]
    if height * width <= LARGEST or height % 2 == 0 or 2 * width > LARGEST:
        return whole
    middle = height // 2
    inner = max(n for n in range(1, height, 2) if n * width <= LARGEST)
    return [
        Rows(first=middle - inner // 2, step=1, count=inner),
        *(Rows(first=middle - k, step=2 * k, count=2) for k in range(inner // 2 + 1, middle + 1)),
    ]


def split_depthwise(edited: EditedGraph) -> None:
    """Replace the depthwise convolutions that XNNPACK has no kernel for, in place."""
    for node in list(edited.graph.nodes):
        if node.target is CONV:
            _split(edited, node)


def _split(edited: EditedGraph, node: Node) -> None:
    x, weight, bias, stride, padding, dilation, groups = _arguments(node)
    if weight not in edited.values or groups == 1 or tuple(dilation) not in ((1,), (1, 1)):
        return
    kernel = edited.values[weight]
    if groups != x.meta["val"].shape[1] or kernel.shape[1] != 1:
        return
    outputs, parts = len(kernel) // groups, pieces(*kernel.shape[2:])
    above, beside = padding[0], padding[-1]
    if outputs * len(parts) == 1 or any(rows.first > above for rows in parts):
        return
    kernels = [
        [
            edited.add(f"{weight.name}_{turn}_{rows.first}", rows.of(kernel[turn::outputs]))
            for rows in parts
        ]
        for turn in range(outputs)
    ]
    biases = [bias] if outputs == 1 else _taking_turns(edited, bias, outputs)
    sizes = [((above - rows.first, beside), (rows.step, 1)) for rows in parts]
    with edited.graph.inserting_before(node):
        new = edited.graph.call_function(
            depthwise, (x, kernels, biases, sizes, tuple(stride), groups)
        )
    node.replace_all_uses_with(new)
    edited.graph.erase_node(node)


def _arguments(node: Node) -> tuple[Any, ...]:
    """Those of `aten.conv2d`, with its defaults where they are left out."""
    defaults: tuple[Any, ...] = (None, (1, 1), (0, 0), (1, 1), 1)
    return (*node.args, *defaults[len(node.args) - 2 :])


def _taking_turns(edited: EditedGraph, bias: Node | None, outputs: int) -> list[Node | None]:
    if bias is None:
        return [None] * outputs
    values = edited.values[bias]
    return [
        edited.add(f"{bias.name}_{turn}", values[turn::outputs].contiguous())
        for turn in range(outputs)
    ]


def depthwise(
    x: Tensor,
    kernels: Sequence[Sequence[Tensor]],
    biases: Sequence[Tensor | None],
    sizes: Sequence[tuple[tuple[int, int], tuple[int, int]]],
    stride: tuple[int, int],
    groups: int,
) -> Tensor:
    """The pieces' sum, per turn: x [B,C,H,W] -> [B,m C,H',W'].

    `kernels`: for each of m turns, one [C,1,kh,kw] per piece; `sizes`: their padding and dilation.
    """
    turns: list[Tensor] = []
    for (kernel, *others), bias in zip(kernels, biases, strict=True):
        (padding, dilation), *places = sizes
        total = F.conv2d(x, kernel, bias, stride, padding, dilation, groups)
        for other, (padding, dilation) in zip(others, places, strict=True):
            total = total + F.conv2d(x, other, None, stride, padding, dilation, groups)
        turns.append(total)
    if len(turns) == 1:
        return turns[0]
    # A stack by reshapes: XNNPACK inserts no axes but the last.
    batch, width, *sides = turns[0].shape
    columns = [turn.reshape(batch, width, 1, math.prod(sides)) for turn in turns]
    return torch.cat(columns, 2).reshape(batch, -1, *sides)
