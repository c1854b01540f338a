"""What tests of fp16 share: limits, a model that leaves its range, how far results are off."""

import dataclasses
from functools import cache

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.exporter.spec import ExportSpec
from fastvlm_export.quantize.apply import Quantized, quantize
from fastvlm_export.quantize.calibration import Calibration, load, pixels
from fastvlm_export.quantize.recipes import RECIPES, Float, Method, Precision, Recipe

from ..targets.conftest import byte_tokenizer, lively_model, make_spec

LIMIT = 32752.0  # the recipe's
ROUNDING = 2e-3
RESOLUTION = 128
BLOCK = "vision_tower.network.2.1"


def half_inputs(program: ExportedProgram, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In the types that the program takes."""
    examples, _ = program.example_inputs
    flat = torch.utils._pytree.tree_leaves(examples)
    return tuple(x.to(like.dtype) for x, like in zip(inputs, flat, strict=True))


def error(found: Tensor, expected: Tensor) -> float:
    """The worst difference over the peak; NaN where either has one."""
    return float((found.float() - expected).abs().max() / expected.abs().max())


def silent(_: str) -> None: ...


@torch.no_grad()
def enlarged(model: FastVLM, peak: float) -> FastVLM:
    """The same function with a residual stream that reaches `peak` inside one block.

    The block's token mixer is multiplied by a factor, and every reader of what it makes divided by
    it; biases of the readers stay.
    """
    tower = model.vision_tower
    block, after = tower.network[2][1], tower.network[3].proj[0].lkb_reparam
    inputs = torch.rand(1, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(1))
    seen: list[float] = []
    hook = block.token_mixer.register_forward_hook(lambda *a: seen.append(a[2].abs().max().item()))
    tower(inputs)
    hook.remove()
    factor = peak / seen[0]
    for layer in (block.token_mixer.reparam_conv, block.convffn.fc2):
        layer.weight *= factor
        layer.bias *= factor
    for layer in (block.convffn.conv.conv, after):
        layer.weight /= factor
    return model


_EIGHT, _FOUR = Precision(bits=8), Precision(bits=4, group_size=32)

# Static towers, and decoders whose activations stay float: what Core ML makes of the built-ins.
INT8, INT4 = (
    dataclasses.replace(
        RECIPES[name], float_format=Float.FP16, decoder=layers, head=_EIGHT, limits=None
    )
    for name, layers in (("int8", _EIGHT), ("int4", _FOUR))
)
BRAIN_INT8 = dataclasses.replace(INT8, name="int8-bf16", float_format=Float.BF16)
WEIGHTS = Recipe(
    name="weights",
    float_format=Float.FP16,
    vision=_EIGHT,
    embedding=Precision(bits=8, method=Method.HQQ, group_size=16),
    decoder=Precision(bits=4, group_size=16, symmetric=False),
)
"""No activation is rounded; zero points in the decoder, a float head."""


@cache
def small() -> tuple[FastVLM, ExportSpec]:
    """A reparameterized random model whose answers depend on the image."""
    raw = lively_model(byte_tokenizer().vocab_size, tied=True)
    spec = make_spec(raw)
    return reparameterize(raw).model.eval().requires_grad_(False), spec


def calibration() -> Calibration:
    """Three images."""
    return dataclasses.replace(load(None), images=load(None).images[3:6])


def shown() -> list[Tensor]:
    """Them, as `small` sees them: [1,3,R,R]."""
    return pixels(calibration(), small()[1].preprocessing)


@cache
def quantized(recipe: Recipe) -> Quantized:
    """`small` under a recipe."""
    model, spec = small()
    return quantize(model, recipe, spec, calibration(), silent)
