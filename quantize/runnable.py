"""An ExportedProgram as a function: how PyTorch itself runs what every target is held to."""

import copy
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

from .ops import dequantize, round_activations, to_integers
from .ranges import DEQUANTIZE_TENSOR, QUANTIZE, QUANTIZED_LINEAR, lifted

Runnable = Callable[..., tuple[Tensor, ...]]


Move = Callable[[Tensor], Tensor]
_MOVE: ContextVar[Move | None] = ContextVar("_MOVE", default=None)


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


def runnable(program: ExportedProgram, *, exact: bool = False) -> Runnable:
    """The program's own operators in PyTorch; integer weights are dequantized once, not per run.

    Takes the program's inputs and returns all outputs. Both are of the program's types, but with
    `exact` float32 where those are float16. See `Float32Interpreter` for what is rounded.
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
    """Runs a program in float32, with float16's meaning or without any rounding.

    Values that the program stores in float16 are float32 tensors of numbers that float16 has;
    beyond 65504 they are infinite. Sums inside an operator are float32, as in the runtimes. A
    weight of integers with float16 scales is such a value, too: rounded, once it is dequantized.
    PyTorch's own float16 convolutions would take 40 to 80 times as long.

    `exact` rounds nothing, so that another runtime's exact run computes the same real numbers:
    float16 means float32, quantize is clamp(x / scale + zero point), and activations that are
    rounded at run time are not.

    What depends on weights alone is computed once, here.
    """

    def __init__(self, program: ExportedProgram, *, exact: bool = False) -> None:
        graph = copy.deepcopy(program.graph)
        _split_linear(graph, exact)
        super().__init__(program.graph_module, graph=graph)
        self.exact = exact
        self.constants = self._constants([_widened(x) for x in lifted(program)])

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The program's own inputs -> its outputs, each as it is inside."""
        return super().run(*args, initial_env=dict(self.constants), **kwargs)

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
        """An operator that makes float16 makes float32 here; with `exact` no integers are made."""
        move = _MOVE.get()
        if move and not self.exact and (target is round_activations or str(target) == QUANTIZE):
            args = (move(args[0]), *args[1:])
        if str(target) in (EXACT if self.exact else TYPED):
            return (EXACT if self.exact else TYPED)[str(target)](*args)
        args = map_aggregate(args, _wide_type)
        return super().call_function(target, args, map_aggregate(kwargs, _wide_type))

    def run_node(self, n: Node) -> Any:
        """Compute and round."""
        value = super().run_node(n)
        if self.exact or n.op != "call_function" or n.target is operator.getitem:
            return value
        return pytree.tree_map(_rounded, value, n.meta["val"])


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


def _wide_type(value: Any) -> Any:
    return torch.float32 if value is torch.float16 else value


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype is torch.float16 else x


def _rounded(x: Any, as_traced: Any) -> Any:
    half = isinstance(as_traced, Tensor) and as_traced.dtype is torch.float16
    return x.half().float() if half else x
