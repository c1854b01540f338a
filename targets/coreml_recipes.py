"""Recipes as Core ML computes them, and what its files and runtime cannot express."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..quantize.recipe_file import PER_CHANNEL
from ..quantize.recipe_layers import undivided
from ..quantize.recipes import (
    ACTIVATIONS,
    RECIPES,
    Activations,
    Float,
    NumberFormat,
    Part,
    Precision,
    Recipe,
    Setting,
)
from ..quantize.toml_file import shown

BITS = (4, 8)
"""Integers that `constexpr_blockwise_shift_scale` takes (iOS 18)."""

_ROUNDED_AT_RUN_TIME = (Activations.DYNAMIC, Activations.AFFINE)
_ACTIVATIONS = {
    part: tuple(
        found
        for found in taken
        if found not in _ROUNDED_AT_RUN_TIME and found is not Activations.SYMMETRIC
    )
    for part, taken in ACTIVATIONS.items()
}
_GROUPED = (Part.DECODER, Part.HEAD)


def adapt(recipe: Recipe) -> Recipe:
    """A built-in with integers as Core ML computes it; any other recipe as it is.

    The Neural Engine's floats are float16, and no compute unit rounds activations at run time. The
    integers are those that every other target gets.
    """
    integers = any(p.bits for p in recipe.precisions) and not recipe.fp8
    if recipe != RECIPES.get(recipe.name) or not integers:
        return recipe
    return replace(
        recipe,
        float_format=Float.FP16,
        decoder=_unrounded(recipe.decoder),
        head=_unrounded(recipe.head),
    )


def _unrounded(precision: Precision) -> Precision:
    if precision.activations in _ROUNDED_AT_RUN_TIME:
        return replace(precision, activations=Activations.FLOAT)
    return precision


def problems(recipe: Recipe, layers: Mapping[str, int] | None) -> list[str]:
    """Every reason why Core ML cannot express the recipe, naming the key and what it can do.

    `layers`: layer name -> input width, where the model is known.
    """
    found = [
        line
        for setting in recipe.settings
        for line in dict.fromkeys(
            line for part in setting.parts for line in _setting_problems(setting, part)
        )
    ]
    if recipe.float_format is Float.BF16:
        found.insert(0, _line("float", recipe.float_format, '"fp32" or "fp16"'))
    return found + list(_width_problems(recipe, layers or {}))


def _line(key: str, value: object, can: str) -> str:
    return f"{key} is {shown(value)}: target 'coreml' takes {can}"


def _setting_problems(setting: Setting, part: Part) -> Iterator[str]:
    key, precision = setting.key, setting.precision
    if precision.bits is None or precision.palettized:
        return
    if precision.fp8:
        yield _line(f"{key}.format", precision.number_format, shown(NumberFormat.INTEGER))
        return
    if precision.bits not in BITS or (part is Part.VISION and precision.bits != 8):
        can = "8 bits for the vision part" if part is Part.VISION else "4 or 8 bits"
        yield _line(f"{key}.bits", precision.bits, can)
    if part not in _GROUPED and precision.group_size is not None:
        can = f"{shown(PER_CHANNEL)} for the {part}"
        yield _line(f"{key}.group_size", precision.group_size, can)
    if part not in _GROUPED and not precision.symmetric:
        yield _line(f"{key}.symmetric", False, f"symmetric weights for the {part}")
    can = " or ".join(shown(a) for a in _ACTIVATIONS[part])
    if precision.activations in _ROUNDED_AT_RUN_TIME:
        can = f"{can}: it rounds no activations at run time"
        yield _line(f"{key}.activations", precision.activations, can)
    elif precision.activations not in _ACTIVATIONS[part]:
        yield _line(f"{key}.activations", precision.activations, f"{can} for the {part}")
    if precision.activation_bits != 8:
        yield _line(f"{key}.activation_bits", precision.activation_bits, "8")


def _width_problems(recipe: Recipe, layers: Mapping[str, int]) -> Iterator[str]:
    """Group sizes that leave a rest: one line for all layers of a setting and width."""
    integers = lambda setting: not setting.precision.palettized  # noqa: E731 - tables: `palettes`
    for key, size, width, names in undivided(recipe, layers, integers):
        yield (
            f"{key}.group_size is {size}: it does not divide the input width {width} of "
            f"{names}; target 'coreml' takes a size that does, or {shown(PER_CHANNEL)}"
        )
