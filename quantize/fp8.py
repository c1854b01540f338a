"""Linear layers whose weights and activations are floats of 8 bits: `fastvlm::fp8_linear`.

Linear layers of tower and projector, all of the decoder's, and the head. Convolutions stay float,
the 1x1 ones among them. Weights have one scale per output channel, max|w| / 448, activations one
per tensor, from calibration: max|x| / 448 by the recipe's observer. Scales are numbers of the
recipe's float format before the weights are chosen, so that what is stored is what was meant.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from ..exporter.errors import ExportError
from ..exporter.model.fastvlm import FastVLM
from . import recipes
from .ops import LARGEST_FP8, dequantize_fp8, fp8_linear
from .recipes import (
    FORMATS,
    FP8_ACTIVATIONS,
    HEAD,
    Float,
    Method,
    NumberFormat,
    Precision,
    Recipe,
    ScaleFormat,
)
from .retype import TYPES
from .toml_file import shown
from .weights import LayerRecord

CHUNK = 2**23  # weights rounded at once

Say = Callable[[str], None]


class Fp8Linear(nn.Module):
    """`fastvlm::fp8_linear` with its weights: x [...,K] -> [...,N].

    Buffers: weight float8_e4m3fn [N,K], scale float [N], bias float [N] or None. `input_scale` is
    the operator's.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, input_scale: float
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.input_scale = input_scale

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = fp8_linear(x, self.weight, self.scale, self.bias, self.input_scale)
        return out


def without(recipe: Recipe) -> Recipe:
    """The rest of the recipe: what it has in fp8 stays float."""
    return recipes.without(recipe, lambda precision: precision.fp8)


def problems(recipe: Recipe) -> list[str]:
    """Every reason why the recipe's fp8 can't be, naming the key in a recipe file."""
    return [
        f"{key}.{line}"
        for key, parts, precision in recipe.settings
        if precision.fp8
        for line in (
            *(
                f'format is "fp8": the {part} has only integers'
                for part in parts
                if NumberFormat.FP8 not in FORMATS[part]
            ),
            *_precision_problems(precision),
        )
    ]


def _precision_problems(precision: Precision) -> Iterator[str]:
    for name, value, only in (
        ("bits", precision.bits, 8),
        ("activations", precision.activations, FP8_ACTIVATIONS[0]),
        ("activation_bits", precision.activation_bits, 8),
        ("method", precision.method, Method.RTN),
        ("group_size", precision.group_size, None),
        ("symmetric", precision.symmetric, True),
        ("scale_format", precision.scale_format, ScaleFormat.FLOAT),
    ):
        if value != only:
            yield f"{name} is {shown(value)}: fp8 takes {shown(only)}"


@torch.no_grad()
def input_scales(
    model: FastVLM, recipe: Recipe, shown: Sequence[Tensor], sequences: Sequence[Tensor], say: Say
) -> dict[str, float]:
    """The scale of what enters each fp8 layer, by its name; a float model, not changed.

    `shown` are images [1,3,R,R], `sequences` the decoder's inputs [1,S,D]. Raises ExportError with
    all `problems`, and where calibration finds values that are not finite.
    """
    from .observers import of_floats, refuse_not_finite  # noqa: PLC0415 - imports torchao

    wrong = problems(recipe)
    if wrong:
        raise ExportError("\n".join(wrong), "Change these keys of the recipe.")
    names = [name for name, _ in _layers(model, recipe)]
    observers = {name: of_floats(recipe, LARGEST_FP8) for name in names}
    for name, observer in observers.items():
        refuse_not_finite(observer, name, "input")

    with ExitStack() as stack:
        for name, observer in observers.items():
            # What leaves the last norm enters the head, which a tied model has no module for.
            if name == HEAD:
                hook = model.decoder.norm.register_forward_hook(partial(_see_output, observer))
            else:
                layer = model.get_submodule(name)
                hook = layer.register_forward_pre_hook(partial(_see_input, observer))
            stack.callback(hook.remove)
        if any(not name.startswith("decoder.") for name in names):
            for number, pixels in enumerate(shown, 1):
                say(f"fp8: image {number} of {len(shown)}")
                model.encode_image(pixels)
        if any(name.startswith("decoder.") for name in names):
            for number, x in enumerate(sequences, 1):
                say(f"fp8: prompt {number} of {len(sequences)}")
                model.decoder(x)
    return {
        name: float(_fitted(observer.calculate_qparams()[0], recipe.float_format))
        for name, observer in observers.items()
    }


def _see_input(observer: nn.Module, _: nn.Module, given: tuple[Tensor, ...]) -> None:
    observer(given[0])


def _see_output(observer: nn.Module, _: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
    observer(made)


@torch.no_grad()
def replace_layers(
    model: FastVLM, recipe: Recipe, scales: Mapping[str, float], say: Say
) -> tuple[LayerRecord, ...]:
    """Put an `Fp8Linear` in each layer's place, and say what each became.

    `scales` are `input_scales`'s. Layers of other precisions may be quantized already. A tied head
    becomes a layer of its own: the table has no products.
    """
    records = []
    for name, (weight, bias) in list(_layers(model, recipe)):
        say(f"fp8: {name}")
        if not weight.isfinite().all():
            raise ExportError(
                f"Weights of {name} are not finite.",
                "Run `fastvlm-export inspect` on the checkpoint: they may be damaged.",
            )
        eight, scale, error = _rounded(weight, recipe.float_format)
        parent, _, leaf = name.rpartition(".")
        layer = Fp8Linear(eight, scale, bias, scales[name]).eval()
        setattr(model.get_submodule(parent), leaf, layer)
        records.append(
            LayerRecord(
                layer=name,
                bits=8,
                group_size=None,
                method=Method.RTN,
                error=error,
                number_format=NumberFormat.FP8,
            )
        )
    return tuple(records)


def _layers(model: FastVLM, recipe: Recipe) -> Iterator[tuple[str, tuple[Tensor, Tensor | None]]]:
    """Weight and bias of each layer to be, by name, in the order of the network."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and recipe.precision(name).fp8:
            yield name, (module.weight.detach(), module.bias)
    if not hasattr(model.decoder, "lm_head") and recipe.precision(HEAD).fp8:
        yield HEAD, (model.decoder.embed_tokens.weight.detach(), None)


def _fitted(scale: Tensor, float_format: Float) -> Tensor:
    """Positive scales as numbers of the float format, normal ones: float32."""
    dtype = TYPES[float_format]
    return scale.clamp(min=torch.finfo(dtype).smallest_normal).to(dtype).float()


def _rounded(weight: Tensor, float_format: Float) -> tuple[Tensor, Tensor, float]:
    """Float [N,K] -> float8_e4m3fn [N,K], scales float32 [N], and |W - W_q| / |W|."""
    peak = weight.abs().amax(1)
    scale = _fitted(torch.where(peak > 0, peak / LARGEST_FP8, 1.0), float_format)
    step = max(1, CHUNK // weight.shape[1])
    eight = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    lost = whole = 0.0
    for rows, factors, to in zip(
        weight.split(step), scale.split(step), eight.split(step), strict=True
    ):
        to.copy_((rows / factors[:, None]).clamp(-LARGEST_FP8, LARGEST_FP8))
        lost += float((dequantize_fp8(to, factors) - rows).square().sum(dtype=torch.float64))
        whole += float(rows.square().sum(dtype=torch.float64))
    return eight, scale, (lost / whole) ** 0.5 if whole > 0 else 0.0
