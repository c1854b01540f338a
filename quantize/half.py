"""fp16 that cannot overflow: operators that leave its range on real inputs stay in float32.

fp16 reaches 65504 and keeps 11 bits down to 6e-5. A float32 run finds the largest magnitude at
every operator (`ranges.scan`); those beyond a limit compute in float32 and hand their values on in
float32 as far as the next operator inside the limit, so that no value beyond it is ever stored in
fp16. What the model itself asks in float32 (RMSNorm's statistics, whose eps of 1e-6 is below fp16's
normal range) stays there too: the program is traced from a model in fp16.

Integers stay what they are, and only the floats around them become fp16: an integer layer's scales,
its bias, what its `dequantize` makes and what its `quantize` reads.
"""

import copy
import dataclasses
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from ..exporter.errors import ExportError
from ..exporter.graphs import Graph, export_program
from .ranges import (
    DEQUANTIZE_TENSOR,
    DEQUANTIZE_WEIGHT,
    LOOKUP,
    QUANTIZE,
    Inputs,
    OpRange,
    lifted,
    scan,
    survives_half,
)

LARGEST = torch.finfo(torch.float16).max  # 65504

CACHE = ("past_key_values", "present")
"""Interface tensors with these prefixes are fp16; every other floating-point one is float32."""


@dataclass(frozen=True, kw_only=True)
class Half:
    """A program in fp16, the operators that stay in float32, and every operator's range.

    Not in `kept`: what the model itself computes in float32.
    """

    program: ExportedProgram
    kept: tuple[OpRange, ...]
    ranges: tuple[OpRange, ...]


def to_half(
    graph: Graph, batches: Sequence[Inputs], limit: float, say: Callable[[str], None]
) -> Half:
    """Trace the graph in fp16, but for operators whose magnitudes on `batches` exceed `limit`.

    pixel_values, image_features, inputs_embeds and logits stay float32, the cache becomes fp16.
    An operator stays in float32, too, where fp16 has not enough digits for its weights, or for the
    scales of its integers.
    `limit` infinity gives the naive conversion. Raises ExportError where float32 itself gives NaN
    or infinity, and where the cache would leave fp16's range.
    """
    wide = export_program(graph)
    ranges = scan(wide, batches, say)
    _refuse_broken(graph.name, ranges)
    _refuse_cache(graph, wide, ranges, limit)
    program = export_program(_traceable(graph))
    _check_same(wide, program)
    widening = _Widening(graph, program, wide, _names_to_keep(wide, ranges, limit))
    widening.run()
    kept = tuple(r for r in ranges if r.node in widening.kept)
    say(f"{graph.name}: {len(kept)} of {len(ranges)} operators stay in float32")
    return Half(program=_rebuilt(program), kept=kept, ranges=ranges)


def _refuse_broken(name: str, ranges: Sequence[OpRange]) -> None:
    broken = [r for r in ranges if not math.isfinite(r.leaving)]
    if broken:
        first = broken[0]
        raise ExportError(
            f"In float32 {len(broken)} operators of the {name} graph already give NaN or infinity, "
            f"first {first.op} ({first.node}) in {first.layer or 'the graph itself'}.",
            "Run `fastvlm-export inspect` on the checkpoint: its weights may be damaged.",
        )


def _refuse_cache(
    graph: Graph, wide: ExportedProgram, ranges: Sequence[OpRange], limit: float
) -> None:
    """The cache is fp16 for every client, so what it cannot hold has nowhere to go."""
    names = dict(zip(wide.graph_signature.user_outputs, graph.outputs, strict=True))
    beyond = [
        f"{names[r.node]} ({r.leaving:.3g})"
        for r in ranges
        if names.get(r.node, "").startswith(CACHE) and r.leaving > max(limit, LARGEST)
    ]
    if beyond:
        raise ExportError(
            f"A cache in fp16 ends at {LARGEST:.0f}, below values of {', '.join(beyond)}.",
            'Use a recipe with float = "fp32".',
        )


def _traceable(graph: Graph) -> Graph:
    """The graph with an fp16 copy of its module and inputs; no other tensor is copied."""
    memo: dict[int, Any] = {}
    for tensor in (*graph.module.parameters(), *graph.module.buffers()):
        memo[id(tensor)] = tensor
        if tensor.dtype is torch.float32:
            half = tensor.detach().half()
            parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(half, requires_grad=False) if parameter else half
    inputs = {
        name: value.half() if value.is_floating_point() else value
        for name, value in graph.inputs.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch to itself
        module = copy.deepcopy(graph.module, memo)
    if isinstance(module, GraphModule):
        for node in module.graph.nodes:  # `activations.integer_vision`'s, which names the type
            if node.kwargs.get("out_dtype") is torch.float32:
                node.update_kwarg("out_dtype", torch.float16)
        module.recompile()
    return dataclasses.replace(graph, module=module, inputs=inputs)


def _check_same(wide: ExportedProgram, half: ExportedProgram) -> None:
    """Ranges are matched by name, so both traces must be the same."""
    traces = [[(n.name, str(n.target)) for n in p.graph.nodes] for p in (wide, half)]
    if traces[0] != traces[1]:
        raise RuntimeError("the fp16 trace differs from the float32 one")


def _names_to_keep(wide: ExportedProgram, ranges: Sequence[OpRange], limit: float) -> set[str]:
    """Operators beyond the limit, or with weights or scales that fp16 cannot represent."""
    specs, tensors = wide.graph_signature.input_specs, lifted(wide)
    constants = {spec.arg.name for spec in specs[: len(tensors)]}
    lost = {
        spec.arg.name
        for spec, tensor in zip(specs, tensors, strict=False)
        if math.isfinite(limit) and not survives_half(tensor)
    }
    beyond = {r.node for r in ranges if not r.within(limit)}
    names: set[str] = set()
    for node in wide.graph.nodes:
        # One of several results is where its producer is.
        part = node.target is operator.getitem and node.args[0].name in names
        read = {n.name for n in node.all_input_nodes}
        scale_lost = math.isfinite(limit) and _scale_is_lost(node)
        if part or node.name in beyond or read & lost or scale_lost:
            names.add(node.name)
        if read and read <= constants:
            constants.add(node.name)
            if read & lost:
                lost.add(node.name)  # a view of such weights, or integers by such scales
    return names | _around(wide, names)


def _scale_is_lost(node: Node) -> bool:
    """Whether the operator has an activation's scale that is no number of fp16."""
    if str(node.target) not in (QUANTIZE, DEQUANTIZE_TENSOR):
        return False
    scale = float(node.args[1])  # type: ignore[arg-type]
    return float(torch.tensor(scale, dtype=torch.float16)) != scale


def _around(program: ExportedProgram, names: set[str]) -> set[str]:
    """What rounds to integers behind kept operators, and what makes floats for them alone.

    That goes from and to any type, so that no cast is needed there.
    """
    found = set()
    for node in program.graph.nodes:
        kind, readers = str(node.target), [user.name for user in node.users]
        behind = kind == QUANTIZE and node.args[0].name in names
        before = kind in (DEQUANTIZE_TENSOR, DEQUANTIZE_WEIGHT, LOOKUP)
        if behind or (before and readers and names.issuperset(readers)):
            found.add(node.name)
    return found


class _Widening:
    """Moves the operators named `names` of an fp16 program to float32, in place."""

    def __init__(
        self, graph: Graph, program: ExportedProgram, wide: ExportedProgram, names: set[str]
    ) -> None:
        self.program = program
        self.fx: FxGraph = program.graph
        self.names = names
        self.kept: set[str] = set()
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.wanted = {n: _dtype(n) for n in self.fx.nodes}
        self.weights = dict(zip(_lifted_names(program), lifted(wide), strict=True))
        self.inputs = dict(zip(program.graph_signature.user_inputs, graph.inputs, strict=True))
        self.outputs = graph.outputs
        self.first = next(n for n in self.fx.nodes if n.op != "placeholder")

    def run(self) -> None:
        for node in list(self.fx.nodes):
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                self.fx.erase_node(node)  # about the types as they were traced
            elif node.op == "placeholder":
                self._place(node)
            elif node.op == "output":
                self._hand_over(node)
            else:
                self._connect(node)
        self.fx.lint()
        self.program.graph_module.recompile()

    def _place(self, node: Node) -> None:
        """Inputs by the interface; weights in float32 where every reader is."""
        if _dtype(node) is not torch.float16:
            return
        if node.name in self.inputs:
            if not self.inputs[node.name].startswith(CACHE):
                _set_dtype(node, torch.float32)
        elif node.users and all(user.name in self.names for user in node.users):
            _set_dtype(node, torch.float32)
            _store(self.program, node.name, self.weights[node.name])

    def _connect(self, node: Node) -> None:
        """Give an operator its inputs in the type that it computes in."""
        if node.name not in self.names:
            node.args = map_aggregate(node.args, lambda a: self._as(a, self._traced(a)))
            node.kwargs = map_aggregate(node.kwargs, lambda a: self._as(a, self._traced(a)))
            return
        read = any(self._traced(n) is torch.float16 for n in node.all_input_nodes)
        if read or _dtype(node) is torch.float16:
            self.kept.add(node.name)
        node.args = map_aggregate(node.args, self._widened)
        node.kwargs = map_aggregate(node.kwargs, self._widened)
        _set_dtype(node, torch.float32)

    def _hand_over(self, node: Node) -> None:
        values: Any = node.args[0]
        dtypes = [
            torch.float16 if name.startswith(CACHE) else torch.float32 for name in self.outputs
        ]
        new = tuple(self._as(v, dtype) for v, dtype in zip(values, dtypes, strict=True))
        node.args = (new,)
        for spec, value in zip(self.program.graph_signature.output_specs, new, strict=True):
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise RuntimeError(f"{spec.target} is changed by the program")
            spec.arg.name = value.name
        node.meta["val"] = tuple(v.meta["val"] for v in new)

    def _traced(self, value: Any) -> torch.dtype | None:
        return self.wanted.get(value) if isinstance(value, Node) else None

    def _widened(self, value: Any) -> Any:
        if value is torch.float16:
            return torch.float32
        return self._as(value, torch.float32)

    def _as(self, value: Any, dtype: torch.dtype | None) -> Any:
        """The value in that type: itself, or the one cast of it that all its readers share."""
        found = _dtype(value) if isinstance(value, Node) else None
        if found is None or dtype is None or found is dtype or not found.is_floating_point:
            return value
        if (value, dtype) not in self.casts:
            after = self.first if value.op == "placeholder" else value.next
            with self.fx.inserting_before(after):
                cast = self.fx.call_function(torch.ops.aten._to_copy.default, (value,))
            cast.kwargs = {"dtype": dtype}
            cast.meta = {k: v for k, v in value.meta.items() if k != "tensor_meta"}
            _set_dtype(cast, dtype)
            self.casts[value, dtype] = cast
        return self.casts[value, dtype]


def _lifted_names(program: ExportedProgram) -> list[str]:
    return [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT
    ]


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _set_dtype(node: Node, dtype: torch.dtype) -> None:
    """Make the node's floating-point values, as its metadata tells them, of that type."""
    node.meta["val"] = pytree.tree_map_only(
        Tensor, lambda v: v.to(dtype) if v.is_floating_point() else v, node.meta["val"]
    )
    node.meta.pop("tensor_meta", None)


def _store(program: ExportedProgram, placeholder: str, value: Tensor) -> None:
    """Replace the weight that a placeholder takes."""
    for spec in program.graph_signature.input_specs:
        if spec.arg.name == placeholder:
            kept = program.state_dict if spec.target in program.state_dict else program.constants
            kept[str(spec.target)] = value


def _rebuilt(program: ExportedProgram) -> ExportedProgram:
    """The same program, checked anew, with example inputs of the types that it now takes."""
    types = {n.name: _dtype(n) for n in program.graph.nodes if n.op == "placeholder"}
    args, kwargs = program.example_inputs
    flat, spec = pytree.tree_flatten(args)
    examples = [
        x.to(types[name]) for x, name in zip(flat, program.graph_signature.user_inputs, strict=True)
    ]
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=(pytree.tree_unflatten(examples, spec), kwargs),
        constants=program.constants,
        verifiers=program.verifiers,
    )
