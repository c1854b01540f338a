"""Changes of an array of stored numbers, whatever file it lies in."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import NoPlaceError

THOUSANDTH = 1.001
NEXT_BFLOAT16 = 1 + 2.0**-7  # bfloat16 has no number between it and 1

Numbers = NDArray[Any]
ChangeNumbers = Callable[[Numbers], Numbers]


def one_scaled(numbers: Numbers) -> Numbers:
    """The largest number times 1.001, or its next neighbour in a narrow type."""
    changed = numbers.copy()
    place = np.unravel_index(np.abs(numbers.astype(np.float32)).argmax(), numbers.shape)
    value = np.float32(numbers[place])
    for factor in (THOUSANDTH, NEXT_BFLOAT16):
        changed[place] = numbers.dtype.type(value * np.float32(factor))
        if changed[place] != numbers[place]:
            return changed
    raise NoPlaceError("no number could be changed")


def one_more(numbers: Numbers) -> Numbers:
    """The integer in the middle, plus one; the highest becomes one less."""
    changed = numbers.copy().reshape(-1)
    place = changed.size // 2
    value = int(changed[place])
    high = {"int4": 7, "uint4": 15}.get(str(numbers.dtype)) or int(np.iinfo(numbers.dtype).max)
    changed[place] = np.array(value + 1 if value < high else value - 1).astype(numbers.dtype)
    return changed.reshape(numbers.shape)


def low_bits_more(bits: int) -> ChangeNumbers:
    """Of the integers of so many bits in a byte in the middle, the lowest one plus one."""

    def change(numbers: Numbers) -> Numbers:
        changed = numbers.copy().reshape(-1)
        place = changed.size // 2
        low = int(changed[place]) & ((1 << bits) - 1)
        changed[place] = int(changed[place]) + (1 if low < (1 << bits) - 1 else -1)
        return changed.reshape(numbers.shape)

    return change


def zeros(numbers: Numbers) -> Numbers:
    """All zero: what a layer without it computes."""
    return np.zeros_like(numbers)


def times(factor: float) -> ChangeNumbers:
    """All of them, times a factor."""
    return lambda numbers: (numbers.astype(np.float64) * factor).astype(numbers.dtype)


def plus(number: int) -> ChangeNumbers:
    """All of them, plus a number."""
    return lambda numbers: numbers + numbers.dtype.type(number)


def reversed_along(axis: int) -> ChangeNumbers:
    """The other way round along an axis: BGR of a first convolution's."""
    return lambda numbers: np.flip(numbers, axis)


def heads_permuted(size: int, axis: int) -> ChangeNumbers:
    """Blocks of `size` numbers along an axis, the first and the last swapped."""

    def change(numbers: Numbers) -> Numbers:
        rows = np.arange(numbers.shape[axis]).reshape(-1, size)
        rows[[0, -1]] = rows[[-1, 0]]
        return np.take(numbers, rows.reshape(-1), axis)

    return change


def one_angle(row: int) -> ChangeNumbers:
    """One entry of a rotary table, as if its angle were a hundredth more."""

    def change(numbers: Numbers) -> Numbers:
        changed = numbers.copy()
        place = (*(0,) * (numbers.ndim - 2), row, 2)
        angle = np.arccos(np.clip(np.float32(numbers[place]), -1, 1))
        changed[place] = np.cos(angle + 1e-2)
        if changed[place] == numbers[place]:
            raise NoPlaceError("the angle's cosine did not change")
        return changed

    return change


def one_row_late(numbers: Numbers) -> Numbers:
    """Each row of a table in the place of the one before it."""
    return np.roll(numbers, -1, axis=-2)


def rows_swapped(numbers: Numbers) -> Numbers:
    """Two rows of a table that no prompt uses in each other's places."""
    changed = numbers.copy()
    changed[[300, 301]] = numbers[[301, 300]]
    return changed


def not_a_number(numbers: Numbers) -> Numbers:
    """One number of a weight is none."""
    changed = numbers.copy().reshape(-1)
    changed[changed.size // 3] = np.nan
    return changed.reshape(numbers.shape)
