"""Which layers of the traced vision graph a recipe quantizes, and what it cannot ask of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..exporter.errors import ExportError
from .recipes import Activations, Method, Precision, Recipe, ScaleFormat

CONV, LINEAR = torch.ops.aten.conv2d.default, torch.ops.aten.linear.default

# An int32 sum of products stays below 2^31 with this much left for the bias: the widest layer adds
# 3072 * 255 * 127 = 1e8.
LARGEST_BIAS = 2**30
# Under `affine` they go through float32 on their way (XNNPACK), where each has its own up to here.
LARGEST_FLOAT_BIAS = 2**22


@dataclass(frozen=True, kw_only=True)
class VisionLayer:
    """A convolution or linear layer of the graph, to be quantized to -`largest`..`largest`."""

    name: str
    node: Node
    precision: Precision
    largest: int

    @property
    def affine(self) -> bool:
        """Whether activations are rounded at run time: a linear layer's."""
        return self.precision.activations is Activations.AFFINE and self.node.target is LINEAR

    @property
    def symmetric(self) -> bool:
        """Whether activations are rounded in fixed ranges around 0."""
        return self.precision.activations is Activations.SYMMETRIC

    @property
    def static(self) -> bool:
        """Whether activations are rounded in fixed ranges, of either kind."""
        return self.precision.activations is not Activations.FLOAT and not self.affine

    @property
    def largest_bias(self) -> int:
        """The largest integer that its bias may become."""
        affine = self.precision.activations is Activations.AFFINE
        return LARGEST_FLOAT_BIAS if affine else LARGEST_BIAS

    @property
    def inputs(self) -> tuple[Node, Node, Node | None]:
        """The nodes of its input, weight and bias."""
        x, weight, *rest = self.node.all_input_nodes
        return x, weight, rest[0] if rest else None


def vision_layers(model: GraphModule, recipe: Recipe) -> list[VisionLayer]:
    """The dense 1x1 convolutions and the linear layers that the recipe quantizes."""
    found = []
    for node in model.graph.nodes:
        if node.target not in (CONV, LINEAR):
            continue
        name = layer_name(node)
        precision = recipe.precision(name)
        # Squeeze-and-excite convolutions compute one value per channel: no time, much influence.
        stack = node.meta["nn_module_stack"].values()
        excite = any(str(kind).endswith("SqueezeExcite") for _, kind in stack)
        if precision.bits is None or excite:
            continue
        if node.target is LINEAR or _is_dense(node):
            largest = int(2 ** (precision.bits - 1)) - 1
            found.append(VisionLayer(name=name, node=node, precision=precision, largest=largest))
    _check(found)
    return found


def layer_name(node: Node) -> str:
    """The module that a node was traced from, e.g. `vision_tower.network.0.0.convffn.fc1`."""
    *_, (name, _) = node.meta["nn_module_stack"].values()
    return str(name)


def _is_dense(conv: Node) -> bool:
    """Whether a convolution is a matrix product over channels: 1x1 and one group."""
    x, weight = (node.meta["val"] for node in conv.all_input_nodes[:2])
    return tuple(weight.shape[1:]) == (x.shape[1], 1, 1)


def _check(layers: Sequence[VisionLayer]) -> None:
    """Raise ExportError for precisions that the vision graph has no operators for."""
    problems: dict[str, list[str]] = {}
    for layer in layers:
        precision = layer.precision
        for wrong, what in (
            (not 1 <= layer.largest <= 127, f"bits = {precision.bits} (2 to 8)"),
            (precision.group_size is not None, "group_size (one scale per output channel)"),
            (not precision.symmetric, "symmetric = false"),
            (precision.method is not Method.RTN, f'method = "{precision.method}" (only "rtn")'),
            (precision.activations is Activations.DYNAMIC, 'activations = "dynamic"'),
            (
                precision.scale_format is not ScaleFormat.FLOAT,
                f'scale_format = "{precision.scale_format}" (only "float")',
            ),
            (
                precision.activations is not Activations.FLOAT and precision.activation_bits != 8,
                f"activation_bits = {precision.activation_bits} (only 8)",
            ),
        ):
            if wrong:
                problems.setdefault(what, []).append(layer.name)
    if problems:
        lines = [
            f"{what}: {names[0]}" + (f" and {len(names) - 1} more layers" if names[1:] else "")
            for what, names in problems.items()
        ]
        raise ExportError(
            "The vision graph cannot be quantized like this:\n  " + "\n  ".join(lines),
            'Give vision layers per-channel symmetric weights, method = "rtn", and static, '
            "symmetric, affine (8 bits) or float activations.",
        )
