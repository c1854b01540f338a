"""GPUs that cannot compute a recipe are refused by key; where none are named, those that can do."""

import pytest

from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import tensorrt, tensorrt_gpus
from fastvlm_export.targets.base import Options


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp32", ("80", "86", "89", "120")),
        ("fp16", ("80", "86", "89", "120")),
        ("int4", ("80", "86", "89", "120")),
        ("fp8", ("89", "120")),
    ],
)
def test_by_default_engines_are_for_gpus_that_compute_the_recipe(
    name: str, expected: tuple[str, ...]
) -> None:
    options, recipe = Options(backend="tensorrt-rtx"), tensorrt.adapt(RECIPES[name])
    assert tensorrt.capabilities_of(options, recipe) == expected
    assert tensorrt.problems(recipe, None, options=options) == []
    assert tensorrt.capabilities_of(Options(backend="tensorrt"), recipe) == ()


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("fp32", ("75", "120"), ['float is "fp32"', "75 cannot", "80 or above"]),
        ("bf16", ("75",), ['float is "bf16"', "75 cannot"]),
        ("int4", ("75",), ["decoder.bits is 4", "75 cannot"]),
        ("fp8", ("80", "86", "120"), ['vision.format is "fp8"', "80, 86 cannot", "89 or above"]),
    ],
)
def test_gpus_without_a_type_are_named_with_its_key(
    name: str, asked: tuple[str, ...], words: list[str]
) -> None:
    found = tensorrt_gpus.problems(tensorrt.adapt(RECIPES[name]), asked)
    assert all(word in found[0] for word in words)


def test_float16_and_8_bit_integers_run_on_the_oldest() -> None:
    for name in ("fp16", "int8"):
        assert tensorrt_gpus.problems(tensorrt.adapt(RECIPES[name]), ("75", "121")) == []
