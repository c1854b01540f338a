"""An ExportedProgram as a function: how PyTorch itself runs what every target is held to."""

import copy
import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph as FxGraph
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .ops import (
    cut_fp8,
    dequantize,
    dequantize_fp8,
    round_activations,
    round_fp8,
    to_integers,
)
from .ranges import DEQUANTIZE_TENSOR, FP8_LINEAR, QUANTIZE, QUANTIZED_LINEAR, lifted

Runnable = Callable[..., tuple[Tensor, ...]]


NARROW = (torch.float16, torch.bfloat16)
"""Types whose values are rounded, but not computed with."""

Move = Callable[[Tensor], Tensor]
_MOVE: ContextVar[Move | None] = ContextVar("_MOVE", default=None)
_RESULT: ContextVar[Move | None] = ContextVar("_RESULT", default=None)


@contextmanager
def roundings_moved(move: Move) -> Iterator[None]:
    """Within, activations go through `move` wherever they are about to become integers.

    What another runtime's sums differ by arrives there; of what is added to the inputs, the first
    rounding may leave nothing.
    """
    before = _MOVE.set(move)
    try:
        yield
    finally:
        _MOVE.reset(before)


@contextmanager
def results_moved(move: Move) -> Iterator[None]:
    """Within, whatever an exact program computes goes through `move`.

    That is where another order of sums, or another kernel, makes a difference. Views of what was
    computed before are left alone.
    """
    before = _RESULT.set(move)
    try:
        yield
    finally:
        _RESULT.reset(before)


def runnable(program: ExportedProgram, *, exact: bool = False) -> Runnable:
    """The program's own operators in PyTorch; integer weights are dequantized once, not per run.

    Takes the program's inputs and returns all outputs. Both are of the program's types, but with
    `exact` float32 where those are 16-bit. See `Float32Interpreter` for what is rounded.
    """
    interpreter = Float32Interpreter(program, exact=exact)
    values = {n.name: n.meta["val"] for n in program.graph.nodes if "val" in n.meta}
    types = [values[str(name)].dtype for name in program.graph_signature.user_outputs]

    @torch.inference_mode()
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = interpreter.run(*map(_widened, inputs))
        if exact:
            return tuple(outputs)
        return tuple(x.to(dtype) for x, dtype in zip(outputs, types, strict=True))

    return run


class Float32Interpreter(Interpreter):
    """Runs a program in float32, with a 16-bit type's meaning or without any rounding.

    Values that the program stores in float16 or bfloat16 are float32 tensors of numbers that those
    have; beyond 65504 float16's are infinite. Sums inside an operator are float32, as in the
    runtimes. A weight of integers with 16-bit scales is such a value, too: rounded, once it is
    dequantized.
    PyTorch's own float16 convolutions would take 40 to 80 times as long.

    `exact` rounds nothing, so that another runtime's exact run computes the same real numbers:
    16 bits mean float32, quantize is clamp(x / scale + zero point), and activations that are
    rounded at run time are not.

    What depends on weights alone is computed once, here.
    """

    def __init__(self, program: ExportedProgram, *, exact: bool = False) -> None:
        graph = copy.deepcopy(program.graph)
        _split_linear(graph, exact)
        _split_fp8(graph, exact)
        super().__init__(program.graph_module, graph=graph)
        self.exact = exact
        self.narrow = {node for node in graph.nodes if not exact and _makes_narrow(node)}
        self.constants = self._constants([_widened(x) for x in lifted(program)])
        self.computed = [node for node in graph.nodes if node not in self.constants]

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        """The program's own inputs -> its outputs, each as it is inside.

        As in the base class, without its traces of every node: small models take twice as long.
        """
        self.env, self.args_iter = dict(self.constants), iter(args)
        for node in self.computed:
            self.env[node] = self.run_node(node)
            for read in self.user_to_last_uses.get(node, ()):
                del self.env[read]
        return self.env[self.computed[-1]]

    @torch.inference_mode()
    def _constants(self, weights: list[Tensor]) -> dict[Node, Any]:
        """Weights, and what is made of weights alone; None where only the latter reads them."""
        nodes = list(self.graph.nodes)
        self.env = dict(zip(nodes, weights, strict=False))
        for node in nodes:
            read = node.all_input_nodes
            if node.op == "call_function" and read and all(n in self.env for n in read):
                self.env[node] = self.run_node(node)
        return {
            node: None if all(user in self.env for user in node.users) else value
            for node, value in self.env.items()
        }

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator that makes 16 bits makes float32 here; with `exact` no integers are made."""
        move = _MOVE.get()
        name = _name(target)
        rounds = target in (round_activations, round_fp8) or name == QUANTIZE
        if move and not self.exact and rounds:
            args = (move(args[0]), *args[1:])
        if name in (EXACT if self.exact else TYPED):
            return (EXACT if self.exact else TYPED)[name](*args)
        args = map_aggregate(args, _wide_type)
        return super().call_function(target, args, map_aggregate(kwargs, _wide_type))

    def run_node(self, n: Node) -> Any:
        """Compute and round."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value = getattr(self, n.op)(n.target, args, kwargs)
        move = _RESULT.get()
        if move and self.exact and n.op == "call_function" and _is_computed(value, args):
            value = move(value)
        return pytree.tree_map(_rounded, value, n.meta["val"]) if n in self.narrow else value


def _quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, *_: Any) -> Tensor:
    return (x / scale + zero_point).clamp(low, high)


def _dequantize(x: Tensor, scale: float, zero_point: int, *_: Any) -> Tensor:
    return (x - zero_point) * scale


EXACT = {QUANTIZE: _quantize, DEQUANTIZE_TENSOR: _dequantize}
"""What stands for operators whose results would be integers."""
TYPED = {QUANTIZE: to_integers}
"""As runtimes are told to compute, not as PyTorch does."""


def _split_linear(graph: FxGraph, exact: bool) -> None:
    """quantized_linear -> dequantize, round_activations and a linear layer of float weights."""
    weights: dict[tuple[Node, ...], Node] = {}
    for node in list(graph.nodes):
        if str(node.target) != QUANTIZED_LINEAR:
            continue
        x, weight, scale, zero_point, bias, _, activation_group = node.args
        with graph.inserting_before(node):
            integers = (weight, scale, zero_point)
            if integers not in weights:
                weights[integers] = graph.call_function(dequantize, integers)
                weights[integers].meta["val"] = scale.meta["val"]  # of the type, not the shape
            entering = x
            if not exact:
                entering = graph.call_function(round_activations, (x, activation_group))
                entering.meta["val"] = None  # rounded to integers, not to a type
            linear = graph.call_function(F.linear, (entering, weights[integers], bias))
        linear.meta = node.meta
        node.replace_all_uses_with(linear)
        graph.erase_node(node)


def _split_fp8(graph: FxGraph, exact: bool) -> None:
    """fp8_linear -> dequantize_fp8, round_fp8 and a linear layer; each rounds to its type."""
    for node in list(graph.nodes):
        if str(node.target) != FP8_LINEAR:
            continue
        x, weight, scale, bias, input_scale = node.args
        with graph.inserting_before(node):
            weights = graph.call_function(dequantize_fp8, (weight, scale))
            weights.meta["val"] = scale.meta["val"]  # of the type, not the shape
            entering = graph.call_function(cut_fp8 if exact else round_fp8, (x, input_scale))
            entering.meta["val"] = x.meta["val"]
            linear = graph.call_function(F.linear, (entering, weights, bias))
        linear.meta = node.meta
        node.replace_all_uses_with(linear)
        graph.erase_node(node)


_name = functools.cache(str)
"""Of an operator: making it takes as long as running a small one."""


def _makes_narrow(node: Node) -> bool:
    """Whether a node computes values that the program stores in 16 bits."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return any(_is_narrow(value) for value in pytree.tree_leaves(node.meta["val"]))


def _is_computed(value: Any, args: tuple[Any, ...]) -> bool:
    """Whether floats were computed, and not only looked at in another shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    read = (one for one in pytree.tree_leaves(args) if isinstance(one, Tensor))
    place = value.untyped_storage().data_ptr()
    return all(one.untyped_storage().data_ptr() != place for one in read)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in NARROW


def _wide_type(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in NARROW else value


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in NARROW else x


def _rounded(x: Any, as_traced: Any) -> Any:
    return x.to(as_traced.dtype).float() if _is_narrow(as_traced) else x
