"""A program's floats in 16 bits: float16 for `half`, and bfloat16 as a whole.

bfloat16 has float32's range and 8 bits of a value, so that nothing overflows and no operator has to
stay behind: what the model itself asks in float32 (RMSNorm's statistics) does, nothing else.
Integers stay what they are, and only the floats around them change.
"""

import copy
import dataclasses
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from ..exporter.graphs import Graph, export_program
from .ranges import lifted
from .recipes import Float

TYPES = {Float.FP32: torch.float32, Float.FP16: torch.float16, Float.BF16: torch.bfloat16}
"""What a recipe's float format means."""

CACHE = ("past_key_values", "present")
"""Interface tensors with these prefixes are 16-bit; every other floating-point one is float32."""


def to_bfloat16(graph: Graph) -> ExportedProgram:
    """The graph traced in bfloat16.

    pixel_values, image_features, inputs_embeds and logits stay float32, the cache becomes bfloat16.
    """
    program = traced_in(graph, torch.bfloat16)
    Widening(graph, program, program, (), torch.bfloat16).run()
    return rebuilt(program)


def traced_in(graph: Graph, dtype: torch.dtype) -> ExportedProgram:
    """The graph traced with a copy of its module and inputs in that type, in place of float32.

    No other tensor is copied.
    """
    memo: dict[int, Any] = {}
    for tensor in (*graph.module.parameters(), *graph.module.buffers()):
        memo[id(tensor)] = tensor
        if tensor.dtype is torch.float32:
            narrow = tensor.detach().to(dtype)
            parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(narrow, requires_grad=False) if parameter else narrow
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in graph.inputs.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch to itself
        module = copy.deepcopy(graph.module, memo)
    if isinstance(module, GraphModule):
        for node in module.graph.nodes:  # `activations.integer_vision`'s, which names the type
            if node.kwargs.get("out_dtype") is torch.float32:
                node.update_kwarg("out_dtype", dtype)
        module.recompile()
    return export_program(dataclasses.replace(graph, module=module, inputs=inputs))


class Widening:
    """Moves the operators named `names` of a 16-bit program to float32, in place.

    Its interface becomes float32, too, but for the cache. `wide`: its trace in float32, for the
    weights of those operators; `dtype`: the 16-bit type. `kept`: which of them had been in it.
    """

    def __init__(
        self,
        graph: Graph,
        program: ExportedProgram,
        wide: ExportedProgram,
        names: Collection[str],
        dtype: torch.dtype,
    ) -> None:
        self.program = program
        self.fx: FxGraph = program.graph
        self.names = names
        self.dtype = dtype
        self.kept: set[str] = set()
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.wanted = {n: _dtype(n) for n in self.fx.nodes}
        self.weights = dict(zip(_lifted_names(program), lifted(wide), strict=True))
        self.inputs = dict(zip(program.graph_signature.user_inputs, graph.inputs, strict=True))
        self.outputs = graph.outputs
        self.first = next(n for n in self.fx.nodes if n.op != "placeholder")

    def run(self) -> None:
        """Do it."""
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
        if _dtype(node) is not self.dtype:
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
        read = any(self._traced(n) is self.dtype for n in node.all_input_nodes)
        if read or _dtype(node) is self.dtype:
            self.kept.add(node.name)
        node.args = map_aggregate(node.args, self._widened)
        node.kwargs = map_aggregate(node.kwargs, self._widened)
        _set_dtype(node, torch.float32)

    def _hand_over(self, node: Node) -> None:
        values: Any = node.args[0]
        dtypes = [self.dtype if name.startswith(CACHE) else torch.float32 for name in self.outputs]
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
        if value is self.dtype:
            return torch.float32
        return self._as(value, torch.float32)

    def _as(self, value: Any, dtype: torch.dtype | None) -> Any:
        """The value in that type: itself, or the one cast of it that all its readers share."""
        found = _dtype(value) if isinstance(value, Node) else None
        if found is None or dtype is None or found is dtype or found not in TYPES.values():
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


def rebuilt(program: ExportedProgram) -> ExportedProgram:
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
