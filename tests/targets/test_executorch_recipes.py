"""Recipes as XNNPACK computes them, and what no backend of ExecuTorch can express."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_export.quantize import recipe_file
from fastvlm_export.quantize.recipes import (
    RECIPES,
    Activations,
    Float,
    LayerRule,
    Precision,
    Recipe,
    ScaleFormat,
)
from fastvlm_export.targets import coreml_recipes, onnx_recipes
from fastvlm_export.targets.executorch_model import Backend
from fastvlm_export.targets.executorch_recipes import adapt, problems

XNNPACK = Backend.XNNPACK
WEIGHTS = Precision(bits=8, activations=Activations.AFFINE)
GROUPS = replace(WEIGHTS, bits=4, group_size=32, scale_format=ScaleFormat.BF16)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integers_meet_affine_activations(name: str) -> None:
    recipe, ours = RECIPES[name], adapt(RECIPES[name], XNNPACK)
    assert problems(ours, {"decoder.lm_head": 64}, XNNPACK) == []
    assert ours.limits == recipe.limits
    assert ours.embedding == recipe.embedding
    assert ours.layers == ()  # so that no model is without the layers that a rule names
    for part in ("vision", "decoder", "head"):
        before, after = getattr(recipe, part), getattr(ours, part)
        scales = ScaleFormat.BF16 if before.bits == 4 else ScaleFormat.FLOAT
        expected = replace(before, activations=Activations.AFFINE, scale_format=scales)
        assert after == expected
    assert adapt(ours, XNNPACK) == ours


def test_everything_else_stays_as_it_is() -> None:
    mine = replace(RECIPES["int4"], name="mine")
    for recipe in (RECIPES["fp32"], RECIPES["lut4"], RECIPES["fp8"], mine):
        assert adapt(recipe, XNNPACK) == recipe
    for recipe in RECIPES.values():
        assert adapt(recipe, Backend.PORTABLE) == recipe
        assert adapt(recipe, Backend.COREML) == coreml_recipes.adapt(recipe)


def test_float32_is_taken_everywhere_and_what_else_where() -> None:
    taken = {
        backend: [
            name for name in RECIPES if not problems(adapt(RECIPES[name], backend), None, backend)
        ]
        for backend in (XNNPACK, Backend.PORTABLE)
    }
    assert taken == {XNNPACK: ["fp32", "int8", "int4"], Backend.PORTABLE: ["fp32"]}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(name="x", float_format=Float.FP16), ["float is", "fp16", '"fp32"']),
        (Recipe(name="x", vision=replace(WEIGHTS, bits=4)), ["vision.bits is 4", "8 bits"]),
        (
            Recipe(name="x", vision=replace(WEIGHTS, activations=Activations.STATIC)),
            ["vision.activations", "static", "affine"],
        ),
        (
            Recipe(name="x", head=replace(WEIGHTS, activations=Activations.DYNAMIC)),
            ["head.activations", "dynamic", "affine"],
        ),
        (Recipe(name="x", decoder=Precision(bits=8)), ["decoder.activations", "float", "affine"]),
        (
            Recipe(name="x", decoder=replace(WEIGHTS, group_size=32)),
            ["decoder.group_size is 32", '"channel" with 8 bits'],
        ),
        (
            Recipe(name="x", decoder=replace(GROUPS, group_size=16)),
            ["decoder.group_size is 16", "multiples of 32"],
        ),
        (
            Recipe(name="x", decoder=replace(GROUPS, scale_format=ScaleFormat.FLOAT)),
            ["decoder.scale_format", "bf16", "4 bits"],
        ),
        (
            Recipe(name="x", head=replace(WEIGHTS, symmetric=False)),
            ["head.symmetric is false", "symmetric"],
        ),
        (
            Recipe(name="x", embedding=Precision(bits=8, group_size=32)),
            ["embedding.group_size is 32", "channel"],
        ),
        (Recipe(name="x", embedding=Precision(bits=4)), ["embedding.bits is 4", "8 bits"]),
        (
            Recipe(
                name="x",
                layers=(LayerRule(pattern="decoder.layers.0.*", precision=Precision(bits=3)),),
                decoder=WEIGHTS,
            ),
            ['layers["decoder.layers.0.*"]'],
        ),
    ],
)
def test_what_cannot_be_expressed_is_named_with_what_can(
    recipe: Recipe, expected: list[str]
) -> None:
    line, *_ = problems(recipe, None, XNNPACK)
    assert "target 'executorch'" in line
    assert "--backend xnnpack" in line
    for part in expected:
        assert part in line


def test_portable_takes_no_integers() -> None:
    [line] = problems(Recipe(name="x", embedding=Precision(bits=8)), None, Backend.PORTABLE)
    assert "embedding.bits is 8" in line
    assert "no integer weights with --backend portable" in line


def test_widths_without_whole_groups_are_named() -> None:
    layers = {f"decoder.layers.{i}.mlp.down_proj": 48 for i in range(3)}
    [line] = problems(Recipe(name="x", decoder=GROUPS), layers, XNNPACK)
    assert "decoder.group_size is 32" in line
    assert "48" in line
    whole = Recipe(name="x", decoder=replace(GROUPS, group_size=None))
    [line] = problems(whole, layers, XNNPACK)
    assert "decoder.group_size" in line
    assert "decoder.layers.0.mlp.down_proj has 48" in line
    assert problems(whole, dict.fromkeys(layers, 64), XNNPACK) == []


@pytest.mark.parametrize("part", ["vision", "decoder", "head"])
def test_other_targets_refuse_affine_activations_by_name(part: str) -> None:
    recipe = Recipe(name="x", **{part: WEIGHTS})
    for found, target in (
        (onnx_recipes.problems(recipe, None), "onnx"),
        (coreml_recipes.problems(recipe, None), "coreml"),
    ):
        [line] = found
        assert f"{part}.activations is \"affine\": target '{target}' takes" in line


def test_an_adapted_recipe_can_be_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "adapted.toml"
    adapted = replace(adapt(RECIPES["int4"], XNNPACK), name="adapted")
    path.write_text(recipe_file.write(adapted))
    assert recipe_file.read(path) == adapted
