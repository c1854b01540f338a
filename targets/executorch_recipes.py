"""Recipes as ExecuTorch's backends compute them, and what their operators cannot express."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..quantize.recipe_file import PER_CHANNEL
from ..quantize.recipe_layers import undivided
from ..quantize.recipes import (
    RECIPES,
    Activations,
    Float,
    NumberFormat,
    Part,
    Precision,
    Recipe,
    ScaleFormat,
    Setting,
)
from ..quantize.toml_file import shown
from . import coreml_recipes
from .executorch_model import Backend

GROUP = 32
"""XNNPACK's groups of 4-bit weights are multiples of this many values."""
BITS = (4, 8)

_LINEAR = (Part.DECODER, Part.HEAD)


def adapt(recipe: Recipe, backend: Backend) -> Recipe:
    """A built-in with integers as the backend computes it; any other recipe as it is.

    XNNPACK rounds the tokens of linear layers around a zero point, and stores the scales of 4-bit
    groups in bfloat16. Integers of 8-bit weights are those that every other target gets.
    """
    if backend is Backend.COREML:
        return coreml_recipes.adapt(recipe)
    if backend is not Backend.XNNPACK or recipe != RECIPES.get(recipe.name) or recipe.fp8:
        return recipe
    return replace(
        recipe,
        vision=_affine(recipe.vision),
        decoder=_affine(recipe.decoder),
        head=_affine(recipe.head),
    )


def _affine(precision: Precision) -> Precision:
    if precision.bits is None or precision.activations is Activations.FLOAT:
        return precision
    scales = ScaleFormat.BF16 if precision.bits == 4 else precision.scale_format
    return replace(precision, activations=Activations.AFFINE, scale_format=scales)


def problems(recipe: Recipe, layers: Mapping[str, int] | None, backend: Backend) -> list[str]:
    """Every reason why the backend cannot express the recipe, naming the key and what it can do.

    `layers`: layer name -> input width, where the model is known.
    """
    if backend is Backend.COREML:
        return coreml_recipes.problems(recipe, layers)
    found = []
    if recipe.float_format is not Float.FP32:
        found.append(_line("float", recipe.float_format, '"fp32"', backend))
    found += [
        line
        for setting in recipe.settings
        if setting.precision.bits is not None
        for line in dict.fromkeys(
            line for part in setting.parts for line in _setting_problems(setting, part, backend)
        )
    ]
    return found + list(_width_problems(recipe, layers or {}, backend))


def _line(key: str, value: object, can: str, backend: Backend) -> str:
    return f"{key} is {shown(value)}: target 'executorch' takes {can} with --backend {backend}"


def _setting_problems(setting: Setting, part: Part, backend: Backend) -> Iterator[str]:
    key, precision = setting.key, setting.precision

    def line(name: str, value: object, can: str) -> str:
        return _line(f"{key}.{name}", value, can, backend)

    if backend is not Backend.XNNPACK:
        yield line("bits", precision.bits, "no integer weights")
        return
    if precision.fp8:
        yield line("format", precision.number_format, shown(NumberFormat.INTEGER))
        return
    if precision.palettized:
        yield line("method", precision.method, "no lookup tables")
        return
    grouped = part in _LINEAR and precision.bits == 4
    if precision.bits not in (BITS if part in _LINEAR else (8,)):
        can = "4 or 8 bits" if part in _LINEAR else f"8 bits for the {part}"
        yield line("bits", precision.bits, can)
    elif precision.group_size is not None and not (grouped and precision.group_size % GROUP == 0):
        where = "with 8 bits" if part in _LINEAR else f"for the {part}"
        can = f"multiples of {GROUP} or {shown(PER_CHANNEL)}" if grouped else shown(PER_CHANNEL)
        yield line("group_size", precision.group_size, can if grouped else f"{can} {where}")
    if not precision.symmetric:
        yield line("symmetric", False, "symmetric weights")
    if grouped and precision.scale_format is not ScaleFormat.BF16:
        yield line("scale_format", precision.scale_format, f"{shown(ScaleFormat.BF16)} with 4 bits")
    if part is Part.EMBEDDING:
        if precision.activations is not Activations.FLOAT:
            yield line("activations", precision.activations, shown(Activations.FLOAT))
    elif precision.activations is not Activations.AFFINE:
        can = f"{shown(Activations.AFFINE)} for the {part}"
        yield line("activations", precision.activations, can)
    if precision.activation_bits != 8:
        yield line("activation_bits", precision.activation_bits, "8")


def _width_problems(recipe: Recipe, layers: Mapping[str, int], backend: Backend) -> Iterator[str]:
    """Group sizes that leave a rest, and 4-bit channels that are no whole groups."""

    def in_groups(setting: Setting) -> bool:
        return not setting.precision.palettized and setting.parts[0] in _LINEAR

    for key, size, width, names in undivided(recipe, layers, in_groups):
        yield (
            f"{key}.group_size is {size}: it does not divide the input width {width} of {names}; "
            f"target 'executorch' takes a size that does with --backend {backend}"
        )
    rest: dict[tuple[str, int], str] = {}
    for layer, width in layers.items():
        setting = recipe.setting(layer)
        whole = setting.precision.bits == 4 and setting.precision.group_size is None
        if whole and in_groups(setting) and width % GROUP:
            rest.setdefault((setting.key, width), layer)
    for (key, width), layer in rest.items():
        can = f"input widths that {GROUP} divides with 4 bits; {layer} has {width}"
        yield _line(f"{key}.group_size", PER_CHANNEL, can, backend)
