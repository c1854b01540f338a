"""What XNNPACK's operators compute, in float32 and without rounding. Images are [B,H,W,C]."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import RefusedError
from .xnn_values import LIMITS, Value, bias_of

TRANSPOSED_WEIGHTS, KEEP_DIMS = 1, 64
"""Flags of operators."""

NO_VALUE = 0xFFFFFFFF
"""The number of a value that is left out."""

Compute = Callable[..., Tensor]


class Node:
    """One operator: its attributes, the values that it reads, and its output's limits."""

    def __init__(self, entry: Any, values: Mapping[int, Value]) -> None:
        self.union = entry.xnode_union
        self.kind = self.union.kind if self.union is not None else "no kind"
        self._values = values
        limits = entry.output_min_max
        self.low = limits.output_min if limits else -math.inf
        self.high = limits.output_max if limits else math.inf

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self.union, name)
        except AttributeError:
            raise RefusedError(f"it has no {name}") from None

    def value(self, name: str) -> Value:
        """What an attribute names. Raises RefusedError where there is no such value."""
        index = getattr(self, name)
        if index not in self._values:
            raise RefusedError(f"its {name} is {index}, which is no value")
        return self._values[index]

    def optional(self, name: str) -> Value | None:
        """As `value`; None where the attribute says that there is none."""
        return None if getattr(self, name) == NO_VALUE else self.value(name)

    def weight(self) -> Tensor:
        """The filter, which has to be a constant."""
        found = self.value("filter_id")
        if found.constant is None:
            raise RefusedError(f"its weight {found.index} is no constant")
        return found.constant

    def bias(self) -> Tensor | None:
        """The bias [O] as real numbers."""
        found = self.optional("bias_id")
        if found is None:
            return None
        return bias_of(found, self.value("input1_id"), self.value("filter_id"))

    def limited(self, compute: Compute) -> Compute:
        """The same, cut to what the output may be: by the operator, then by its type."""
        made = self.value("output_id").range
        limits = [(self.low, self.high), *([made] if made else [])]
        limits = [one for one in limits if one != (-math.inf, math.inf)]
        if not limits:
            return compute

        def run(*inputs: Tensor) -> Tensor:
            result = compute(*inputs)
            for low, high in limits:
                result = result.clamp(low, high)
            return result

        return run


def _unary(compute: Compute) -> Callable[[Node], tuple[Compute, list[Value]]]:
    return lambda node: (compute, [node.value("input_id")])


def _binary(compute: Compute) -> Callable[[Node], tuple[Compute, list[Value]]]:
    return lambda node: (compute, [node.value("input1_id"), node.value("input2_id")])


def _moves(
    make: Callable[[Node], Compute], *, inputs: int = 0
) -> Callable[[Node], tuple[Compute, list[Value]]]:
    """An operator that moves numbers: XNNPACK copies integers, so their scales have to agree."""

    def compiled(node: Node) -> tuple[Compute, list[Value]]:
        names = [f"input{one}_id" for one in range(1, inputs + 1)] or ["input_id"]
        read, made = [node.value(name) for name in names], node.value("output_id")
        if made.kind in LIMITS and any(one.layout != made.layout for one in read):
            raise RefusedError("it moves integers of one scale to those of another")
        return make(node), read

    return compiled


def _transpose(node: Node) -> Compute:
    order = list(node.perm)
    if sorted(order) != list(range(node.num_dims)):
        raise RefusedError(f"it permutes axes by {order}")
    return lambda x: x.permute(order)


def _reshape(node: Node) -> Compute:
    shape = [size or -1 for size in node.new_shape]
    if shape.count(-1) > 1 or len(shape) != node.num_dims:
        raise RefusedError(f"its new shape is {list(node.new_shape)}")
    return lambda x: x.reshape(shape)


def _slice(node: Node) -> Compute:
    places = list(zip(node.offsets, node.sizes, strict=True))
    if not all(size for _, size in places):
        raise RefusedError(f"it slices to {list(node.sizes)}")

    def run(x: Tensor) -> Tensor:
        for axis, (offset, size) in enumerate(places):
            x = x.narrow(axis, offset, size)
        return x

    return run


def _pad(node: Node) -> Compute:
    sides = [*zip(node.pre_paddings, node.post_paddings, strict=True)]
    flat = [size for pair in reversed(sides) for size in pair]
    return lambda x: F.pad(x, flat, value=node.padding_value)


def _concatenate(node: Node) -> Compute:
    return lambda *parts: torch.cat(parts, node.axis)


def _linear(node: Node) -> tuple[Compute, list[Value]]:
    """x [...,K] times weight' [K,N], plus bias [N]; the weight may be an activation, too."""
    weight, bias = node.value("filter_id"), node.optional("bias_id")
    transposed = node.flags == TRANSPOSED_WEIGHTS
    if weight.constant is None:
        if bias is not None and bias.kind != "fp32":
            raise RefusedError(f"the bias {bias.index} is {bias.kind}")
        read = [node.value("input1_id"), weight, *([bias] if bias else [])]
        return lambda x, w, b=None: F.linear(x, w.t() if transposed else w, b), read
    matrix = weight.constant.t() if transposed else weight.constant
    addend = node.bias()
    return lambda x: F.linear(x, matrix, addend), [node.value("input1_id")]


def _convolution(node: Node) -> tuple[Compute, list[Value]]:
    weight = node.weight()
    outputs = node.groups * node.group_output_channels
    kernel = (node.kernel_height, node.kernel_width)
    if node.kind == "XNNDepthwiseConv2d":
        _check_weight(weight, (1, *kernel, outputs))
        kernels = weight.permute(3, 0, 1, 2)
    else:
        _check_weight(weight, (outputs, *kernel, node.group_input_channels))
        kernels = weight.permute(0, 3, 1, 2)
    bias, pad, sides = node.bias(), *_padding(node)
    stride = (node.subsampling_height, node.subsampling_width)
    dilation = (node.dilation_height, node.dilation_width)
    groups = node.groups

    def run(x: Tensor) -> Tensor:
        x = F.pad(x.permute(0, 3, 1, 2), pad) if any(pad) else x.permute(0, 3, 1, 2)
        return F.conv2d(x, kernels, bias, stride, sides, dilation, groups).permute(0, 2, 3, 1)

    return run, [node.value("input1_id")]


def _deconvolution(node: Node) -> tuple[Compute, list[Value]]:
    weight = node.weight()
    height, width, depth = node.kernel_height, node.kernel_width, node.group_input_channels
    outputs, groups = node.group_output_channels, node.groups
    _check_weight(weight, (groups * outputs, height, width, depth))
    split = weight.view(groups, outputs, height, width, depth)
    kernels = split.permute(0, 4, 1, 2, 3).reshape(groups * depth, outputs, height, width)
    bias, pad, sides = node.bias(), *_padding(node)
    if any(pad):
        raise RefusedError("it is padded otherwise on one side than on the other")
    stride = (node.subsampling_height, node.subsampling_width)
    dilation = (node.dilation_height, node.dilation_width)
    adjustment = (node.adjustment_height, node.adjustment_width)

    def run(x: Tensor) -> Tensor:
        made = F.conv_transpose2d(
            x.permute(0, 3, 1, 2), kernels, bias, stride, sides, adjustment, groups, dilation
        )
        return made.permute(0, 2, 3, 1)

    return run, [node.value("input1_id")]


def _check_weight(weight: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(weight.shape) != wanted:
        raise RefusedError(f"its weight is {list(weight.shape)}, its attributes say {list(wanted)}")


def _padding(node: Node) -> tuple[tuple[int, ...], tuple[int, int]]:
    """What is padded beforehand (left, right, top, bottom), and alike on both sides."""
    top, right, bottom, left = (
        getattr(node, f"padding_{side}") for side in ("top", "right", "bottom", "left")
    )
    if (top, left) == (bottom, right):
        return (0, 0, 0, 0), (top, left)
    return (left, right, top, bottom), (0, 0)


def _pooling(node: Node) -> tuple[Compute, list[Value]]:
    """The largest, or the mean of those that are no padding."""
    pad, sides = _padding(node)
    if any(pad):
        raise RefusedError("it is padded otherwise on one side than on the other")
    kernel = (node.pooling_height, node.pooling_width)
    stride = (node.stride_height, node.stride_width)
    dilation = (node.dilation_height, node.dilation_width)

    def run(x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        if node.kind == "XNNMaxPooling2d":
            made = F.max_pool2d(x, kernel, stride, sides, dilation)
        else:
            made = F.avg_pool2d(x, kernel, stride, sides, count_include_pad=False)
        return made.permute(0, 2, 3, 1)

    return run, [node.value("input_id")]


def _global_mean(node: Node) -> tuple[Compute, list[Value]]:
    keep = node.flags == KEEP_DIMS
    return lambda x: x.mean((1, 2), keepdim=keep), [node.value("input_id")]


def _same(x: Tensor) -> Tensor:
    return x


_COMPILERS: Mapping[str, Callable[[Node], tuple[Compute, list[Value]]]] = {
    "XNNAbs": _unary(torch.abs),
    "XNNAdd": _binary(torch.add),
    "XNNAvgPooling2d": _pooling,
    "XNNBatchMatrixMultiply": _binary(torch.matmul),
    "XNNCeiling": _unary(torch.ceil),
    "XNNClamp": _unary(_same),
    **{f"XNNConcatenate{n}": _moves(_concatenate, inputs=n) for n in range(2, 6)},
    "XNNConv2d": _convolution,
    "XNNConvTranspose2d": _deconvolution,
    "XNNConvert": _unary(_same),
    "XNNCopy": _moves(lambda _: _same),
    "XNNCos": _unary(torch.cos),
    "XNNDepthwiseConv2d": _convolution,
    "XNNDiv": _binary(torch.div),
    "XNNExp": _unary(torch.exp),
    "XNNFloor": _unary(torch.floor),
    "XNNFullyConnected": _linear,
    "XNNGelu": _unary(F.gelu),
    "XNNGlobalAvgPooling2d": _global_mean,
    "XNNHardswish": _unary(F.hardswish),
    "XNNLeakyReLU": lambda node: (
        lambda x: F.leaky_relu(x, node.negative_slope),
        [node.value("input_id")],
    ),
    "XNNLog": _unary(torch.log),
    "XNNMaxPooling2d": _pooling,
    "XNNMaximum": _binary(torch.maximum),
    "XNNMinimum": _binary(torch.minimum),
    "XNNMultiply": _binary(torch.mul),
    "XNNNegate": _unary(torch.neg),
    "XNNPReLU": _binary(lambda x, slope: torch.where(x < 0, x * slope, x)),
    "XNNReciprocalSquareRoot": _unary(torch.rsqrt),
    "XNNSigmoid": _unary(torch.sigmoid),
    "XNNSin": _unary(torch.sin),
    "XNNSoftmax": _unary(lambda x: torch.softmax(x, -1)),
    "XNNSquare": _unary(torch.square),
    "XNNSquareRoot": _unary(torch.sqrt),
    "XNNStaticConstantPad": _moves(_pad),
    "XNNStaticReshape": _moves(_reshape),
    "XNNStaticSlice": _moves(_slice),
    "XNNStaticTranspose": _moves(_transpose),
    "XNNSubtract": _binary(torch.sub),
    "XNNTanh": _unary(torch.tanh),
}
"""A node's kind in XNNPACK's schema -> what it computes, and which values it reads."""

_FLAGS: Mapping[str, tuple[int, ...]] = {
    "XNNAvgPooling2d": (0, KEEP_DIMS),
    "XNNFullyConnected": (0, TRANSPOSED_WEIGHTS),
    "XNNGlobalAvgPooling2d": (0, KEEP_DIMS),
    "XNNMaxPooling2d": (0, KEEP_DIMS),
}
"""The flags that a node may have; any other: 0 alone."""


def compile_node(node: Node) -> tuple[Compute, list[Value]]:
    """What a node computes of the values that it reads. Raises RefusedError for unknown ones."""
    if node.kind not in _COMPILERS:
        raise RefusedError("no such operator is known")
    if node.flags not in _FLAGS.get(node.kind, (0,)):
        raise RefusedError(f"it has the flags {node.flags:#x}")
    compute, read = _COMPILERS[node.kind](node)
    return node.limited(compute), read
