"""The image encoder for ExecuTorch, written so that XNNPACK takes it as one piece.

XNNPACK averages over height and width only, has no maxima along an axis, no fused attention that
its partitioner would find in our graph, and depthwise kernels of a few sizes (see
`executorch_depthwise`). Each of these is written here with operators that it has; everything else
stays as the recipe's program has it.
"""

from itertools import groupby

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn import functional as F

from ..exporter.graphs import traced_inputs
from ..exporter.model.fastvithd import EPS_OF_CHANNEL_NORM, LayerNormChannel
from ..quantize.ranges import QUANTIZED_LINEAR
from .executorch_depthwise import split_depthwise
from .executorch_edit import EditedGraph
from .executorch_linear import quantized_linear, share_rounding
from .executorch_retrace import Operators, retrace
from .executorch_static import sign_integers


def vision_method(program: ExportedProgram) -> ExportedProgram:
    """`graphs.build`'s vision program as a method: pixels [1,3,R,R] -> image_features [1,N,D].

    Both are float32.
    """
    [pixels] = traced_inputs(program)
    edited = EditedGraph(program)
    _plain_norms(edited)
    split_depthwise(edited)
    sign_integers(edited)
    shape = [1, *(int(size) for size in pixels.shape[1:])]
    method = retrace(_Vision(edited), (torch.zeros(shape),), (None,))
    share_rounding(method)
    return method


class _Vision(nn.Module):
    def __init__(self, edited: EditedGraph) -> None:
        super().__init__()
        self.encoder = edited.module(_OPERATORS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        image_features: Tensor
        [image_features] = self.encoder(pixel_values)
        return image_features


def _plain_norms(edited: EditedGraph) -> None:
    """Replace each norm over channels by `channel_norm`, in place.

    In float32 nothing overflows that its scaling would keep from it; it takes maxima.
    """
    means: dict[int, Node] = {}
    inside = [node for node in edited.graph.nodes if _norm(node)]
    for name, group in groupby(inside, key=_norm):
        nodes = list(group)
        [x] = {
            n: None
            for node in nodes
            for n in node.all_input_nodes
            if n not in nodes and n not in edited.values
        }
        weight, bias = dict.fromkeys(
            n for node in nodes for n in node.all_input_nodes if n in edited.values
        )
        [out] = [node for node in nodes if any(user not in nodes for user in node.users)]
        width = len(edited.values[weight])
        if width not in means:
            means[width] = edited.add(f"mean_{width}", torch.full((1, width, 1, 1), 1 / width))
        scale, shift = (
            edited.add(f"{name}_{part}".replace(".", "_"), edited.values[n].view(1, -1, 1, 1))
            for part, n in (("scale", weight), ("shift", bias))
        )
        with edited.graph.inserting_before(out):
            new = edited.graph.call_function(channel_norm, (x, means[width], scale, shift))
        out.replace_all_uses_with(new)


def _norm(node: Node) -> str:
    """The name of the norm over channels that an operator belongs to, or ""."""
    if node.op != "call_function":
        return ""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    name, kind = stack[-1] if stack else ("", "")
    return str(name) if str(kind).endswith(LayerNormChannel.__name__) else ""


def channel_norm(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + shift over the channels of [B,C,H,W].

    `mean` [1,C,1,1] holds 1/C: XNNPACK averages along channels only as a convolution.
    """
    centred = x - F.conv2d(x, mean)
    variance = F.conv2d(centred * centred, mean)
    return centred * torch.rsqrt(variance + EPS_OF_CHANNEL_NORM) * scale + shift


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key' / sqrt(d)) value, all [1,heads,N,d]."""
    shape = query.shape
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    scores = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1), value).view(shape)


def _unbind(x: Tensor, axis: int = 0) -> tuple[Tensor, ...]:
    shape = [*x.shape[:axis], *x.shape[axis + 1 :]]
    return tuple(x.narrow(axis, i, 1).reshape(shape) for i in range(x.shape[axis]))


_OPERATORS: Operators = {
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.unbind.int": _unbind,
    QUANTIZED_LINEAR: quantized_linear,
}
