"""Recipes: how each part's numbers are stored and computed, as data."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar, get_type_hints

from ..exporter.errors import ExportError
from .precisions import (
    ACTIVATIONS,
    FIXED,
    FORMATS,
    FP8_ACTIVATIONS,
    METHODS,
    PALETTE_BITS,
    SCALE_FORMATS,
    Activations,
    Float,
    Method,
    NumberFormat,
    Observer,
    Part,
    Precision,
    ScaleFormat,
)
from .toml_file import meant

__all__ = [
    "ACTIVATIONS",
    "EMBEDDING",
    "FIXED",
    "FORMATS",
    "FP8_ACTIVATIONS",
    "HEAD",
    "METHODS",
    "PALETTE_BITS",
    "RECIPES",
    "SCALE_FORMATS",
    "Activations",
    "Float",
    "LayerRule",
    "LossLimits",
    "Method",
    "NumberFormat",
    "Observer",
    "Part",
    "Precision",
    "Recipe",
    "ScaleFormat",
    "Setting",
    "get",
    "part_of",
    "parts_of",
    "recorded",
    "rule_key",
    "without",
]

HEAD = "decoder.lm_head"
"""The head's layer name, also where its weights are the embedding table's."""

EMBEDDING = "decoder.embed_tokens"

T = TypeVar("T")

_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """Layers whose name matches the shell pattern, e.g. `decoder.layers.0.mlp.*`."""

    pattern: str
    precision: Precision


class Setting(NamedTuple):
    """A precision, the parts whose layers it may be for, and its key in a recipe file."""

    key: str
    parts: tuple[Part, ...]
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class LossLimits:
    """The most that quantization may cost, against the original in float32.

    `mean_kl` in nats per teacher-forced position; `accuracy_points` of the bundled task's answers,
    in percentage points.
    """

    mean_kl: float
    accuracy_points: float


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A precision for each part, and rules for single layers: the last that matches counts.

    `percentile` is the share of values, in percent, inside a percentile observer's range.
    `range_limit` is the magnitude above which an operator stays in float32 under `fp16`.
    """

    name: str
    float_format: Float = Float.FP32
    vision: Precision = field(default_factory=Precision)
    embedding: Precision = field(default_factory=Precision)
    decoder: Precision = field(default_factory=Precision)
    head: Precision = field(default_factory=Precision)
    layers: tuple[LayerRule, ...] = ()
    observer: Observer = Observer.MINMAX
    percentile: float = 99.999
    range_limit: float = 32752.0
    limits: LossLimits | None = None

    def precision(self, layer: str) -> Precision:
        """The precision of a layer by its module name in FastVLM, e.g. `projector.0`."""
        return self.setting(layer).precision

    def setting(self, layer: str) -> Setting:
        """The setting that decides about a layer: the last rule that matches, else its part's."""
        part = part_of(layer)
        found = Setting(part.value, (part,), getattr(self, part))
        for rule in self.layers:
            if fnmatchcase(layer, rule.pattern):
                found = Setting(rule_key(rule.pattern), (part,), rule.precision)
        return found

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Each part's precision, then each rule's."""
        parts = (Setting(part.value, (part,), getattr(self, part)) for part in Part)
        rules = (
            Setting(rule_key(rule.pattern), parts_of(rule.pattern), rule.precision)
            for rule in self.layers
        )
        return (*parts, *rules)

    @property
    def palettized(self) -> bool:
        """Whether a layer may get lookup tables."""
        return any(precision.palettized for precision in self.precisions)

    @property
    def fp8(self) -> bool:
        """Whether a layer may get weights and activations in fp8."""
        return any(precision.fp8 for precision in self.precisions)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Every precision that some layer may have."""
        return tuple(setting.precision for setting in self.settings)

    @property
    def ranged(self) -> bool:
        """Whether a layer may have activations whose range is fixed on calibration images."""
        return any(
            precision.bits
            and (
                precision.activations in FIXED
                or (precision.activations is Activations.AFFINE and Part.VISION in parts)
            )
            for _, parts, precision in self.settings
        )

    @property
    def quantized(self) -> bool:
        """Whether anything but float32 is asked for."""
        return self.float_format is not Float.FP32 or any(p.bits for p in self.precisions)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest."""
        return {**dataclasses.asdict(self), "layers": [dataclasses.asdict(r) for r in self.layers]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Read `to_dict`'s data. Raises KeyError, TypeError or ValueError for anything else."""
        parts = {part.value: _precision(values[part]) for part in Part}
        if not isinstance(values["layers"], list | tuple):
            raise TypeError("layers are no list of rules")
        rules = tuple(
            _typed(LayerRule(**{**rule, "precision": _precision(rule["precision"])}))
            for rule in values["layers"]
        )
        limits = values["limits"]
        return _typed(
            cls(
                **{
                    **values,
                    **parts,
                    "layers": rules,
                    "float_format": Float(values["float_format"]),
                    "observer": Observer(values["observer"]),
                    "limits": None if limits is None else _typed(LossLimits(**limits)),
                }
            )
        )


def _precision(values: Mapping[str, Any]) -> Precision:
    typed = {
        "method": Method(values["method"]),
        "activations": Activations(values["activations"]),
        # Manifests from before there was another have none.
        "scale_format": ScaleFormat(values.get("scale_format", ScaleFormat.FLOAT)),
        "number_format": NumberFormat(values.get("number_format", NumberFormat.INTEGER)),
    }
    return _typed(Precision(**{**values, **typed}))


def _typed(instance: T) -> T:
    """The dataclass itself, where each value is of its field's type; else a TypeError."""
    for name, wanted in get_type_hints(type(instance)).items():
        if name == "layers":
            continue  # a tuple of rules that have been through here
        value = getattr(instance, name)
        allowed = int | float if wanted is float else wanted  # JSON may drop a float's ".0"
        if not isinstance(value, allowed) or isinstance(value, bool) is not (wanted is bool):
            raise TypeError(f"{name} is {value!r}, not {wanted}")
    return instance


def without(recipe: Recipe, other: Callable[[Precision], bool]) -> Recipe:
    """The recipe with all float whose precision is of the other kind."""

    def kept(precision: Precision) -> Precision:
        return Precision() if other(precision) else precision

    return dataclasses.replace(
        recipe,
        vision=kept(recipe.vision),
        embedding=kept(recipe.embedding),
        decoder=kept(recipe.decoder),
        head=kept(recipe.head),
        layers=tuple(
            dataclasses.replace(rule, precision=kept(rule.precision)) for rule in recipe.layers
        ),
    )


def part_of(layer: str) -> Part:
    """The part that a layer belongs to, by its module name in FastVLM."""
    if layer.startswith(("vision_tower.", "projector")):
        return Part.VISION
    if layer == EMBEDDING:
        return Part.EMBEDDING
    return Part.HEAD if layer == HEAD else Part.DECODER


def parts_of(pattern: str) -> tuple[Part, ...]:
    """The parts that hold layers which a pattern could match, judged without a model.

    What comes before the first wildcard decides: `*.fc1` could be in the tower or the decoder.
    """
    fixed = _WILDCARD.split(pattern)[0]

    def could_begin(start: str) -> bool:
        return fixed.startswith(start) or (fixed != pattern and start.startswith(fixed))

    could = {
        Part.VISION: could_begin("vision_tower.") or could_begin("projector"),
        Part.EMBEDDING: fnmatchcase(EMBEDDING, pattern),
        Part.DECODER: could_begin("decoder.layers."),
        Part.HEAD: fnmatchcase(HEAD, pattern),
    }
    return tuple(part for part in Part if could[part])


def rule_key(pattern: str) -> str:
    """How messages name the rule of that pattern in a recipe file."""
    return f'layers["{pattern}"]'


_VISION = Precision(bits=8, activations=Activations.STATIC)
_TABLE = Precision(bits=8)
_DYNAMIC = Precision(bits=8, activations=Activations.DYNAMIC)
# On the bundled model 16 channels to a table cost a fifth of KL less than one table for a layer
# where indices have 4 bits; with 6 bits more tables gain nothing that the task's answers show.
_LUT4 = Precision(bits=4, group_size=16, method=Method.PALETTE)
_LUT6 = Precision(bits=6, method=Method.PALETTE)
# Around bfloat16: next to fp8's roundings its own are nothing, and no operator has to stay in
# float32 for its range, where kernels that compute in fp8 would have to hand over.
_FP8 = Precision(bits=8, number_format=NumberFormat.FP8, activations=Activations.SYMMETRIC)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="fp32"),
        Recipe(
            name="fp16",
            float_format=Float.FP16,
            limits=LossLimits(mean_kl=1e-3, accuracy_points=0.5),
        ),
        Recipe(
            name="int8",
            vision=_VISION,
            embedding=_TABLE,
            decoder=_DYNAMIC,
            head=_DYNAMIC,
            limits=LossLimits(mean_kl=0.05, accuracy_points=1.0),
        ),
        Recipe(
            name="int4",
            vision=_VISION,
            embedding=_TABLE,
            decoder=Precision(bits=4, group_size=32, activations=Activations.DYNAMIC),
            head=_DYNAMIC,
            limits=LossLimits(mean_kl=0.5, accuracy_points=2.0),
        ),
        Recipe(
            name="lut4",
            float_format=Float.FP16,
            vision=_LUT6,
            embedding=_LUT6,
            decoder=_LUT4,
            head=_LUT6,
            limits=LossLimits(mean_kl=0.5, accuracy_points=2.0),
        ),
        Recipe(
            name="lut6",
            float_format=Float.FP16,
            vision=_LUT6,
            embedding=_LUT6,
            decoder=_LUT6,
            head=_LUT6,
            limits=LossLimits(mean_kl=0.05, accuracy_points=1.0),
        ),
        Recipe(
            name="bf16",
            float_format=Float.BF16,
            limits=LossLimits(mean_kl=0.02, accuracy_points=1.0),
        ),
        Recipe(
            name="fp8",
            float_format=Float.BF16,
            vision=_FP8,
            decoder=_FP8,
            head=_FP8,
            limits=LossLimits(mean_kl=0.05, accuracy_points=1.0),
        ),
    )
}


def get(name: str) -> Recipe:
    """The built-in recipe of that name; raises ExportError for one that there is not."""
    if name not in RECIPES:
        raise ExportError(
            f"There is no recipe named '{name}'.{meant(name, RECIPES)}",
            f"Use one of: {', '.join(RECIPES)}, or a TOML file of your own. "
            "`fastvlm-export targets` shows who takes which.",
        )
    return RECIPES[name]


def recorded(values: Mapping[str, Any]) -> Recipe:
    """The recipe that a manifest holds; raises ExportError where it is damaged."""
    try:
        return Recipe.from_dict(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(
            f"The manifest's recipe is damaged: {error!r}.",
            "Export the bundle again: fastvlm-export --checkpoint DIR --out DIR --force",
        ) from error
