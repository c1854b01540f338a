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

Under `affine` activations a linear layer is one `fastvlm::quantized_linear`, rounded at run time:
`<layer>.weight` int8 [O,I], `<layer>.scale` float32 [O,1], `<layer>.bias` float [O] or none. Its
integers are those of a static layer. Calibration sees it, like everything, in float: convolutions,
which are static under `affine`, too, get the ranges that they have beside static linear layers.

Under float16 the activations' scales are numbers that float16 has, unless it cannot hold them, all
biases are plain float, and the dequantize operators say in `out_dtype` what they make, for
`half.to_half` to change: runtimes that compute in float16 have scales in float16 and take no int32.
The weights' integers are those of float32.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..exporter.errors import ExportError
from ..exporter.graphs import Graph, export_program
from .ops import AFFINE
from .quiet import quiet_import
from .ranges import DEQUANTIZE_TENSOR, DEQUANTIZE_WEIGHT, QUANTIZE, survives_half
from .recipes import Activations, Float, Method, Observer, Precision, Recipe, ScaleFormat

with quiet_import():
    from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize
    from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import (
        DerivedQuantizationSpec,
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
    )
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

CONV, LINEAR = torch.ops.aten.conv2d.default, torch.ops.aten.linear.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_channel.default
QUANTIZED = torch.ops.fastvlm.quantized_linear.default

# An int32 sum of products stays below 2^31 with this much left for the bias: the widest layer adds
# 3072 * 255 * 127 = 1e8.
LARGEST_BIAS = 2**30
# Under `affine` they go through float32 on their way (XNNPACK), where each has its own up to here.
LARGEST_FLOAT_BIAS = 2**22
# Fine enough for 99.99 % of a range whose outliers are 100 times its body.
BINS = 2**14


@dataclass(frozen=True, kw_only=True)
class _Layer:
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
    def static(self) -> bool:
        """Whether activations are rounded in fixed ranges."""
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


class _PercentileObserver(HistogramObserver):  # type: ignore[misc]
    """The range that holds `percentile` % of all calibration values, half of the rest either side.

    Exact up to one of the histogram's bins.
    """

    def __init__(self, percentile: float, **kwargs: Any) -> None:
        super().__init__(bins=BINS, **kwargs)
        self.outside = (1 - percentile / 100) / 2

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        share = torch.cumsum(self.histogram.double(), 0)
        share /= share[-1].clone()
        first = int((share <= self.outside).sum())
        last = int((share < 1 - self.outside).sum())
        width = (self.max_val - self.min_val) / self.bins
        return self.min_val + width * first, self.min_val + width * (last + 1)


class _VisionQuantizer(Quantizer):  # type: ignore[misc]
    """Says to torchao what the recipe says about each layer."""

    def __init__(self, layers: Sequence[_Layer], recipe: Recipe) -> None:
        self.layers = layers
        self.half = recipe.float_format is Float.FP16
        observers: dict[Observer, Any] = {
            Observer.MINMAX: MinMaxObserver,
            Observer.HISTOGRAM: HistogramObserver,
            Observer.PERCENTILE: _PercentileObserver.with_args(percentile=recipe.percentile),
        }
        self.activation = QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=observers[recipe.observer],
            quant_min=0,
            quant_max=255,
            qscheme=torch.per_tensor_affine,
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        """Attach to each layer's node what torchao shall insert around it."""
        for layer in self.layers:
            x, weight, bias = layer.inputs
            integer = layer.static and layer.node.target is CONV
            weights = _constant(model, weight)
            biased = bias if integer and not self.half else None
            biases = None if biased is None else _constant(model, biased)
            # In this order: torchao derives each only from those before it.
            specs: dict[Node, Any] = {x: self.activation} if layer.static else {}
            edges = [(node, layer.node) for node in specs]
            scales = partial(_weight_scale, weights, biases, layer.largest, layer.largest_bias)
            specs[weight] = _derived(scales, edges, layer.largest)
            if biased is not None:
                edges = [*edges, (weight, layer.node)]
                specs[biased] = _derived(_bias_scale, edges, 2**31 - 1, torch.int32)
            layer.node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map=specs,
                output_qspec=self.activation if integer else None,
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
            observer.register_forward_pre_hook(partial(_refuse_not_finite, names[node], side))


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


def _refuse_not_finite(layer: str, side: str, _: nn.Module, args: tuple[Tensor]) -> None:
    # The sum would overflow for large but finite values.
    low, high = torch.aminmax(args[0])
    if not (low.isfinite() and high.isfinite()):
        raise ExportError(
            f"Calibration finds values that are not finite at the {side} of {layer}.",
            "Run `fastvlm-export inspect` on the checkpoint: its weights may be damaged.",
        )


def _layers(model: GraphModule, recipe: Recipe) -> list[_Layer]:
    """The dense 1x1 convolutions and the linear layers that the recipe quantizes."""
    found = []
    for node in model.graph.nodes:
        if node.target not in (CONV, LINEAR):
            continue
        name = _layer_name(node)
        precision = recipe.precision(name)
        # Squeeze-and-excite convolutions compute one value per channel: no time, much influence.
        stack = node.meta["nn_module_stack"].values()
        excite = any(str(kind).endswith("SqueezeExcite") for _, kind in stack)
        if precision.bits is None or excite:
            continue
        if node.target is LINEAR or _is_dense(node):
            largest = int(2 ** (precision.bits - 1)) - 1
            found.append(_Layer(name=name, node=node, precision=precision, largest=largest))
    _check(found)
    return found


def _layer_name(node: Node) -> str:
    """The module that a node was traced from, e.g. `vision_tower.network.0.0.convffn.fc1`."""
    *_, (name, _) = node.meta["nn_module_stack"].values()
    return str(name)


def _is_dense(conv: Node) -> bool:
    """Whether a convolution is a matrix product over channels: 1x1 and one group."""
    x, weight = (node.meta["val"] for node in conv.all_input_nodes[:2])
    return tuple(weight.shape[1:]) == (x.shape[1], 1, 1)


def _check(layers: Sequence[_Layer]) -> None:
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
            'Give vision layers per-channel symmetric weights, method = "rtn", and static, affine '
            "(8 bits) or float activations.",
        )


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
    layers = _layers(model, recipe)
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
    if recipe.float_format is Float.FP16:
        _fit_half(converted)
    return dataclasses.replace(graph, module=converted)


def _name_constants(model: GraphModule) -> None:
    """Store each layer's integers, scales and zero points under its name, in its floats' place."""
    for node in model.graph.nodes:
        if node.target not in (CONV, LINEAR):
            continue
        name = _layer_name(node)
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
        if node.target is not LINEAR or _layer_name(node) not in names:
            continue
        name, (x, weight, *bias) = _layer_name(node), node.args
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


def _fit_half(model: GraphModule) -> None:
    """Round the activations' scales to float16, and name the type that is dequantized to."""
    for node in model.graph.nodes:
        if str(node.target) in (QUANTIZE, DEQUANTIZE_TENSOR):
            x, scale, *rest = node.args
            exact = torch.tensor(scale, dtype=torch.float32)
            if survives_half(exact):
                node.args = (x, float(exact.half()), *rest)
        if str(node.target) in (DEQUANTIZE_TENSOR, DEQUANTIZE_WEIGHT):
            node.kwargs = {**node.kwargs, "out_dtype": torch.float32}
    model.recompile()
