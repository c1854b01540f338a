"""Recipes as Apple's app computes them, and what its files cannot express.

The app runs the tower in Core ML and everything behind it in MLX, which never rounds activations,
and which knows one integer format for a whole model: `quantization {group_size, bits}`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..quantize.recipe_file import PER_CHANNEL
from ..quantize.recipes import (
    Activations,
    LayerRule,
    Method,
    NumberFormat,
    Part,
    Precision,
    Recipe,
    Setting,
)
from ..quantize.toml_file import shown
from . import coreml_recipes

GROUP_SIZES = (128, 64, 32)
"""Weights that share a scale in MLX, the fewest scales first. Larger groups of ours repeat one."""
BITS = (4, 8)

PROJECTOR = ("projector.0", "projector.2")
_LANGUAGE = (Part.EMBEDDING, Part.DECODER, Part.HEAD)
_FLOAT = Precision()


def adapt(recipe: Recipe) -> Recipe:
    """A built-in recipe, as Core ML computes it, as this layout does.

    The projector is no part of the package: it stays float. Where table and head have other bits
    than the decoder (int4), they get the decoder's, since MLX would store all layers with the most;
    HQQ then chooses their scales, which on the bundled model costs half of RTN's KL. Lookup tables
    are Core ML's alone, so beside a palettized tower the language model is float.
    """
    if not any(p.bits for p in recipe.precisions):
        return recipe
    decoder = _FLOAT if recipe.decoder.palettized else recipe.decoder
    return replace(
        recipe,
        embedding=_like(decoder, recipe.embedding),
        decoder=decoder,
        head=_like(decoder, recipe.head),
        layers=(*recipe.layers, LayerRule(pattern="projector.*", precision=_FLOAT)),
    )


def _like(decoder: Precision, table: Precision) -> Precision:
    if table.bits is None or decoder.bits is None:
        return _FLOAT
    return table if table.bits == decoder.bits else replace(decoder, method=Method.HQQ)


def problems(recipe: Recipe, layers: Mapping[str, int] | None = None) -> list[str]:
    """Every reason why this layout cannot express the recipe: Core ML the tower, MLX the rest.

    `layers`: layer name -> input width, where the model is known.
    """
    found = coreml_recipes.problems(_tower(recipe), layers)
    found += [
        line
        for setting in recipe.settings
        if any(part in _LANGUAGE for part in setting.parts)
        for line in _setting_problems(setting)
    ]
    for setting in dict.fromkeys(recipe.setting(layer) for layer in PROJECTOR):
        found += _setting_problems(setting, " for the projector")
    return [*dict.fromkeys(found), *_width_problems(recipe, layers or {})]


def _tower(recipe: Recipe) -> Recipe:
    """The recipe with everything float that the package does not hold."""
    rules = (
        rule
        for rule, setting in zip(recipe.layers, recipe.settings[len(Part) :], strict=True)
        if Part.VISION in setting.parts
    )
    return replace(recipe, embedding=_FLOAT, decoder=_FLOAT, head=_FLOAT, layers=tuple(rules))


def _line(key: str, value: object, can: str) -> str:
    return f"{key} is {shown(value)}: layout 'apple-app' takes {can}"


def _setting_problems(setting: Setting, where: str = "") -> Iterator[str]:
    key, precision = setting.key, setting.precision
    if precision.bits is None:
        return
    if precision.fp8:
        can = f"{shown(NumberFormat.INTEGER)}{where or ' there'}: MLX knows no such floats"
        yield _line(f"{key}.format", precision.number_format, can)
        return
    if precision.palettized:
        yield _line(f"{key}.method", precision.method, f"no lookup tables{where or ' there'}: MLX")
        return
    if precision.bits not in BITS:
        yield _line(f"{key}.bits", precision.bits, f"{' or '.join(map(str, BITS))}{where}")
    if precision.group_size is not None and precision.group_size % GROUP_SIZES[-1]:
        can = f"multiples of {GROUP_SIZES[-1]}, or {shown(PER_CHANNEL)}{where}"
        yield _line(f"{key}.group_size", precision.group_size, can)
    if precision.activations is not Activations.FLOAT:
        can = f"{shown(Activations.FLOAT)}{where}: MLX rounds no activations"
        yield _line(f"{key}.activations", precision.activations, can)


def _width_problems(recipe: Recipe, layers: Mapping[str, int]) -> Iterator[str]:
    """Channels that no group of MLX divides."""
    for layer, width in layers.items():
        setting = recipe.setting(layer)
        precision = setting.precision
        if (setting.parts[0] not in _LANGUAGE and layer not in PROJECTOR) or precision.palettized:
            continue
        if precision.bits and precision.group_size is None and width % GROUP_SIZES[-1]:
            can = f"input widths that {GROUP_SIZES[-1]} divides; {layer} has {width}"
            yield _line(f"{setting.key}.group_size", PER_CHANNEL, can)
