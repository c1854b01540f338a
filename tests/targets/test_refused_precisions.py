"""Precisions that only TensorRT computes: each other target refuses them by their key."""

from collections.abc import Callable, Mapping

import pytest

from fastvlm_export.quantize.recipes import (
    RECIPES,
    Activations,
    Float,
    LayerRule,
    Precision,
    Recipe,
)
from fastvlm_export.targets import (
    apple_app_recipes,
    coreml_recipes,
    executorch_recipes,
    onnx_recipes,
)
from fastvlm_export.targets.executorch_model import Backend

Problems = Callable[[Recipe], list[str]]

OTHERS: Mapping[str, Problems] = {
    "onnx": lambda recipe: onnx_recipes.problems(recipe, None),
    "coreml": lambda recipe: coreml_recipes.problems(recipe, None),
    "executorch, xnnpack": lambda recipe: executorch_recipes.problems(
        recipe, None, Backend.XNNPACK
    ),
    "executorch, coreml": lambda recipe: executorch_recipes.problems(recipe, None, Backend.COREML),
    "apple app": apple_app_recipes.problems,
}


@pytest.fixture(params=OTHERS)
def problems(request: pytest.FixtureRequest) -> Problems:
    found: Problems = OTHERS[request.param]
    return found


def test_symmetric_activations_are_refused_by_their_key(problems: Problems) -> None:
    symmetric = Precision(bits=8, activations=Activations.SYMMETRIC)
    found = problems(Recipe(name="x", vision=symmetric))
    assert any('vision.activations is "symmetric"' in line for line in found), found
    allowed = [line for line in found if "vision.activations" in line]
    assert all(' takes "' in line for line in allowed), allowed
    assert not any(line.count('"symmetric"') > 1 for line in found), "proposed and refused"


@pytest.mark.parametrize("weights", [Precision(), Precision(bits=8)], ids=["floats", "integers"])
def test_bfloat16_is_refused_by_its_key(problems: Problems, weights: Precision) -> None:
    recipe = Recipe(name="x", float_format=Float.BF16, embedding=weights)
    found = [line for line in problems(recipe) if line.startswith("float is ")]
    assert len(found) == 1, found
    assert found[0].startswith('float is "bf16": target \'')
    assert 'takes "fp32"' in found[0]


@pytest.mark.parametrize("part", ["vision", "decoder", "head"])
def test_fp8_is_refused_by_its_key(problems: Problems, part: str) -> None:
    eight = RECIPES["fp8"].decoder
    rules = (LayerRule(pattern="projector.*", precision=Precision()),) if part == "vision" else ()
    found = problems(Recipe(name="x", **{part: eight}, layers=rules))
    assert len(found) == 1, found
    assert found[0].startswith(f'{part}.format is "fp8"') or "portable" in found[0]
    assert 'takes "integer"' in found[0]


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_built_ins_of_tensorrt_are_refused(problems: Problems, name: str) -> None:
    assert problems(RECIPES[name])
