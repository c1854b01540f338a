"""The tensors of an XNNPACK graph: what they are, and constants as real numbers.

Integers stand for real numbers here: a weight is integer times scale, an activation of a static
range is any number within it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...targets.executorch_types import Delegate
from ...targets.executorch_xnn import xnn_constant, xnn_kind
from .errors import RefusedError

INPUT, OUTPUT = 1, 2
"""Flags of values that are a delegate's arguments."""

LIMITS = {"qint8": (-128, 127), "quint8": (0, 255)}
"""Types of static activations -> least and greatest integer."""
INT4_ZERO = 8
"""What is added to integers of 4 bits to store them."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor of a graph; `kind` is its data type as the schema names it behind the prefix.

    `scale` is a number or, per channel, a tensor with the axis `channel_axis`; `constant` are
    the real numbers of a weight, or the integers of a bias, whose scale its operator gives.
    """

    index: int
    kind: str
    dims: tuple[int, ...]
    flags: int
    argument: int
    scale: float | Tensor | None = None
    zero_point: int = 0
    channel_axis: int = 0
    constant: Tensor | None = None

    @property
    def range(self) -> tuple[float, float] | None:
        """Least and greatest real number of a static activation; None: it has no limits."""
        if self.kind not in LIMITS or not isinstance(self.scale, float):
            return None
        low, high = ((limit - self.zero_point) * self.scale for limit in LIMITS[self.kind])
        return low, high

    @property
    def layout(self) -> tuple[Any, ...]:
        """What has to be the same on both sides of an operator that only moves numbers."""
        return self.kind, self.scale, self.zero_point


def read_value(delegate: Delegate, graph: Any, entry: Any) -> Value:
    """A value of the graph. Raises RefusedError for types that are not XNNPACK's of ours."""
    union = entry.xvalue_union
    if union is None:
        raise RefusedError("it has a value of no kind")
    tensor = union.fields.get("tensor_value", union)
    value = Value(
        index=tensor.id_out,
        kind=xnn_kind(tensor),
        dims=tuple(tensor.dims),
        flags=tensor.flags,
        argument=tensor.external_id,
    )
    if tensor.flags not in (0, INPUT, OUTPUT) or (tensor.flags and tensor.constant_buffer_idx):
        raise RefusedError(f"value {value.index} has the flags {tensor.flags}")
    value = _quantized(delegate, graph, value, union.fields.get("quant_params"))
    if not tensor.constant_buffer_idx:
        return value
    data = xnn_constant(delegate, graph, tensor.constant_buffer_idx)
    return replace(value, constant=_constant(value, data))


def _quantized(delegate: Delegate, graph: Any, value: Value, parameters: Any) -> Value:
    """The value with its scale, where its type has one."""
    kind = parameters.kind if parameters is not None else ""
    if value.kind not in _PARAMETERS.get(kind, ()):
        raise RefusedError(f"value {value.index} is {value.kind} with {kind or 'no scale'}")
    if kind == "PerTensorQuant":
        return replace(
            value,
            scale=float(np.float32(parameters.scale)),
            zero_point=parameters.zero_point,
        )
    if kind not in ("PerChannelQuant", "PerChannelGroupQuant"):
        return value
    if not parameters.scale_buffer_idx:
        raise RefusedError(f"the scales of value {value.index} are not where ExecuTorch has them")
    data = xnn_constant(delegate, graph, parameters.scale_buffer_idx)
    axis = parameters.channel_dim
    if axis not in range(len(value.dims)):
        raise RefusedError(f"value {value.index} has scales along axis {axis}")
    count = value.dims[axis]
    if kind == "PerChannelGroupQuant":
        if len(value.dims) != 2 or axis != 0 or parameters.group_size <= 0:
            raise RefusedError(f"value {value.index} has groups of {parameters.group_size}")
        count = math.prod(value.dims) // parameters.group_size
        if value.dims[1] % parameters.group_size:
            raise RefusedError(f"value {value.index} has groups of {parameters.group_size}")
        scale = _bfloat16(data, count).view(value.dims[0], -1)
    else:
        scale = torch.from_numpy(np.frombuffer(data, np.float32, count).copy())
    if parameters.num_scales != count:
        raise RefusedError(f"value {value.index} has {parameters.num_scales} scales, not {count}")
    return replace(value, scale=scale, channel_axis=axis)


_PARAMETERS = {
    "": ("fp32",),
    "PerTensorQuant": ("qint8", "quint8", "qint32"),
    "PerChannelQuant": ("qcint8", "qcint32", "qcint4"),
    "PerTokenDynamicQuant": ("qdint8",),
    "PerChannelGroupQuant": ("qbint4",),
}
"""What says how a tensor is quantized -> the types that have it."""


def _bfloat16(data: memoryview, count: int) -> Tensor:
    bits = np.frombuffer(data, np.uint16, count).astype(np.uint32) << 16
    return torch.from_numpy(bits.view(np.float32))


def _constant(value: Value, data: memoryview) -> Tensor:
    """Real numbers of a weight; integers of a bias (float64)."""
    count = math.prod(value.dims)
    if value.kind == "fp32":
        return torch.from_numpy(np.frombuffer(data, np.float32, count).copy()).view(value.dims)
    if value.kind in ("qint32", "qcint32"):
        integers = torch.from_numpy(np.frombuffer(data, np.int32, count).copy())
        return integers.double().view(value.dims)
    if value.kind in ("qcint4", "qbint4"):
        integers = _nibbles(value, data)
    elif value.kind == "quint8":
        integers = torch.from_numpy(np.frombuffer(data, np.uint8, count).copy())
    else:
        integers = torch.from_numpy(np.frombuffer(data, np.int8, count).copy())
    weights = integers.view(value.dims).float() - value.zero_point
    if isinstance(value.scale, float):
        return weights * value.scale
    if value.scale is None:
        raise RefusedError(f"the constant {value.index} is {value.kind}")
    if value.kind == "qbint4":
        rows, groups = value.scale.shape
        return (weights.view(rows, groups, -1) * value.scale[:, :, None]).view(value.dims)
    axes = [1] * len(value.dims)
    axes[value.channel_axis] = -1
    return weights * value.scale.view(axes)


def _nibbles(value: Value, data: memoryview) -> Tensor:
    """Two integers to a byte, the first of them low; rows are whole bytes."""
    if len(value.dims) != 2:
        raise RefusedError(f"value {value.index} has 4-bit integers of {len(value.dims)} axes")
    rows, width = value.dims
    packed = np.frombuffer(data, np.uint8, rows * -(-width // 2)).reshape(rows, -1)
    both = np.stack([packed & 15, packed >> 4], -1).reshape(rows, -1)[:, :width]
    return torch.from_numpy(both.astype(np.int8) - INT4_ZERO)


def bias_of(bias: Value, x: Value, weight: Value) -> Tensor:
    """A bias [O] as real numbers: integers are in units of the input's scale times the weight's.

    That is how XNNPACK adds them, whatever the scale is that is written beside them.
    """
    if bias.constant is None:
        raise RefusedError(f"the bias {bias.index} is no constant")
    if bias.kind == "fp32":
        return bias.constant
    if not isinstance(x.scale, float) or weight.scale is None:
        raise RefusedError(f"the bias {bias.index} is {bias.kind} of inputs without a scale")
    scale = torch.as_tensor(weight.scale, dtype=torch.float64) * x.scale
    return (bias.constant * scale).float()
