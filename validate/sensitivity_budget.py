"""A mixed-precision recipe for a budget: the fewest bytes for a loss, or the least loss for a size.

Layers start as the recipe has them. Each can be upgraded, to 8 bits if it has 4, or to float, and
upgrades are made in the order of the loss that they save per byte. Losses of layers measured alone
give that order; how far to go, for a loss, is decided by measuring combinations.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ..exporter.errors import ExportError
from ..exporter.model.fastvlm import FastVLM
from ..quantize.recipes import EMBEDDING, HEAD, LayerRule, Precision, Recipe

_BUDGET = re.compile(r"(\d{1,12}(?:\.\d*)?|\.\d+)\s*(%|[kMG]?B)", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a recipe may lose (0..1) or take (bytes); one of the two, as `text` says."""

    text: str
    loss: float | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        """For the name of a recipe: `0.5pct`, `400MB`."""
        return self.text.replace("%", "pct").replace(" ", "")


def parse_budget(text: str) -> Budget:
    """`0.5%`, `400MB`, `1.2 GB`; decimal units. Raises ExportError for anything else."""
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise ExportError(
            f"--budget {text} is neither a loss nor a size.",
            "Give the share of tokens that may differ, such as --budget 0.5%, or the weights' "
            "size, such as --budget 400MB.",
        )
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        if number > 100:
            raise ExportError(
                f"--budget {text}: no more than all tokens can differ.", "Give 100% or less."
            )
        return Budget(text=text.strip(), loss=number / 100)
    return Budget(text=text.strip(), size=int(number * _UNITS[unit]))


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One precision for each layer of a ladder, their bytes, and their losses alone."""

    precisions: tuple[Precision, ...]
    size: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Layers that move together (a tied table's two uses), and their rungs, the recipe's first."""

    layers: tuple[str, ...]
    rungs: tuple[Rung, ...]


def next_precision(precision: Precision) -> Precision | None:
    """8 bits per channel for 4, which runtimes are fast with; None where only float is left.

    For lookup tables 8 bits and one table: 256 entries serve a layer better than 16 serve a group.
    """
    if precision.bits is None or precision.bits >= 8:
        return None
    return replace(precision, bits=8, group_size=None, symmetric=True)


def stored_size(model: FastVLM, layer: str, precision: Precision) -> int:
    """Bytes of a layer's weights, scales or tables (float32), zero points and bias."""
    table = layer == HEAD and not hasattr(model.decoder, "lm_head")
    module = model.get_submodule(EMBEDDING if table else layer)
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    rows, width = weight.flatten(1).shape
    size = 0 if bias is None else 4 * rows
    if precision.bits is None:
        return size + 4 * rows * width
    if precision.palettized:
        tables = rows // (precision.group_size or rows)
        entries = 1 << precision.bits
        return size + 4 * tables * entries + math.ceil(rows * width * precision.bits / 8)
    groups = rows * (width // (precision.group_size or width))
    zero_points = 0 if precision.symmetric else groups * precision.bits
    return size + 4 * groups + math.ceil((rows * width * precision.bits + zero_points) / 8)


def float_size(model: FastVLM) -> int:
    """Bytes of all weights in float32, a tied table once."""
    return 4 * sum(parameter.numel() for parameter in model.parameters())


Choice = tuple[int, ...]
"""The rung of each ladder."""


def upgrades(ladders: Sequence[Ladder]) -> list[Choice]:
    """From the recipe itself to all float: after each, the one that saves most loss per byte."""
    choice = [0] * len(ladders)
    path = [tuple(choice)]
    while steps := [
        (_gain(ladder, choice[index], rung), index, rung)
        for index, ladder in enumerate(ladders)
        for rung in range(choice[index] + 1, len(ladder.rungs))
    ]:
        _, index, rung = max(steps)
        choice[index] = rung
        path.append(tuple(choice))
    return path


def _gain(ladder: Ladder, now: int, rung: int) -> float:
    """Loss saved per byte added; without limit where bytes are saved, too."""
    before, after = ladder.rungs[now], ladder.rungs[rung]
    saved, added = before.loss - after.loss, after.size - before.size
    if added > 0:
        return saved / added
    return math.inf if saved >= 0 else -math.inf


def size_of(ladders: Sequence[Ladder], choice: Choice, rest: int) -> int:
    """Bytes of all weights; `rest`: those that no recipe quantizes."""
    pairs = zip(ladders, choice, strict=True)
    return rest + sum(ladder.rungs[rung].size for ladder, rung in pairs)


def predicted(ladders: Sequence[Ladder], choice: Choice) -> float:
    """The sum of the layers' losses. Errors partly cancel, so it is mostly too high."""
    return sum(ladder.rungs[rung].loss for ladder, rung in zip(ladders, choice, strict=True))


def within_loss(
    path: Sequence[Choice], limit: float, measure: Callable[[Choice], float]
) -> tuple[Choice, float]:
    """The first choice of the path whose measured loss is within the limit, and that loss.

    By bisection: as many measurements as the length of the path has binary digits. Its last choice,
    all float, loses nothing, so there always is one; a smaller limit never gives an earlier one.
    """
    low, high, loss = 0, len(path) - 1, 0.0
    while low < high:
        middle = (low + high) // 2
        found = measure(path[middle])
        if found <= limit:
            high, loss = middle, found
        else:
            low = middle + 1
    return path[high], loss


def within_size(ladders: Sequence[Ladder], path: Sequence[Choice], limit: int, rest: int) -> Choice:
    """The path's upgrades in their order, those left out that do not fit."""
    choice = path[0]
    for before, after in itertools.pairwise(path):
        index = next(i for i, rung in enumerate(after) if rung != before[i])
        upgraded = (*choice[:index], after[index], *choice[index + 1 :])
        if size_of(ladders, upgraded, rest) <= limit:
            choice = upgraded
    return choice


def mixed_recipe(
    recipe: Recipe, wanted: Mapping[str, Precision], floats: Iterable[str], name: str
) -> Recipe:
    """The recipe with rules for the layers that shall have another precision than it says.

    `floats`: layers that it keeps in float, which no pattern may catch.
    """
    all_wanted = {layer: recipe.precision(layer) for layer in floats} | dict(wanted)
    return replace(recipe, name=name, layers=(*recipe.layers, *rules(recipe, all_wanted)))


def rules(recipe: Recipe, wanted: Mapping[str, Precision]) -> tuple[LayerRule, ...]:
    """Rules that give every layer what is wanted, few by patterns, where many layers agree."""
    left = [layer for layer in wanted if recipe.precision(layer) != wanted[layer]]
    found: list[LayerRule] = []
    while left:
        precision = wanted[left[0]]
        right = {layer for layer in wanted if wanted[layer] == precision}
        patterns = {
            pattern: covered
            for layer in left
            if layer in right
            for pattern in _patterns(layer)
            if right >= (covered := {other for other in wanted if fnmatchcase(other, pattern)})
        }
        best = max(patterns, key=lambda pattern: len(patterns[pattern].intersection(left)))
        found.append(LayerRule(pattern=best, precision=precision))
        left = [layer for layer in left if layer not in patterns[best]]
    return tuple(found)


def _patterns(layer: str) -> list[str]:
    """The name; each of its numbers as `*`; all below its beginnings, as in `decoder.layers.*`.

    A recipe file takes patterns of one part only.
    """
    words = layer.split(".")
    shortest = 2 if layer.startswith(("vision_tower.", "decoder.layers.")) else len(words)
    below = [".".join((*words[:count], "*")) for count in range(shortest, len(words))]
    anywhere = [
        ".".join((*words[:index], "*", *words[index + 1 :]))
        for index, word in enumerate(words)
        if word.isdecimal()
    ]
    return [layer, *anywhere, *below]
