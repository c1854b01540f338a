"""Recipes as TensorRT computes them, and what its operators cannot express."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..quantize.recipe_file import PER_CHANNEL
from ..quantize.recipe_layers import undivided
from ..quantize.recipes import (
    ACTIVATIONS,
    METHODS,
    RECIPES,
    Activations,
    Float,
    Method,
    Part,
    Precision,
    Recipe,
    Setting,
)
from ..quantize.toml_file import either, shown

GROUP_SIZES = (16, 32, 64, 128)
"""Groups of 4-bit weights that TensorRT's products read as they are: of 256 values, and of 8-bit
weights in any groups, it makes floats while it builds, and the engine holds those."""

_LINEAR = (Part.DECODER, Part.HEAD)
_TAKEN = (Activations.FLOAT, Activations.SYMMETRIC)
_ACTIVATIONS = {
    part: tuple(found for found in taken if found in _TAKEN) for part, taken in ACTIVATIONS.items()
}


def adapt(recipe: Recipe) -> Recipe:
    """A built-in with integers as TensorRT computes it; any other recipe as it is.

    Its tensor cores add float16, its integers have no zero points, and it rounds no activations at
    run time. The weights' integers are those that every other target gets.
    """
    if recipe != RECIPES.get(recipe.name) or not _rounds(recipe):
        return recipe
    return replace(
        recipe,
        float_format=Float.FP16,
        vision=_fitting(recipe.vision, Activations.SYMMETRIC),
        decoder=_fitting(recipe.decoder, Activations.FLOAT),
        head=_fitting(recipe.head, Activations.FLOAT),
    )


def _rounds(recipe: Recipe) -> bool:
    """Whether the recipe asks for integers that ONNX's types have."""
    return any(p.bits and not p.fp8 and not p.palettized for p in recipe.precisions)


def _fitting(precision: Precision, activations: Activations) -> Precision:
    if precision.bits is None or precision.activations in _TAKEN:
        return precision
    return replace(precision, activations=activations)


def problems(
    recipe: Recipe,
    layers: Mapping[str, int] | None,
    *,
    tied: bool = False,
) -> list[str]:
    """Every reason why TensorRT cannot express the recipe, naming the key and what it can do.

    `layers`: layer name -> input width, where the model is known. `tied` says nothing: embedding
    and head are engines of their own.
    """
    found = [
        line
        for setting in recipe.settings
        if setting.precision.bits is not None and not setting.precision.fp8
        for line in dict.fromkeys(
            line for part in setting.parts for line in _setting_problems(setting, part)
        )
    ]
    return found + list(_width_problems(recipe, layers or {}))


def _line(key: str, value: object, can: str) -> str:
    return f"{key} is {shown(value)}: target 'tensorrt' takes {can}"


def _setting_problems(setting: Setting, part: Part) -> Iterator[str]:
    """One precision by itself, for a part that its layers may belong to."""
    key, precision = setting.key, setting.precision
    if precision.palettized:  # the rest means other things there
        scales = [shown(method) for method in METHODS[part] if method is not Method.PALETTE]
        yield _line(f"{key}.method", precision.method, either(scales))
        return
    linear = part in _LINEAR
    sizes = either(GROUP_SIZES)
    if precision.bits not in ((4, 8) if linear else (8,)):
        can = f"4 with a group_size ({sizes}), or 8" if linear else f"8 for the {part}"
        yield _line(f"{key}.bits", precision.bits, can)
    elif linear and precision.bits == 4 and precision.group_size not in GROUP_SIZES:
        size = precision.group_size
        shown_size = PER_CHANNEL if size is None else size
        yield _line(f"{key}.group_size", shown_size, f"{sizes} with 4 bits")
    elif precision.bits == 8 and precision.group_size is not None:
        where = "with 8 bits" if linear else f"for the {part}"
        yield _line(f"{key}.group_size", precision.group_size, f"{shown(PER_CHANNEL)} {where}")
    if not precision.symmetric:
        yield _line(f"{key}.symmetric", False, "symmetric weights")
    if precision.activations not in _ACTIVATIONS[part]:
        can = either([shown(taken) for taken in _ACTIVATIONS[part]])
        yield _line(f"{key}.activations", precision.activations, f"{can} for the {part}")
    if precision.activation_bits != 8:
        yield _line(f"{key}.activation_bits", precision.activation_bits, "8")


def _width_problems(recipe: Recipe, layers: Mapping[str, int]) -> Iterator[str]:
    """Group sizes that leave a rest: one line for all layers of a setting and width."""

    def in_groups(setting: Setting) -> bool:
        return not setting.precision.palettized and setting.parts[0] in _LINEAR

    for key, size, width, names in undivided(recipe, layers, in_groups):
        fit = [block for block in GROUP_SIZES if width % block == 0]
        can = either([*fit, f"{shown(PER_CHANNEL)} with 8 bits"])
        yield (
            f"{key}.group_size is {size}: it does not divide the input width {width} of "
            f"{names}, where target 'tensorrt' takes {can}"
        )
