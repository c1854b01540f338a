"""The largest magnitude that enters and leaves each operator, on real inputs, in float32."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

Inputs = tuple[Tensor, ...]
"""One call's tensors, in the order of the program's own inputs."""


@dataclass(frozen=True, kw_only=True)
class OpRange:
    """One operator's magnitudes over all inputs; NaN or infinite if any value was.

    `node` is its name in the program, `op` the operator, `layer` the module that it belongs to.
    `entering` counts weights, too; `leaving` counts an attention's scores before the softmax, which
    a runtime may hold in the same format (by their bound |query| |key| / sqrt(d)).
    """

    node: str
    op: str
    layer: str
    entering: float
    leaving: float

    def within(self, limit: float) -> bool:
        """Whether nothing exceeds the limit; NaN does."""
        return self.entering <= limit and self.leaving <= limit


@torch.inference_mode()
def scan(
    program: ExportedProgram, batches: Sequence[Inputs], say: Callable[[str], None]
) -> tuple[OpRange, ...]:
    """Run every batch; one entry per operator that reads floating-point tensors, in order."""
    if not batches:
        raise ValueError("nothing to scan: no inputs")
    scanner = _Scanner(program)
    for index, batch in enumerate(batches):
        say(f"ranges: {index + 1} of {len(batches)}")
        scanner.run(*scanner.weights, *batch)
    return tuple(
        OpRange(
            node=node.name,
            op=str(node.target),
            layer=layer_of(node),
            entering=larger(scanner.magnitudes[n.name] for n in node.all_input_nodes),
            leaving=larger((scanner.magnitudes[node.name], scanner.scores[node.name])),
        )
        for node in program.graph.nodes
        if node.op == "call_function" and any(is_float(n) for n in node.all_input_nodes)
    )


def lifted(program: ExportedProgram) -> list[Tensor]:
    """Parameters, buffers and constants, in the order of the graph's first placeholders."""
    values: dict[str | None, Any] = {**program.constants, **program.state_dict}
    return [
        values[spec.target]
        for spec in program.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT
    ]


def layer_of(node: Node) -> str:
    """The innermost module's name, e.g. `vision_tower.network.2.0.convffn.fc1`, or ""."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return "" if not stack or stack[-1][0].startswith("_") else str(stack[-1][0])


def is_float(node: Node) -> bool:
    """Whether the node's value is a floating-point tensor, or has any inside."""
    return any(
        isinstance(value, Tensor) and value.is_floating_point()
        for value in pytree.tree_leaves(node.meta.get("val"))
    )


def larger(values: Any) -> float:
    """The largest of some magnitudes, or 0 of none; NaN if any is, which Python's max may drop."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def magnitude(value: Any) -> float:
    """max|x| over the floating-point tensors in a value, in one pass over each."""
    found = []
    for x in pytree.tree_leaves(value):
        if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
            low, high = torch.aminmax(x)
            found.append(torch.maximum(-low, high).item())
    return larger(found)


class _Scanner(Interpreter):
    """Keeps the largest magnitude of each node's value, and of its scores, over all runs."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.weights = lifted(program)
        self.magnitudes: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        inputs = set(program.graph_signature.user_inputs)
        self.constant = {
            n.name for n in program.graph.nodes if n.op == "placeholder" and n.name not in inputs
        }

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.constant and n.name in self.magnitudes:
            return value  # read once: weights are most of a decoder's numbers
        args, _ = self.fetch_args_kwargs_from_env(n)
        for kept, found in (
            (self.magnitudes, magnitude(value)),
            (self.scores, _scores(n, args)),
        ):
            kept[n.name] = larger((found, kept.get(n.name, 0.0)))
        return value


def _scores(node: Node, args: tuple[Any, ...]) -> float:
    """A bound of an attention's scores: max|q| max|k| / sqrt(d) per head, else 0.

    RoPE turns queries and keys without changing how long they are.
    """
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        query, key = args[:2]  # [B,H,N,d]
    elif str(node.target) == "fastvlm.cached_attention.default":
        heads, kv_heads = args[8:10]
        query, new = (
            x.unflatten(2, (n, -1)).transpose(1, 2)
            for x, n in ((args[0], heads), (args[1], kv_heads))
        )
        key = torch.cat((args[3], new), dim=2).repeat_interleave(heads // kv_heads, dim=1)
    else:
        return 0.0
    longest = query.norm(dim=-1).amax((0, 2)) * key.norm(dim=-1).amax((0, 2))  # [H]
    return magnitude(longest / math.sqrt(query.shape[-1]))
