"""Static quantization of the vision graph with torchao's PT2E flow, calibrated on images.

What is quantized is what ONNX Runtime and its like compute in integers: dense 1x1 convolutions with
their input and output, and linear layers with their input. Everything else stays in float.

In the ExportedProgram, static layers read and write (all `quantized_decomposed`):
- activations: `quantize_per_tensor.default` and `dequantize_per_tensor.default`, uint8 0..255,
  scale and zero point as numbers. An output that enters another quantized layer is quantized once
  and has one dequantize for each reader.
- weights: an int8 constant `<layer>.weight` [O,I,1,1] or [O,I] and `dequantize_per_channel.default`
  along axis 0 with `<layer>.weight_scale` float32 [O], `<layer>.weight_zero_point` int64 zeros [O].
- biases of convolutions: an int32 constant `<layer>.bias` [O] and `dequantize_per_channel.default`
  with `<layer>.bias_scale` = s_x * weight_scale and `<layer>.bias_zero_point` zeros; biases of
  linear layers are plain float.
Then the float operator (`aten.conv2d.default`, `aten.linear.default`) itself. A weight-only layer
has only its weight's `dequantize_per_channel`. No constant is quantized at run time.

Under `symmetric` activations the operators around a layer say int8, -128..127 and zero point 0, and
all biases are plain float: runtimes that know no zero points (TensorRT) read no int32, either.

Under `affine` activations a linear layer is one `fastvlm::quantized_linear`, rounded at run time:
`<layer>.weight` int8 [O,I], `<layer>.scale` float32 [O,1], `<layer>.bias` float [O] or none. Its
integers are those of a static layer. Calibration sees it, like everything, in float: convolutions,
which are static under `affine`, too, get the ranges that they have beside static linear layers.

Under float16 the activations' scales are numbers that float16 has, unless it cannot hold them, all
biases are plain float, and the dequantize operators say in `out_dtype` what they make, for
`half.to_half` to change: runtimes that compute in float16 have scales in float16 and take no int32.
Under bfloat16 likewise, with its numbers.
The weights' integers are those of float32.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..exporter.graphs import Graph, export_program
from .observers import around_zero, refuse_not_finite, unsigned
from .ops import AFFINE
from .quiet import quiet_import
from .ranges import DEQUANTIZE_TENSOR, DEQUANTIZE_WEIGHT, QUANTIZE, survives_half
from .recipes import Float, Recipe
from .retype import TYPES
from .vision_layers import CONV, LARGEST_BIAS, LINEAR, VisionLayer, layer_name, vision_layers

with quiet_import():
    from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import (
        DerivedQuantizationSpec,
        QuantizationAnnotation,
        Quantizer,
    )
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_channel.default
QUANTIZED = torch.ops.fastvlm.quantized_linear.default


class _VisionQuantizer(Quantizer):  # type: ignore[misc]
    """Says to torchao what the recipe says about each layer."""

    def __init__(self, layers: Sequence[VisionLayer], recipe: Recipe) -> None:
        self.layers = layers
        self.narrow = recipe.float_format is not Float.FP32
        self.unsigned, self.around_zero = unsigned(recipe), around_zero(recipe)

    def annotate(self, model: GraphModule) -> GraphModule:
        """Attach to each layer's node what torchao shall insert around it."""
        for layer in self.layers:
            x, weight, bias = layer.inputs
            activation = self.around_zero if layer.symmetric else self.unsigned
            integer = layer.static and layer.node.target is CONV
            weights = _constant(model, weight)
            biased = bias if integer and not (self.narrow or layer.symmetric) else None
            biases = None if biased is None else _constant(model, biased)
            # In this order: torchao derives each only from those before it.
            specs: dict[Node, Any] = {x: activation} if layer.static else {}
            edges = [(node, layer.node) for node in specs]
            scales = partial(_weight_scale, weights, biases, layer.largest, layer.largest_bias)
            specs[weight] = _derived(scales, edges, layer.largest)
            if biased is not None:
                edges = [*edges, (weight, layer.node)]
                specs[biased] = _derived(_bias_scale, edges, 2**31 - 1, torch.int32)
            layer.node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map=specs,
                output_qspec=activation if integer else None,
                _annotated=True,
            )
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: `annotate` wrote all there is."""

    def prepare_obs_or_fq_callback(self, model: GraphModule, observers: Mapping[Any, Any]) -> None:
        """Let every observer refuse what is not a number, in the name of its layer."""
        names = {layer.node: layer.name for layer in self.layers}
        for place, observer in observers.items():
            if isinstance(observer, DerivedObserverOrFakeQuantize):
                continue  # a weight or bias, not a calibrated range
            side, node = ("input", place[1]) if isinstance(place, tuple) else ("output", place)
            refuse_not_finite(observer, names[node], side)


def _constant(model: GraphModule, node: Node) -> Tensor:
    return model.get_parameter(str(node.target)).detach()


def _derived(
    scales: Callable[[list[Any]], tuple[Tensor, Tensor]],
    edges: list[tuple[Node, Node]],
    largest: int,
    dtype: torch.dtype = torch.int8,
) -> Any:
    """Symmetric integers along axis 0, their scales computed once calibration is over."""
    return DerivedQuantizationSpec(
        derived_from=edges,
        derive_qparams_fn=scales,
        dtype=dtype,
        quant_min=-largest,
        quant_max=largest,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def _weight_scale(
    weight: Tensor, bias: Tensor | None, largest: int, largest_bias: int, observers: list[Any]
) -> tuple[Tensor, Tensor]:
    """s_w[c] = max|w[c]| / `largest`, and |b[c]| / (s_x s_w[c]) at most `largest_bias`.

    The second part matters for channels whose weights are next to nothing beside their bias.
    """
    scale = weight.abs().flatten(1).amax(1) / largest
    if bias is not None:
        input_scale = observers[0].calculate_qparams()[0]
        scale = torch.maximum(scale, bias.abs() / (input_scale * largest_bias))
    scale = torch.where(scale > 0, scale, 1.0)  # a channel of zeros
    return scale, torch.zeros_like(scale, dtype=torch.int64)


def _bias_scale(observers: list[Any]) -> tuple[Tensor, Tensor]:
    """s_b[c] = s_x s_w[c], so that the bias adds to the integer products as it is."""
    inputs, weights = observers
    scale = inputs.calculate_qparams()[0] * weights.calculate_qparams()[0]
    return scale, torch.zeros_like(scale, dtype=torch.int64)


def quantize_vision(
    graph: Graph,
    recipe: Recipe,
    batches: Sequence[Tensor],
    say: Callable[[str], None] = lambda _: None,
) -> ExportedProgram:
    """`integer_vision`, traced."""
    return export_program(integer_vision(graph, recipe, batches, say))


@torch.no_grad()
def integer_vision(
    graph: Graph,
    recipe: Recipe,
    batches: Sequence[Tensor],
    say: Callable[[str], None] = lambda _: None,
) -> Graph:
    """The vision graph with the recipe's integers: pixel_values [B,3,R,R] -> features [B,N,D].

    `batches` are calibration images [1,3,R,R], run one at a time; layers whose activations stay
    float need none. The graph's module stays as it is, and what has no integers is shared with it.
    """
    model = export_program(graph).module(check_guards=False)
    if not isinstance(model, GraphModule):
        raise TypeError("an ExportedProgram's module is a GraphModule")
    layers = vision_layers(model, recipe)
    if not layers:
        return graph
    affine = [layer.name for layer in layers if layer.affine]
    rest = [layer for layer in layers if not layer.affine]
    prepared = prepare_pt2e(model, _VisionQuantizer(rest, recipe))
    if any(layer.static for layer in layers):
        if not batches:
            raise ValueError("static activations need calibration images")
        for index, pixels in enumerate(batches):
            say(f"image {index + 1} of {len(batches)}")
            prepared(pixels)
    converted = convert_pt2e(prepared)
    _name_constants(converted)
    _round_at_run_time(converted, affine, recipe)
    if recipe.float_format is not Float.FP32:
        _fit(converted, TYPES[recipe.float_format])
    return dataclasses.replace(graph, module=converted)


def _name_constants(model: GraphModule) -> None:
    """Store each layer's integers, scales and zero points under its name, in its floats' place."""
    for node in model.graph.nodes:
        if node.target not in (CONV, LINEAR):
            continue
        name = layer_name(node)
        layer = model.get_submodule(name)
        for kind, dequantized in zip(("weight", "bias"), node.args[1:3], strict=False):
            if dequantized is None or dequantized.target is not DEQUANTIZE:
                continue
            delattr(layer, kind)
            for suffix, source in zip(
                ("", "_scale", "_zero_point"), dequantized.args, strict=False
            ):
                layer.register_buffer(kind + suffix, getattr(model, source.target))
                delattr(model, source.target)
                source.target = f"{name}.{kind}{suffix}"
    model.recompile()


def _round_at_run_time(model: GraphModule, names: Collection[str], recipe: Recipe) -> None:
    """Make the linear layers of these names operators of integers that round what enters them."""
    for node in list(model.graph.nodes):
        if node.target is not LINEAR or layer_name(node) not in names:
            continue
        name, (x, weight, *bias) = layer_name(node), node.args
        layer, bits = model.get_submodule(name), int(recipe.precision(name).bits or 0)
        integers, scale = _integers(_constant(model, weight), bits)
        delattr(layer, "weight")
        layer.register_buffer("weight", integers)
        layer.register_buffer("scale", scale)
        with model.graph.inserting_before(node):
            scales = model.graph.get_attr(f"{name}.scale")
            rounded = model.graph.call_function(
                QUANTIZED, (x, weight, scales, None, bias[0] if bias else None, bits, AFFINE)
            )
        rounded.meta = node.meta
        node.replace_all_uses_with(rounded)
        model.graph.erase_node(node)
    model.recompile()


def _integers(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Float [O,I] -> int8 [O,I] and scales [O,1], as they are in a static layer."""
    largest = int(2 ** (bits - 1)) - 1
    scale, zeros = _weight_scale(weight, None, largest, LARGEST_BIAS, [])
    integers: Tensor = torch.ops.quantized_decomposed.quantize_per_channel.default(
        weight, scale, zeros, 0, -largest, largest, torch.int8
    )
    return integers, scale[:, None]


def _fit(model: GraphModule, dtype: torch.dtype) -> None:
    """Round the activations' scales to a 16-bit type, and name the one that is dequantized to."""
    for node in model.graph.nodes:
        if str(node.target) in (QUANTIZE, DEQUANTIZE_TENSOR):
            x, scale, *rest = node.args
            exact = torch.tensor(scale, dtype=torch.float32)
            if dtype is torch.bfloat16 or survives_half(exact):
                node.args = (x, float(exact.to(dtype)), *rest)
        if str(node.target) in (DEQUANTIZE_TENSOR, DEQUANTIZE_WEIGHT):
            node.kwargs = {**node.kwargs, "out_dtype": torch.float32}
    model.recompile()
