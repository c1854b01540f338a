"""What operators of an ExecuTorch program compute, in FLOPs: see `delegation`."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..exporter.errors import ExportError
from ..targets.executorch_model import EXPORT_HINT

if TYPE_CHECKING:
    from ..targets.executorch_file import Call

Sizes = tuple[int, ...]

MOVES = frozenset(
    {
        *("Convert", "Copy", "StaticReshape", "StaticTranspose", "StaticSlice"),
        *("StaticConstantPad", *(f"Concatenate{count}" for count in range(2, 6))),
    }
)
"""Nodes of XNNPACK that compute nothing, by their names in its schema less "XNN"."""

_FREE = (
    "alias arange argmax as_strided bitwise_and bitwise_not bitwise_or cat clone contiguous copy "
    "detach embedding empty eq et_copy_index et_view expand flip full gather ge gt index index_put "
    "index_select le lift_fresh logical_and logical_not logical_or lt masked_fill narrow ne ones "
    "permute repeat reshape scalar_tensor scatter select select_scatter slice slice_scatter split "
    "split_with_sizes squeeze stack sym_numel sym_size t to to_dim_order transpose tril triu "
    "unbind unsqueeze view where zeros"
)
FREE = frozenset(_FREE.split())
"""Portable operators that move, convert, compare, choose or look up, by `_base`'s names."""

_PRODUCTS = ("mm", "bmm", "matmul", "linear", "addmm", "baddbmm", "mv", "dot")


def xnn_operators(graph: Any) -> Iterator[tuple[str, int]]:
    """(kind, FLOPs) of each node of an `XNNGraph`. Raises ExportError for one that refers nowhere.

    Tensors are NHWC, a convolution's filter [out, kH, kW, in / groups]; a linear layer's inputs are
    the last axis.
    """
    sizes: dict[int, Sizes] = {}
    for value in graph.xvalues:
        tensor = getattr(value.xvalue_union, "tensor_value", value.xvalue_union)
        sizes[tensor.id_out] = tuple(tensor.dims)
    for entry in graph.xnodes:
        node = entry.xnode_union
        kind = type(node).__name__.removeprefix("XNN")
        try:
            yield kind, _xnn_flops(kind, node, sizes)
        except (KeyError, IndexError) as error:
            raise ExportError(
                f"A node {kind} of XNNPACK's graph has a tensor that is not in it: {error}.",
                EXPORT_HINT,
            ) from error


def _xnn_flops(kind: str, node: Any, sizes: Mapping[int, Sizes]) -> int:
    if kind in MOVES:
        return 0
    if kind in _XNN_FLOPS:
        return _XNN_FLOPS[kind](node, sizes)
    return math.prod(sizes[node.output_id])


def _convolution(node: Any, sizes: Mapping[int, Sizes]) -> int:
    window: int = node.kernel_height * node.kernel_width
    return 2 * math.prod(sizes[node.output_id]) * window * int(node.group_input_channels)


def _transposed_convolution(node: Any, sizes: Mapping[int, Sizes]) -> int:
    window: int = node.kernel_height * node.kernel_width
    return 2 * math.prod(sizes[node.input1_id]) * window * int(node.group_output_channels)


def _product(node: Any, sizes: Mapping[int, Sizes]) -> int:
    return 2 * math.prod(sizes[node.output_id]) * sizes[node.input1_id][-1]


def _attention(node: Any, sizes: Mapping[int, Sizes]) -> int:
    return 4 * math.prod(sizes[node.query_id]) * sizes[node.key_id][-2]


def _pooling(node: Any, sizes: Mapping[int, Sizes]) -> int:
    given = node.output_value_id if hasattr(node, "output_value_id") else node.output_id
    return math.prod(sizes[given]) * int(node.pooling_height * node.pooling_width)


_XNN_FLOPS: dict[str, Callable[[Any, Mapping[int, Sizes]], int]] = {
    **dict.fromkeys(("Conv2d", "DepthwiseConv2d"), _convolution),
    "ConvTranspose2d": _transposed_convolution,
    **dict.fromkeys(("FullyConnected", "BatchMatrixMultiply"), _product),
    "ScaledDotProductAttention": _attention,
    **dict.fromkeys(("AvgPooling2d", "MaxPooling2d", "ArgMaxPooling2d"), _pooling),
    "GlobalAvgPooling2d": lambda node, sizes: math.prod(sizes[node.input_id]),
}
"""What counts other than one for every number that the node gives."""


def portable_operator(call: "Call") -> tuple[str, int]:
    """(kind, FLOPs) of an operator that no delegate has; the kind is its name in the file.

    An operator that this doesn't know counts as arithmetic.
    """
    base = _base(call.operator)
    tensors = [one for one in call.args if hasattr(one, "sizes")]
    if base in FREE or call.operator.startswith("executorch_prim::") or not tensors:
        return call.operator, 0
    given = math.prod(tensors[-1].sizes)
    if "conv" in base and len(tensors) > 2:
        transposed = next((one for one in call.args if isinstance(one, bool)), False)
        taken, weight = tensors[0].sizes, tensors[1].sizes
        return call.operator, 2 * (math.prod(taken) if transposed else given) * math.prod(
            weight[1:]
        )
    if base in ("addmm", "baddbmm"):
        tensors = tensors[1:]  # the first is what is added
    if base in _PRODUCTS:
        return call.operator, 2 * given * (tensors[0].sizes or (1,))[-1]
    return call.operator, given


def _base(operator: str) -> str:
    """`aten::_to_dim_order_copy.out` -> `to_dim_order`: one name for all forms of an operator."""
    name = operator.rpartition("::")[2].partition(".")[0].strip("_")
    return name.removesuffix("_copy") if name != "copy" else name
