"""The decoder's layers with integer weights, quantized one transformer layer at a time."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..exporter.errors import ExportError
from ..exporter.model.attention_op import cached_attention
from ..exporter.model.decoder import Attention, Decoder, Layer, rotary_tables
from ..exporter.model.fastvlm import FastVLM
from .gptq import hessian, inverse_factor, quantize_columns
from .ops import AFFINE, FLOAT_ACTIVATIONS, PER_TOKEN, quantized_embedding, quantized_linear
from .recipes import (
    ACTIVATIONS,
    EMBEDDING,
    HEAD,
    METHODS,
    Activations,
    Method,
    NumberFormat,
    Precision,
    Recipe,
    part_of,
)
from .rounding import Integers, by_rows, quantize_rows

DECODER = "decoder."
SMALLEST_GROUP = 16  # worth proposing: runtimes' kernels take no smaller one


class _Quantized(nn.Module):
    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, integers: Integers) -> None:
        super().__init__()
        self.bits = integers.bits
        self.register_buffer("weight", integers.weight)
        self.register_buffer("scale", integers.scale)
        self.register_buffer("zero_point", integers.zero_point)

    @property
    def integers(self) -> Integers:
        """The very tensors of this layer."""
        return Integers(
            weight=self.weight, scale=self.scale, zero_point=self.zero_point, bits=self.bits
        )

    def extra_repr(self) -> str:
        rows, width = self.weight.shape
        return f"{width} -> {rows}, bits={self.bits}, group={width // self.scale.shape[1]}"


class QuantizedLinear(_Quantized):
    """`fastvlm::quantized_linear` with its weights: x [...,K] -> [...,N].

    Buffers: weight int8 [N,K], scale float [N,G], zero_point int8 [N,G] or None, bias float [N]
    or None. `activation_group` is the operator's.
    """

    bias: Tensor | None

    def __init__(self, integers: Integers, bias: Tensor | None, activation_group: int) -> None:
        super().__init__(integers)
        self.activation_group = activation_group
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = quantized_linear(
            x,
            self.weight,
            self.scale,
            self.zero_point,
            self.bias,
            self.bits,
            self.activation_group,
        )
        return out


class QuantizedEmbedding(_Quantized):
    """`fastvlm::quantized_embedding` with its table: ids [B,S] -> [B,S,D].

    Buffers: weight int8 [V,D], scale float [V,G], zero_point int8 [V,G] or None.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = quantized_embedding(
            input_ids, self.weight, self.scale, self.zero_point, self.bits
        )
        return out


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What became of a layer, by its module name in FastVLM.

    `error` is the relative RMS error of the weights, under GPTQ that of the layer's output on the
    calibration inputs, which is what GPTQ keeps small.
    """

    layer: str
    bits: int
    group_size: int | None
    method: Method
    error: float
    number_format: NumberFormat = NumberFormat.INTEGER


def layer_names(model: FastVLM) -> list[str]:
    """Every layer with weights to multiply with or look up, the tied head among them.

    Not all of them are quantized by any recipe.
    """
    kinds = nn.Conv2d | nn.Linear | nn.Embedding
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return [*names, *([] if HEAD in names else [HEAD])]


def layer_widths(decoder: Decoder) -> dict[str, int]:
    """Input width of every layer that a recipe may quantize, the tied head among them."""
    width = decoder.config.hidden_size
    linear = {
        DECODER + name: module.in_features
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    return {EMBEDDING: width, **linear, HEAD: width}


def check_groups(recipe: Recipe, widths: Mapping[str, int]) -> None:
    """Raise ExportError for the layers whose input width the group size does not divide."""
    wrong: dict[tuple[int, int], list[str]] = defaultdict(list)
    for layer, width in widths.items():
        precision = recipe.precision(layer)
        size = precision.group_size
        if precision.bits is not None and size is not None and width % size:
            wrong[size, width].append(layer)
    if not wrong:
        return
    lines = [
        f"Group size {size} does not divide {width}, the input width of "
        f"{', '.join(_shortened(layers, widths))}."
        for (size, width), layers in wrong.items()
    ]
    fits = math.gcd(*(width for _, width in wrong), *(size for size, _ in wrong))
    example = f" (such as {fits})" if fits >= SMALLEST_GROUP else ""
    raise ExportError(
        "\n".join(lines),
        f"Set a group_size that divides the width{example} for these layers, or leave it out: one "
        "scale per output channel.",
    )


def _shortened(layers: Sequence[str], widths: Mapping[str, int]) -> list[str]:
    """`decoder.layers.*.mlp.up_proj` for the layers of a pattern where all of them are meant."""
    patterns = defaultdict(list)
    for layer in widths:
        patterns[re.sub(r"\.\d+\.", ".*.", layer)].append(layer)
    shown: list[str] = []
    for pattern, members in patterns.items():
        hit = [layer for layer in members if layer in layers]
        shown += [pattern] if len(hit) == len(members) > 1 else hit
    return shown


def quantize_decoder(
    decoder: Decoder, recipe: Recipe, inputs: Sequence[Tensor], say: Callable[[str], None]
) -> tuple[LayerRecord, ...]:
    """Replace the layers of `decoder` in place, freeing each one's float weights as it goes.

    `inputs` are calibration sequences of inputs_embeds [1,S,D], for GPTQ alone: carried through
    transformer layer by transformer layer, each quantized before its outputs are taken. A tied
    table whose embedding and head are quantized alike is stored once, in both modules.
    """
    widths = layer_widths(decoder)
    check_groups(recipe, widths)
    _check_methods(recipe, widths, inputs)
    work = _Work(decoder, recipe)
    calibrated = any(_uses_gptq(recipe.precision(layer)) for layer in widths)
    states = list(inputs) if calibrated else []
    with torch.no_grad():
        for index in range(len(decoder.layers)):
            say(f"quantize decoder layer {index + 1} of {len(decoder.layers)}")
            states = work.layer(index, states)
        say("quantize embedding and head")
        work.tables([decoder.norm(x) for x in states])
    return tuple(work.records)


def activation_group(precision: Precision) -> int:
    """The operators' `activation_group`: dynamic activations are rounded in the weights' groups."""
    if precision.activations is Activations.FLOAT:
        return FLOAT_ACTIVATIONS
    if precision.activations is Activations.AFFINE:
        return AFFINE
    return precision.group_size or PER_TOKEN


def _uses_gptq(precision: Precision) -> bool:
    return precision.bits is not None and precision.method is Method.GPTQ


def _check_methods(recipe: Recipe, layers: Iterable[str], inputs: Sequence[Tensor]) -> None:
    """What recipe files cannot ask for, and a recipe made in Python could."""
    problems: list[str] = []
    for layer in layers:
        part, (key, _, precision) = part_of(layer), recipe.setting(layer)
        if precision.bits is None:
            continue
        if precision.method not in METHODS[part]:
            taken = ", ".join(METHODS[part])
            problems.append(f"{key}.method: {precision.method} is not for {part} ({taken})")
        if precision.activations not in ACTIVATIONS[part]:
            taken = ", ".join(ACTIVATIONS[part])
            problems.append(
                f"{key}.activations: {precision.activations} is not for {part} ({taken})"
            )
        if _uses_gptq(precision) and not inputs:
            problems.append(f"{key}.method: gptq has no calibration sequences to learn from")
    if problems:
        raise ExportError(
            "\n".join(dict.fromkeys(problems)), "Change these keys, or calibrate with images."
        )


class _Work:
    """The decoder on its way to integers, and the calibration sequences on their way through it."""

    def __init__(self, decoder: Decoder, recipe: Recipe) -> None:
        self.decoder, self.recipe = decoder, recipe
        self.records: list[LayerRecord] = []

    def layer(self, index: int, states: list[Tensor]) -> list[Tensor]:
        """Quantize a transformer layer; hidden states [1,S,D] before it -> those after it.

        `Decoder.run`, stopped before each product until its weights are integers.
        """
        layer = self.decoder.layers[index]
        if not isinstance(layer, Layer):  # what nn.ModuleList cannot tell a type checker
            raise TypeError(type(layer))
        attention, mlp, name = layer.self_attn, layer.mlp, f"layers.{index}"
        normed = [layer.input_layernorm(x) for x in states]
        self.linear([f"{name}.self_attn.{part}_proj" for part in "qkv"], normed)
        mixed = [self._mix(attention, x) for x in normed]
        self.linear([f"{name}.self_attn.o_proj"], mixed)
        states = [x + attention.o_proj(y) for x, y in zip(states, mixed, strict=True)]
        normed = [layer.post_attention_layernorm(x) for x in states]
        self.linear([f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"], normed)
        inner = [F.silu(mlp.gate_proj(x)) * mlp.up_proj(x) for x in normed]
        self.linear([f"{name}.mlp.down_proj"], inner)
        return [x + mlp.down_proj(y) for x, y in zip(states, inner, strict=True)]

    def _mix(self, attention: Attention, x: Tensor) -> Tensor:
        cos, sin = rotary_tables(self.decoder.config, x.shape[1])
        past = x.new_zeros(len(x), attention.kv_heads, 0, attention.head_dim)
        mask = torch.ones(x.shape[:2], dtype=torch.int64)
        qkv = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
        out: Tensor = cached_attention(
            *qkv, past, past, mask, cos, sin, attention.heads, attention.kv_heads
        )[0]
        return out

    def linear(self, names: Sequence[str], inputs: Sequence[Tensor]) -> None:
        """Quantize linear layers, named below the decoder, that receive the same inputs [1,S,K]."""
        h = factor = None
        for name in names:
            precision = self.recipe.precision(DECODER + name)
            if precision.bits is None:
                continue
            module = self.decoder.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise TypeError(type(module))
            if not _uses_gptq(precision):
                quantize = partial(quantize_rows, precision=precision)
                integers, error = by_rows(module.weight, quantize)
            else:
                if h is None or factor is None:
                    h = hessian(inputs, module.in_features)
                    factor = inverse_factor(h)
                quantize = partial(quantize_columns, factor=factor, precision=precision)
                integers, error = by_rows(module.weight, quantize, h)
            self._put(name, QuantizedLinear(integers, module.bias, activation_group(precision)))
            self._record(DECODER + name, precision, error)

    def tables(self, normed: list[Tensor]) -> None:
        """Quantize embedding and head; `normed` are the head's inputs [1,S,D]."""
        embedding, head = self.recipe.precision(EMBEDDING), self.recipe.precision(HEAD)
        table = self.decoder.embed_tokens.weight
        tied = not hasattr(self.decoder, "lm_head")
        shared = tied and embedding.bits is not None and _alike(embedding, head)
        if tied and not shared and (embedding.bits is not None or head.bits is not None):
            self._put("lm_head", _linear(table))
        if not shared and hasattr(self.decoder, "lm_head"):
            self.linear(["lm_head"], normed)
        if embedding.bits is None:
            return
        integers, error = by_rows(table, partial(quantize_rows, precision=embedding))
        self._put("embed_tokens", QuantizedEmbedding(integers))
        self._record(EMBEDDING, embedding, error)
        if shared:
            self._put("lm_head", QuantizedLinear(integers, None, activation_group(head)))
            self._record(HEAD, head, error)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.decoder.get_submodule(parent), leaf, module.eval())

    def _record(self, layer: str, precision: Precision, error: float) -> None:
        self.records.append(
            LayerRecord(
                layer=layer,
                bits=int(precision.bits or 0),
                group_size=precision.group_size,
                method=precision.method,
                error=error,
            )
        )


def _alike(embedding: Precision, head: Precision) -> bool:
    """Whether both mean the same integers: what enters the head's product does not matter."""
    return replace(embedding, activations=head.activations, activation_bits=8) == replace(
        head, activation_bits=8
    )


def _linear(table: Tensor) -> nn.Linear:
    """The head of a tied model as a layer of its own, around the embedding's very weights."""
    rows, width = table.shape
    head = nn.Linear(width, rows, bias=False, device="meta")
    head.weight = nn.Parameter(table, requires_grad=False)
    return head
