"""Which versions of ONNX Runtime bundles are run in, and what a bundle is held to there."""

import importlib.util
import math
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet

from fastvlm_export.validate.limits import FLOAT16, FLOAT32, Limits

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "runtimes.py"


@pytest.fixture(scope="module")
def runtimes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("runtimes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_oldest_and_the_last_of_each_minor_release_are_run(runtimes: ModuleType) -> None:
    tested = SpecifierSet(">=1.24.1,<1.33")
    listed = ["1.33.0", "1.32.0", "1.31.1", " 1.31.0", "1.24.10", "1.24.9", "1.24.1", "1.24.0"]
    found = runtimes.ends([*listed, "1.32.1rc1", "1.9.0"], tested)
    assert found == ["1.24.1", "1.24.10", "1.31.1", "1.32.0"]
    assert runtimes.ends(["1.24.1"], tested) == ["1.24.1"]
    assert runtimes.ends(["1.9.0"], tested) == []


@pytest.mark.parametrize("limits", [FLOAT16, FLOAT32])
def test_a_bundle_is_held_to_what_its_report_says(runtimes: ModuleType, limits: Limits) -> None:
    written = {name: None if value == math.inf else value for name, value in asdict(limits).items()}
    assert runtimes._limits(written) == limits


def test_a_version_that_does_not_run_has_no_numbers(runtimes: ModuleType) -> None:
    cells = runtimes._cells({"error": "did not run"})
    assert len(cells) == len(runtimes.COLUMNS) - 3
    assert "did not run" in cells[-1]
