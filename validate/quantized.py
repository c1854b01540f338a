"""What a recipe is, did and cost, in the words and rows of a report."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..quantize.recipes import (
    Activations,
    Float,
    NumberFormat,
    Observer,
    Part,
    Precision,
    Recipe,
    ScaleFormat,
)
from . import formats

if TYPE_CHECKING:
    from ..quantize.apply import Record
    from ..quantize.ranges import OpRange
    from ..quantize.weights import LayerRecord
    from .loss import CaseLoss, QuantizationLoss


EXACT = (
    "Neither side rounds here: the artifact's program on its stored weights, against the exported "
    "programs in PyTorch, with no step to half precision or integers between float32 values. Both "
    "are the same real numbers under every recipe, equal but for float32's last bits, and a fault "
    "shows that roundings would hide. The limits are five times what the programs are seen to "
    "move by when each operator's result is moved by a rounding of float32."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the loss table; `passed` is None for a number without a limit."""

    label: str
    value: str
    limit: str = ""
    passed: bool | None = None


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers of one kind (`decoder.layers.*.mlp.up_proj`), stored alike; the worst error of any."""

    layers: str
    count: int
    bits: int
    group_size: int | None
    method: str
    error: float
    number_format: NumberFormat = NumberFormat.INTEGER


def loss_rows(loss: "QuantizationLoss") -> list[Row]:
    """The gates first, then what explains them."""
    rows = [
        Row(
            label=check.name,
            value=check.message or formats.number(check.value),
            limit=formats.number(check.limit),
            passed=check.passed,
        )
        for check in loss.checks
    ]
    same = loss.same_first
    if same.total:
        shortest = min((case for case in loss.cases if case.kl), key=_before)
        rows += [
            Row(label="worst KL", value=formats.number(loss.worst_kl)),
            Row(label="same token first", value=formats.share(same.right, same.total)),
            Row(
                label="equal tokens before one differs",
                value=f"{_before(shortest)} of {len(shortest.kl)} on {shortest.case}",
            ),
        ]
    if loss.features:
        rows += [
            Row(label="image features, PSNR", value=f"{formats.number(loss.features.psnr_db)} dB"),
            Row(label="image features, 1 - cosine", value=formats.number(loss.features.cosine)),
            Row(label="image features, max relative", value=formats.number(loss.features.relative)),
        ]
    if loss.answers:
        sides = (("original", loss.answers.original), ("quantized", loss.answers.quantized))
        rows += [
            Row(label=f"exact answers, {name}", value=formats.share(told.right, told.total))
            for name, told in ((name, side.total) for name, side in sides)
        ]
    return rows


def _before(case: "CaseLoss") -> int:
    return case.tokens_before_difference


def recipe_facts(recipe: Recipe) -> dict[str, str]:
    """A recipe as people read it: part or pattern -> what becomes of its layers."""
    facts = {"name": recipe.name, "floats": str(recipe.float_format)}
    facts |= {str(part): _words(getattr(recipe, part)) for part in Part}
    facts |= {rule.pattern: _words(rule.precision) for rule in recipe.layers}
    if recipe.ranged:
        percentile = recipe.observer is Observer.PERCENTILE
        extra = f", {recipe.percentile:g} % of the values" if percentile else ""
        facts["static ranges"] = f"{recipe.observer}{extra}"
    if recipe.float_format is Float.FP16:
        facts["float32 beyond"] = formats.number(recipe.range_limit)
    return facts


def _words(precision: Precision) -> str:
    if precision.bits is None:
        return "not quantized"
    if precision.fp8:
        return "fp8 weights per channel; static fp8 activations (linear layers)"
    if precision.palettized:
        sharing = f"{precision.group_size} channels" if precision.group_size else "layer"
        return f"{precision.bits}-bit indices, one lookup table for each {sharing}"
    groups = f"in groups of {precision.group_size}" if precision.group_size else "per channel"
    symmetry = "symmetric" if precision.symmetric else "with zero points"
    words = f"{precision.bits}-bit weights {groups}, {symmetry}, {precision.method}"
    if precision.scale_format is not ScaleFormat.FLOAT:
        words += f", {precision.scale_format} scales"
    if precision.activations is Activations.FLOAT:
        return words
    return f"{words}; {precision.activations} {precision.activation_bits}-bit activations"


def layer_groups(layers: Sequence["LayerRecord"]) -> list[LayerGroup]:
    """Layers that differ in their number alone as one line, in the order of the model."""
    groups: dict[tuple[object, ...], list[LayerRecord]] = {}
    for layer in layers:
        kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.layer)
        key = (kind, layer.bits, layer.group_size, layer.method, layer.number_format)
        groups.setdefault(key, []).append(layer)
    return [
        LayerGroup(
            layers=str(kind) if len(found) > 1 else found[0].layer,
            count=len(found),
            bits=found[0].bits,
            group_size=found[0].group_size,
            method=str(found[0].method),
            error=float(np.max([layer.error for layer in found])),
            number_format=found[0].number_format,
        )
        for (kind, *_), found in groups.items()
    ]


def kept_operators(record: "Record") -> list[tuple[str, "OpRange", float]]:
    """Operators that the range scan left in float32: graph, operator, largest magnitude."""
    found = [
        # NumPy's maximum is NaN where any value is.
        (graph, operator, float(np.max([operator.entering, operator.leaving])))
        for graph, operators in record.kept.items()
        for operator in operators
    ]
    return sorted(found, key=lambda item: -math.inf if math.isnan(item[2]) else -item[2])


def describe(record: "Record") -> dict[str, object]:
    """Everything recorded, as plain data: the recipe, calibration, operators and layers."""
    return {"recipe": record.recipe.to_dict(), **record.to_dict()}
