"""What an ExecuTorch file must hold of a program: every constant that is read, as it is stored.

Said from the program alone, so that a saved file can be held against it. Most constants are stored
as they are. Stored otherwise are

- what is made of constants alone (a norm's weight with more axes): what comes of it;
- a convolution's weight in XNNPACK: [O,I,kH,kW] as [O,kH,kW,I], a depthwise one's as [1,kH,kW,O],
  perhaps in pieces: as many rows of it as a kernel takes (`executorch_depthwise.pieces`), and of
  several outputs a channel, each in its turn;
- 4-bit integers in XNNPACK: two to a byte, plus 8, the first of the two low; their scales bfloat16;
- static activations: unsigned integers less 128, scale and zero point as numbers.

Not stored are zero points of weights, which are zero.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..quantize.ranges import DEQUANTIZE_WEIGHT, QUANTIZE, QUANTIZED_LINEAR
from .executorch_decoder import VISIBLE
from .executorch_depthwise import pieces
from .program_constants import Constants, live_nodes, scalars

ATTENTION = "fastvlm.cached_attention.default"
ANGLES = slice(6, 8)
"""Where attention has its rotary tables; its mask and cache, between, are not stored."""

SCALED = "aten.scaled_dot_product_attention.default"
CONV = "aten.conv2d.default"
SIGNED = 128
"""What unsigned integers are less in XNNPACK, which takes signed ones."""


class Numbers(NamedTuple):
    """Numbers of one kind (a type's name, or `int4`), in the order that they lie in."""

    kind: str
    data: NDArray[Any]


Fingerprint = tuple[str, bytes]
"""A tensor's kind and the SHA-256 of its numbers, in order; its shape is no part of it."""


def fingerprint(numbers: Numbers) -> Fingerprint:
    """Of the numbers' bytes."""
    data = np.ascontiguousarray(numbers.data).reshape(-1)
    return numbers.kind, hashlib.sha256(data.view(np.uint8).data).digest()


class Range(NamedTuple):
    """A static activation's scale and zero point, of signed integers."""

    scale: float
    zero_point: int


Form = tuple[Numbers, ...]
"""One way of storing a tensor: in one piece, or in several."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor that a file must hold, in one of `forms`: the likeliest comes first.

    `reads` is how many operators read it; 0: it changes nothing and need not be there. `size` is
    how many numbers it has.
    """

    name: str
    forms: Callable[[], Iterator[Form]]
    reads: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Expected:
    """All that a method's file must hold, and the single numbers that it may."""

    tensors: tuple[Stored, ...]
    ranges: dict[str, Range]
    """A quantize operator's name -> what it rounds by."""
    scalars: frozenset[float]


def expected(program: ExportedProgram) -> Expected:
    """All that the program's first output is computed from.

    Raises RuntimeError where that leaves out a constant that some operator reads.
    """
    collector = _Collector(program)
    live = live_nodes(program)
    computed = [
        node
        for node in program.graph.nodes
        if node in live and node.op == "call_function" and node not in collector.constants
    ]
    for node in computed:
        collector.add_reads(node)
    collector.constants.refuse_forgotten(live)
    return Expected(
        tensors=tuple(
            Stored(name=name, forms=forms, reads=reads, size=size)
            for (name, _), (forms, reads, size) in collector.found.items()
        ),
        ranges={
            node.name: Range(float(np.float32(node.args[1])), int(node.args[2]) - SIGNED)
            for node in computed
            if str(node.target) == QUANTIZE
        },
        scalars=scalars(program) | set(_of_attention(computed)),
    )


def _of_attention(nodes: list[Node]) -> Iterator[float]:
    """What attention multiplies scores by, where no operator names it, and how it hides them."""
    for node in nodes:
        if str(node.target) == SCALED:
            yield node.args[0].meta["val"].shape[-1] ** -0.5  # type: ignore[union-attr]
        elif str(node.target) == ATTENTION:
            query, heads = node.args[0], node.args[8]
            yield (query.meta["val"].shape[-1] // heads) ** -0.5  # type: ignore[union-attr]
            yield from (VISIBLE, -VISIBLE)


Forms = Callable[[Tensor], Iterator[Form]]


class _Collector:
    """Goes over the operators that are run, and notes what each reads of what is stored."""

    def __init__(self, program: ExportedProgram) -> None:
        self.constants = Constants(program)
        self.found: dict[tuple[str, str], tuple[Callable[[], Iterator[Form]], int, int]] = {}

    def add_reads(self, node: Node) -> None:
        """What one operator reads that is computed at run time."""
        kind = str(node.target)
        if kind == ATTENTION:
            for source in (n for n in node.args[:3] if isinstance(n, Node) and n in self.constants):
                self._add(source, _plain)
            for table in (n for n in node.args[ANGLES] if isinstance(n, Node)):
                # All layers read the rows that are looked up once.
                self._add(table, _plain, 0 if self._has(table) else 1)
        elif kind == QUANTIZED_LINEAR:
            self._add_linear(node)
        elif kind == CONV:
            self._add_convolution(node)
        else:
            for source in (n for n in node.all_input_nodes if n in self.constants):
                neutral = self.constants.changes_nothing(node, source, torch.float32)
                self._add(source, _plain, 0 if neutral else 1)

    def _add_linear(self, node: Node) -> None:
        _, weight, scale, zeros, bias, bits, _ = node.args
        four = bits == 4
        for source, forms in (
            (weight, _packed if four else _plain),
            (scale, _bfloat16 if four else _plain),
            (zeros, _plain),
            (bias, _plain),
        ):
            if isinstance(source, Node):
                self._add(source, forms)

    def _add_convolution(self, node: Node) -> None:
        x, weight, bias, *_ = (*node.args, None)
        if isinstance(x, Node) and x in self.constants:
            self._add(x, _plain)
        turns = 1
        if isinstance(weight, Node) and weight in self.constants:
            rows, depth = weight.meta["val"].shape[:2]
            channels = x.meta["val"].shape[1]  # type: ignore[union-attr]
            turns = rows // channels if depth == 1 and rows % channels == 0 else 1
            self._add(weight, lambda values: _kernels(values, turns))
        if isinstance(bias, Node) and bias in self.constants:
            self._add(bias, lambda values: _taking_turns(values, turns))

    def _has(self, node: Node) -> bool:
        return (self.constants.leaves(node)[0], "") in self.found

    def _add(self, source: Node, forms: Forms, times: int = 1) -> None:
        """A constant; a weight of integers as what it is made of."""
        if str(source.target) == DEQUANTIZE_WEIGHT:
            weight, scale, zeros = (n for n in source.args[:3] if isinstance(n, Node))
            if self.constants.value(zeros).any():
                raise RuntimeError(f"{source}: XNNPACK's weights have no zero points")
            self.constants.accounted.update(self.constants.leaves(zeros))
            self._add(weight, forms, times)
            self._add(scale, _plain, times)
            return
        names = self.constants.leaves(source)
        self.constants.accounted.update(names)
        key = (names[0], "" if source in self.constants.values else source.name)
        before = self.found.get(key, (None, 0))[1]
        value = self.constants.value
        size = math.prod(source.meta["val"].shape)
        self.found[key] = (lambda: forms(value(source)), before + times, size)


def _plain(values: Tensor) -> Iterator[Form]:
    yield (_numbers(values),)


def _numbers(values: Tensor) -> Numbers:
    return Numbers(str(values.dtype).removeprefix("torch."), values.contiguous().numpy())


def _packed(values: Tensor) -> Iterator[Form]:
    """4-bit integers [N,K], K even, as XNNPACK's qb4w."""
    halves = (values.contiguous().numpy().astype(np.int16) + 8).astype(np.uint8)
    yield (Numbers("int4", halves[:, ::2] | (halves[:, 1::2] << 4)),)


def _bfloat16(values: Tensor) -> Iterator[Form]:
    yield (Numbers("bfloat16", values.bfloat16().contiguous().view(torch.int16).numpy()),)


def _kernels(values: Tensor, turns: int) -> Iterator[Form]:
    """A convolution's weight [O,I,kH,kW]: whole, then in the pieces of a depthwise one."""
    yield (_numbers(values.permute(0, 2, 3, 1)),)
    yield (_numbers(values),)
    if values.shape[1] != 1:
        return
    depthwise = [values, *(values[turn::turns] for turn in range(turns) if turns > 1)]
    yield (_numbers(depthwise[0].permute(1, 2, 3, 0)),)
    split = [
        rows.of(part)
        for part in depthwise[-turns:]
        for rows in pieces(values.shape[2], values.shape[3])
    ]
    yield tuple(_numbers(part.permute(1, 2, 3, 0)) for part in split)
    yield tuple(map(_numbers, split))


def _taking_turns(values: Tensor, turns: int) -> Iterator[Form]:
    """A bias [O]: whole, then per output of a channel."""
    yield (_numbers(values),)
    if turns > 1:
        yield tuple(_numbers(values[turn::turns]) for turn in range(turns))
