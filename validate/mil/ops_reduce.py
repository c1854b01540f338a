"""Reductions, normalizations, softmax, sums along an axis and sorting. Inside is float32."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .node import Kernel, Node

Operation = Callable[[Node], Kernel]
_Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduction(function: _Reduce, *, rounds: bool = True) -> Operation:
    """`function(x, axes, keep)`; axes are all where none are given.

    Not `rounds`: the result is one of the numbers given.
    """

    def operation(node: Node) -> Kernel:
        axes = tuple(node.numbers("axes", range(len(node.ref("x").type.shape))))
        keep = bool(node.number("keep_dims", False))
        if node.is_float("x"):
            return node.kernel(lambda x: function(x, axes, keep), "x", rounds=rounds)
        # As numbers, which the result's type cuts to integers.
        return node.kernel(lambda x: function(x.double(), axes, keep), "x")

    return operation


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in axes:
        x = torch.prod(x, axis, keepdim=True)
    return x if keep else x.squeeze(axes)


def _arg(function: Callable[..., Tensor]) -> Operation:
    def operation(node: Node) -> Kernel:
        axis = int(node.number("axis", -1))
        keep = bool(node.number("keep_dims", False))
        return node.kernel(lambda x: function(x, dim=axis, keepdim=keep), "x")

    return operation


def _softmax(node: Node) -> Kernel:
    axis = int(node.number("axis", -1))
    return node.kernel(lambda x: torch.softmax(x, dim=axis), "x")


def _layer_norm(node: Node) -> Kernel:
    rank = len(node.ref("x").type.shape)
    axes = [axis % rank for axis in node.numbers("axes", range(rank))]
    epsilon = float(node.number("epsilon", 1e-5))
    scale = ["gamma"] if node.has("gamma") else []
    shift = ["beta"] if node.has("beta") else []
    if axes == list(range(rank - len(axes), rank)) and (scale or not shift):

        def run_last(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
            return functional.layer_norm(x, x.shape[rank - len(axes) :], gamma, beta, epsilon)

        return node.kernel(run_last, "x", *scale, *shift)
    if axes != sorted(axes):
        raise node.error(f"normalizes the axes {axes}, which are not in order")

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        normal = (x - mean) * torch.rsqrt(variance + epsilon)
        shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
        named = dict(zip(scale + shift, parameters, strict=True))
        if "gamma" in named:
            normal = normal * named["gamma"].reshape(shape)
        return normal + named["beta"].reshape(shape) if "beta" in named else normal

    return node.kernel(run, "x", *scale, *shift)


def _batch_norm(node: Node) -> Kernel:
    epsilon = float(node.number("epsilon", 1e-5))
    optional = [name for name in ("gamma", "beta") if node.has(name)]

    def run(x: Tensor, mean: Tensor, variance: Tensor, *rest: Tensor) -> Tensor:
        named = dict(zip(optional, rest, strict=True))
        return functional.batch_norm(
            x, mean, variance, named.get("gamma"), named.get("beta"), eps=epsilon
        )

    return node.kernel(run, "x", "mean", "variance", *optional)


def _instance_norm(node: Node) -> Kernel:
    epsilon = float(node.number("epsilon", 1e-5))
    optional = [name for name in ("gamma", "beta") if node.has(name)]

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        named = dict(zip(optional, rest, strict=True))
        axes = list(range(2, x.dim()))
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        normal = (x - mean) * torch.rsqrt(variance + epsilon)
        shape = (1, -1, *[1] * len(axes))
        if "gamma" in named:
            normal = normal * named["gamma"].reshape(shape)
        return normal + named["beta"].reshape(shape) if "beta" in named else normal

    return node.kernel(run, "x", *optional)


def _l2_norm(node: Node) -> Kernel:
    """Over the last three dimensions."""
    epsilon = float(node.number("epsilon", 1e-6))
    return node.kernel(
        lambda x: x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon), "x"
    )


def _cumsum(node: Node) -> Kernel:
    axis = int(node.number("axis", 0))
    exclusive = bool(node.number("exclusive", False))
    reverse = bool(node.number("reverse", False))

    def run(x: Tensor) -> Tensor:
        forward = x.flip(axis) if reverse else x
        total = torch.cumsum(forward, axis, dtype=x.dtype)
        if exclusive:
            total = total - forward
        return total.flip(axis) if reverse else total

    return node.kernel(run, "x")


def _argsort(node: Node) -> Kernel:
    axis = int(node.number("axis", -1))
    ascending = bool(node.number("ascending", False))
    return node.kernel(
        lambda x: torch.argsort(x, dim=axis, descending=not ascending, stable=True), "x"
    )


def _topk(node: Node) -> Kernel:
    """Equal values keep their order, as `argsort` does."""
    axis = int(node.number("axis", -1))
    ascending = bool(node.number("ascending", False))
    count = int(node.number("k", 1))
    outputs = len(node.outputs)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        values, indices = torch.sort(x, dim=axis, descending=not ascending, stable=True)
        kept = x.shape[axis] if count < 0 else count
        if kept > x.shape[axis]:
            raise ValueError(f"{kept} of {x.shape[axis]} values")
        return (values.narrow(axis, 0, kept).clone(), indices.narrow(axis, 0, kept))[:outputs]

    return node.kernel(run, "x")


OPERATIONS: dict[str, Operation] = {
    "reduce_l1_norm": _reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "reduce_l2_norm": _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "reduce_log_sum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "reduce_log_sum_exp": _reduction(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "reduce_max": _reduction(lambda x, axes, keep: torch.amax(x, axes, keepdim=keep), rounds=False),
    "reduce_mean": _reduction(lambda x, axes, keep: torch.mean(x, axes, keepdim=keep)),
    "reduce_min": _reduction(lambda x, axes, keep: torch.amin(x, axes, keepdim=keep), rounds=False),
    "reduce_prod": _reduction(_product),
    "reduce_sum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "reduce_sum_square": _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "reduce_argmax": _arg(torch.argmax),
    "reduce_argmin": _arg(torch.argmin),
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "l2_norm": _l2_norm,
    "cumsum": _cumsum,
    "argsort": _argsort,
    "topk": _topk,
}
