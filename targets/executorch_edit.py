"""A copy of a program's graph that can be edited, constants included, before it is traced anew."""

import copy

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from ..quantize.ranges import lifted
from .executorch_retrace import Operators, Rewritten


class EditedGraph:
    """`graph` is a copy of the program's; `values` are the constants of its first placeholders."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.graph: Graph = copy.deepcopy(program.graph)
        found = lifted(program)
        placeholders = list(self.graph.find_nodes(op="placeholder"))
        self.values: dict[Node, Tensor] = dict(zip(placeholders, found, strict=False))
        self._first_input = placeholders[len(found)]

    def add(self, name: str, value: Tensor) -> Node:
        """A new constant."""
        with self.graph.inserting_before(self._first_input):
            node = self.graph.placeholder(name)
        self.values[node] = value
        return node

    def module(self, operators: Operators) -> Rewritten:
        """The edited graph with the constants that it still reads; see `Rewritten`."""
        self.graph.eliminate_dead_code()
        for node in [node for node in self.values if not node.users]:
            self.graph.erase_node(node)
            del self.values[node]
        # In the graph's order: constants that were added come after the program's own.
        constants = list(self.values.values())
        return Rewritten(self.program, operators, graph=self.graph, constants=constants)
