"""Recipes as TOML files: the user's own, and those that a search writes.

name = "mine"              # default: the file's name without .toml
base = "int4"              # a built-in recipe to start from; default: float32 everywhere
float = "fp32"             # or "fp16", "bf16": the format of all that is no integer
observer = "percentile"    # or "minmax", "histogram": for static and symmetric activations
percentile = 99.999        # in percent, for that observer
range_limit = 32752.0      # under "fp16": operators above it stay in float32

[decoder]                  # also [vision], [embedding], [head]; unset keys are the base's
bits = 4                   # or 8
group_size = 32            # weights that share a scale; "channel": all of an output channel
symmetric = true
method = "gptq"            # or "rtn", "hqq"; "palette": see below
activations = "dynamic"    # or "affine", "float"; in tower and projector "static", "affine" (linear
                           # layers; convolutions are static), "symmetric" (static, but without a
                           # zero point) or "float"
activation_bits = 8
scale_format = "float"     # or "bf16", not in tower and projector: what scales are rounded to
format = "integer"         # or "fp8", not for the embedding: see below

[[layers]]                 # the last rule that matches a layer counts
pattern = "decoder.layers.0.mlp.*"
bits = 8                   # unset keys are those of the part that the layers belong to

[[layers]]
pattern = "projector*"
keep = true                # in the recipe's float format; a part may say so, too

[limits]                   # default: those of the built-in with as few bits
mean_kl = 0.3
accuracy_points = 1.5

# method = "palette" means lookup tables instead of scales, for any part and any layer:
# bits = 4                 # of an index into a table: 1, 2, 3, 4, 6 or 8
# group_size = 16          # output channels that share a table; "tensor": all of a layer
# Activations are "float", and there is no symmetric or scale_format. With a method of the other
# kind than the base's, bits alone is the base's where it is unset.
#
# format = "fp8" means floats of 8 bits (e4m3), one scale for an output channel and one, from
# calibration, for what enters. Only bits, activations ("symmetric") and activation_bits are there
# beside it, and need not be said. Linear layers alone are quantized so.
"""

import dataclasses
import json
import re
from pathlib import Path

from ..exporter.errors import ExportError
from . import recipes
from .recipes import (
    ACTIVATIONS,
    FORMATS,
    FP8_ACTIVATIONS,
    METHODS,
    PALETTE_BITS,
    RECIPES,
    SCALE_FORMATS,
    Activations,
    Float,
    LayerRule,
    LossLimits,
    Method,
    NumberFormat,
    Observer,
    Part,
    Precision,
    Recipe,
    ScaleFormat,
    parts_of,
    rule_key,
)
from .toml_file import Table, read_toml, shown

SUFFIX = ".toml"
PER_CHANNEL, PER_TENSOR = "channel", "tensor"
LARGEST_GROUP = 65536
LARGEST_FP16 = 65504.0
SHOWN_PROBLEMS = 20

_KEYS = {"number_format": "format"}
"""Fields that a file calls otherwise."""
_PRECISION = tuple(_KEYS.get(f.name, f.name) for f in dataclasses.fields(Precision))
_FP8 = Precision(bits=8, number_format=NumberFormat.FP8, activations=FP8_ACTIVATIONS[0])
_LIMITS = tuple(field.name for field in dataclasses.fields(LossLimits))
_TOP = (
    *("name", "base", "float", "observer", "percentile", "range_limit"),
    *(part.value for part in Part),
    *("layers", "limits"),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_NAMES = "up to 64 letters, digits and . _ + -, the first a letter or digit"
_PATTERN = re.compile(r"[A-Za-z0-9_.*?\[\]!-]{1,200}")
_BITS, _ACTIVATION_BITS = (4, 8), (8,)
FEW_BITS = 4  # up to here a recipe may lose what int4 may, above what int8 may

_NO_LAYER = "matches no layer: their names begin with vision_tower., projector or decoder."
_UNCLEAR = (
    "could match layers of several parts: let it begin with vision_tower., projector or "
    "decoder.layers., or be decoder.embed_tokens or decoder.lm_head"
)


def find(name_or_path: str) -> Recipe:
    """A built-in recipe by its name, or the one in a file whose name ends in .toml."""
    if name_or_path.lower().endswith(SUFFIX):
        return read(Path(name_or_path))
    return recipes.get(name_or_path)


def read(path: Path) -> Recipe:
    """The recipe in a TOML file. Raises ExportError with all that is wrong in it."""
    problems: list[str] = []
    recipe = _recipe(Table(read_toml(path, "recipe file"), "", problems), path.stem)
    if problems:
        lines = problems[:SHOWN_PROBLEMS]
        if len(problems) > len(lines):
            lines.append(f"and {len(problems) - len(lines)} more")
        listed = "\n".join(f"  - {line}" for line in lines)
        raise ExportError(
            f"{path} is not a recipe that can be applied:\n{listed}",
            f"Correct it and run again with --recipe {path}; "
            "`fastvlm-export targets` shows what each target takes.",
        )
    return recipe


def _recipe(top: Table, stem: str) -> Recipe:
    top.only(_TOP)
    # A misspelt base is one problem: with one that quantizes, the keys below make sense.
    base = RECIPES[top.choice("base", tuple(RECIPES), "int4" if "base" in top else "fp32")]
    name = top.text("name", stem, _NAME, _NAMES)
    if "name" not in top and not _NAME.fullmatch(stem):
        top.complain("name", f"is missing, and the file's, {shown(stem)}, is not {_NAMES}")
    parts = {part: _part(top.table(part), part, getattr(base, part)) for part in Part}
    recipe = Recipe(
        name=name,
        float_format=top.choice("float", tuple(Float), base.float_format),
        vision=parts[Part.VISION],
        embedding=parts[Part.EMBEDDING],
        decoder=parts[Part.DECODER],
        head=parts[Part.HEAD],
        layers=_rules(top, parts),
        observer=top.choice("observer", tuple(Observer), base.observer),
        percentile=top.number("percentile", 50, 100, base.percentile),
        range_limit=top.number("range_limit", 1, LARGEST_FP16, base.range_limit),
    )
    recipe = dataclasses.replace(recipe, limits=_limits(top.table("limits"), recipe))
    if not top.problems:  # wrong values would make these mislead
        _check_use(top, recipe)
        _check_name(top, recipe)
    return recipe


def _part(table: Table, part: Part, start: Precision) -> Precision:
    table.only((*_PRECISION, "keep"))
    return _precision(table, (part,), start)


def _precision(table: Table, parts: tuple[Part, ...], start: Precision) -> Precision:
    """`start` with what the table says. `parts`: whose layers it is for."""
    given = [name for name in _PRECISION if name in table]
    if table.flag("keep", False):
        for name in given:
            table.complain(name, f"and {table.name('keep')} = true contradict each other")
        return Precision()
    who = parts[0] if len(parts) == 1 else None
    why = f" (all that {who} layers can have)" if who else ""
    formats = FORMATS[who] if who else tuple(NumberFormat)
    kind = table.choice("format", formats, start.number_format, why)
    if kind is NumberFormat.FP8:
        return _floats(table)
    if start.fp8:
        start = Precision(bits=start.bits)  # the rest means something else there
    method = table.choice("method", METHODS[who] if who else tuple(Method), start.method, why)
    tables = method is Method.PALETTE
    if tables is not (start.method is Method.PALETTE):
        start = Precision(bits=start.bits, method=method)  # the rest means something else there
    sizes, widest = (PALETTE_BITS, PER_TENSOR) if tables else (_BITS, PER_CHANNEL)
    computed = ACTIVATIONS[who] if who else tuple(Activations)
    scales, whose = SCALE_FORMATS[who] if who and not tables else tuple(ScaleFormat), why
    if tables:
        computed, why = (Activations.FLOAT,), " (all there is beside lookup tables)"
    found = Precision(
        bits=table.choice("bits", sizes, start.bits),
        group_size=table.count_or("group_size", widest, LARGEST_GROUP, start.group_size),
        symmetric=table.flag("symmetric", start.symmetric),
        method=method,
        activations=table.choice("activations", computed, start.activations, why),
        activation_bits=table.choice("activation_bits", _ACTIVATION_BITS, start.activation_bits),
        scale_format=table.choice("scale_format", scales, start.scale_format, whose),
    )
    if tables:
        found = _without_scales(table, found)
    if "bits" not in table and found.bits not in (None, *sizes):
        table.complain("bits", f"is missing: {method} has no {found.bits}, as the base has")
    if found.bits is None and "bits" not in table:
        for name in given:
            table.complain(name, f"needs {table.name('bits')}: without, the weights stay float")
        return Precision()
    wrong = table.values.get("activations", "float") != "float"  # and noted already
    if "activation_bits" in table and found.activations is Activations.FLOAT and not wrong:
        table.complain("activation_bits", f'needs {table.name("activations")} other than "float"')
    return found


def _floats(table: Table) -> Precision:
    """The precision of fp8, and a complaint about each key that is for integers."""
    for name in ("group_size", "symmetric", "method", "scale_format"):
        if name in table:
            whole = f'{table.name("format")} = "integer"'
            table.complain(name, f"says nothing about fp8: leave it out, or set {whole}")
    why = " (all there is with fp8)"
    return dataclasses.replace(
        _FP8,
        bits=table.choice("bits", (8,), 8, why),
        activations=table.choice("activations", FP8_ACTIVATIONS, _FP8.activations, why),
        activation_bits=table.choice("activation_bits", _ACTIVATION_BITS, 8, why),
    )


def _without_scales(table: Table, found: Precision) -> Precision:
    """The precision of lookup tables, and a complaint about each key that is for scales."""
    for name, kind in (("symmetric", bool), ("scale_format", str)):
        if isinstance(table.values.get(name), kind):  # else noted already
            table.complain(name, "says nothing about lookup tables: leave it out")
    return dataclasses.replace(found, symmetric=True, scale_format=ScaleFormat.FLOAT)


def _rules(top: Table, parts: dict[Part, Precision]) -> tuple[LayerRule, ...]:
    rules: list[LayerRule] = []
    for table in top.tables("layers"):
        table.only(("pattern", "keep", *_PRECISION))
        if "pattern" not in table:
            table.complain("pattern", "is missing")
        pattern = table.text("pattern", "", _PATTERN, "a pattern of layer names")
        if pattern:
            table.key = rule_key(pattern)
            if any(rule.pattern == pattern for rule in rules):
                table.complain("pattern", "is there twice")
        owners = parts_of(pattern)
        if pattern and len(owners) != 1:
            table.complain("pattern", _UNCLEAR if owners else _NO_LAYER)
        if "keep" not in table and not any(name in table for name in _PRECISION):
            table.complain("bits", "is missing, or keep = true")
        # Without one part to start from, the keys' own values can be judged all the same.
        start = parts[owners[0]] if len(owners) == 1 else Precision(bits=8)
        rules.append(LayerRule(pattern=pattern, precision=_precision(table, owners, start)))
    return tuple(rules)


def _limits(table: Table, recipe: Recipe) -> LossLimits | None:
    """The file's limits, and the built-ins' where it says nothing: by the fewest bits."""
    table.only(_LIMITS)
    bits = [precision.bits for precision in recipe.precisions if precision.bits]
    like = recipe.float_format.value
    if bits:
        like = "int4" if min(bits) <= FEW_BITS else "fp8" if recipe.fp8 else "int8"
    usual = RECIPES[like].limits
    if usual is None:
        if not table.values:
            return None
        for name in _LIMITS:
            if name not in table:
                table.complain(name, "is missing: a float32 recipe has no limits of its own")
        usual = LossLimits(mean_kl=0.0, accuracy_points=0.0)
    return LossLimits(
        mean_kl=table.number("mean_kl", 0, 100, usual.mean_kl),
        accuracy_points=table.number("accuracy_points", 0, 100, usual.accuracy_points),
    )


def _check_use(top: Table, recipe: Recipe) -> None:
    """A key that counts for nothing is a mistake somewhere."""
    if "observer" in top and not recipe.ranged:
        top.complain(
            "observer",
            'counts for "static" and "symmetric" activations only, and no layer has them',
        )
    elif "percentile" in top and recipe.observer is not Observer.PERCENTILE:
        top.complain("percentile", f'needs observer = "percentile", not {shown(recipe.observer)}')
    if "range_limit" in top and recipe.float_format is not Float.FP16:
        top.complain("range_limit", f'needs float = "fp16", not {shown(recipe.float_format)}')


def _check_name(top: Table, recipe: Recipe) -> None:
    """Reports go by the name: a built-in's is for what equals it."""
    if recipe != RECIPES.get(recipe.name, recipe):
        top.complain(
            "name",
            f"is {shown(recipe.name)}, a built-in recipe that this file differs from: "
            "give it a name of its own",
        )


def write(recipe: Recipe) -> str:
    """TOML that `read` gives back as the same recipe.

    What counts for nothing is left out: settings of a float precision, an observer that nobody
    asks, the magnitude limit of a float32 recipe.
    """
    lines = [f"name = {shown(recipe.name)}", f"float = {shown(recipe.float_format)}"]
    if recipe.ranged:
        lines.append(f"observer = {shown(recipe.observer)}")
        if recipe.observer is Observer.PERCENTILE:
            lines.append(f"percentile = {recipe.percentile!r}")
    if recipe.float_format is Float.FP16:
        lines.append(f"range_limit = {recipe.range_limit!r}")
    for part in Part:
        precision: Precision = getattr(recipe, part)
        if precision.bits:
            lines += ["", f"[{part}]", *_written(precision)]
    for rule in recipe.layers:
        lines += ["", "[[layers]]", f"pattern = {json.dumps(rule.pattern)}"]
        if recipe.fp8 and rule.precision.bits and not rule.precision.fp8:
            lines.append(f"format = {shown(NumberFormat.INTEGER)}")  # its part's may be fp8
        lines += _written(rule.precision) if rule.precision.bits else ["keep = true"]
    if recipe.limits:
        limits = dataclasses.asdict(recipe.limits)
        lines += ["", "[limits]", *(f"{name} = {value!r}" for name, value in limits.items())]
    return "\n".join(lines) + "\n"


def _written(precision: Precision) -> list[str]:
    values = dataclasses.asdict(precision)
    values["format"] = values.pop("number_format")
    if precision.fp8:
        values = {name: values[name] for name in ("format", "bits", "activations")}
        return [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    del values["format"]
    if precision.group_size is None:
        values["group_size"] = PER_TENSOR if precision.palettized else PER_CHANNEL
    if precision.palettized:
        del values["symmetric"], values["scale_format"]
    if precision.activations is Activations.FLOAT:
        del values["activation_bits"]
    return [f"{name} = {json.dumps(value)}" for name, value in values.items()]
