"""Linear layers of integer weights in the form that XNNPACK takes as one operator.

XNNPACK rounds the activations itself, per token, to 8 bits around a zero point (its type qd8), and
multiplies them by weights of 8 bits per channel (qc8w) or of 4 bits per group (qb4w). Its
partitioner finds that in a graph as a chain of `quantized_decomposed` operators, which is what
tracing `affine_linear` writes.
"""

import operator
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # defines the operators
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from ..quantize.ops import AFFINE
from .executorch_recipes import GROUP

INT8, INT4 = (-128, 127), (-8, 7)


def affine_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """x [...,K] rounded per token, times weight' [K,N], plus bias [N]: [...,N] float32.

    weight int8 [N,K] holding `bits`-bit signed integers; scale float32, of 8 bits [N,1], of 4 bits
    [N,G], which XNNPACK stores as bfloat16. Trace it with the weights as parameters, buffers or
    constants, and give the program to `share_rounding`.
    """
    width = weight.shape[1]
    group = width // scale.shape[1]
    if not ((bits == 8 and group == width) or (bits == 4 and group % GROUP == 0)):
        raise NotImplementedError(f"{bits} bits in groups of {group}")
    decomposed = torch.ops.quantized_decomposed
    steps, zeros = decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
    rounded = decomposed.quantize_per_token(x, steps, zeros, *INT8, torch.int8)
    x = decomposed.dequantize_per_token(rounded, steps, zeros, *INT8, torch.int8, torch.float32)
    # The partitioner wants zero points as a constant. Here the very number is made, not a node
    # that would make it; XNNPACK neither stores nor reads it.
    with _disable_current_modes():
        zero = torch.zeros(1, 1, dtype=torch.int8).expand(tuple(scale.shape))
    limits = INT8 if bits == 8 else INT4
    values = decomposed.dequantize_per_channel_group(
        weight, scale, zero, *limits, torch.int8, group, torch.float32
    )
    return F.linear(x, values, bias)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation_group: int,
) -> Tensor:
    """`fastvlm::quantized_linear`, whose activations are affine, as `affine_linear`."""
    if zero_point is not None or activation_group != AFFINE:
        raise NotImplementedError(f"activations {activation_group}, zero points {zero_point}")
    return affine_linear(x, weight, scale, bias, bits)


def share_rounding(program: ExportedProgram) -> None:
    """Let linear layers that read the same activations read one rounding of them, in place.

    Such layers are one piece for ExecuTorch's partitioner, which joins pieces from the end of the
    graph and never tries a pair again: they have to stand side by side, before whatever reads any
    of them, or the method falls apart into several delegates.
    """
    first: dict[tuple[Any, ...], Node] = {}
    latest: dict[Node, Node] = {}
    for node in list(program.graph.nodes):
        if str(node.target) in _ROUNDING or node.target is operator.getitem:
            same = first.setdefault((node.target, *node.args), node)
            if same is not node:
                node.replace_all_uses_with(same)
                program.graph.erase_node(node)
        elif str(node.target) == "aten.linear.default":
            rounded, weight = node.args[:2]
            if isinstance(rounded, Node) and str(rounded.target) == _ROUNDING[-1]:
                if rounded in latest:
                    latest[rounded].append(weight)
                    weight.append(node)
                latest[rounded] = node
    program.graph.lint()
    program.graph_module.recompile()


_ROUNDING = tuple(
    f"quantized_decomposed.{name}.default"
    for name in (
        "choose_qparams_per_token_asymmetric",
        "quantize_per_token",
        "dequantize_per_token",
    )
)
