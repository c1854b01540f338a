"""Recipes as TensorRT computes them, and one line for whatever it can't."""

from dataclasses import replace

import pytest

from fastvlm_export.quantize.recipes import (
    RECIPES,
    Activations,
    Float,
    LayerRule,
    Method,
    Precision,
    Recipe,
)
from fastvlm_export.targets import tensorrt_recipes


def problems(recipe: Recipe) -> list[str]:
    return tensorrt_recipes.problems(recipe, {"decoder.layers.0.mlp.up_proj": 80})


def test_built_ins_with_integers_are_computed_around_float16() -> None:
    for name in ("int8", "int4"):
        adapted = tensorrt_recipes.adapt(RECIPES[name])
        assert adapted.float_format is Float.FP16
        assert adapted.vision.activations is Activations.SYMMETRIC
        assert adapted.decoder.activations is adapted.head.activations is Activations.FLOAT
        assert adapted.decoder.bits == RECIPES[name].decoder.bits
        assert adapted.limits == RECIPES[name].limits


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "fp8", "lut4", "lut6"])
def test_others_stay_as_they_are(name: str) -> None:
    assert tensorrt_recipes.adapt(RECIPES[name]) == RECIPES[name]


def test_a_recipe_of_the_users_own_is_not_rewritten() -> None:
    own = replace(RECIPES["int8"], name="mine")
    assert tensorrt_recipes.adapt(own) is own
    assert len(problems(own)) == 3  # vision, decoder, head: each names its activations


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int8"])
def test_what_it_takes(name: str) -> None:
    assert problems(tensorrt_recipes.adapt(RECIPES[name])) == []


@pytest.mark.parametrize(
    ("part", "precision", "said"),
    [
        ("decoder", Precision(bits=4), "decoder.group_size"),
        ("decoder", Precision(bits=4, group_size=8), "16, 32, 64 or 128 with 4 bits"),
        ("decoder", Precision(bits=8, group_size=16), "group_size is 16: target 'tensorrt'"),
        ("decoder", Precision(bits=3, group_size=16), "decoder.bits is 3"),
        ("decoder", Precision(bits=4, group_size=16, symmetric=False), "symmetric weights"),
        ("head", Precision(bits=8, activations=Activations.DYNAMIC), '"float" for the head'),
        ("vision", Precision(bits=8, activations=Activations.STATIC), '"float" or "symmetric"'),
        ("vision", Precision(bits=4), "8 for the vision"),
        ("embedding", Precision(bits=8, group_size=16), "for the embedding"),
        ("embedding", Precision(bits=6, method=Method.PALETTE), '"rtn" or "hqq"'),
        ("decoder", Precision(bits=4, group_size=32), "does not divide the input width 80"),
    ],
)
def test_every_refusal_names_the_key_and_what_is_taken(
    part: str, precision: Precision, said: str
) -> None:
    recipe = replace(Recipe(name="mine"), **{part: precision})
    (line,) = problems(recipe)
    assert said in line
    assert line.startswith(part)
    assert "target 'tensorrt' takes" in line


def test_rules_are_held_to_the_same() -> None:
    rule = LayerRule(pattern="decoder.layers.0.*", precision=Precision(bits=8, symmetric=False))
    (line,) = problems(Recipe(name="mine", layers=(rule,)))
    assert line.startswith('layers["decoder.layers.0.*"].symmetric is false')


def test_lookup_tables_are_refused() -> None:
    assert any("lut4" not in line and ".method" in line for line in problems(RECIPES["lut4"]))
