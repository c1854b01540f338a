"""Recipes as Core ML computes them, and what it cannot express."""

from dataclasses import replace

import pytest

from fastvlm_export.quantize.recipes import (
    RECIPES,
    Activations,
    Float,
    LayerRule,
    Precision,
    Recipe,
)
from fastvlm_export.targets.coreml_recipes import adapt, problems

INTEGERS = Precision(bits=8)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integers_meet_float16_and_no_dynamic_activations(name: str) -> None:
    recipe, ours = RECIPES[name], adapt(RECIPES[name])
    assert ours.name == name
    assert ours.float_format is Float.FP16
    assert ours.vision == recipe.vision  # static activations as they were calibrated
    assert {p.activations for p in (ours.embedding, ours.decoder, ours.head)} == {Activations.FLOAT}
    for part in ("embedding", "decoder", "head"):
        before, after = getattr(recipe, part), getattr(ours, part)
        assert replace(before, activations=Activations.FLOAT) == after


@pytest.mark.parametrize("name", ["fp32", "fp16", "lut4", "lut6", "bf16", "fp8"])
def test_other_built_ins_stay_as_they_are(name: str) -> None:
    assert adapt(RECIPES[name]) == RECIPES[name]


def test_a_recipe_of_ones_own_is_taken_literally() -> None:
    mine = replace(RECIPES["int4"], name="mine")
    assert adapt(mine) == mine
    assert adapt(replace(RECIPES["int4"], head=INTEGERS)).float_format is Float.FP32


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4", "lut4", "lut6"])
def test_every_built_in_is_taken_but_tensorrts(name: str) -> None:
    assert problems(adapt(RECIPES[name]), None) == []


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            Recipe(name="x", decoder=replace(INTEGERS, activations=Activations.DYNAMIC)),
            ["decoder.activations", "dynamic", "float"],
        ),
        (Recipe(name="x", decoder=Precision(bits=3)), ["decoder.bits is 3", "4 or 8"]),
        (Recipe(name="x", vision=Precision(bits=4)), ["vision.bits is 4", "8 bits"]),
        (
            Recipe(name="x", embedding=Precision(bits=8, group_size=32)),
            ["embedding.group_size is 32", "channel"],
        ),
        (
            Recipe(name="x", embedding=Precision(bits=8, symmetric=False)),
            ["embedding.symmetric is false", "symmetric"],
        ),
        (
            Recipe(
                name="x",
                layers=(LayerRule(pattern="decoder.layers.0.*", precision=Precision(bits=5)),),
            ),
            ['layers["decoder.layers.0.*"].bits is 5', "4 or 8"],
        ),
    ],
)
def test_what_cannot_be_expressed_is_named_with_what_can(
    recipe: Recipe, expected: list[str]
) -> None:
    [line] = problems(recipe, None)
    assert "target 'coreml'" in line
    for part in expected:
        assert part in line


def test_group_sizes_that_leave_a_rest_are_named_with_the_layer() -> None:
    recipe = Recipe(name="x", decoder=Precision(bits=4, group_size=48))
    layers = {"decoder.layers.0.mlp.up_proj": 128, "decoder.layers.1.mlp.up_proj": 128}
    [line] = problems(recipe, layers)
    assert "decoder.group_size is 48" in line
    assert "128" in line
    assert "decoder.layers.0.mlp.up_proj and 1 more" in line
    assert problems(recipe, {"decoder.layers.0.mlp.up_proj": 96}) == []


def test_float32_around_integers_can_be_had() -> None:
    assert problems(Recipe(name="x", decoder=INTEGERS, head=INTEGERS), None) == []
