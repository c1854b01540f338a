"""A program's constants by name, and what is computed from nothing but them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..quantize.ranges import lifted

NEUTRAL = {"aten.add.Tensor": 0, "aten.sub.Tensor": 0, "aten.mul.Tensor": 1, "aten.div.Tensor": 1}
"""Elementwise operators of two operands, and the second that changes nothing."""
CLAMP = "aten.clamp.default"


class Constants:
    """What a program reads that no input decides. `accounted` are the names that were asked for."""

    def __init__(self, program: ExportedProgram) -> None:
        specs = program.graph_signature.input_specs
        places = [node for node in program.graph.nodes if node.op == "placeholder"]
        # Constants come first, then the user's inputs.
        self.values = {n: t.detach() for n, t in zip(places, lifted(program), strict=False)}
        self.names = {n: str(s.target) for n, s in zip(self.values, specs, strict=False)}
        self._constant: set[Node] = set(self.values)
        for node in program.graph.nodes:
            made_of = node.all_input_nodes if node.op == "call_function" else ()
            if made_of and self._constant.issuperset(made_of):
                self._constant.add(node)
        self.accounted: set[str] = set()

    def __contains__(self, node: Node) -> bool:
        """Whether it is stored, or made of nothing but what is."""
        return node in self._constant

    def value(self, node: Node) -> Tensor:
        """A constant's numbers, computed where it is made of others."""
        if node in self.values:
            return self.values[node]
        args, kwargs = map_arg((node.args, node.kwargs), self.value)
        made: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return made

    def leaves(self, node: Node) -> tuple[str, ...]:
        """The names of what it is made of."""
        return tuple(dict.fromkeys(self._iterate_leaves(node)))

    def _iterate_leaves(self, node: Node) -> Iterator[str]:
        if node in self.names:
            yield self.names[node]
        else:
            for source in node.all_input_nodes:
                yield from self._iterate_leaves(source)

    def changes_nothing(self, node: Node, source: Node, dtype: torch.dtype) -> bool:
        """Whether an elementwise operator with this constant gives its other operand as it is."""
        kind = str(node.target)
        if kind not in NEUTRAL:
            return False
        other = next(n for n in node.all_input_nodes if n is not source)
        if node.args[1] is not source and kind in ("aten.sub.Tensor", "aten.div.Tensor"):
            return False
        if other.meta["val"].shape != node.meta["val"].shape:
            return False
        return bool((self.value(source).to(dtype) == NEUTRAL[kind]).all())

    def refuse_forgotten(self, live: set[Node]) -> None:
        """Raise RuntimeError for constants that some operator reads and nobody accounted for."""
        forgotten = [
            name for node, name in self.names.items() if node in live and name not in self.accounted
        ]
        if forgotten:
            raise RuntimeError(f"{', '.join(forgotten)}: read, but not said how it is stored")


def live_nodes(program: ExportedProgram, until: Node | None = None) -> set[Node]:
    """What the first output, or `until`, is computed from."""
    results = next(n for n in program.graph.nodes if n.op == "output").args[0]
    last = results[0] if until is None else until
    found, waiting = {last}, [last]
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n not in found]
        found.update(new)
        waiting += new
    return found


def scalars(program: ExportedProgram, *, until: Node | None = None) -> frozenset[float]:
    """Numbers in the program's own operators (a factor, a bound), and two that lowering adds.

    Adding 0 and multiplying by 1 change nothing, and a reciprocal is a division of 1.
    """
    found = {0.0, 1.0}
    for node in live_nodes(program, until):
        kinds = (int, float) if str(node.target) in (*NEUTRAL, CLAMP) else (float,)
        leaves = pytree.tree_leaves((node.args, node.kwargs))
        found |= {float(x) for x in leaves if isinstance(x, kinds) and not isinstance(x, bool)}
    return frozenset(found)
