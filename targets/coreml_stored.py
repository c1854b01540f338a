"""What a Core ML package must hold of a program: every constant that is read, as it is stored.

Said from the program alone, so that a saved package can be held against it: `coreml_lowering` and
its translations write these numbers, and nothing here is taken from what they wrote. Most constants
are stored as they are, in Core ML's type (int64 becomes int32). Stored otherwise are

- what is made of constants alone (a norm's weight with more axes): what comes of it;
- a constant beside values of another float type: in their type;
- int32 biases, for which Core ML has no integers: integer times scale, in the layer's float type;
- a weight's scales: in the type of the weight that they make;
- rotary tables: as long as the cache, in the type of the queries that they turn;
- for a linear layer without a bias, one of zeros.

Not stored are zero points of zero, and most constants that change nothing (times 1, plus 0).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..quantize.ranges import DEQUANTIZE_TENSOR, DEQUANTIZE_WEIGHT, LOOKUP, QUANTIZE
from .coreml_lowering import numpy, traced_type
from .program_constants import NEUTRAL, Constants, live_nodes

ATTENTION = "fastvlm.cached_attention.default"
ANGLES = slice(6, 8)
"""Where attention has its rotary tables; its mask and cache, between, are not stored."""

LINEAR = {"aten.linear.default": 2, "fastvlm.quantized_linear.default": 4}
"""Linear layers, and where they have their bias."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor that a package must hold.

    `names` are the constants it is made of, by their names in the program: the first says which it
    is. `numbers` computes it, in the type it is stored in, small integers one to a byte. `reads` is
    how many operations read it, where a weight's integers count as read by what reads the weight;
    0: it changes nothing and need not be there.
    """

    names: tuple[str, ...]
    numbers: Callable[[], NDArray[Any]]
    reads: int

    @property
    def name(self) -> str:
        """Which one it is."""
        return self.names[0]


def stored(
    program: ExportedProgram, *, until: Node | None = None, capacity: int = 0
) -> tuple[Stored, ...]:
    """All that the program's first output, or the node `until`, is computed from.

    `capacity`: positions of the decoder's cache. Raises RuntimeError where that leaves out a
    constant that some operator reads.
    """
    collector = _Collector(program, capacity)
    live = live_nodes(program, until)
    for node in program.graph.nodes:
        if node in live and node.op == "call_function" and node not in collector.constants:
            collector.add_reads(node)
    collector.constants.refuse_forgotten(live)
    return tuple(Stored(names=k[0], numbers=n, reads=r) for k, (n, r) in collector.found.items())


def as_long(table: Tensor, capacity: int) -> Tensor:
    """A rotary table [context,d/2] -> [capacity,d/2]: the last row again and again.

    Padding may lie beyond the context; what it is turned by does not matter.
    """
    beyond = table[-1:].expand(capacity - len(table), -1)
    return torch.cat((table, beyond))


class _Collector:
    """Goes over the operators that are run, and notes what each reads of what is stored."""

    def __init__(self, program: ExportedProgram, capacity: int) -> None:
        self.constants = Constants(program)
        self.capacity = capacity
        self.found: dict[Any, tuple[Callable[[], NDArray[Any]], int]] = {}

    def add_reads(self, node: Node) -> None:
        """What one operator reads that is computed at run time."""
        kind = str(node.target)
        if kind == ATTENTION:
            self._add_attention(node)
            return
        if kind in (QUANTIZE, DEQUANTIZE_TENSOR):
            self._add_range(node, node.all_input_nodes[0] if kind == QUANTIZE else node)
        if kind in LINEAR and not any(isinstance(a, Node) for a in node.args[LINEAR[kind] :][:1]):
            size, dtype = node.meta["val"].shape[-1], traced_type(node)
            name = self.constants.leaves(node.all_input_nodes[1])[0]
            self._add((f"{name} (no bias)",), dtype, lambda: torch.zeros(size, dtype=dtype))
        for source in (n for n in node.all_input_nodes if n in self.constants):
            if kind not in NEUTRAL:
                self._add_read(source, None)
            else:
                dtype = traced_type(node)
                times = 0 if self.constants.changes_nothing(node, source, dtype) else 1
                self._add_read(source, dtype, times)

    def _add_attention(self, node: Node) -> None:
        """Queries, keys and values may be constants as anywhere; all layers share the tables."""
        for source in (n for n in node.args[:3] if isinstance(n, Node) and n in self.constants):
            self._add_read(source, None)
        dtype = traced_type(node.all_input_nodes[0])
        for table in (n for n in node.args[ANGLES] if isinstance(n, Node)):

            def whole(table: Node = table) -> Tensor:
                return as_long(self.constants.value(table), self.capacity).to(dtype)

            before = self.found.get((self.constants.leaves(table), dtype))
            self._add(self.constants.leaves(table), dtype, whole, 0 if before else 1)

    def _add_range(self, node: Node, real: Node) -> None:
        """Scale and zero point of activations, which are numbers in the graph."""
        scale, zero = node.args[1:3]
        dtype = traced_type(real)
        self._add((f"{node.name} scale",), dtype, lambda: torch.tensor(scale, dtype=dtype))
        self._add((f"{node.name} zero point",), None, lambda: torch.tensor(zero, dtype=torch.uint8))

    def _add_read(self, source: Node, dtype: torch.dtype | None, times: int = 1) -> None:
        """A constant, in another float type if one is given; a weight as what it is made of."""
        kind = str(source.target)
        if kind == DEQUANTIZE_WEIGHT:
            self._add_weight(source)
        elif kind == LOOKUP:
            for part in source.all_input_nodes:
                self._add_read(part, None)
        else:

            def numbers() -> Tensor:
                value = self.constants.value(source)
                return value if dtype is None else value.to(dtype)

            self._add(self.constants.leaves(source), dtype, numbers, times)

    def _add_weight(self, node: Node) -> None:
        """Integers and scales, one for each index along an axis: int8 [N,...], or an int32 bias."""
        weight, scale, zeros = (n for n in node.args[:3] if isinstance(n, Node))
        dtype = traced_type(node)
        if not self.constants.value(zeros).any():
            self.constants.accounted.update(self.constants.leaves(zeros))
        else:
            self._add_read(zeros, None)
        if traced_type(weight) is torch.int32:
            self._add(
                (*self.constants.leaves(weight), *self.constants.leaves(scale)),
                dtype,
                lambda: (self.constants.value(weight) * self.constants.value(scale)).to(dtype),
            )
        else:
            self._add_read(weight, None)
            self._add_read(scale, dtype)

    def _add(
        self,
        names: tuple[str, ...],
        dtype: torch.dtype | None,
        make: Callable[[], Tensor],
        times: int = 1,
    ) -> None:
        before = self.found.get((names, dtype), (None, 0))[1]
        self.found[names, dtype] = (lambda: numpy(make()), before + times)
        self.constants.accounted.update(names)
