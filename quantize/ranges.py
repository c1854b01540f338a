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

from .ops import LARGEST_FP8

# By name: torch knows these operators only once somebody imported what defines them.
QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
DEQUANTIZE_TENSOR = "quantized_decomposed.dequantize_per_tensor.default"
DEQUANTIZE_WEIGHT = "quantized_decomposed.dequantize_per_channel.default"
LOOKUP = "fastvlm.lookup.default"
FP8_LINEAR = "fastvlm.fp8_linear.default"
QUANTIZED_LINEAR = "fastvlm.quantized_linear.default"

WEIGHT_ERROR = 2.0**-8
"""Most that fp16 may change a tensor, relative and as norms: half of what int8 usually does."""

Inputs = tuple[Tensor, ...]
"""One call's tensors, in the order of the program's own inputs."""


@dataclass(frozen=True, kw_only=True)
class OpRange:
    """One operator's magnitudes over all inputs; NaN or infinite if any value was.

    `node` is its name in the program, `op` the operator, `layer` the module that it belongs to.
    `entering` counts weights, too. `leaving` counts what a runtime may store in the same format
    inside: a mean's sum, and an attention's scores by their bound |query| |key| / sqrt(d).
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
    """Run every batch; one entry per operator that reads or makes floating-point tensors."""
    if not batches:
        raise ValueError("nothing to scan: no inputs")
    scanner = _Scanner(program)
    for index, batch in enumerate(batches):
        say(f"ranges: {index + 1} of {len(batches)}")
        scanner.run(*scanner.weights, *batch)
    return tuple(
        OpRange(
            node=node.name,
            op=_operator(node),
            layer=_layer(node),
            entering=larger(scanner.magnitudes[n.name] for n in node.all_input_nodes),
            leaving=larger((scanner.magnitudes[node.name], scanner.inside[node.name])),
        )
        for node in program.graph.nodes
        if node.op == "call_function" and any(map(is_float, (node, *node.all_input_nodes)))
    )


def survives_half(tensor: Tensor) -> bool:
    """Whether |half(x) - x| <= 2^-8 |x|, as norms, of weights or scales.

    It is 2^-12 in fp16's normal range, more for numbers far below 6e-5 (tiny layer scales folded
    into weights) and infinite for one beyond 65504. Anything but float32 survives.
    """
    if tensor.dtype is not torch.float32:
        return True
    error, size = tensor.half().float().sub_(tensor).norm(), tensor.norm()
    return bool(error <= WEIGHT_ERROR * size)


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


def _layer(node: Node) -> str:
    """`layer_of`; what PT2E inserted belongs to no module, so to the layer around it."""
    around: tuple[Node, ...] = (node,)
    if str(node.target) in (QUANTIZE, DEQUANTIZE_TENSOR, DEQUANTIZE_WEIGHT):
        around = (*node.all_input_nodes, *node.users)
    return next((name for name in map(layer_of, around) if name), "")


def _operator(node: Node) -> str:
    aten = isinstance(node.target, torch._ops.OpOverload)
    return str(node.target) if aten else str(getattr(node.target, "__name__", node.target))


def is_float(node: Node) -> bool:
    """Whether the node's value is a floating-point tensor, or has any inside."""
    return any(map(_is_wide, pytree.tree_leaves(node.meta.get("val"))))


def _is_wide(value: Any) -> bool:
    """Whether it is a tensor of floats that may be stored in other types: not fp8."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype is not torch.float8_e4m3fn
    )


def larger(values: Any) -> float:
    """The largest of some magnitudes, or 0 of none; NaN if any is, which Python's max may drop."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def magnitude(value: Any) -> float:
    """max|x| over the floating-point tensors in a value, in one pass over each."""
    found = []
    for x in pytree.tree_leaves(value):
        if _is_wide(x) and x.numel():
            low, high = torch.aminmax(x)
            found.append(torch.maximum(low.abs(), high.abs()).item())
    return larger(found)


class _Scanner(Interpreter):
    """Keeps the largest magnitude of each node's value, and of what is inside, over all runs."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.weights = lifted(program)
        self.magnitudes: dict[str, float] = {}
        self.inside: dict[str, float] = {}
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
            (self.inside, _inside(n, args, value)),
        ):
            kept[n.name] = larger((found, kept.get(n.name, 0.0)))
        return value


def _inside(node: Node, args: tuple[Any, ...], value: Any) -> float:
    """The largest magnitude that an operator makes on its way, where its result does not show it.

    RoPE turns queries and keys without changing how long they are.
    """
    if node.target is torch.ops.aten.mean.dim:
        return float(magnitude(value) * args[0].numel() / max(value.numel(), 1))
    if str(node.target) == QUANTIZED_LINEAR:
        scale, bits = args[2], args[5]  # weights may be stored as floats: |q - zero point| < 2^bits
        return float(magnitude(scale) * 2**bits)
    if str(node.target) == FP8_LINEAR:
        return float(magnitude(args[2]) * LARGEST_FP8)
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return _scores(args[0], args[1])
    if str(node.target) == "fastvlm.cached_attention.default":
        query, key, _, past_key, *_, heads, kv_heads = args
        query, new = (
            x.unflatten(2, (n, -1)).transpose(1, 2) for x, n in ((query, heads), (key, kv_heads))
        )
        key = torch.cat((past_key, new), dim=2)
        return _scores(query, key.repeat_interleave(heads // kv_heads, dim=1))
    return 0.0


def _scores(query: Tensor, key: Tensor) -> float:
    """A bound of the scores of [B,H,N,d]: max|q| max|k| / sqrt(d), per head."""
    longest = query.norm(dim=-1).amax((0, 2)) * key.norm(dim=-1).amax((0, 2))  # [H]
    return magnitude(longest / math.sqrt(query.shape[-1]))
