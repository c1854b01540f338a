"""An ExportedProgram as a function: how PyTorch itself runs what every target is held to."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from .ops import dequantize, round_activations

Runnable = Callable[..., tuple[Tensor, ...]]


def runnable(program: ExportedProgram) -> Runnable:
    """The program's own operators in PyTorch; integer weights are dequantized once, not per run.

    Takes the program's inputs and returns all outputs. A program in float16 is run as
    `half.rounded` does, since PyTorch has no fast float16 convolution on a CPU.
    """
    if any(_is_half(node) for node in program.graph.nodes):
        from .half import rounded  # noqa: PLC0415 - only where it is needed

        return rounded(program)
    module = program.module(check_guards=False)  # the traced sizes are examples
    if not isinstance(module, GraphModule):
        raise TypeError(type(module))
    _dequantize_once(module)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            out = module(*inputs)
        return out if isinstance(out, tuple) else (out,)

    return run


def _is_half(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is torch.float16


def _dequantize_once(module: GraphModule) -> None:
    """quantized_linear -> round_activations and a linear layer of float weights."""
    graph = module.graph
    weights: dict[str, Node] = {}
    for node in list(graph.nodes):
        if node.target is not torch.ops.fastvlm.quantized_linear.default:
            continue
        x, weight, scale, zero_point, bias, _, activation_group = node.args
        with graph.inserting_before(node):
            if weight.target not in weights:
                name = f"dequantized_{len(weights)}"
                module.register_buffer(
                    name,
                    dequantize(
                        _constant(module, weight),
                        _constant(module, scale),
                        None if zero_point is None else _constant(module, zero_point),
                    ),
                )
                weights[weight.target] = graph.get_attr(name)
            rounded = graph.call_function(round_activations, (x, activation_group))
            linear = graph.call_function(F.linear, (rounded, weights[weight.target], bias))
        node.replace_all_uses_with(linear)
        graph.erase_node(node)
    if weights:
        graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()


def _constant(module: GraphModule, node: Node) -> Tensor:
    value = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.target} is no constant")
    return value.detach()
