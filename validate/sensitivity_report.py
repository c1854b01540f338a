"""What the measurement of a recipe's layers found: data, a table, a plot."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..quantize.recipes import Part
from . import formats
from .plots import WIDTH, ticks
from .templates import environment

SHOWN = 20
PART_TITLES = {
    Part.VISION: "Vision",
    Part.EMBEDDING: "Embedding",
    Part.DECODER: "Decoder",
    Part.HEAD: "Head",
}


@dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """One layer under the recipe: bits and bytes of its weights, its loss alone in 0..1."""

    layer: str
    part: Part
    bits: int
    size: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """The mixed-precision recipe that a budget led to.

    `upgraded` is layer -> bits, None: float. `predicted` is the sum of the layers' losses alone,
    `measured` the loss of the whole recipe, 0..1; sizes in bytes of all weights.
    """

    name: str
    budget: str
    path: str
    upgraded: dict[str, int | None]
    size: int
    recipe_size: int
    float_size: int
    predicted: float
    measured: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Every quantized layer in the order of the network, measured alone and all `together`."""

    source: str
    recipe: str
    prompts: int
    positions: int
    layers: tuple[LayerLoss, ...]
    together: float
    mixed: Mixed | None = None

    @property
    def total(self) -> float:
        """The sum of the layers' losses."""
        return sum(layer.loss for layer in self.layers)

    def share(self, layer: LayerLoss) -> float:
        """A layer's part of the sum, 0..1; 0 where nothing is lost."""
        return layer.loss / self.total if self.total > 0 else 0.0

    @property
    def ranked(self) -> list[LayerLoss]:
        """The most sensitive first."""
        return sorted(self.layers, key=lambda layer: -layer.loss)

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON, the layers by loss."""
        return {
            "source": self.source,
            "recipe": self.recipe,
            "loss": "mean total variation distance of next-token probabilities, 0..1",
            "prompts": self.prompts,
            "positions": self.positions,
            "sum": self.total,
            "together": self.together,
            "layers": [
                {
                    "layer": layer.layer,
                    "part": layer.part.value,
                    "bits": layer.bits,
                    "bytes": layer.size,
                    "loss": layer.loss,
                    "share": self.share(layer),
                }
                for layer in self.ranked
            ],
            "mixed": formats.plain(self.mixed),
        }


def percent(share: float) -> str:
    """0..1 as percent: 0.391 %."""
    return f"{formats.number(100 * share)} %"


def terminal(found: Sensitivity) -> Group:
    """The layers that lose most, what all lose together, and the recipe of a budget."""
    table = Table(
        title=Text(
            f"Loss of single layers under {found.recipe}, {found.positions} positions of "
            f"{found.prompts} prompts",
            "bold",
        ),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("Layer", overflow="fold")
    table.add_column("Part")
    for name in ("Bits", "Size", "Loss", "Share"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in found.ranked[:SHOWN]:
        table.add_row(
            Text(layer.layer),
            layer.part.value,
            str(layer.bits),
            formats.size(layer.size),
            percent(layer.loss),
            f"{100 * found.share(layer):.1f} %",
        )
    more = len(found.layers) - SHOWN
    notes = [Text(f"and {more} more layers: --json lists all", "dim")] if more > 0 else []
    notes.append(Text(summary(found)))
    if found.mixed:
        notes.append(Text(mixed_summary(found.mixed)))
    return Group(table, *notes)


def summary(found: Sensitivity) -> str:
    """How to read the losses, in two sentences."""
    return (
        f"All {len(found.layers)} layers together lose {percent(found.together)}; their losses add "
        f"up to {percent(found.total)}. A loss of 1 % means that one sampled token in a hundred "
        "would be another."
    )


def mixed_summary(mixed: Mixed) -> str:
    """What the budget bought."""
    to_float = sum(bits is None for bits in mixed.upgraded.values())
    return (
        f"For {mixed.budget}: {len(mixed.upgraded) - to_float} layers in 8 bits, {to_float} in "
        f"float. {formats.size(mixed.size)} of weights (before {formats.size(mixed.recipe_size)}, "
        f"all float {formats.size(mixed.float_size)}), predicted loss {percent(mixed.predicted)}, "
        f"measured {percent(mixed.measured)}."
    )


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One layer of the plot, in its units."""

    x: float
    y: float
    width: float
    height: float
    part: Part
    title: str


LEFT, TOP, HEIGHT, BOTTOM = 64, 40, 300, 34


def bars(found: Sensitivity) -> list[Bar]:
    """A bar for each layer in the order of the network, its height the loss."""
    highest = max((layer.loss for layer in found.layers), default=0.0) or 1.0
    step = (WIDTH - LEFT) / max(len(found.layers), 1)
    return [
        Bar(
            x=LEFT + index * step,
            y=TOP + HEIGHT * (1 - layer.loss / highest),
            width=max(step * 0.85, 0.5),
            height=HEIGHT * layer.loss / highest,
            part=layer.part,
            title=f"{layer.layer}, {layer.bits} bits: {percent(layer.loss)}",
        )
        for index, layer in enumerate(found.layers)
    ]


def grid(found: Sensitivity) -> list[tuple[float, str]]:
    """Heights of the grid lines and what they stand for."""
    highest = max((layer.loss for layer in found.layers), default=0.0)
    if highest == 0:
        return [(float(TOP + HEIGHT), "0 %")]
    return [(TOP + HEIGHT * (1 - tick / highest), percent(tick)) for tick in ticks(highest)]


def svg(found: Sensitivity) -> str:
    """The plot as a file of its own, that follows light and dark."""
    return _render("sensitivity.svg.j2", found)


def page(found: Sensitivity) -> str:
    """The plot and the table of all layers as one HTML page without references."""
    return _render("sensitivity.html.j2", found)


def _render(template: str, found: Sensitivity) -> str:
    return (
        _environment()
        .get_template(template)
        .render(
            found=found,
            bars=bars(found),
            grid=grid(found),
            width=WIDTH,
            left=LEFT,
            top=TOP,
            bottom=TOP + HEIGHT,
            height=TOP + HEIGHT + BOTTOM,
            parts=_legend(layer.part for layer in found.layers),
            summary=summary(found),
            mixed=mixed_summary(found.mixed) if found.mixed else "",
        )
    )


def _legend(parts: Iterable[Part]) -> list[tuple[int, Part, str]]:
    """Where each part's name goes."""
    present = dict.fromkeys(parts)
    return [(LEFT + 120 * index, part, PART_TITLES[part]) for index, part in enumerate(present)]


@cache
def _environment() -> Environment:
    return environment({"percent": percent, "size": formats.size})
