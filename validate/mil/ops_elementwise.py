"""Elementwise operations and activations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .node import Kernel, Node
from .numbers import BY_NAME, halved, range_of

Operation = Callable[[Node], Kernel]


def _unary(function: Callable[[Tensor], Tensor], *, rounds: bool = True) -> Operation:
    """Not `rounds`: of numbers of a type, the result is one, too."""
    return lambda node: node.kernel(function, "x", rounds=rounds)


def _binary(function: Callable[[Tensor, Tensor], Tensor], *, rounds: bool = True) -> Operation:
    return lambda node: node.kernel(function, "x", "y", rounds=rounds)


def _guarded(function: Callable[[Tensor], Tensor], default: float) -> Operation:
    """A function of x + epsilon."""

    def operation(node: Node) -> Kernel:
        epsilon = float(node.number("epsilon", default))
        return node.kernel(lambda x: function(x + epsilon), "x")

    return operation


def _with_alpha(function: Callable[[Tensor, float], Tensor]) -> Operation:
    def operation(node: Node) -> Kernel:
        alpha = node.number("alpha")
        return node.kernel(lambda x: function(x, alpha), "x")

    return operation


def _with_alpha_beta(function: Callable[[Tensor, float, float], Tensor]) -> Operation:
    def operation(node: Node) -> Kernel:
        alpha, beta = node.number("alpha"), node.number("beta")
        return node.kernel(lambda x: function(x, alpha, beta), "x")

    return operation


def _gelu(node: Node) -> Kernel:
    mode = node.text("mode", "EXACT")
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "EXACT": functional.gelu,
        "TANH_APPROXIMATION": lambda x: functional.gelu(x, approximate="tanh"),
        "SIGMOID_APPROXIMATION": lambda x: x * torch.sigmoid(1.702 * x),
    }
    if mode not in functions:
        raise node.error(f"has the unknown mode {mode!r}")
    return node.kernel(functions[mode], "x")


def _prelu(node: Node) -> Kernel:
    return node.kernel(functional.prelu, "x", "alpha")


def _softplus_parametric(node: Node) -> Kernel:
    def run(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        return alpha.reshape(shape) * _softplus(beta.reshape(shape) * x)

    return node.kernel(run, "x", "alpha", "beta")


def _softplus(x: Tensor) -> Tensor:
    # torch's own is linear beyond a threshold.
    return torch.logaddexp(x, torch.zeros((), dtype=x.dtype))


def _divide(node: Node) -> Kernel:
    """Integers are divided as numbers; what the result's type cannot hold is cut off."""
    if node.is_float("x"):
        return node.kernel(torch.div, "x", "y")
    return node.kernel(lambda x, y: torch.div(x, y, rounding_mode="trunc"), "x", "y")


def _select(node: Node) -> Kernel:
    return node.kernel(torch.where, "cond", "a", "b", rounds=False)


def _cast(node: Node) -> Kernel:
    name = node.text("dtype")
    target = node.type.dtype
    if BY_NAME.get(name) != target:
        raise node.error(f"casts to {name!r}, but its output is {target.name}")
    source = node.ref("x").type.dtype
    if target.is_float and source.is_float:
        if target.name == "fp16" and source.name != "fp16" and not node.exact:
            return node.kernel(halved, "x", rounds=False)
        return node.kernel(lambda x: x, "x", rounds=False, views=True)
    if target.is_float:
        return node.kernel(lambda x: x.to(torch.float32, copy=True), "x")
    if target.name == "bool":
        return node.kernel(lambda x: x != 0, "x", rounds=False)
    low, high = range_of(target)

    def to_integer(x: Tensor) -> Tensor:
        """Towards zero; what the type cannot hold becomes its end, as NaN becomes 0."""
        if x.is_floating_point():
            x = x.double().nan_to_num(nan=0.0).clamp(low, high).to(torch.int64)
        return x.clone() if x.dtype == target.torch else x

    return node.kernel(to_integer, "x")


OPERATIONS: dict[str, Operation] = {
    "abs": _unary(torch.abs, rounds=False),
    "acos": _unary(torch.acos),
    "asin": _unary(torch.asin),
    "atan": _unary(torch.atan),
    "atanh": _unary(torch.atanh),
    "ceil": _unary(torch.ceil, rounds=False),
    "cos": _unary(torch.cos),
    "cosh": _unary(torch.cosh),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "floor": _unary(torch.floor, rounds=False),
    "logical_not": _unary(torch.logical_not, rounds=False),
    "relu": _unary(torch.relu, rounds=False),
    "relu6": _unary(lambda x: x.clamp(0, 6), rounds=False),
    "round": _unary(torch.round, rounds=False),
    "sigmoid": _unary(torch.sigmoid),
    "sign": _unary(torch.sign, rounds=False),
    "silu": _unary(functional.silu),
    "sin": _unary(torch.sin),
    "sinh": _unary(torch.sinh),
    "softplus": _unary(_softplus),
    "softsign": _unary(functional.softsign),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "tan": _unary(torch.tan),
    "tanh": _unary(torch.tanh),
    "inverse": _guarded(torch.reciprocal, 1e-4),
    "log": _guarded(torch.log, 1e-45),
    "rsqrt": _guarded(torch.rsqrt, 1e-12),
    "clamped_relu": _with_alpha_beta(
        lambda x, alpha, beta: torch.where(x >= 0, x, alpha * x).clamp(max=beta)
    ),
    "clip": _with_alpha_beta(torch.clamp),
    "elu": _with_alpha(functional.elu),
    "gelu": _gelu,
    "leaky_relu": _with_alpha(functional.leaky_relu),
    "linear_activation": _with_alpha_beta(lambda x, alpha, beta: x * alpha + beta),
    "prelu": _prelu,
    "scaled_tanh": _with_alpha_beta(lambda x, alpha, beta: alpha * torch.tanh(beta * x)),
    "sigmoid_hard": _with_alpha_beta(lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1)),
    "softplus_parametric": _softplus_parametric,
    "threshold": _with_alpha(lambda x, alpha: x.clamp(min=alpha)),
    "thresholded_relu": _with_alpha(lambda x, alpha: torch.where(x >= alpha, x, 0)),
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "real_div": _divide,
    "floor_div": _binary(torch.floor_divide),
    "mod": _binary(torch.remainder),
    "pow": _binary(torch.pow),
    "maximum": _binary(torch.maximum, rounds=False),
    "minimum": _binary(torch.minimum, rounds=False),
    "equal": _binary(torch.eq, rounds=False),
    "not_equal": _binary(torch.ne, rounds=False),
    "less": _binary(torch.lt, rounds=False),
    "less_equal": _binary(torch.le, rounds=False),
    "greater": _binary(torch.gt, rounds=False),
    "greater_equal": _binary(torch.ge, rounds=False),
    "logical_and": _binary(torch.logical_and, rounds=False),
    "logical_or": _binary(torch.logical_or, rounds=False),
    "logical_xor": _binary(torch.logical_xor, rounds=False),
    "select": _select,
    "cast": _cast,
}
