"""Single layers of a float model as a recipe would have them, put in place and taken out again.

The modules compute with the very integers and ranges that an export would pack: they are taken from
the quantized vision graph and the quantized decoder, GPTQ's choices among them, and from the model
with lookup tables and fp8.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from ..exporter import graphs
from ..exporter.model.decoder import Decoder
from ..exporter.model.fastvlm import FastVLM
from ..exporter.spec import ExportSpec
from . import fp8
from .activations import DEQUANTIZE, QUANTIZED, quantize_vision
from .apply import decoder_inputs, same_weights
from .ops import to_integers
from .palettes import palettize, without
from .recipes import EMBEDDING, HEAD, Method, Part, Recipe, part_of
from .rounding import Integers
from .vision_layers import CONV, LINEAR
from .weights import (
    QuantizedEmbedding,
    QuantizedLinear,
    layer_names,
    layer_widths,
    quantize_decoder,
)

Say = Callable[[str], None]
_ROUND = torch.ops.quantized_decomposed.quantize_per_tensor.default
_WIDEN = torch.ops.quantized_decomposed.dequantize_per_tensor.default


class StaticLayer(nn.Module):
    """A convolution or linear layer between fixed roundings: x -> round(layer(round(x))).

    `entering` and `leaving` are what the graph's quantize operators are given behind the tensor:
    scale, zero point, least and greatest integer, type; None: not rounded.
    """

    def __init__(
        self, layer: nn.Module, entering: tuple[Any, ...] | None, leaving: tuple[Any, ...] | None
    ) -> None:
        super().__init__()
        self.layer, self.entering, self.leaving = layer, entering, leaving

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return _rounded(self.layer(_rounded(x, self.entering)), self.leaving)


def _rounded(x: Tensor, numbers: tuple[Any, ...] | None) -> Tensor:
    if numbers is None:
        return x
    out: Tensor = _WIDEN(to_integers(x, *numbers), *numbers)
    return out


class _FloatHead(nn.Module):
    """The head of a tied model around the float table, while its embedding is another module."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.table)


@contextmanager
def substituted(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules in the place of others, by name; afterwards the model has its own again.

    No tensor is touched. A name that is not there yet is added and taken away again.
    """
    before = []
    try:
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            before.append((owner, leaf, getattr(owner, leaf, None)))
            setattr(owner, leaf, module)
        yield
    finally:
        for owner, leaf, module in reversed(before):
            if module is None:
                delattr(owner, leaf)
            else:
                setattr(owner, leaf, module)


@contextmanager
def simulated(model: FastVLM, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with some of its layers as `variants` gives them; contexts can be stacked.

    A tied head stays float where only the embedding is among them, and the other way round.
    """
    decoder = model.decoder
    tied = not hasattr(decoder, "lm_head")
    head = {HEAD: _FloatHead(decoder.embed_tokens.weight)} if tied and EMBEDDING in layers else {}
    with substituted(model, {**head, **layers}):
        yield


@torch.no_grad()
def variants(
    model: FastVLM, recipe: Recipe, spec: ExportSpec, shown: Sequence[Tensor], say: Say
) -> dict[str, nn.Module]:
    """For each layer that the recipe quantizes, by its name, the module that computes like it.

    In the order of the network. `shown` are calibration images [1,3,R,R]. A reparameterized model;
    it is not changed, and the variants share its biases.
    """
    names, rest = layer_names(model), fp8.without(without(recipe))
    changed = same_weights(model)  # static ranges are taken behind lookup tables, as by `quantize`
    records = palettize(changed, recipe, say)
    precisions = [rest.precision(layer) for layer in layer_widths(model.decoder)]
    calibrated = recipe.fp8 or any(p.bits and p.method is Method.GPTQ for p in precisions)
    sequences = decoder_inputs(model, shown, spec, say) if calibrated else []
    if recipe.fp8:
        scales = fp8.input_scales(model, recipe, shown, sequences, say)
        records += fp8.replace_layers(changed, recipe, scales, say)
    found = {record.layer: changed.get_submodule(record.layer) for record in records}
    if any(rest.precision(name).bits for name in names if _is_vision(name)):
        built = graphs.build(
            changed,
            resolution=spec.preprocessing.resolution,
            context=spec.context,
            image_token_id=spec.image_token_id,
        )
        say("quantize vision")
        found |= _vision(model, quantize_vision(built["vision"], rest, shown, say))
    decoder = same_weights(model.decoder)
    quantize_decoder(decoder, rest, sequences, say)
    found |= _decoder(decoder)
    return {name: found[name] for name in names if name in found}


def _is_vision(layer: str) -> bool:
    return part_of(layer) is Part.VISION


def _decoder(decoder: Decoder) -> dict[str, nn.Module]:
    return {
        f"decoder.{name}": module
        for name, module in decoder.named_modules()
        if isinstance(module, QuantizedLinear | QuantizedEmbedding)
    }


def _vision(model: FastVLM, program: ExportedProgram) -> dict[str, nn.Module]:
    """The quantized layers of `quantize_vision`'s graph, as its docstring describes them."""
    traced = program.module(check_guards=False)
    if not isinstance(traced, GraphModule):
        raise TypeError("an ExportedProgram's module is a GraphModule")
    found: dict[str, nn.Module] = {}
    for node in traced.graph.nodes:
        if node.target is QUANTIZED:
            found[_layer_of(node.args[1])] = _affine(traced, node)
        if node.target not in (CONV, LINEAR) or node.args[1].target is not DEQUANTIZE:
            continue
        x, weight = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else None
        name = _layer_of(weight.args[0])
        layer = copy.deepcopy(model.get_submodule(name))
        for kind, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                setattr(layer, kind, nn.Parameter(_value(traced, value), requires_grad=False))
        leaving = [user for user in node.users if user.target is _ROUND]
        found[name] = StaticLayer(
            layer,
            x.args[1:] if x.target is _WIDEN else None,
            leaving[0].args[1:] if leaving else None,
        )
    return found


def _affine(traced: GraphModule, node: Node) -> nn.Module:
    """A linear layer whose activations are rounded at run time."""
    _, *tensors, bits, group = node.args
    weight, scale, zeros, bias = (
        _value(traced, x) if isinstance(x, Node) else None for x in tensors
    )
    if weight is None or scale is None:
        raise TypeError(f"{node} has no integers")
    integers = Integers(weight=weight, scale=scale, zero_point=zeros, bits=int(str(bits)))
    return QuantizedLinear(integers, bias, int(str(group))).eval()


def _layer_of(weight: Any) -> str:
    return str(weight.target).removesuffix(".weight")


def _value(traced: GraphModule, node: Node) -> Tensor:
    """A constant of the graph, dequantized where it is stored as integers."""
    if node.target is DEQUANTIZE:
        parts = [_value(traced, x) if isinstance(x, Node) else x for x in node.args]
        out: Tensor = DEQUANTIZE(*parts)
        return out
    owner, _, leaf = str(node.target).rpartition(".")
    value = getattr(traced.get_submodule(owner), leaf)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.target} is no constant")
    return value.detach()
