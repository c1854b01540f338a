"""What an ONNX graph must hold of a program: every constant that is read, and how often.

Said from the program alone, so that a saved file can be held against it. Most constants are stored
as they are, in any shape. Stored otherwise are

- a matrix [N,K], which may lie transposed, as MatMul and MatMulInteger want it;
- what is made of constants alone (a norm's weight with more axes): what comes of it;
- a weight's scales per channel in MatMulNBits: each as often as its row has blocks;
- zero points of weights: in the type of the weight;
- static activations before a linear layer: their zero point, and the products of their scale with
  the layer's, which the integer product is multiplied by;
- activations with one scale per token: see `_PER_TOKEN`, for all layers that read them at once;
- numbers in the program's own operators (an epsilon, a factor): as tensors or as attributes.

So is the formula that each GELU takes, and whether packed weights meet rounded activations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..quantize import ops
from ..quantize.ranges import (
    DEQUANTIZE_TENSOR,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    QUANTIZED_LINEAR,
    layer_of,
)
from .onnx_attention import mixes, rotates
from .onnx_contents import setting
from .onnx_numbers import Fingerprint, fingerprint_of
from .onnx_plain_attention import HIDDEN
from .onnx_recipes import BLOCK_SIZES
from .program_constants import CLAMP, NEUTRAL, Constants, live_nodes

CONV = "aten.conv2d.default"
LINEAR = "aten.linear.default"
GELU = "aten.gelu.default"
SCALED = "aten.scaled_dot_product_attention.default"
ATTENTION = "fastvlm.cached_attention.default"
_PAST, _ANGLES = 3, slice(6, 8)
"""Where cached attention has its keys [B,H,N,d], and its rotary tables."""

_PER_TOKEN = (127.0, 1e-30, 1.0)
"""By what the peak of a token is divided to give its scale, the least scale, and the scale of what
was divided by it already. The zero point is 128."""
_MIDDLE = torch.tensor(128, dtype=torch.uint8)

Forms = Callable[[], Iterator[Fingerprint]]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor or number that a file must hold in one of `forms`.

    `reads` is how many operators read it at least, and `most` at most: what changes nothing may be
    left out, and what a fused operator knows by itself. `size` is how many numbers it has.
    """

    name: str
    forms: Forms
    reads: int
    most: int
    size: int


def expected(program: ExportedProgram) -> tuple[Stored, ...]:
    """All that the program's first output is computed from; one entry for each time it is read.

    Raises RuntimeError where that leaves out a constant that some operator reads.
    """
    collector = _Collector(program)
    live = live_nodes(program)
    for node in program.graph.nodes:
        if node in live and node.op == "call_function" and node not in collector.constants:
            collector.add(node)
    collector.constants.refuse_forgotten(live)
    return tuple(collector.found)


class _Collector:
    """Goes over the operators that are run, and notes what each reads of what is stored."""

    def __init__(self, program: ExportedProgram) -> None:
        self.constants = Constants(program)
        self.found: list[Stored] = []
        self._dequantized: set[Node] = set()
        self._rounded: set[Node] = set()

    def add(self, node: Node) -> None:
        """What one operator reads."""
        kind = str(node.target)
        if kind == QUANTIZED_LINEAR:
            self._add_quantized_linear(node)
        elif kind == LINEAR and _has_integers(node):
            self._add_dequantized_linear(node)
        elif kind in (QUANTIZE, DEQUANTIZE_TENSOR):
            if kind == QUANTIZE or not all(map(_is_integer_product, node.users)):
                self._add_range(node)
        else:
            if kind == ATTENTION:
                self._add_attention(node)
            else:
                for source in (n for n in node.all_input_nodes if n in self.constants):
                    self._add_constant(node, source)
            self._add_literals(node)

    def _add_constant(self, node: Node, source: Node) -> None:
        if str(source.target) != DEQUANTIZE_WEIGHT:
            neutral = self._changes_nothing(node, source)
            self._add_tensor(source, least=0 if neutral else 1)
        elif source not in self._dequantized:  # once for all that read it
            self._dequantized.add(source)
            weight, scale, zeros = source.all_input_nodes
            self._add_tensor(weight)
            self._add_tensor(scale)
            self._add_tensor(zeros, dtype=weight.meta["val"].dtype)

    def _changes_nothing(self, node: Node, source: Node) -> bool:
        """Whether what is multiplied is all 1, or what is added, as a layer's bias, all 0."""
        if str(node.target) in (CONV, LINEAR) and source in node.args[2:]:
            return not self.constants.value(source).any()
        return self.constants.changes_nothing(node, source, source.meta["val"].dtype)

    def _add_range(self, node: Node) -> None:
        """Scale and zero point of static activations."""
        scale, zero, _, _, dtype = node.args[1:6]
        self._add_number(f"{_named(node)}'s scale", scale, torch.float32)
        self._add_number(f"{_named(node)}'s zero point", zero, dtype)

    def _add_dequantized_linear(self, node: Node) -> None:
        """Integers of 8 bits, multiplied as such if the activations are static, else in floats."""
        x, dequantize, *bias = node.all_input_nodes
        weight, scale, zeros = dequantize.all_input_nodes
        self.constants.accounted.update(self.constants.leaves(zeros))
        if self.constants.value(zeros).any():
            raise RuntimeError(f"{node}: linear layers of 8 bits have no zero points")
        self._add_tensor(weight)
        if _is_integer_product(node):
            factor, zero = x.args[1:3]
            self._add_number(f"{_named(node)}'s zero point", zero, x.args[5])
            self._add_product(scale, factor)
        else:
            self._add_tensor(scale, more=lambda: self._in_blocks(weight, scale))
            self._add_level(node, 1)
        for one in bias:
            self._add_constant(node, one)

    def _add_quantized_linear(self, node: Node) -> None:
        """Integers, scales, zero points and bias, and what the activations are rounded by."""
        arguments: tuple[Any, ...] = node.args
        x, weight, scale, zeros, bias, _, group = arguments
        for part in (weight, zeros, bias):
            if isinstance(part, Node):
                self._add_tensor(part)
        if group == ops.PER_TOKEN:
            self._add_tensor(scale)
            self._add_rounding(node, x)
            return
        self._add_tensor(scale, more=lambda: self._in_blocks(weight, scale))
        self._add_level(node, 1 if group == ops.FLOAT_ACTIVATIONS else 4)

    def _add_rounding(self, node: Node, x: Node) -> None:
        """One scale per token: what rounds them, once for all layers that read them."""
        self._add_fingerprint(f"{_named(node)}'s zero point", fingerprint_of(_MIDDLE))
        if x not in self._rounded:
            self._rounded.add(x)
            for number in _PER_TOKEN:
                self._add_number(f"{number} of {x.name}'s scales", number, torch.float32)
            self._add_fingerprint(f"{x.name}'s zero point", fingerprint_of(_MIDDLE))

    def _add_attention(self, node: Node) -> None:
        """The rotary tables, once where the operator itself turns queries and keys, else twice.

        Where there is no operator, also what scores are multiplied by and hidden with.
        """
        arguments: tuple[Any, ...] = node.args
        width = arguments[_PAST].meta["val"].shape[-1]
        times = 1 if rotates(width) else 2
        for table in arguments[_ANGLES]:
            self._add_tensor(table, least=times, most=times)
        if not mixes(width):
            self._add_number(f"{_named(node)}'s scale", width**-0.5, torch.float32)
            self._add_number(f"{_named(node)}'s {HIDDEN}", HIDDEN, torch.float32)

    def _add_literals(self, node: Node) -> None:
        """Numbers that the operator names, and what attention multiplies scores by."""
        kind, value = str(node.target), node.meta["val"]
        if kind == SCALED:
            scale = node.kwargs.get("scale")
            factor = value.shape[-1] ** -0.5 if scale is None else scale
            self._add_number(f"{_named(node)}'s scale", factor, torch.float32)
            return
        if kind == GELU:
            formula = str(node.kwargs.get("approximate", "none"))
            self._add_fingerprint(f"{_named(node)}'s formula", setting("approximate", formula))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        for number in pytree.tree_leaves((node.args, node.kwargs)):
            whole = kind in (*NEUTRAL, CLAMP) and isinstance(number, int)
            if isinstance(number, bool) or not (whole or isinstance(number, float)):
                continue
            counts = kind in NEUTRAL and number != NEUTRAL[kind]
            name = f"{_named(node)}'s {number}"
            self._add_number(name, number, value.dtype, least=1 if counts else 0)

    def _add_product(self, scale: Node, factor: Any) -> None:
        def forms() -> Iterator[Fingerprint]:
            value = self.constants.value(scale)
            yield fingerprint_of(torch.tensor(factor, dtype=value.dtype) * value)

        self._account(scale)
        self._add(self._name(scale), forms, size=_size(scale))

    def _in_blocks(self, weight: Node, scale: Node) -> Iterator[Fingerprint]:
        """One scale per channel, as often as MatMulNBits has blocks."""
        value, depth = self.constants.value(scale), weight.meta["val"].shape[-1]
        if value.numel() == len(value):
            for blocks in sorted({-(-depth // size) for size in BLOCK_SIZES}):
                yield fingerprint_of(value.reshape(-1, 1).expand(-1, blocks))

    def _add_level(self, node: Node, accuracy: int) -> None:
        wanted = setting("accuracy_level", accuracy)
        self._add_fingerprint(f"{_named(node)}'s accuracy level {accuracy}", wanted)

    def _add_tensor(
        self,
        source: Node,
        *,
        least: int = 1,
        most: int = 1,
        dtype: torch.dtype | None = None,
        more: Forms | None = None,
    ) -> None:
        """A constant as it is or in another type, transposed, or as what it is made of."""
        names = self.constants.leaves(source)

        def forms() -> Iterator[Fingerprint]:
            value = self.constants.value(source)
            yield from _as_it_is(value if dtype is None else value.to(dtype))
            if more is not None:
                yield from more()
            if len(names) == 1 and source not in self.constants.values:
                yield from _as_it_is(self._leaf(names[0]))

        self._account(source)
        self._add(self._name(source), forms, least=least, most=most, size=_size(source))

    def _leaf(self, name: str) -> Tensor:
        return next(
            self.constants.values[n] for n, one in self.constants.names.items() if one == name
        )

    def _account(self, source: Node) -> None:
        self.constants.accounted.update(self.constants.leaves(source))

    def _name(self, source: Node) -> str:
        made = "" if source in self.constants.values else f" ({source.name})"
        return f"{self.constants.leaves(source)[0]}{made}"

    def _add_number(self, name: str, number: Any, dtype: Any, *, least: int = 1) -> None:
        self._add_fingerprint(name, fingerprint_of(torch.tensor(number, dtype=dtype)), least=least)

    def _add_fingerprint(self, name: str, found: Fingerprint, *, least: int = 1) -> None:
        self._add(name, lambda: iter([found]), least=least, size=1)

    def _add(self, name: str, forms: Forms, *, size: int, least: int = 1, most: int = 1) -> None:
        self.found.append(Stored(name=name, forms=forms, reads=least, most=most, size=size))


def _is_integer_product(node: Node) -> bool:
    """Whether a linear layer has integer weights and static activations."""
    if str(node.target) != LINEAR or not _has_integers(node):
        return False
    return str(node.all_input_nodes[0].target) == DEQUANTIZE_TENSOR


def _has_integers(linear: Node) -> bool:
    return str(linear.all_input_nodes[1].target) == DEQUANTIZE_WEIGHT


def _as_it_is(value: Tensor) -> Iterator[Fingerprint]:
    yield fingerprint_of(value)
    if value.dim() == 2:
        yield fingerprint_of(value.T)


def _named(node: Node) -> str:
    """An operator by its layer, too, where it belongs to one."""
    layer = layer_of(node)
    return f"{layer} ({node.name})" if layer else node.name


def _size(source: Node) -> int:
    return int(source.meta["val"].numel())
