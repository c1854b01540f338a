"""Precisions that only TensorRT computes: each other target refuses them by their key."""

from collections.abc import Callable, Mapping

import pytest

from fastvlm_export.quantize.recipes import Activations, Precision, Recipe
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
