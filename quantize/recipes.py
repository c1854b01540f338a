"""Recipes: how each part's numbers are stored and computed, as data."""

import difflib
from dataclasses import dataclass
from enum import StrEnum

from ..exporter.errors import ExportError


class Precision(StrEnum):
    """A number format for weights and arithmetic."""

    FP32 = "fp32"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One precision for each part of the model."""

    name: str
    vision: Precision
    embedding: Precision
    decoder: Precision
    head: Precision


RECIPES: dict[str, Recipe] = {
    "fp32": Recipe(
        name="fp32",
        vision=Precision.FP32,
        embedding=Precision.FP32,
        decoder=Precision.FP32,
        head=Precision.FP32,
    ),
}


def get(name: str) -> Recipe:
    """The recipe of that name; raises ExportError for one that there is not."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        guess = f" Did you mean '{close[0]}'?" if close else ""
        raise ExportError(
            f"There is no recipe named '{name}'.{guess}",
            f"Use one of: {', '.join(RECIPES)}. `fastvlm-export targets` shows who takes which.",
        )
    return RECIPES[name]
