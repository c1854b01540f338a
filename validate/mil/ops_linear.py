"""Convolutions, matrix products and attention. Sums are float32."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .node import Kernel, Node

_CONV: dict[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def same_padding(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], *, lower: bool
) -> list[int]:
    """Before and after each dimension, so that ceil(size / stride) windows fit.

    `kernel` includes dilation. An odd one goes after, or before where `lower`. (coremltools'
    description of `same` has another formula beside this one; its shape inference and TensorFlow,
    which the name is from, have this.)
    """
    pads = []
    for size, width, stride in zip(sizes, kernel, strides, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + width - size)
        before = (total + 1) // 2 if lower else total // 2
        pads += [before, total - before]
    return pads


def spatial_pad(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the last dimensions; `pads` are before and after each, first dimension first."""
    if not any(pads):
        return x
    order = [pads[i + j] for i in range(len(pads) - 2, -2, -2) for j in (0, 1)]
    return functional.pad(x, order, value=value)


def _conv(node: Node) -> Kernel:
    rank = len(node.ref("x").type.shape) - 2
    convolve = _CONV[rank]
    weight = node.ref("weight").type.shape[2:]
    strides = tuple(node.numbers("strides", [1] * rank))
    dilations = tuple(node.numbers("dilations", [1] * rank))
    groups = int(node.number("groups", 1))
    kind = node.text("pad_type", "valid")
    pads = node.numbers("pad", [0] * (2 * rank)) if kind == "custom" else [0] * (2 * rank)
    if kind not in ("custom", "valid", "same", "same_lower") or len(pads) != 2 * rank:
        raise node.error(f"has the padding {kind!r} {pads}")
    operands = ["x", "weight", *(["bias"] if node.has("bias") else [])]
    if kind.startswith("same"):
        lower = kind == "same_lower"
        kernel = [(size - 1) * step + 1 for size, step in zip(weight, dilations, strict=True)]

        def run_same(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            padded = spatial_pad(x, same_padding(x.shape[2:], kernel, strides, lower=lower))
            return convolve(padded, weight, bias, strides, 0, dilations, groups)

        return node.kernel(run_same, *operands)
    if pads[::2] == pads[1::2]:
        padding = tuple(pads[::2])
        return node.kernel(
            lambda x, weight, bias=None: convolve(
                x, weight, bias, strides, padding, dilations, groups
            ),
            *operands,
        )
    return node.kernel(
        lambda x, weight, bias=None: convolve(
            spatial_pad(x, pads), weight, bias, strides, 0, dilations, groups
        ),
        *operands,
    )


def _conv_transpose(node: Node) -> Kernel:
    rank = len(node.ref("x").type.shape) - 2
    convolve = _CONV_TRANSPOSE[rank]
    strides = tuple(node.numbers("strides", [1] * rank))
    dilations = tuple(node.numbers("dilations", [1] * rank))
    groups = int(node.number("groups", 1))
    kind = node.text("pad_type", "valid")
    pads = node.numbers("pad", [0] * (2 * rank)) if kind == "custom" else [0] * (2 * rank)
    wanted = node.numbers("output_shape", [])[-rank:]
    if kind not in ("custom", "valid", "same") or len(pads) != 2 * rank:
        raise node.error(f"has the padding {kind!r} {pads}")

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        full = convolve(x, weight, None, strides, 0, 0, groups, dilations)
        crops = []
        for axis in range(rank):
            before, after = pads[2 * axis], pads[2 * axis + 1]
            size = full.shape[axis + 2]
            if kind == "same":
                total = size - x.shape[axis + 2] * strides[axis]
                before, after = total // 2, total - total // 2
            if wanted:
                after = size - before - wanted[axis]
            crops += [-before, -after]
        cropped = spatial_pad(full, crops)
        return cropped if bias is None else cropped + bias.reshape(-1, *[1] * rank)

    return node.kernel(run, "x", "weight", *(["bias"] if node.has("bias") else []))


def _linear(node: Node) -> Kernel:
    operands = ["x", "weight", *(["bias"] if node.has("bias") else [])]
    return node.kernel(functional.linear, *operands)


def _matmul(node: Node) -> Kernel:
    flip_x = bool(node.number("transpose_x", False)) and len(node.ref("x").type.shape) > 1
    flip_y = bool(node.number("transpose_y", False)) and len(node.ref("y").type.shape) > 1

    def run(x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x.mT if flip_x else x, y.mT if flip_y else y)

    return node.kernel(run if flip_x or flip_y else torch.matmul, "x", "y")


def _einsum(node: Node) -> Kernel:
    equation = node.text("equation")
    # With one operand, or nothing to sum, einsum may give a view.
    return node.kernel(lambda *values: torch.einsum(equation, *values).clone(), "values")


def _attention(node: Node) -> Kernel:
    """softmax(q k^T / sqrt(E) + mask) v, where a mask of truth values keeps or drops a key."""
    if not node.has("attn_mask"):
        return node.kernel(functional.scaled_dot_product_attention, "query", "key", "value")
    mask_is_bool = node.ref("attn_mask").type.dtype.name == "bool"

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        if mask_is_bool:
            key, value, mask = _seen(key, value, mask)
        sees = mask.any(-1) if mask_is_bool else mask.amax(-1) > -math.inf
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        # By the formula, a row that sees no key divides 0 by 0; PyTorch makes it 0.
        return out if bool(sees.all()) else torch.where(sees.unsqueeze(-1), out, math.nan)

    return node.kernel(run, "query", "key", "value", "attn_mask")


def _seen(key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leave out the last keys that no row sees: most of a cache that is yet to be filled.

    Their weight is 0, which changes nothing unless a number there is infinite or none.
    """
    columns = mask.reshape(-1, mask.shape[-1]).any(0).nonzero()
    end = int(columns[-1]) + 1 if columns.numel() else mask.shape[-1]
    unseen = key[..., end:, :].sum() + value[..., end:, :].sum()
    if mask.shape[-1] != key.shape[-2] or not math.isfinite(unseen):
        return key, value, mask
    return key[..., :end, :], value[..., :end, :], mask[..., :end]


OPERATIONS: dict[str, Callable[[Node], Kernel]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "einsum": _einsum,
    "linear": _linear,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
}
