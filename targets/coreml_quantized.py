"""Integer and palettized weights as Core ML's `constexpr` operators; static activations.

The very integers, scales, indices and tables of the program are what is stored.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from ..quantize.ops import FLOAT_ACTIVATIONS
from ..quantize.quiet import quiet_import
from ..quantize.ranges import (
    DEQUANTIZE_TENSOR,
    DEQUANTIZE_WEIGHT,
    LOOKUP,
    QUANTIZE,
    QUANTIZED_LINEAR,
)
from .coreml_lowering import Translation, Translator, Var, numpy, numpy_type, traced_type

with quiet_import():
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - its name everywhere
    from coremltools.converters.mil.mil import types


def _stored_as(integers: Tensor, kind: str) -> NDArray[Any]:
    """Small integers in the NumPy type that coremltools packs as `kind`, e.g. "int4"."""
    found: NDArray[Any] = numpy(integers).astype(
        types.nptype_from_builtin(types.string_to_builtin(kind))
    )
    return found


def _dequantized(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, name: str
) -> Var:
    """(weight - zero_point) * scale as one constant operator; scale has the weight's rank."""
    kind = f"int{bits}"
    given = {} if zero_point is None else {"offset": _stored_as(zero_point, kind)}
    return mb.constexpr_blockwise_shift_scale(
        data=_stored_as(weight, kind), scale=numpy(scale), name=name, **given
    )


def _arguments(node: Node) -> tuple[Any, ...]:
    return node.args


def _quantized_linear(t: Translator, node: Node) -> Var:
    x, weight, scale, zero_point, bias, bits, activation_group = _arguments(node)
    if activation_group != FLOAT_ACTIVATIONS:
        raise NotImplementedError("Core ML rounds no activations at run time")
    zeros = None if zero_point is None else t.tensor(zero_point)
    given = {} if bias is None else {"bias": t.var(bias)}
    weights = _dequantized(
        t.tensor(weight),
        t.tensor(scale),
        zeros,
        int(bits),
        f"{node.name}_weight",
    )
    return mb.linear(x=t.var(x), weight=weights, name=node.name, **given)


def _quantized_embedding(t: Translator, node: Node) -> Var:
    ids, weight, scale, zero_point, bits = _arguments(node)
    zeros = None if zero_point is None else t.tensor(zero_point)
    table = _dequantized(
        t.tensor(weight),
        t.tensor(scale),
        zeros,
        int(bits),
        f"{node.name}_table",
    )
    return mb.gather(x=table, indices=t.var(ids), axis=0, name=node.name)


def _per_channel(t: Translator, node: Node) -> Var:
    """A stored tensor with one scale for each index along an axis."""
    integers, scale, zeros = (t.tensor(a) for a in node.args[:3])
    axis = _arguments(node)[3]
    if zeros.any():
        raise NotImplementedError(f"{node.name}: zero points of weights")
    if integers.dtype == torch.int32:  # a bias, for which Core ML has no integers
        return mb.const(val=(integers * scale).to(traced_type(node)).numpy(), name=node.name)
    shape = [1] * integers.dim()
    shape[axis] = -1
    scale = scale.to(traced_type(node)).reshape(shape)
    return _dequantized(integers, scale, None, 8, node.name)


def _range_of(t: Translator, node: Node, dtype: torch.dtype) -> dict[str, Any]:
    scale, zero_point = node.args[1:3]
    return {
        "scale": np.array(scale, numpy_type(dtype))[()],
        "zero_point": np.array(zero_point, np.uint8)[()],
    }


def _quantize(t: Translator, node: Node) -> Var:
    x = t.var(node.args[0])
    if tuple(node.args[3:6]) != (0, 255, torch.uint8):
        raise NotImplementedError(f"{node.format_node()}")
    dtype = traced_type(_arguments(node)[0])
    return mb.quantize(input=x, output_dtype="uint8", name=node.name, **_range_of(t, node, dtype))


def _dequantize(t: Translator, node: Node) -> Var:
    return mb.dequantize(
        input=t.var(node.args[0]), name=node.name, **_range_of(t, node, traced_type(node))
    )


def _lookup(t: Translator, node: Node) -> Var:
    """indices [N,...], table [G,2^bits] -> weight [N,...]."""
    return _looked_up(t.tensor(node.args[0]), t.tensor(node.args[1]), node.name)


def _looked_up(indices: Tensor, table: Tensor, name: str) -> Var:
    groups, entries = table.shape
    bits = int(np.log2(entries))
    lut = numpy(table).reshape(groups, *[1] * (indices.dim() - 1), entries, 1)
    return mb.constexpr_lut_to_dense(indices=_stored_as(indices, f"uint{bits}"), lut=lut, name=name)


def _palettized_embedding(t: Translator, node: Node) -> Var:
    ids, indices, table = node.args
    rows = _looked_up(t.tensor(indices), t.tensor(table), f"{node.name}_table")
    return mb.gather(x=rows, indices=t.var(ids), axis=0, name=node.name)


TRANSLATIONS: Mapping[str, Translation] = {
    QUANTIZED_LINEAR: _quantized_linear,
    "fastvlm.quantized_embedding.default": _quantized_embedding,
    LOOKUP: _lookup,
    "fastvlm.palettized_embedding.default": _palettized_embedding,
    QUANTIZE: _quantize,
    DEQUANTIZE_TENSOR: _dequantize,
    DEQUANTIZE_WEIGHT: _per_channel,
}
"""Operator -> how it is written."""
