"""Which GPUs can compute a recipe: the types that a generation has no units for.

Found with TensorRT for RTX 1.7.1, which refuses a float32 product, bfloat16 and 4-bit integers for
compute capability 75, and fp8 below 89.
"""

from collections.abc import Iterator, Sequence

from ..quantize.recipes import Recipe
from .tensorrt_package import CAPABILITIES

FLOATS = {"fp32": 80, "fp16": 75, "bf16": 80}
"""A recipe's float format -> the first compute capability whose products take it."""

FOUR_BITS, FP8 = 80, 89
"""The first compute capability for 4-bit weights, and for fp8."""


def needs(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """(key and value of the recipe, the least compute capability for it), each once."""
    yield f'float is "{recipe.float_format}"', FLOATS[recipe.float_format]
    for setting in recipe.settings:
        if setting.precision.fp8:
            yield f'{setting.key}.format is "fp8"', FP8
        elif setting.precision.bits == 4:
            yield f"{setting.key}.bits is 4", FOUR_BITS


def problems(recipe: Recipe, capabilities: Sequence[str]) -> list[str]:
    """Why GPUs of these compute capabilities can't compute the recipe; none: they can."""
    found = []
    for what, least in needs(recipe):
        below = [one for one in capabilities if one.isdecimal() and int(one) < least]
        if below:
            found.append(
                f"{what}: GPUs of compute capability {', '.join(below)} cannot compute it; "
                f"target 'tensorrt' takes {least} or above for it"
            )
    return found


def default(recipe: Recipe) -> tuple[str, ...]:
    """Of the compute capabilities that are built for without being named, those that can."""
    least = max(least for _, least in needs(recipe))
    return tuple(one for one in CAPABILITIES if int(one) >= least)
