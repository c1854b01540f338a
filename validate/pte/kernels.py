"""The operators that ExecuTorch runs itself, outside of any delegate.

Those of ATen are PyTorch's own, found by name. Quantizers are not among them: the stock runtime
has none.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...targets.executorch_types import Call
from .errors import RefusedError
from .memory import DTYPES, Memory

Step = Callable[[Memory], None]

ATEN = frozenset(
    (
        *("_local_scalar_dense", "_log_softmax", "_softmax", "abs", "add", "addmm", "amax", "amin"),
        *("any", "arange", "argmax", "argmin", "avg_pool2d", "bitwise_and", "bitwise_not"),
        *("bitwise_or", "bmm", "cat", "ceil", "clamp", "clone", "constant_pad_nd", "convolution"),
        *("copy", "copy_", "cos", "cumsum", "detach_copy", "div", "elu", "embedding", "eq", "erf"),
        *(
            "exp",
            "expand_copy",
            "fill",
            "floor",
            "floor_divide",
            "full",
            "full_like",
            "gather",
            "ge",
        ),
        *("gelu", "gt", "hardtanh", "index", "index_put", "index_put_", "index_select", "le"),
        *("leaky_relu", "linear", "log", "logical_and", "logical_not", "logical_or", "lt"),
        *("masked_fill", "maximum", "mean", "minimum", "mm", "mul", "ne", "neg", "ones"),
        *("permute_copy", "pow", "prod", "reciprocal", "relu", "remainder", "repeat", "rsqrt"),
        *("rsub", "scalar_tensor", "scatter", "scatter_add", "select_copy", "select_scatter"),
        *("sigmoid", "sin", "slice_copy", "slice_scatter", "sqrt", "squeeze_copy", "stack", "sub"),
        *("sum", "sym_numel", "sym_size", "t_copy", "tanh", "transpose_copy", "tril"),
        *("unsqueeze_copy", "var", "view_copy", "where", "zeros"),
    )
)
"""What computes the same numbers in every run, and touches nothing but its arguments."""

PRIMS: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "eq": operator.eq,
    "floordiv": operator.floordiv,
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
    "mod": operator.mod,
    "mul": operator.mul,
    "ne": operator.ne,
    "neg": operator.neg,
    "sub": operator.sub,
    "sym_float": float,
    "sym_max": max,
    "sym_min": min,
    "truediv": operator.truediv,
}
"""`executorch_prim::NAME.Scalar` or `.int`: numbers of the run."""


def compile_call(call: Call) -> Step:
    """What runs an operator on a method's memory. Raises RefusedError for unknown ones."""
    namespace, _, name = call.operator.partition("::")
    base, _, overload = name.partition(".")
    if call.operator in _OWN:
        run, count = _OWN[call.operator]
        if len(call.indices) != count:
            raise RefusedError(f"it has {len(call.indices)} arguments, not {count}")
        return lambda memory: run(memory, *call.indices)
    if namespace == "executorch_prim" and overload in ("Scalar", "int") and base in PRIMS:
        compute = PRIMS[base]
        *inputs, output = call.indices or (0,)
        return lambda memory: memory.write(output, compute(*map(memory.read, inputs)))
    found = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
    if namespace != "aten" or base not in ATEN or found is None:
        raise RefusedError("no such operator is known")
    return _aten(found, call)


def _aten(found: Any, call: Call) -> Step:
    """PyTorch's operator of the same schema: its arguments, then what it returns."""
    schema = found._schema
    arguments, returns = schema.arguments, schema.returns
    if len(call.indices) != len(arguments) + len(returns):
        raise RefusedError(f"it has {len(call.indices)} arguments, not those of {schema}")
    given = list(zip(arguments, call.indices[: len(arguments)], strict=True))
    outputs = [index for argument, index in given if argument.is_out]
    in_place = call.operator.partition(".")[0].endswith("_")

    def run(memory: Memory) -> None:
        if in_place:
            memory.check_writable(call.indices[0])
        made = {i: torch.empty(0, dtype=DTYPES[memory.tensor(i).dtype]) for i in outputs}
        values = [(one, made[i] if i in made else memory.read(i)) for one, i in given]
        result = found(
            *(value for one, value in values if not one.kwarg_only),
            **{one.name: value for one, value in values if one.kwarg_only},
        )
        for index, value in made.items():
            memory.write(index, value)
        if not outputs and not in_place:
            memory.write(call.indices[-1], result)

    return run


def _resize(memory: Memory, sizes: int, _format: int, output: int, _same: int) -> None:
    """`empty` writes no number: what lies there stays."""
    memory.resize(output, memory.read(sizes))


def _view(memory: Memory, x: int, sizes: int, output: int) -> None:
    shape, found = list(memory.read(sizes)), memory.read(x)
    memory.share(output, x, found.reshape(shape).shape)


def _converted(memory: Memory, x: int, _blocking: int, _order: int, output: int, _: int) -> None:
    memory.write(output, memory.read(x).to(DTYPES[memory.tensor(output).dtype]))


_OWN: Mapping[str, tuple[Callable[..., None], int]] = {
    "aten::empty.out": (_resize, 4),
    "executorch_prim::et_view.default": (_view, 3),
    "dim_order_ops::_to_dim_order_copy.out": (_converted, 5),
    "dim_order_ops::_clone_dim_order.out": (_converted, 5),
}
"""Operators that PyTorch has not, or not as ExecuTorch does: what runs them, how many arguments."""
