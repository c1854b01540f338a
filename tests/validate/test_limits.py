import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from fastvlm_export.quantize.recipes import (
    RECIPES,
    Activations,
    Float,
    LayerRule,
    Precision,
    Recipe,
)
from fastvlm_export.validate import limits
from fastvlm_export.validate.limits import (
    BFLOAT16,
    EXACT,
    FLOAT16,
    FLOAT32,
    INTEGER_ACTIVATIONS,
    INTEGER_WEIGHTS,
    NOTHING,
    Limits,
    Statistics,
    exact_limits,
    limits_for,
)
from fastvlm_export.validate.parity import Stage

from .fakes import Altered, compare, tiny_session

WEIGHTS = Precision(bits=4, group_size=32)
DYNAMIC = Precision(bits=8, activations=Activations.DYNAMIC)
STATIC = Precision(bits=8, activations=Activations.STATIC)


def test_built_in_recipes_get_the_limits_of_what_they_round():
    assert limits_for(RECIPES["fp32"]) == FLOAT32
    assert limits_for(RECIPES["fp16"]) == FLOAT16
    assert limits_for(RECIPES["bf16"]) == BFLOAT16
    assert limits_for(RECIPES["int8"]) == INTEGER_ACTIVATIONS
    assert limits_for(RECIPES["int4"]) == INTEGER_ACTIVATIONS


def test_a_name_decides_nothing():
    assert limits_for(Recipe(name="int4")) == FLOAT32
    assert limits_for(replace(RECIPES["int8"], name="mine")) == INTEGER_ACTIVATIONS


def test_weight_only_integers_are_as_strict_as_float32_but_for_the_table():
    recipe = Recipe(name="w4", decoder=WEIGHTS, vision=WEIGHTS)
    assert limits_for(recipe) == FLOAT32
    recipe = replace(recipe, embedding=Precision(bits=8))
    assert limits_for(recipe) == INTEGER_WEIGHTS
    assert replace(INTEGER_WEIGHTS, embeddings=0.0) == FLOAT32


def test_a_rounded_decoder_does_not_loosen_the_tower():
    found = limits_for(Recipe(name="decoder only", decoder=DYNAMIC, head=DYNAMIC))
    assert (found.features, found.features_rms, found.cosine) == (1e-4, 1e-4, 1e-7)
    assert found.features_noise == FLOAT32.features_noise
    assert found.statistics.features_rms == FLOAT32.features_rms
    assert found.logits == INTEGER_ACTIVATIONS.logits
    assert found.answers == INTEGER_ACTIVATIONS.answers


def test_a_rounded_tower_reaches_the_logits():
    found = limits_for(Recipe(name="tower only", vision=STATIC))
    assert found.features == INTEGER_ACTIVATIONS.features
    assert found.logits == INTEGER_ACTIVATIONS.logits
    assert found.embeddings == 0


@pytest.mark.parametrize(
    ("pattern", "loosened"),
    [
        ("vision_tower.network.0.*", True),
        ("projector.0", True),
        ("*.fc1", True),
        ("decoder.layers.0.*", False),
    ],
)
def test_a_rule_loosens_the_tower_where_it_can_reach_it(pattern, loosened):
    rule = LayerRule(pattern=pattern, precision=DYNAMIC)
    found = limits_for(Recipe(name="rule", layers=(rule,)))
    assert (found.features == INTEGER_ACTIVATIONS.features) == loosened
    assert found.logits == INTEGER_ACTIVATIONS.logits


def looser(one, other, **instead):
    """Field by field the larger of two kinds."""
    numbers = {
        field.name: max(getattr(one, field.name), getattr(other, field.name))
        for field in fields(Limits)
        if field.name != "statistics"
    }
    both = asdict(one.statistics), asdict(other.statistics)
    statistics = Statistics(**{name: max(kind[name] for kind in both) for name in both[0]})
    return Limits(**(numbers | instead), statistics=statistics)


def test_float16_under_integers_takes_the_looser_of_each():
    found = limits_for(replace(RECIPES["int8"], float_format=Float.FP16))
    assert found == looser(FLOAT16, INTEGER_ACTIVATIONS)
    weights = limits_for(Recipe(name="w4f16", float_format=Float.FP16, decoder=WEIGHTS))
    assert weights == FLOAT16


def test_fp8_takes_the_looser_of_bfloat16_and_rounded_activations():
    found = limits_for(RECIPES["fp8"])
    # The table is no more than bfloat16.
    assert found == looser(BFLOAT16, INTEGER_ACTIVATIONS, embeddings=0.0)


@pytest.mark.parametrize("recipe", ["fp16", "bf16", "int8", "int4", "fp8", "lut4", "lut6"])
def test_where_values_are_rounded_no_single_one_decides(recipe):
    """Only that it is finite: the statistics of all images are what is judged."""
    found = limits_for(RECIPES[recipe])
    for name in ("logits", "logits_rms", "worst_kl", "mean_kl", "tokens", "features", "cosine"):
        assert math.isinf(getattr(found, name))
    assert found.rounded
    assert all(0 < value < 0.2 for value in asdict(found.statistics).values())
    assert not exact_limits(RECIPES[recipe]).rounded


@pytest.mark.parametrize(
    ("recipe", "decibels"), [("fp32", 80), ("fp16", 50), ("bf16", 32), ("lut4", 50)]
)
def test_features_have_a_least_psnr(recipe, decibels):
    """Tables of weights are computed in float16 and round no activations."""
    found = limits_for(RECIPES[recipe])
    noise = (found.statistics or found).features_noise
    assert -20 * np.log10(noise) == pytest.approx(decibels, abs=0.1)


def test_statistics_take_the_worst_of_draws_and_nothing_of_nan():
    one = Statistics(
        features_rms=0.1, features_noise=0.1, logits_rms=0.4, mean_kl=math.nan, tokens=0.0
    )
    other = Statistics(
        features_rms=0.2, features_noise=0.2, logits_rms=math.inf, mean_kl=0.3, tokens=0.0
    )
    found = NOTHING.worst(one).worst(other)
    assert found == Statistics(
        features_rms=0.2, features_noise=0.2, logits_rms=0.4, mean_kl=0.3, tokens=0.0
    )
    assert found.times(3) == Statistics(
        features_rms=pytest.approx(0.6),
        features_noise=pytest.approx(0.6),
        logits_rms=pytest.approx(1.2),
        mean_kl=pytest.approx(2.7),
        tokens=0.0,
    )


def test_three_tokens_may_differ_by_chance_however_few_there_are():
    limit = FLOAT16.statistics
    assert limit.share(300) == pytest.approx(0.02 + 0.01)
    assert limit.share(1) == 1.0


def test_without_rounding_every_recipe_is_held_to_float32():
    for recipe in RECIPES.values():
        found = exact_limits(recipe)
        assert replace(found, embeddings=0.0) == EXACT
        assert found.embeddings == (INTEGER_WEIGHTS.embeddings if recipe.embedding.bits else 0.0)


def test_every_kind_is_at_least_as_loose_as_float32_and_no_limit_is_open():
    for kind in (FLOAT16, BFLOAT16, INTEGER_WEIGHTS, INTEGER_ACTIVATIONS):
        for field in fields(limits.Limits):
            if field.name == "statistics":
                continue
            value = getattr(kind, field.name)
            assert getattr(FLOAT32, field.name) <= value
            assert value < 1 or (kind.rounded and math.isinf(value))


def spread(x):
    """Every value off by 14 % of the RMS, which is beyond its limit."""
    noise = np.random.default_rng(5).choice([-0.14, 0.14], x.shape)
    return x + (noise * np.sqrt(np.mean(x.astype(np.float64) ** 2))).astype(np.float32)


@pytest.mark.parametrize(
    ("part", "stage"), [("image", Stage.IMAGE_FEATURES), ("decode", Stage.TEACHER_FORCED)]
)
def test_a_small_difference_everywhere_fails_by_its_rms_alone(part, stage):
    statistics = replace(
        INTEGER_ACTIVATIONS.statistics, mean_kl=1.0, tokens=1.0, features_noise=1.0
    )
    loose = replace(INTEGER_ACTIVATIONS, statistics=statistics)
    result = compare(Altered(tiny_session(), **{part: spread}), limits=loose)
    assert result.first_broken is stage
    failed = {(m.case, c.name) for m, c in result.failures if m.stage is stage}
    assert failed == {("all images", "RMS relative, all")}
