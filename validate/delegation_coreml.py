"""What a Core ML delegate of an ExecuTorch program computes, in FLOPs: see `delegation`."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..exporter.scratch import ScratchFolder
from ..targets.coreml_model import MAIN
from ..targets.executorch_coreml_payload import PACKAGE, unpack
from .mil.errors import damaged, foreign
from .mil.package import Package

if TYPE_CHECKING:
    from ..targets.executorch_file import Delegate

Sizes = tuple[int, ...]

_FREE = (
    "argsort band_part cast concat coreml_update_state dequantize equal expand_dims fill fill_like "
    "gather gather_along_axis gather_nd greater greater_equal identity less less_equal logical_and "
    "logical_not logical_or logical_xor non_zero not_equal one_hot pad quantize range_1d "
    "read_state reshape reshape_like reverse scatter select shape slice_by_index slice_by_size "
    "slice_update sliding_windows split squeeze stack tile transpose"
)
FREE = frozenset(_FREE.split())
"""Operations that move, convert, compare, choose or look up."""


def coreml_operators(delegate: "Delegate", longest: int) -> Iterator[tuple[str, int]]:
    """(kind, FLOPs) of each operation of a delegate's package; constants are none.

    Sizes that only a run tells are taken as `longest`. Raises ExportError for a damaged payload.
    """
    with ScratchFolder() as scratch:
        unpack(delegate.processed, scratch, f"{delegate.file.source}, a Core ML delegate,")
        package = Package(scratch / PACKAGE)
        function = package.spec.mlProgram.functions.get(MAIN)
        if function is None:
            raise foreign(package.path, f"has no function '{MAIN}'")
        if function.opset not in function.block_specializations:
            raise damaged(package.model_path, f"has no operations for {function.opset!r}")
        sizes = {one.name: _sizes(one.type, longest) for one in function.inputs}
        for operation in function.block_specializations[function.opset].operations:
            given = [_sizes(one.type, longest) for one in operation.outputs]
            sizes.update(zip((one.name for one in operation.outputs), given, strict=True))
            if operation.type != "const" and not operation.type.startswith("constexpr_"):
                yield operation.type, _flops(operation, sizes, given[0] if given else (0,))


def _sizes(type_: Any, longest: int) -> Sizes:
    """Of a tensor, or of the one in a state; of anything else none."""
    if type_.WhichOneof("type") == "stateType":
        type_ = type_.stateType.wrappedType
    return tuple(
        dim.constant.size if dim.WhichOneof("dimension") == "constant" else longest
        for dim in type_.tensorType.dimensions
    )


def _flops(operation: Any, sizes: Mapping[str, Sizes], out: Sizes) -> int:
    """Of an operation whose first output has the sizes `out`."""
    if operation.type in FREE:
        return 0

    def size_of(parameter: str) -> Sizes:
        bound = operation.inputs[parameter].arguments
        return sizes.get(bound[0].name, (1,)) if bound else (1,)

    special = _FLOPS.get(operation.type)
    return special(size_of, out) if special else math.prod(out)


def _shared(x: Sizes, y: Sizes, out: Sizes) -> int:
    """The length of the axis that a product of matrices sums over, whichever is transposed.

    (rows * shared) * (shared * columns) / (rows * columns) is its square.
    """
    product = math.prod(x[-2:]) * math.prod(y[-2:])
    return math.isqrt(product // max(math.prod(out[-2:]), 1))


_FLOPS: dict[str, Callable[[Callable[[str], Sizes], Sizes], int]] = {
    "conv": lambda size_of, out: 2 * math.prod(out) * math.prod(size_of("weight")[1:]),
    "conv_transpose": lambda size_of, _: (
        2 * math.prod(size_of("x")) * math.prod(size_of("weight")[1:])
    ),
    "linear": lambda size_of, out: 2 * math.prod(out) * size_of("x")[-1],
    "matmul": lambda size_of, out: 2 * math.prod(out) * _shared(size_of("x"), size_of("y"), out),
    "scaled_dot_product_attention": lambda size_of, _: (
        4 * math.prod(size_of("query")) * size_of("key")[-2]
    ),
    **dict.fromkeys(
        ("reduce_mean", "reduce_sum", "reduce_max", "reduce_sum_square"),
        lambda size_of, _: math.prod(size_of("x")),
    ),
}
"""What counts other than one for every number that the operation gives."""
