"""Recipes as data: which precision a layer gets, and the way through JSON and back."""

import json
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.model.fastvlm import build
from fastvlm_export.quantize.recipe_layers import unused_rules
from fastvlm_export.quantize.recipes import (
    EMBEDDING,
    HEAD,
    RECIPES,
    Activations,
    Float,
    LayerRule,
    Method,
    Part,
    Precision,
    Recipe,
    get,
    part_of,
    parts_of,
)

from .. import checkpoints
from . import strategies

EIGHT, FOUR = Precision(bits=8), Precision(bits=4, group_size=32)


def layer_names() -> list[str]:
    """Every layer of a small FastVLM that a recipe may quantize."""
    model = build(checkpoints.tiny_config())
    kinds = (nn.Conv2d, nn.Linear, nn.Embedding)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


LAYERS = layer_names()


def through_json(recipe: Recipe) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(recipe.to_dict(), allow_nan=False))
    return values


def test_a_model_has_layers_of_every_part() -> None:
    counts = {part: sum(part_of(layer) is part for layer in LAYERS) for part in Part}
    print(counts)
    assert counts[Part.EMBEDDING] == counts[Part.HEAD] == 1
    assert counts[Part.DECODER] == 2 * 7
    assert counts[Part.VISION] == len(LAYERS) - 2 * 7 - 2


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        ("vision_tower.network.2.0.convffn.fc1", Part.VISION),
        ("projector", Part.VISION),
        ("projector.0", Part.VISION),
        ("decoder.layers.3.mlp.down_proj", Part.DECODER),
        (EMBEDDING, Part.EMBEDDING),
        (HEAD, Part.HEAD),
    ],
)
def test_part_of_a_layer(layer: str, part: Part) -> None:
    assert part_of(layer) is part
    assert parts_of(layer) == (part,)
    recipe = Recipe(name="x", **{part.value: EIGHT})
    assert recipe.precision(layer) == EIGHT
    assert [p for p in Part if recipe.precision(example(p)) == EIGHT] == [part]


def example(part: Part) -> str:
    return next(layer for layer in LAYERS if part_of(layer) is part)


def test_the_last_rule_that_matches_counts() -> None:
    recipe = Recipe(
        name="x",
        decoder=FOUR,
        layers=(
            LayerRule(pattern="decoder.layers.0.*", precision=EIGHT),
            LayerRule(pattern="decoder.layers.*.down_proj", precision=Precision()),
        ),
    )
    assert recipe.precision("decoder.layers.0.mlp.up_proj") == EIGHT
    assert recipe.precision("decoder.layers.0.mlp.down_proj") == Precision()
    assert recipe.precision("decoder.layers.1.mlp.down_proj") == Precision()
    assert recipe.precision("decoder.layers.1.mlp.up_proj") == FOUR
    setting = recipe.setting("decoder.layers.1.mlp.down_proj")
    assert setting.key == 'layers["decoder.layers.*.down_proj"]'
    assert recipe.setting("decoder.layers.1.mlp.up_proj").key == "decoder"
    assert [setting.key for setting in recipe.settings][:4] == list(Part)


def test_patterns_tell_capitals_apart_and_match_whole_names() -> None:
    rules = tuple(
        LayerRule(pattern=pattern, precision=EIGHT)
        for pattern in ("DECODER.LAYERS.*", "layers.0", "decoder.layers")
    )
    recipe = Recipe(name="x", layers=rules)
    assert not [layer for layer in LAYERS if recipe.precision(layer).bits]
    assert len(unused_rules(recipe, LAYERS)) == 3


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("vision_tower.*", [Part.VISION]),
        ("v*", [Part.VISION]),
        ("proj*", [Part.VISION]),
        ("decoder.layers.*", [Part.DECODER]),
        ("decoder.l[!m]*", [Part.DECODER]),
        ("decoder.l*", [Part.DECODER, Part.HEAD]),
        ("decoder.e*", [Part.EMBEDDING]),
        ("decoder.*", [Part.EMBEDDING, Part.DECODER, Part.HEAD]),
        ("*.fc1", [Part.VISION, Part.DECODER]),
        ("*", list(Part)),
        ("", []),
        ("decoder", []),
        ("tower.*", []),
        ("decoder.norm", []),
    ],
)
def test_parts_of_a_pattern(pattern: str, parts: list[Part]) -> None:
    assert list(parts_of(pattern)) == parts


@given(st.sampled_from(LAYERS), st.data())
def test_a_pattern_never_matches_outside_its_parts(layer: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(layer)))
    end = data.draw(st.integers(start, len(layer)))
    wildcard = data.draw(st.sampled_from(("*", "?", "[a-z]", "[!x]", "[")))
    pattern = layer[:start] + wildcard + layer[end:]
    outside = [
        name
        for name in LAYERS
        if fnmatchcase(name, pattern) and part_of(name) not in parts_of(pattern)
    ]
    assert not outside, (pattern, outside)


def test_rules_that_match_no_layer() -> None:
    patterns = ("decoder.layers.1.*", "decoder.layers.2.*", "projector.*", "vision_tower.tail")
    rules = tuple(LayerRule(pattern=pattern, precision=EIGHT) for pattern in patterns)
    found = unused_rules(Recipe(name="x", layers=rules), iter(LAYERS))
    print(found)
    assert [line.split('"')[1] for line in found] == ["decoder.layers.2.*", "vision_tower.tail"]


def test_built_in_recipes() -> None:
    assert list(RECIPES) == ["fp32", "fp16", "int8", "int4", "lut4", "lut6", "bf16", "fp8"]
    assert [name for name, recipe in RECIPES.items() if recipe.quantized] == [
        "fp16",
        "int8",
        "int4",
        "lut4",
        "lut6",
        "bf16",
        "fp8",
    ]
    assert RECIPES["fp32"].limits is None
    assert RECIPES["fp16"].float_format is Float.FP16
    assert RECIPES["bf16"].float_format is Float.BF16
    for name in ("fp16", "int8", "int4", "lut4", "lut6", "bf16", "fp8"):
        limits = get(name).limits
        assert limits is not None
        assert 0 < limits.mean_kl < 1
    for recipe in RECIPES.values():
        for part in Part:
            used = recipe.precision(example(part))
            static = used.activations is Activations.STATIC
            scaled = used.bits is not None and not (used.palettized or used.fp8)
            assert static == (part is Part.VISION and scaled)
        assert recipe.palettized == (recipe.name in ("lut4", "lut6"))


def test_tables_are_the_whole_of_lut4_and_lut6() -> None:
    """A tied table is stored once, and only the decoder's layers have 4 bits, as in int4."""
    for name, bits in (("lut4", 4), ("lut6", 6)):
        recipe = get(name)
        assert recipe.float_format is Float.FP16
        assert recipe.vision == recipe.embedding == recipe.head
        assert recipe.decoder.bits == bits
        for part in Part:
            precision = getattr(recipe, part)
            assert precision.palettized
            assert precision.bits in (bits, 6)
            assert precision.activations is Activations.FLOAT


def test_float_weights_have_no_tables() -> None:
    assert not Precision(method=Method.PALETTE).palettized
    assert not Precision(bits=4).palettized
    assert not Recipe(name="x", vision=Precision(method=Method.PALETTE)).palettized
    rule = LayerRule(pattern="projector*", precision=Precision(bits=1, method=Method.PALETTE))
    assert Recipe(name="x", layers=(rule,)).palettized


def test_a_rule_alone_quantizes() -> None:
    rule = LayerRule(pattern="projector*", precision=EIGHT)
    assert Recipe(name="x", layers=(rule,)).quantized
    assert not Recipe(name="x", layers=(LayerRule(pattern="*", precision=Precision()),)).quantized


@pytest.mark.parametrize(
    ("name", "guess"), [("int44", "int4"), ("INT8", "int8"), ("fp-16", "fp16"), ("", None)]
)
def test_a_name_that_there_is_not(name: str, guess: str | None) -> None:
    with pytest.raises(ExportError) as raised:
        get(name)
    assert f"'{name}'" in raised.value.message
    assert ("Did you mean" in raised.value.message) == (guess is not None)
    assert guess is None or f"'{guess}'" in raised.value.message
    assert "fp32, fp16, int8, int4" in raised.value.hint


@pytest.mark.parametrize("name", RECIPES)
def test_built_in_recipes_survive_json(name: str) -> None:
    again = Recipe.from_dict(through_json(RECIPES[name]))
    assert again == RECIPES[name]
    assert repr(again) == repr(RECIPES[name])  # enums, not their strings


@given(strategies.recipes())
def test_recipes_survive_json(recipe: Recipe) -> None:
    again = Recipe.from_dict(through_json(recipe))
    assert again == recipe
    assert hash(again) == hash(recipe)


def places(values: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested data, the data itself left out."""
    inside: list[tuple[Any, Any]] = []
    if isinstance(values, dict):
        inside = list(values.items())
    elif isinstance(values, list):
        inside = list(enumerate(values))
    return [
        place for key, value in inside for place in ((*path, key), *places(value, (*path, key)))
    ]


def full() -> dict[str, Any]:
    rule = LayerRule(pattern="projector*", precision=EIGHT)
    return through_json(Recipe(**{**vars(RECIPES["int4"]), "layers": (rule,)}))


FLOATS = {"percentile", "range_limit", "mean_kl", "accuracy_points"}
NUMBERS = {"bits", "group_size", "activation_bits", *FLOATS}


def is_fair(key: object, value: object) -> bool:
    """Whether a key can have a value of that type."""
    if value is None:
        return key in {"bits", "group_size", "limits"}
    if isinstance(value, str):
        return key in {"name", "pattern"}
    if isinstance(value, bool):
        return key == "symmetric"
    if isinstance(value, int | float):
        return key in (NUMBERS if isinstance(value, int) else FLOATS)
    return key == "layers" and value == []


@pytest.mark.parametrize("place", places(full()), ids=str)
def test_values_of_another_type_are_refused(place: tuple[Any, ...]) -> None:
    for value in (None, [], ["x"], {}, {"x": 1}, "?", 0.5, True, 7):
        values = full()
        inner = values
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        if is_fair(place[-1], value):
            assert Recipe.from_dict(values)
            continue
        with pytest.raises((KeyError, TypeError, ValueError)):
            print(f"taken: {place} = {value!r}: {Recipe.from_dict(values)}")


REQUIRED = {
    *("name", "float_format", "observer", "layers", "limits", *Part),
    *("pattern", "precision", "method", "activations", "mean_kl", "accuracy_points"),
}


@pytest.mark.parametrize("place", places(full()), ids=str)
def test_missing_values_are_refused_or_have_a_default(place: tuple[Any, ...]) -> None:
    values = full()
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    if place[-1] in REQUIRED:
        with pytest.raises((KeyError, TypeError)):
            print(f"taken without {place}: {Recipe.from_dict(values)}")
    else:
        assert isinstance(Recipe.from_dict(values), Recipe)


@pytest.mark.parametrize("values", [None, [], "int8", 3, {}, {"name": "int8"}, [["name", "x"]]])
def test_data_that_is_no_recipe(values: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Recipe.from_dict(values)


def test_unknown_keys_are_refused() -> None:
    for place in ((), ("vision",), ("limits",), ("layers", 0), ("layers", 0, "precision")):
        values = full()
        inner = values
        for key in place:
            inner = inner[key]
        inner["bitz"] = 8
        with pytest.raises(TypeError):
            print(f"taken: bitz in {place}: {Recipe.from_dict(values)}")
