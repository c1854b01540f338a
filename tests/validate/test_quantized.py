import math
from dataclasses import replace

import pytest

from fastvlm_export.quantize.recipes import (
    RECIPES,
    Activations,
    LayerRule,
    NumberFormat,
    Observer,
    Precision,
    Recipe,
)
from fastvlm_export.validate import quantized

from .reports import quantization_loss, record


def test_layers_that_differ_in_number_alone_are_one_line():
    (up, head) = quantized.layer_groups(record().layers)
    assert (up.layers, up.count, up.bits, up.group_size) == (
        "decoder.layers.*.mlp.up_proj",
        2,
        4,
        32,
    )
    assert up.error == pytest.approx(0.02)
    assert (head.layers, head.count) == ("decoder.lm_head", 1)


def test_a_layer_with_other_bits_keeps_its_name():
    layers = record().layers
    mixed = (layers[0], replace(layers[1], bits=8), layers[2])
    assert [group.layers for group in quantized.layer_groups(mixed)] == [
        "decoder.layers.0.mlp.up_proj",
        "decoder.layers.1.mlp.up_proj",
        "decoder.lm_head",
    ]


def test_integers_and_floats_of_8_bits_are_two_lines():
    layers = [replace(layer, bits=8) for layer in record().layers[:2]]
    mixed = (layers[0], replace(layers[1], number_format=NumberFormat.FP8))
    groups = quantized.layer_groups(mixed)
    assert [group.number_format for group in groups] == [NumberFormat.INTEGER, NumberFormat.FP8]


def test_an_error_that_is_no_number_is_not_hidden_by_others():
    layers = record().layers
    broken = (replace(layers[0], error=math.nan), layers[1])
    assert math.isnan(quantized.layer_groups(broken)[0].error)


def test_the_largest_magnitudes_come_first_and_nan_before_all():
    kept = record().kept["vision"]
    found = quantized.kept_operators(record(kept={"vision": kept[:2], "decoder": kept[2:]}))
    assert [(graph, magnitude) for graph, _, magnitude in found] == [
        ("decoder", 3e4),
        ("vision", 2e4),
        ("vision", 1e4),
    ]
    broken = record(kept={"vision": (kept[2], replace(kept[0], leaving=math.nan))})
    assert math.isnan(quantized.kept_operators(broken)[0][2])


def test_recipes_in_words():
    facts = quantized.recipe_facts(RECIPES["int4"])
    assert facts["vision"].startswith("8-bit weights per channel")
    assert facts["static ranges"] == "minmax"
    assert facts["embedding"] == "8-bit weights per channel, symmetric, rtn"
    facts = quantized.recipe_facts(RECIPES["lut4"])
    assert facts["vision"] == "6-bit indices, one lookup table for each layer"
    assert facts["decoder"] == "4-bit indices, one lookup table for each 16 channels"
    rule = LayerRule(
        pattern="*.fc1",
        precision=Precision(bits=4, group_size=16, symmetric=False, activations=Activations.STATIC),
    )
    mine = Recipe(name="mine", observer=Observer.PERCENTILE, percentile=99.9, layers=(rule,))
    facts = quantized.recipe_facts(mine)
    assert facts["vision"] == "not quantized"
    assert "in groups of 16, with zero points" in facts["*.fc1"]
    assert facts["static ranges"] == "percentile, 99.9 % of the values"
    assert quantized.recipe_facts(RECIPES["fp16"])["float32 beyond"] == "32752"
    facts = quantized.recipe_facts(RECIPES["fp8"])
    assert (facts["floats"], facts["embedding"]) == ("bf16", "not quantized")
    assert facts["decoder"] == "fp8 weights per channel; static fp8 activations (linear layers)"
    assert facts["static ranges"] == "minmax"
    symmetric = Precision(bits=8, activations=Activations.SYMMETRIC)
    facts = quantized.recipe_facts(Recipe(name="symmetric", vision=symmetric))
    assert facts["vision"].endswith("; symmetric 8-bit activations")
    assert facts["static ranges"] == "minmax"


def test_the_rows_of_the_loss_begin_with_its_gates():
    loss = quantization_loss()
    rows = quantized.loss_rows(loss)
    assert [(row.label, row.passed) for row in rows[:2]] == [
        ("mean KL", True),
        ("accuracy points lost", True),
    ]
    assert all(row.passed is None for row in rows[2:])
    values = {row.label: row.value for row in rows}
    assert values["same token first"] == "100 % (5 of 5)"
    assert values["exact answers, quantized"] == "100 % (30 of 30)"


def test_nothing_compared_is_one_failed_row():
    rows = quantized.loss_rows(replace(quantization_loss(), cases=(), answers=None))
    assert [(row.value, row.passed) for row in rows] == [("no image was compared", False)]
