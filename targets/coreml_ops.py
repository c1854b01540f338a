"""How each of PyTorch's operators in our graphs is written in MIL (iOS 18's operator set)."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from ..quantize.quiet import quiet_import
from .coreml_lowering import Translation, Translator, Var, mil_type, numpy_type, traced_type

with quiet_import():
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - its name everywhere
    from coremltools.converters.mil.mil import types

_Pair = Sequence[int] | int


def _argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def _pair(value: _Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _convolution(t: Translator, node: Node) -> Var:
    x, weight, bias = node.args[0], node.args[1], _argument(node, 2, "bias")
    stride, padding = _argument(node, 3, "stride", 1), _argument(node, 4, "padding", 0)
    dilation, groups = _argument(node, 5, "dilation", 1), _argument(node, 6, "groups", 1)
    above, left = _pair(padding)
    given = {} if bias is None else {"bias": t.var(bias)}
    return mb.conv(
        x=t.var(x),
        weight=t.var(weight),
        strides=_pair(stride),
        pad_type="custom",
        pad=(above, above, left, left),
        dilations=_pair(dilation),
        groups=groups,
        name=node.name,
        **given,
    )


def _linear(t: Translator, node: Node) -> Var:
    bias = _argument(node, 2, "bias")
    given = {} if bias is None else {"bias": t.var(bias)}
    return mb.linear(x=t.var(node.args[0]), weight=t.var(node.args[1]), name=node.name, **given)


def _binary(name: str) -> Translation:
    def write(t: Translator, node: Node) -> Var:
        if _argument(node, 2, "alpha", 1) != 1 or node.kwargs.get("rounding_mode"):
            raise NotImplementedError(f"{node.format_node()}")
        dtype = traced_type(node)
        x, y = (t.var(a, dtype) for a in node.args[:2])
        return getattr(mb, name)(x=x, y=y, name=node.name)

    return write


def _unary(name: str, **options: Any) -> Translation:
    def write(t: Translator, node: Node) -> Var:
        return getattr(mb, name)(x=t.var(node.args[0]), name=node.name, **options)

    return write


def _rsqrt(t: Translator, node: Node) -> Var:
    # MIL adds 1e-12 to x unless told otherwise.
    nothing = np.array(0, numpy_type(traced_type(node)))[()]
    return mb.rsqrt(x=t.var(node.args[0]), epsilon=nothing, name=node.name)


def _reciprocal(t: Translator, node: Node) -> Var:
    # MIL's `inverse` adds 1e-4 to x unless told otherwise, so this is a division.
    return mb.real_div(x=t.var(1, traced_type(node)), y=t.var(node.args[0]), name=node.name)


def _gelu(t: Translator, node: Node) -> Var:
    if node.kwargs.get("approximate", "none") != "none":
        raise NotImplementedError(f"{node.format_node()}")
    return mb.gelu(x=t.var(node.args[0]), mode="EXACT", name=node.name)


def _reduce(name: str) -> Translation:
    def write(t: Translator, node: Node) -> Var:
        axes = node.args[1]
        return getattr(mb, name)(
            x=t.var(node.args[0]),
            axes=[axes] if isinstance(axes, int) else list(axes),  # type: ignore[arg-type]
            keep_dims=bool(_argument(node, 2, "keepdim", False)),
            name=node.name,
        )

    return write


def _clamp(t: Translator, node: Node) -> Var:
    low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
    x, dtype = t.var(node.args[0]), traced_type(node)
    if low is not None:
        x = mb.maximum(x=x, y=t.var(low, dtype), name=node.name if high is None else None)
    if high is not None:
        x = mb.minimum(x=x, y=t.var(high, dtype), name=node.name)
    return x


def _cast(t: Translator, node: Node) -> Var:
    wanted = mil_type(traced_type(node))
    x = t.var(node.args[0])
    if x.dtype == wanted:
        return x
    return mb.cast(x=x, dtype=types.builtin_to_string(wanted), name=node.name)


def _reshape(t: Translator, node: Node) -> Var:
    shape = [int(size) for size in node.meta["val"].shape]
    return mb.reshape(x=t.var(node.args[0]), shape=shape, name=node.name)


def _transpose(t: Translator, node: Node) -> Var:
    order = list(range(node.meta["val"].dim()))
    first, second = (int(a) for a in node.args[1:3])  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return mb.transpose(x=t.var(node.args[0]), perm=order, name=node.name)


def _permute(t: Translator, node: Node) -> Var:
    return mb.transpose(x=t.var(node.args[0]), perm=list(node.args[1]), name=node.name)  # type: ignore[arg-type]


def _unsqueeze(t: Translator, node: Node) -> Var:
    return mb.expand_dims(x=t.var(node.args[0]), axes=[node.args[1]], name=node.name)


def _unbind(t: Translator, node: Node) -> tuple[Var, ...]:
    axis = int(_argument(node, 1, "dim", 0))
    parts = mb.split(x=t.var(node.args[0]), num_splits=len(node.meta["val"]), axis=axis)
    return tuple(mb.squeeze(x=part, axes=[axis]) for part in parts)


def _getitem(t: Translator, node: Node) -> Var:
    values = t.values[node.args[0]]  # type: ignore[index]
    return None if values is None else values[node.args[1]]


def _attention(t: Translator, node: Node) -> Var:
    if len(node.args) > 3 or node.kwargs:
        raise NotImplementedError("only plain attention is translated; see cached_attention")
    query, key, value = (t.var(a) for a in node.args)
    return mb.scaled_dot_product_attention(query=query, key=key, value=value, name=node.name)


def _nothing(_: Translator, __: Node) -> None:
    return None


def _rows(t: Translator, node: Node) -> Var:
    """`aten.embedding(table, ids)`."""
    return mb.gather(x=t.var(node.args[0]), indices=t.var(node.args[1]), axis=0, name=node.name)


TRANSLATIONS: Mapping[str, Translation] = {
    "aten.conv2d.default": _convolution,
    "aten.linear.default": _linear,
    "aten.embedding.default": _rows,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.add.Tensor": _binary("add"),
    "aten.sub.Tensor": _binary("sub"),
    "aten.mul.Tensor": _binary("mul"),
    "aten.div.Tensor": _binary("real_div"),
    "aten.abs.default": _unary("abs"),
    "aten.relu.default": _unary("relu"),
    "aten.sigmoid.default": _unary("sigmoid"),
    "aten.silu.default": _unary("silu"),
    "aten.gelu.default": _gelu,
    "aten.rsqrt.default": _rsqrt,
    "aten.reciprocal.default": _reciprocal,
    "aten.clamp.default": _clamp,
    "aten.mean.dim": _reduce("reduce_mean"),
    "aten.amax.default": _reduce("reduce_max"),
    "aten.to.dtype": _cast,
    "aten._to_copy.default": _cast,
    "aten.reshape.default": _reshape,
    "aten.view.default": _reshape,
    "aten.flatten.using_ints": _reshape,
    "aten.transpose.int": _transpose,
    "aten.permute.default": _permute,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.unbind.int": _unbind,
    "aten._assert_tensor_metadata.default": _nothing,
    str(operator.getitem): _getitem,
}
"""Operator -> how it is written."""
