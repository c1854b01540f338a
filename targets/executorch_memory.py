"""The filled part of a cache as an input of a delegate, without a copy of it.

ExecuTorch slices by copying. The first rows of a cache lie where the cache lies, though: a tensor
at the same address, resized in each call, is the slice.
"""

from typing import Any

import torch
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule, Node

from ..quantize.quiet import quiet_import

with quiet_import():
    from executorch.exir.delegate import executorch_call_delegate
    from executorch.exir.passes import MemoryPlanningPass


class AliasPlanning(MemoryPlanningPass):  # type: ignore[misc]
    """ExecuTorch's planning, with first rows of a mutable buffer planned where the buffer is."""

    def run(
        self, graph_module: GraphModule, graph_signature: ExportGraphSignature | None = None
    ) -> Any:
        """Plan one method's memory; see the base class."""
        aliases = [] if graph_signature is None else _first_rows(graph_module, graph_signature)
        for node in aliases:
            node.meta["_share_alloc_with_arg_idx"] = 0
        result = super().run(graph_module, graph_signature)
        for node in aliases:
            row = node.all_input_nodes[0].meta["spec"].shape[1:]
            # Of all operators, this one only resizes: it writes no number.
            node.target = torch.ops.aten.empty.out
            node.args = ([node.args[3], *row],)
        graph_module.recompile()
        return result


def _first_rows(graph_module: GraphModule, signature: ExportGraphSignature) -> list[Node]:
    """Slices `buffer[:end]` of mutable buffers that only delegates read, before it is written.

    What a delegate returns is its own; any other operator might return the buffer's memory.
    """
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    written = set(signature.buffers_to_mutate.values())
    found = []
    for buffer in graph_module.graph.find_nodes(op="placeholder"):
        if signature.inputs_to_buffers.get(buffer.target) not in written:
            continue
        slices = [node for node in buffer.users if _is_first_rows(node)]
        others = (order[node] for node in buffer.users if node not in slices)
        end = min(others, default=len(order))
        found += [
            node
            for node in slices
            if all(
                user.target is executorch_call_delegate and order[user] < end for user in node.users
            )
        ]
    return found


def _is_first_rows(node: Node) -> bool:
    if node.target is not torch.ops.aten.slice_copy.Tensor_out:
        return False
    _, axis, start, _, *step = node.args
    return (axis, start or 0, *step) in ((0, 0), (0, 0, 1))
