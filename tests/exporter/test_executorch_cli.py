"""ExecuTorch from the command line: options, what can't be had, and a whole export of fp32."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastvlm_export.exporter.bundle import open_bundle
from fastvlm_export.exporter.checkpoint import BUNDLED_FOLDER
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import executorch, executorch_backends
from fastvlm_export.targets.base import Options
from fastvlm_export.targets.executorch_model import PROGRAM
from fastvlm_export.validate import proof
from fastvlm_export.validate.delegation import delegation

from .commands import Run, bad

SAMPLE = BUNDLED_FOLDER.parent / "images" / "red-7786.png"

EXECUTORCH = ["--target", "executorch"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*EXECUTORCH, "--backend", "nonsense"], ["--backend nonsense", "xnnpack", "portable"]),
        ([*EXECUTORCH, "--backend", "vulkan"], ["--backend vulkan", "Vulkan SDK"]),
        ([*EXECUTORCH, "--backend", "qnn"], ["--backend qnn", "Qualcomm"]),
        ([*EXECUTORCH, "--recipe", "fp16"], ['"fp16"', "--backend xnnpack"]),
        ([*EXECUTORCH, "--recipe", "lut4"], ['"palette"', "no lookup tables"]),
        ([*EXECUTORCH, "--backend", "portable", "--recipe", "int8"], ["--backend portable"]),
        (["--external-weights"], ["--external-weights: target 'onnx' has no such choice"]),
        (["--backend", "xnnpack"], ["--backend xnnpack: target 'onnx' has no such choice"]),
        (
            ["--target", "coreml", "--backend", "portable", "--external-weights"],
            ["--backend portable: target 'coreml'", "--external-weights: target 'coreml'"],
        ),
        (
            [*EXECUTORCH, "--target", "onnx", "--layout", "apple-app", "--backend", "vulkan"],
            ["--layout apple-app: target 'executorch'", "--backend vulkan"],
        ),
    ],
)
def test_what_cannot_be_had_is_one_error_and_nothing_is_written(
    arguments: list[str], words: list[str], tmp_path: Path, run: Run
) -> None:
    result = run(*arguments, "--out", tmp_path / "out", "--quiet")
    bad(result, *words, "fastvlm-export targets")
    assert result.err.count("Error") == 1
    assert not any(tmp_path.iterdir())


def test_without_executorch_the_error_says_how_to_get_it(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch, "find_spec", lambda name: None)
    result = run(*EXECUTORCH, "--out", tmp_path / "out", "--quiet")
    bad(result, "'executorch' can't be used here", "pip install 'fastvlm-export[executorch]'")
    assert not any(tmp_path.iterdir())
    row = _row(run, "executorch")
    assert (row["lower"], row["run"], row["runtime"]) == (False, False, None)


def test_core_mls_backend_needs_coremltools(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch_backends, "find_spec", lambda name: None)
    result = run(*EXECUTORCH, "--backend", "coreml", "--out", tmp_path / "out", "--quiet")
    bad(result, "--backend coreml", "pip install 'fastvlm-export[coreml]'")
    assert not any(tmp_path.iterdir())


def test_a_weight_file_that_would_be_empty_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = SimpleNamespace(pte=b"program", ptd=None)
    monkeypatch.setattr(executorch, "_lowered", lambda *_, **__: lowered)
    spec: Any = None
    with pytest.raises(ExportError, match="no weight of this model is large enough"):
        executorch.lower({}, spec, RECIPES["fp32"], tmp_path, Options(external_weights=True))
    assert not any(tmp_path.iterdir())


def test_targets_lists_each_backend_with_its_recipes(run: Run) -> None:
    row = _row(run, "executorch")
    assert row["recipes"] == ["fp32", "int8", "int4"]  # of the backend that is the default
    backends = {one["backend"]: one for one in row["backends"]}
    assert list(backends) == ["xnnpack", "portable", "coreml", "vulkan", "qnn"]
    assert backends["xnnpack"]["recipes"] == row["recipes"]
    assert backends["xnnpack"]["runtime"] == "ExecuTorch"
    assert backends["portable"]["recipes"] == ["fp32"]
    assert {"fp16", "lut4"} <= set(backends["coreml"]["recipes"])
    assert (backends["coreml"]["run"], backends["coreml"]["lower"]) == (False, True)
    assert backends["vulkan"]["recipes"] == []
    assert "Vulkan SDK" in backends["vulkan"]["remedy"]
    assert _row(run, "onnx")["backends"] == []
    told = run("targets").out
    assert "portable" in told
    assert "--backend vulkan" in told


def _row(run: Run, target: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = json.loads(run("targets", "--json").out)
    return next(row for row in rows if row["target"] == target)


@pytest.fixture(
    scope="module",
    params=[pytest.param(recipe, marks=pytest.mark.e2e) for recipe in ("fp32", "int4")],
)
def exported(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any]]:
    """A bundle of the bundled model, and the report in it."""
    out = request.getfixturevalue(f"executorch_{request.param}")
    return out, json.loads((out / "report" / "report.json").read_text())


FP32 = pytest.mark.parametrize(
    "exported", [pytest.param("fp32", marks=pytest.mark.e2e)], indirect=True
)


def test_the_bundled_model_arrives_whole_and_is_proven(
    exported: tuple[Path, dict[str, Any]],
) -> None:
    out, report = exported
    assert report["passed"]
    assert report["runtime"] == {"name": "ExecuTorch", "device": True}
    greedy = [one for one in report["parity"]["measurements"] if one["stage"] == "greedy"]
    answered, equal = (sum(one["numbers"][key] for one in greedy) for key in ("tokens", "matching"))
    # Integers flip where floats differ in their last bits, and another token goes another way.
    assert equal >= (1 if report["recipe"] == "fp32" else 0.95) * answered > 100
    if report["recipe"] == "fp32":
        assert all(one["numbers"]["tokens"] + one["numbers"]["ties"] >= 64 for one in greedy)
    answers = report["accuracy"]["candidate"]
    assert answers["total"] >= 150
    assert answers["right"] >= 0.98 * answers["total"]
    assert report["accuracy"]["passed"]
    assert report["stored_weights"]["passed"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["artifact"] == {"backend": "xnnpack", "external_weights": 0}


@FP32
def test_float32_differs_in_the_order_of_sums_alone_and_is_timed(
    exported: tuple[Path, dict[str, Any]],
) -> None:
    _, report = exported
    assert report["accuracy"]["check"]["value"] == 0
    assert report["latency"]["subjects"][0]["setting"].endswith("backend xnnpack")
    assert report["latency"]["ratios"]["pytorch"]["ttft"] > 0


def test_its_encoder_and_decoder_are_one_delegate_each(
    exported: tuple[Path, dict[str, Any]],
) -> None:
    out, report = exported
    placement = report["placement"]
    assert placement["passed"]
    vision, embedding, decoder = placement["methods"]
    for one in (vision, decoder):
        assert one["delegates"] == ["XnnpackBackend"]
        assert one["share_of_flops"] > 0.999
    assert embedding["checks"] == []
    assert "In one delegate each" in report["verdict"]
    assert "Placement" in (out / "report" / "report.html").read_text()


@FP32
def test_generate_and_validate_take_the_bundle_as_any_other(
    exported: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = Path(shutil.copytree(exported[0], tmp_path / "bundle"))
    answer = run("generate", out, "--image", SAMPLE, "--prompt", "Read the number.", "--json")
    assert json.loads(answer.out)["text"] == "7786"
    monkeypatch.setattr(proof, "QUESTIONS", 6)  # the export asked many more
    monkeypatch.setattr(proof, "STEPS", 8)
    again = run("validate", out, "--json", "--quiet")
    assert again.code == 0
    report = json.loads(again.out)["bundles"][0]["report"]
    assert report["placement"]["passed"]
    assert report["stored_weights"]["passed"]


@FP32
def test_a_damaged_bundle_is_one_error(
    exported: tuple[Path, dict[str, Any]], tmp_path: Path, run: Run
) -> None:
    folder = Path(shutil.copytree(exported[0], tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["artifact"]["backend"] = "vulkan"  # not what the program was lowered for
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="backend 'vulkan'"):
        delegation(open_bundle(folder))
    data = (folder / PROGRAM).read_bytes()
    (folder / PROGRAM).write_bytes(data[: len(data) // 2])
    bad(run("generate", folder, "--prompt", "Hello"), PROGRAM, "differs from the hash")
