"""Recipes by hypothesis: every one that a recipe file can say."""

import dataclasses

from hypothesis import strategies as st

from fastvlm_export.quantize.recipes import (
    ACTIVATIONS,
    FORMATS,
    FP8_ACTIVATIONS,
    METHODS,
    PALETTE_BITS,
    RECIPES,
    SCALE_FORMATS,
    Float,
    LayerRule,
    LossLimits,
    Method,
    NumberFormat,
    Observer,
    Part,
    Precision,
    Recipe,
)

PATTERNS = {
    Part.VISION: ("vision_tower.*", "vision_tower.network.[2-4].*", "projector*", "projector.0"),
    Part.EMBEDDING: ("decoder.embed_tokens", "decoder.e*"),
    Part.DECODER: ("decoder.layers.*", "decoder.layers.0.mlp.*", "decoder.layers.?.*.[!k]_proj"),
    Part.HEAD: ("decoder.lm_head", "decoder.lm_*"),
}
LIMITS = st.builds(
    LossLimits,
    mean_kl=st.floats(0, 100),
    accuracy_points=st.floats(0, 100),
)


def precisions(part: Part) -> st.SearchStrategy[Precision]:
    quantized = st.builds(
        Precision,
        bits=st.sampled_from((4, 8)),
        group_size=st.none() | st.integers(1, 65536),
        symmetric=st.booleans(),
        method=st.sampled_from([m for m in METHODS[part] if m is not Method.PALETTE]),
        activations=st.sampled_from(ACTIVATIONS[part]),
        scale_format=st.sampled_from(SCALE_FORMATS[part]),
    )
    tables = st.builds(
        Precision,
        bits=st.sampled_from(PALETTE_BITS),
        group_size=st.none() | st.integers(1, 65536),
        method=st.just(Method.PALETTE),
    )
    floats = st.just(
        Precision(bits=8, number_format=NumberFormat.FP8, activations=FP8_ACTIVATIONS[0])
    )
    found = st.just(Precision()) | quantized | tables
    return found | floats if NumberFormat.FP8 in FORMATS[part] else found


def rules(part: Part) -> st.SearchStrategy[LayerRule]:
    return st.builds(LayerRule, pattern=st.sampled_from(PATTERNS[part]), precision=precisions(part))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    some_rules = st.lists(
        st.sampled_from(tuple(Part)).flatmap(rules), max_size=6, unique_by=lambda rule: rule.pattern
    )
    names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._+-]{0,20}\Z")
    recipe = Recipe(
        name=draw(names.filter(lambda name: name not in RECIPES)),
        float_format=draw(st.sampled_from(Float)),
        **{part.value: draw(precisions(part)) for part in Part},
        layers=tuple(draw(some_rules)),
    )
    if recipe.quantized:
        recipe = dataclasses.replace(recipe, limits=draw(LIMITS))
    if recipe.float_format is Float.FP16:
        recipe = dataclasses.replace(recipe, range_limit=draw(st.floats(1, 65504)))
    if recipe.ranged:
        recipe = dataclasses.replace(recipe, observer=draw(st.sampled_from(Observer)))
    if recipe.observer is Observer.PERCENTILE:
        recipe = dataclasses.replace(recipe, percentile=draw(st.floats(50, 100)))
    return recipe
