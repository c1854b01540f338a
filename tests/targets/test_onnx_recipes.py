"""What ONNX refuses of a recipe, and that each refusal says what to write instead."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given

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
)
from fastvlm_export.targets.onnx_recipes import BLOCK_SIZES, problems, takes

from ..quantize import strategies

INT8, INT4 = RECIPES["int8"], RECIPES["int4"]
BLOCKS = "16 or 32 or 64 or 128 or 256"


def changed(part: str, **changes: Any) -> Recipe:
    """int4 with another precision for one part."""
    precision = dataclasses.replace(getattr(INT4, part), **changes)
    return dataclasses.replace(INT4, name="x", **{part: precision})


def problem(recipe: Recipe, layers: dict[str, int] | None = None, *, tied: bool = False) -> str:
    found = problems(recipe, layers, tied=tied)
    print("\n".join(found))
    assert len(found) == 1, found
    assert "target 'onnx'" in found[0]
    return found[0]


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4"])
def test_it_takes_the_built_in_recipes(name: str) -> None:
    assert takes(RECIPES[name])
    assert problems(RECIPES[name], None, tied=True) == []


@pytest.mark.parametrize("name", ["lut4", "lut6"])
def test_it_takes_no_lookup_tables(name: str) -> None:
    assert not takes(RECIPES[name])
    widths = {"decoder.layers.0.mlp.up_proj": 7}  # that 16 channels share a table is no block
    assert problems(RECIPES[name], widths, tied=True) == [
        'vision.method is "palette": target \'onnx\' takes "rtn"',
        'embedding.method is "palette": target \'onnx\' takes "rtn" or "hqq"',
        'decoder.method is "palette": target \'onnx\' takes "rtn", "hqq" or "gptq"',
        'head.method is "palette": target \'onnx\' takes "rtn", "hqq" or "gptq"',
    ]


def test_a_rule_with_lookup_tables_is_named() -> None:
    tables = Precision(bits=4, method=Method.PALETTE, group_size=8)
    rule = LayerRule(pattern="decoder.layers.0.*", precision=tables)
    found = problem(dataclasses.replace(INT4, name="x", layers=(rule,)))
    assert found.startswith('layers["decoder.layers.0.*"].method is "palette"')


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activations", [Activations.FLOAT, Activations.DYNAMIC])
@pytest.mark.parametrize("part", ["decoder", "head"])
def test_it_takes_blocks(
    part: str, size: int, bits: int, symmetric: bool, activations: Activations
) -> None:
    changes = {"group_size": size, "bits": bits, "symmetric": symmetric}
    assert takes(changed(part, **changes, activations=activations, method=Method.GPTQ))


@pytest.mark.parametrize("part", Part)
def test_it_takes_float_parts_and_float_activations(part: Part) -> None:
    assert takes(dataclasses.replace(INT8, **{part.value: Precision()}))
    eight = Precision(bits=8)
    assert takes(dataclasses.replace(INT8, **{part.value: eight}))
    assert takes(Recipe(name="x", **{part.value: eight}))


REFUSED = [
    ("vision", {"bits": 4}, "vision.bits is 4: target 'onnx' takes 8 bits"),
    ("vision", {"group_size": 32}, "vision.group_size is 32: target 'onnx' takes \"channel\" for"),
    ("vision", {"symmetric": False}, "vision.symmetric is false: target 'onnx' takes symmetric"),
    (
        "vision",
        {"activations": Activations.DYNAMIC},
        'vision.activations is "dynamic": target \'onnx\' takes "float" or "static" for the vision',
    ),
    ("embedding", {"bits": 4}, "embedding.bits is 4: target 'onnx' takes 8 bits"),
    ("embedding", {"group_size": 32}, "embedding.group_size is 32: target 'onnx' takes"),
    ("embedding", {"symmetric": False}, "embedding.symmetric is false: target 'onnx' takes"),
    (
        "embedding",
        {"activations": Activations.STATIC},
        'embedding.activations is "static": target \'onnx\' takes "float" for the embedding',
    ),
    (
        "decoder",
        {"group_size": 48},
        f"decoder.group_size is 48: target 'onnx' takes {BLOCKS}, or \"channel\" with 8 bits",
    ),
    ("decoder", {"group_size": 512}, f"decoder.group_size is 512: target 'onnx' takes {BLOCKS}"),
    ("head", {"group_size": 8}, f"head.group_size is 8: target 'onnx' takes {BLOCKS}"),
    (
        "decoder",
        {"group_size": None},
        f"decoder.bits is 4: target 'onnx' takes 4 or 8 with a group_size ({BLOCKS}), 8 with",
    ),
    ("decoder", {"bits": 3}, "decoder.bits is 3: target 'onnx' takes 4 or 8 with a group_size"),
    ("head", {"symmetric": False}, "head.symmetric is false: target 'onnx' takes symmetric weight"),
    (
        "head",
        {"activations": Activations.STATIC},
        'head.activations is "static": target \'onnx\' takes "float" or "dynamic" for the head',
    ),
    ("decoder", {"activation_bits": 16}, "decoder.activation_bits is 16: target 'onnx' takes 8"),
]


@pytest.mark.parametrize(("part", "changes", "expected"), REFUSED)
def test_refused_parts(part: str, changes: dict[str, Any], expected: str) -> None:
    recipe = changed(part, **changes)
    assert problem(recipe).startswith(expected)
    assert not takes(recipe)


@pytest.mark.parametrize(("part", "changes", "expected"), REFUSED)
def test_refused_rules_are_named_by_their_pattern(
    part: str, changes: dict[str, Any], expected: str
) -> None:
    pattern = strategies.PATTERNS[Part(part)][0]
    rule = LayerRule(pattern=pattern, precision=getattr(changed(part, **changes), part))
    found = problem(dataclasses.replace(INT4, layers=(rule,)))
    assert found.startswith(expected.replace(f"{part}.", f'layers["{pattern}"].', 1))


def test_what_a_float_precision_says_does_not_count() -> None:
    odd = Precision(group_size=3, symmetric=False, activations=Activations.STATIC)
    assert takes(Recipe(name="x", vision=odd, embedding=odd, decoder=odd, head=odd))


def test_a_rule_for_several_parts_is_held_to_each() -> None:
    """No recipe file says this, but a Recipe made in Python can."""
    rule = LayerRule(pattern="decoder.*", precision=INT4.decoder)
    found = problems(dataclasses.replace(INT8, layers=(rule,)), None)
    print("\n".join(found))
    assert [line.split("]")[1].split(" ")[0] for line in found] == [
        ".group_size",
        ".bits",
        ".activations",
    ]
    assert all("embedding" in line or "8 bits" in line for line in found)


def test_fp16_around_integers_is_refused() -> None:
    found = problem(dataclasses.replace(INT8, float_format=Float.FP16))
    assert found == 'float is "fp16": target \'onnx\' takes "fp32" around integer weights'
    rule = LayerRule(pattern="projector*", precision=Precision(bits=8))
    assert problem(dataclasses.replace(RECIPES["fp16"], layers=(rule,))) == found


def test_all_refusals_at_once() -> None:
    rule = LayerRule(pattern="decoder.layers.0.*", precision=Precision(bits=4))
    recipe = Recipe(
        name="x",
        float_format=Float.FP16,
        vision=Precision(bits=4, symmetric=False),
        decoder=Precision(bits=4, group_size=24),
        layers=(rule,),
    )
    found = problems(recipe, {"decoder.layers.1.mlp.up_proj": 32})
    print("\n".join(found))
    assert [line.split(" ")[0] for line in found] == [
        "vision.bits",
        "vision.symmetric",
        "decoder.group_size",
        'layers["decoder.layers.0.*"].bits',
        "float",
        "decoder.group_size",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head": Precision()}, "head.bits is not set (float), embedding.bits 8: target 'onnx'"),
        ({"embedding": Precision()}, "head.bits is 8, embedding.bits not set (float): target"),
        (
            {"head": Precision(bits=8, group_size=32)},
            "head.group_size is 32, embedding.group_size \"channel\": target 'onnx' stores",
        ),
        (
            {"head": Precision(bits=8, method=Method.GPTQ)},
            'head.method is "gptq", embedding.method "rtn": target \'onnx\' stores',
        ),
        (
            {"layers": (LayerRule(pattern=HEAD, precision=Precision()),)},
            'layers["decoder.lm_head"].bits is not set (float), embedding.bits 8',
        ),
    ],
)
def test_a_tied_table_is_one(changes: dict[str, Any], expected: str) -> None:
    recipe = dataclasses.replace(INT8, **changes)
    assert takes(recipe)
    assert problem(recipe, tied=True).startswith(expected)


def test_a_tied_table_that_is_alike() -> None:
    for head in (Precision(bits=8), dataclasses.replace(INT8.head, activation_bits=8)):
        assert problems(dataclasses.replace(INT8, head=head), None, tied=True) == []
    assert problems(Recipe(name="x", decoder=INT8.decoder), None, tied=True) == []


def test_a_tied_table_that_is_refused_already_is_not_compared() -> None:
    found = problem(changed("head", bits=4), tied=True)
    assert found.startswith("head.bits is 4: target 'onnx' takes")


WIDTHS = {
    EMBEDDING: 96,
    **{f"decoder.layers.{index}.mlp.up_proj": 96 for index in range(3)},
    **{f"decoder.layers.{index}.mlp.down_proj": 304 for index in range(3)},
    "decoder.layers.0.self_attn.o_proj": 72,
    HEAD: 96,
}


def test_groups_that_leave_a_rest() -> None:
    found = problems(changed("decoder", group_size=64), WIDTHS)
    print("\n".join(found))
    assert found == [
        "decoder.group_size is 64: it does not divide the input width 96 of "
        "decoder.layers.0.mlp.up_proj and 2 more, where target 'onnx' takes 16 or 32, or "
        '"channel" with 8 bits',
        "decoder.group_size is 64: it does not divide the input width 304 of "
        "decoder.layers.0.mlp.down_proj and 2 more, where target 'onnx' takes 16, or "
        '"channel" with 8 bits',
        "decoder.group_size is 64: it does not divide the input width 72 of "
        "decoder.layers.0.self_attn.o_proj, where target 'onnx' takes only "
        '"channel" with 8 bits',
    ]


def test_groups_of_a_rule_that_leave_a_rest() -> None:
    rules = (
        LayerRule(
            pattern="decoder.layers.*.down_proj", precision=Precision(bits=8, group_size=256)
        ),
        LayerRule(pattern="decoder.layers.[01].*.down_proj", precision=Precision()),
        LayerRule(pattern="decoder.layers.0.self_attn.*", precision=Precision(bits=8)),
    )
    found = problem(dataclasses.replace(INT4, layers=rules), WIDTHS)
    assert found.startswith('layers["decoder.layers.*.down_proj"].group_size is 256: it does not')
    assert "of decoder.layers.2.mlp.down_proj, where" in found


def test_a_table_has_no_groups_to_leave_a_rest() -> None:
    found = problem(changed("embedding", group_size=64), {EMBEDDING: 96, HEAD: 96})
    assert found.startswith("embedding.group_size is 64: target 'onnx' takes \"channel\"")


def test_groups_that_leave_no_rest() -> None:
    layers = {"decoder.layers.0.mlp.up_proj": 896, "decoder.layers.0.mlp.down_proj": 4864}
    assert problems(INT4, layers) == []
    assert problems(RECIPES["int8"], dict.fromkeys(WIDTHS, 7)) == []


@given(strategies.recipes())
def test_every_recipe_is_taken_or_refused_in_words(recipe: Recipe) -> None:
    for tied in (False, True):
        found = problems(recipe, WIDTHS, tied=tied)
        assert len(set(found)) == len(found), found
        assert all("target 'onnx' " in line and line.isprintable() for line in found), found
    assert set(problems(recipe, None)) <= set(found)
    assert takes(recipe) == (not problems(recipe, None))
