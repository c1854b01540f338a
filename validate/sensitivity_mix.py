"""From a model and a recipe to losses of its layers, and on to a mixed recipe for a budget."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..exporter.errors import ExportError
from ..exporter.model.fastvlm import FastVLM
from ..exporter.spec import ExportSpec
from ..quantize.recipes import EMBEDDING, HEAD, LayerRule, Precision, Recipe, part_of
from ..quantize.simulate import variants
from ..quantize.weights import layer_names
from . import formats
from .sensitivity import Change, Prompt, losses
from .sensitivity_budget import (
    Budget,
    Choice,
    Ladder,
    Rung,
    float_size,
    mixed_recipe,
    next_precision,
    predicted,
    size_of,
    stored_size,
    upgrades,
    within_loss,
    within_size,
)
from .sensitivity_report import LayerLoss, Mixed

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """A recipe's layers in the order of the network, and modules for each precision of theirs.

    `modules` is layer -> precision -> module, the recipe's precision first; float has none.
    """

    model: FastVLM
    recipe: Recipe
    modules: Mapping[str, Mapping[Precision, nn.Module]]

    def change(self, precisions: Mapping[str, Precision]) -> Change:
        """The modules of layers under these precisions."""
        return {
            layer: self.modules[layer][precision]
            for layer, precision in precisions.items()
            if precision.bits is not None
        }

    @property
    def as_recipe(self) -> dict[str, Precision]:
        """Every layer as the recipe has it."""
        return {layer: next(iter(found)) for layer, found in self.modules.items()}


def options(
    model: FastVLM,
    recipe: Recipe,
    spec: ExportSpec,
    shown: Sequence[Tensor],
    say: Say,
    *,
    upgraded: bool,
) -> Options:
    """Quantize every layer as the recipe says and, if asked for, in the next better precision.

    `shown`: calibration images [1,3,R,R]. Raises ExportError where there is nothing to quantize.
    """
    first = variants(model, recipe, spec, shown, say)
    if not first:
        raise ExportError(
            f"Recipe '{recipe.name}' quantizes no layer of this model: there is nothing to "
            "measure.",
            "Use one with integer weights, such as --recipe int4.",
        )
    better = {
        layer: precision
        for layer in first
        if upgraded and (precision := next_precision(recipe.precision(layer)))
    }
    alone = Recipe(
        name="upgraded",
        layers=tuple(LayerRule(pattern=layer, precision=p) for layer, p in better.items()),
        observer=recipe.observer,
        percentile=recipe.percentile,
    )
    second = variants(model, alone, spec, shown, say) if better else {}
    return Options(
        model=model,
        recipe=recipe,
        modules={
            layer: {recipe.precision(layer): module}
            | ({better[layer]: second[layer]} if layer in better else {})
            for layer, module in first.items()
        },
    )


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Layer -> precision -> loss alone, 0..1; and of the whole recipe."""

    alone: Mapping[str, Mapping[Precision, float]]
    together: float


def measure(found: Options, asked: Sequence[Prompt], say: Say) -> Losses:
    """Every layer alone in each of its precisions, and all as the recipe has them."""
    pairs = [(layer, p) for layer, modules in found.modules.items() for p in modules]
    changes = [found.change({layer: precision}) for layer, precision in pairs]
    whole = found.change(found.as_recipe)
    *alone, together = losses(found.model, asked, [*changes, whole], say)
    table: dict[str, dict[Precision, float]] = {layer: {} for layer in found.modules}
    for (layer, precision), loss in zip(pairs, alone, strict=True):
        table[layer][precision] = loss
    return Losses(alone=table, together=together)


def layer_losses(found: Options, measured: Losses) -> tuple[LayerLoss, ...]:
    """The layers under the recipe, for people."""
    return tuple(
        LayerLoss(
            layer=layer,
            part=part_of(layer),
            bits=int(precision.bits or 0),
            size=stored_size(found.model, layer, precision),
            loss=measured.alone[layer][precision],
        )
        for layer, precision in found.as_recipe.items()
    )


def check_size(found: Options, budget: Budget) -> None:
    """Raise ExportError for a size that the recipe itself exceeds: known before measuring."""
    nothing = Losses(
        alone={layer: dict.fromkeys(modules, 0.0) for layer, modules in found.modules.items()},
        together=0.0,
    )
    steps = ladders(found, nothing)
    size = size_of(steps, (0,) * len(steps), _rest(found, steps))
    if budget.size is not None and size > budget.size:
        raise ExportError(
            f"The recipe's own weights take {formats.size(size)}, more than --budget allows "
            f"({formats.size(budget.size)}).",
            "Give a larger --budget, or a --recipe with fewer bits.",
        )


def ladders(found: Options, measured: Losses) -> list[Ladder]:
    """Each layer's precisions up to float. A tied table's two uses move together, stored once."""
    tied = not hasattr(found.model.decoder, "lm_head")
    pair = (EMBEDDING, HEAD) if tied and {EMBEDDING, HEAD} <= set(found.modules) else ()
    groups: list[tuple[str, ...]] = [(layer,) for layer in found.modules if layer not in pair]
    if pair:
        groups.append(pair)
    return [_ladder(found, measured, layers) for layers in groups]


def _rest(found: Options, steps: Sequence[Ladder]) -> int:
    """Bytes of the weights that no ladder holds."""
    return float_size(found.model) - sum(ladder.rungs[-1].size for ladder in steps)


def _ladder(found: Options, measured: Losses, layers: tuple[str, ...]) -> Ladder:
    steps = zip(*(found.modules[layer] for layer in layers), strict=True)
    integer = [
        Rung(
            precisions=precisions,
            size=stored_size(found.model, layers[0], precisions[0]),
            loss=sum(measured.alone[n][p] for n, p in zip(layers, precisions, strict=True)),
        )
        for precisions in steps
    ]
    floats = Rung(
        precisions=(Precision(),) * len(layers),
        size=stored_size(found.model, layers[0], Precision()),
        loss=0.0,
    )
    return Ladder(layers=layers, rungs=(*integer, floats))


def mix(
    found: Options, measured: Losses, budget: Budget, asked: Sequence[Prompt], path: str, say: Say
) -> tuple[Mixed, Recipe]:
    """The recipe for a budget that `check_size` lets pass, and what it takes and loses."""
    steps = ladders(found, measured)
    order = upgrades(steps)
    rest = _rest(found, steps)

    def loss(choice: Choice) -> float:
        say(f"measure a recipe of {size_of(steps, choice, rest) / 1e6:.4g} MB")
        change = found.change(_precisions(steps, choice))
        return losses(found.model, asked, [change], lambda _: None)[0]

    if budget.loss is not None:
        choice, lost = within_loss(order, budget.loss, loss)
    else:
        choice = within_size(steps, order, budget.size or 0, rest)
        lost = loss(choice)
    name = f"{found.recipe.name[:32]}-{budget.name}"
    floats = (n for n in layer_names(found.model) if found.recipe.precision(n).bits is None)
    wanted = _precisions(steps, choice)
    recipe = mixed_recipe(found.recipe, wanted, floats, name)
    before = found.as_recipe
    return (
        Mixed(
            name=name,
            budget=budget.text,
            path=path,
            upgraded={n: p.bits for n, p in wanted.items() if p != before[n]},
            size=size_of(steps, choice, rest),
            recipe_size=size_of(steps, order[0], rest),
            float_size=size_of(steps, order[-1], rest),
            predicted=predicted(steps, choice),
            measured=lost,
        ),
        recipe,
    )


def _precisions(steps: Iterable[Ladder], choice: Choice) -> dict[str, Precision]:
    return {
        layer: precision
        for ladder, rung in zip(steps, choice, strict=True)
        for layer, precision in zip(ladder.layers, ladder.rungs[rung].precisions, strict=True)
    }
