from dataclasses import replace

import pytest

from fastvlm_export.quantize.recipes import (
    EMBEDDING,
    HEAD,
    RECIPES,
    Activations,
    LayerRule,
    Method,
    Precision,
    Recipe,
)
from fastvlm_export.targets import apple_app, coreml_recipes

UP = "decoder.layers.0.mlp.up_proj"
FLOAT = Precision()


def as_here(name: str) -> Recipe:
    return apple_app.adapt(coreml_recipes.adapt(RECIPES[name]))


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4", "lut4", "lut6"])
def test_every_built_in_can_be_had_but_tensorrts(name: str) -> None:
    assert apple_app.problems(as_here(name)) == []


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_float_recipes_stay_as_they_are(name: str) -> None:
    assert as_here(name) == RECIPES[name]


@pytest.mark.parametrize("name", ["int8", "int4", "lut4", "lut6"])
def test_the_projector_is_float_and_the_tower_as_in_the_package(name: str) -> None:
    recipe = as_here(name)
    assert recipe.precision("projector.0") == recipe.precision("projector.2") == FLOAT
    assert recipe.precision("vision_tower.network.4.0.convffn.fc1") == RECIPES[name].vision


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4), ("lut4", None)])
def test_the_language_model_has_one_bit_width(name: str, bits: int | None) -> None:
    recipe = as_here(name)
    assert {recipe.precision(layer).bits for layer in (EMBEDDING, UP, HEAD)} == {bits}


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        (Recipe(name="x", decoder=Precision(bits=3)), "decoder.bits is 3"),
        (Recipe(name="x", decoder=Precision(bits=4, group_size=16)), "decoder.group_size is 16"),
        (
            Recipe(name="x", head=Precision(bits=8, activations=Activations.DYNAMIC)),
            "head.activations is",
        ),
        (
            Recipe(name="x", embedding=Precision(bits=4, method=Method.PALETTE)),
            "embedding.method is",
        ),
        (
            Recipe(name="x", vision=Precision(bits=8, activations=Activations.STATIC)),
            "for the projector",
        ),
        (
            Recipe(
                name="x",
                layers=(
                    LayerRule(
                        pattern="decoder.layers.*.up_proj",
                        precision=Precision(bits=4, group_size=48),
                    ),
                ),
            ),
            "group_size is 48",
        ),
    ],
)
def test_what_mlx_cannot_store_or_compute_is_named(recipe: Recipe, line: str) -> None:
    (found,) = apple_app.problems(recipe)
    assert line in found
    assert "'apple-app'" in found


def test_the_tower_is_core_ml_s_to_judge() -> None:
    """Its tower has one scale per channel; its embedding package, too, which is not here."""
    kept = LayerRule(pattern="projector.*", precision=FLOAT)
    groups = Precision(bits=4, group_size=32)
    table = Recipe(name="x", embedding=groups, decoder=groups, head=groups)
    assert coreml_recipes.problems(table, None)
    assert apple_app.problems(table) == []
    (found,) = apple_app.problems(Recipe(name="x", vision=Precision(bits=4), layers=(kept,)))
    assert "vision.bits is 4: target 'coreml'" in found


def test_a_static_tower_around_a_float_projector_is_fine() -> None:
    tower = Recipe(name="x", vision=Precision(bits=8, activations=Activations.STATIC))
    kept = LayerRule(pattern="projector.*", precision=FLOAT)
    assert apple_app.problems(replace(tower, layers=(kept,))) == []


@pytest.mark.parametrize("size", [32, 64, 96, 128, 256, None])
def test_groups_that_are_multiples_of_mlx_s_can_be_had(size: int | None) -> None:
    recipe = Recipe(name="x", decoder=Precision(bits=4, group_size=size))
    assert apple_app.problems(recipe, {UP: 768}) == []


def test_channels_that_no_group_divides_are_named() -> None:
    recipe = Recipe(name="x", decoder=Precision(bits=8))
    (found,) = apple_app.problems(recipe, {UP: 48, "decoder.layers.0.mlp.down_proj": 96})
    assert UP in found
