"""Which recipes ONNX files and ONNX Runtime's kernels can express."""

from collections.abc import Iterator, Mapping

from ..quantize.recipe_file import PER_CHANNEL
from ..quantize.recipe_layers import undivided
from ..quantize.recipes import (
    ACTIVATIONS,
    EMBEDDING,
    HEAD,
    METHODS,
    Activations,
    Float,
    Method,
    NumberFormat,
    Part,
    Precision,
    Recipe,
    Setting,
)
from ..quantize.toml_file import either, shown

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""What MatMulNBits takes as `block_size`."""

_ACTIVATIONS = {
    part: tuple(
        found for found in taken if found not in (Activations.AFFINE, Activations.SYMMETRIC)
    )
    for part, taken in ACTIVATIONS.items()
}
_LINEAR = (Part.DECODER, Part.HEAD)
_PER_CHANNEL_BITS, _BLOCK_BITS = (8,), (4, 8)


def takes(recipe: Recipe) -> bool:
    """Whether ONNX can express the recipe, whatever the model."""
    return not problems(recipe, None)


def problems(recipe: Recipe, layers: Mapping[str, int] | None, *, tied: bool = False) -> list[str]:
    """Every reason why ONNX cannot express the recipe, naming the key and what ONNX can do.

    `layers`: layer name -> input width, where the model is known. `tied`: it is known, and its
    head's weights are the embedding table's.
    """
    found = [line for setting in recipe.settings for line in _setting_problems(setting)]
    if recipe.float_format is Float.BF16:
        found.append(_line("float", "bf16", '"fp32" or "fp16"'))
    elif recipe.float_format is Float.FP16 and any(
        p.bits and not p.palettized for p in recipe.precisions
    ):
        found.append(_line("float", "fp16", '"fp32" around integer weights'))
    if tied:
        found += _table_problems(recipe)
    return found + list(_width_problems(recipe, layers or {}))


def _line(key: str, value: object, can: str) -> str:
    return f"{key} is {shown(value)}: target 'onnx' takes {can}"


def _setting_problems(setting: Setting) -> Iterator[str]:
    """One precision by itself, for each part that its layers may belong to; once each line."""
    if setting.precision.bits is None:
        return
    lines = [line for part in setting.parts for line in _precision_problems(setting, part)]
    yield from dict.fromkeys(lines)


def _precision_problems(setting: Setting, part: Part) -> Iterator[str]:
    key, precision = setting.key, setting.precision
    if precision.fp8:
        yield _line(f"{key}.format", precision.number_format, shown(NumberFormat.INTEGER))
        return
    if precision.palettized:  # the rest means other things there
        scales = [method for method in METHODS[part] if method is not Method.PALETTE]
        yield _line(f"{key}.method", precision.method, either(map(shown, scales)))
        return
    linear = part in _LINEAR
    blocks = linear and precision.group_size is not None
    sizes = " or ".join(map(str, BLOCK_SIZES))
    if blocks and precision.group_size not in BLOCK_SIZES:
        can = f"{sizes}, or {shown(PER_CHANNEL)} with 8 bits"
        yield _line(f"{key}.group_size", precision.group_size, can)
    if not linear and precision.group_size is not None:
        can = f"{shown(PER_CHANNEL)} for the {part}"
        yield _line(f"{key}.group_size", precision.group_size, can)
    if precision.bits not in (_BLOCK_BITS if blocks else _PER_CHANNEL_BITS):
        can = "8 bits"
        if linear:
            can = f"4 or 8 with a group_size ({sizes}), 8 with {shown(PER_CHANNEL)}"
        yield _line(f"{key}.bits", precision.bits, can)
    if not blocks and not precision.symmetric:
        where = "without a group_size" if linear else f"for the {part}"
        yield _line(f"{key}.symmetric", False, f"symmetric weights {where}")
    if precision.activations not in _ACTIVATIONS[part]:
        can = f"{either(map(shown, _ACTIVATIONS[part]))} for the {part}"
        yield _line(f"{key}.activations", precision.activations, can)
    if precision.activation_bits != 8:
        yield _line(f"{key}.activation_bits", precision.activation_bits, "8")


def _table_problems(recipe: Recipe) -> Iterator[str]:
    """A tied table is stored once, so both of its uses need the same integers."""
    table, head = recipe.setting(EMBEDDING), recipe.setting(HEAD)
    if any(list(_setting_problems(setting)) for setting in (table, head)):
        return  # neither is right yet
    for name in ("bits", "group_size", "method"):
        ours, theirs = (_written(name, s.precision) for s in (head, table))
        if ours != theirs:
            yield (
                f"{head.key}.{name} is {ours}, {table.key}.{name} {theirs}: target 'onnx' stores "
                f"the table that embedding and head share once, so takes the same for both"
            )
        if name == "bits" and None in (head.precision.bits, table.precision.bits):
            return  # the rest counts for nothing


def _written(name: str, precision: Precision) -> str:
    value = getattr(precision, name)
    if value is None:
        return shown(PER_CHANNEL) if name == "group_size" else "not set (float)"
    return shown(value)


def _width_problems(recipe: Recipe, layers: Mapping[str, int]) -> Iterator[str]:
    """Group sizes that leave a rest: one line for all layers of a setting and width."""

    def in_groups(setting: Setting) -> bool:
        return not setting.precision.palettized and setting.parts[0] in _LINEAR

    for key, size, width, names in undivided(recipe, layers, in_groups):
        fit = " or ".join(str(block) for block in BLOCK_SIZES if width % block == 0)
        can = f"{fit}, or" if fit else "only"
        yield (
            f"{key}.group_size is {size}: it does not divide the input width {width} of "
            f"{names}, where target 'onnx' takes {can} "
            f"{shown(PER_CHANNEL)} with 8 bits"
        )
