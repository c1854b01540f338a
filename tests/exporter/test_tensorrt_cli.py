"""TensorRT from the command line: options, what can't be had, and whole exports without a GPU."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastvlm_export.exporter import options, pipeline
from fastvlm_export.exporter.checkpoint import BUNDLED_FOLDER
from fastvlm_export.exporter.source import SourceRequest
from fastvlm_export.targets import tensorrt_device as device
from fastvlm_export.targets import tensorrt_package as packages
from fastvlm_export.targets.base import Options
from fastvlm_export.targets.tensorrt_package import Backend
from fastvlm_export.targets.tensorrt_plan import PLAN, engine_file, read_plan
from fastvlm_export.targets.tensorrt_record import RECORD, read_record
from fastvlm_export.validate import proof

from ..checkpoints import save_apple
from ..targets import tensorrt_bundles as toys
from .commands import Run, bad

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

SAMPLE = BUNDLED_FOLDER.parent / "images" / "red-7786.png"
TENSORRT = ["--target", "tensorrt"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines with one must say the same here; tests/gpu is theirs."""
    monkeypatch.setattr(device, "driver_problem", lambda *_: "No NVIDIA GPU in this test.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TENSORRT, "--backend", "cuda"], ["--backend cuda", "tensorrt-rtx, tensorrt"]),
        ([*TENSORRT, "--backend", "xnnpack"], ["--backend xnnpack", "tensorrt-rtx, tensorrt"]),
        (
            [*TENSORRT, "--compute-capability", "80,90"],
            ["--compute-capability 80,90", "not for 90", "80, 86, 89, 120"],
        ),
        ([*TENSORRT, "--compute-capability", "ampere"], ["not for ampere"]),
        ([*TENSORRT, "--compute-capability", ""], ["--compute-capability"]),
        (
            [*TENSORRT, "--backend", "tensorrt", "--compute-capability", "80"],
            ["builds for the GPU that it runs on", "tensorrt-rtx"],
        ),
        (
            [*TENSORRT, "--compute-capability", "75,120"],
            ['float is "fp32"', "compute capability 75 cannot", "80 or above"],
        ),
        (
            [*TENSORRT, "--compute-capability", "75", "--recipe", "int4"],
            ["decoder.bits is 4", "compute capability 75 cannot"],
        ),
        (
            [*TENSORRT, "--compute-capability", "86,89", "--recipe", "fp8"],
            ['.format is "fp8"', "compute capability 86 cannot", "89 or above"],
        ),
        ([*TENSORRT, "--layout", "apple-app"], ["--layout apple-app: target 'tensorrt'"]),
        ([*TENSORRT, "--external-weights"], ["--external-weights: target 'tensorrt'"]),
        (
            ["--compute-capability", "80,86"],
            ["--compute-capability 80,86: target 'onnx' has no such choice"],
        ),
        ([*TENSORRT, "--recipe", "lut4"], ["palette"]),
    ],
)
def test_what_cannot_be_had_is_one_error_and_nothing_is_written(
    arguments: list[str], words: list[str], tmp_path: Path, run: Run
) -> None:
    result = run(*arguments, "--out", tmp_path / "out", "--quiet")
    bad(result, *words, "fastvlm-export targets")
    assert result.err.count("Error") == 1
    assert not any(tmp_path.iterdir())


def test_without_a_package_the_error_says_how_to_get_it(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    result = run(*TENSORRT, "--out", tmp_path / "out", "--quiet")
    bad(result, "'tensorrt' can't be used here", "pip install 'fastvlm-export[tensorrt]'")
    assert not any(tmp_path.iterdir())
    row = _row(run)
    assert (row["lower"], row["run"]) == (False, False)


def test_a_driver_that_is_too_old_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "The driver of NVIDIA Test is too old: it runs CUDA up to 12.4."
    monkeypatch.setattr(device, "driver_problem", lambda *_: words)
    row = _row(run)
    assert (row["lower"], row["run"]) == (True, False)
    assert words in row["remedy"]


def _row(run: Run) -> dict[str, Any]:
    rows: list[dict[str, Any]] = json.loads(run("targets", "--json").out)
    return next(row for row in rows if row["target"] == "tensorrt")


def test_targets_lists_both_backends_with_their_recipes(run: Run) -> None:
    row = _row(run)
    assert {"fp32", "fp16", "int8", "int4"} <= set(row["recipes"])
    assert not {"lut4", "lut6"} & set(row["recipes"])
    assert row["versions"]["tensorrt-rtx"] == packages.version(Backend.RTX)
    assert [one["backend"] for one in row["backends"]] == ["tensorrt-rtx", "tensorrt"]
    assert all(one["lower"] and not one["run"] for one in row["backends"])
    assert "ONNX Runtime" in row["runtime"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("80,86", ("80", "86")),
        ("8.0, 12.0", ("80", "120")),
        ("sm_89,SM89,89", ("89",)),
        ("", ("",)),
    ],
)
def test_capabilities_are_spelled_as_people_do(
    text: str | None, expected: tuple[str, ...] | None
) -> None:
    assert options.capabilities(text) == expected


@pytest.fixture(
    scope="module",
    params=[pytest.param(recipe, marks=pytest.mark.e2e) for recipe in ("fp32", "int4")],
)
def exported(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any]]:
    """A bundle of the bundled model, and the report in it."""
    out = request.getfixturevalue(f"tensorrt_{request.param}")
    return out, json.loads((out / "report" / "report.json").read_text())


FP32 = pytest.mark.parametrize(
    "exported", [pytest.param("fp32", marks=pytest.mark.e2e)], indirect=True
)


def test_the_bundled_model_arrives_whole_and_is_proven(
    exported: tuple[Path, dict[str, Any]],
) -> None:
    out, report = exported
    assert report["passed"], report["verdict"]
    greedy = [one for one in report["parity"]["measurements"] if one["stage"] == "greedy"]
    assert greedy
    tokens, equal = (sum(one["numbers"][key] for one in greedy) for key in ("tokens", "matching"))
    # Integers flip where floats differ in their last bits, and another token goes another way.
    assert equal >= (1 if report["recipe"] == "fp32" else 0.95) * tokens > 100
    answers = report["accuracy"]["candidate"]
    assert answers["right"] >= 0.98 * answers["total"] > 100
    assert report["stored_weights"]["passed"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["artifact"] == {
        "backend": "tensorrt-rtx",
        "engines": 1,
        "compute_capabilities": "80,120",
        "parser": f"tensorrt-rtx {packages.version(Backend.RTX)}",
        "lacks": "",
        "built_on": "",
    }
    assert set(manifest["files"]) >= {
        PLAN,
        RECORD,
        "tokenizer.json",
        *(engine_file(name) for name in ("vision", "embedding", "decoder")),
    }


def test_engines_are_real_and_hold_the_weights(exported: tuple[Path, dict[str, Any]]) -> None:
    out, report = exported
    engines = report["engines"]
    assert engines["passed"]
    assert engines["compute_capabilities"] == ["80", "120"]
    for name, graph in engines["graphs"].items():
        network = graph["network"]
        assert graph["engine_bytes"] == (out / engine_file(name)).stat().st_size
        assert graph["engine_bytes"] > network["weight_bytes"]
        assert graph["effort"]["build_seconds"] > 0
        assert network["folded"] == network["odd"] == []
        assert network["layers"] > network["nodes"] > 0
    assert engines["graphs"]["decoder"]["network"]["kinds"]["KV_CACHE_UPDATE"] == 8


def test_the_report_says_what_did_not_run_on_a_gpu(exported: tuple[Path, dict[str, Any]]) -> None:
    out, report = exported
    assert report["runtime"]["device"] is False
    assert "ONNX Runtime" in report["runtime"]["name"]
    assert report["latency"] is None
    assert report["latency_note"]
    assert report["engines"]["on_gpu"]["loaded_and_read_back"] == {}
    assert "No engine was loaded or run" in report["verdict"]
    page = (out / "report" / "report.html").read_text()
    assert "No engine was loaded or run" in page
    assert report["latency_note"].split(".")[0] in page


@FP32
def test_generate_answers_through_onnx_runtime_and_says_so(
    exported: tuple[Path, dict[str, Any]], run: Run
) -> None:
    out, _ = exported
    answer = run("generate", out, "--image", SAMPLE, "--prompt", "Read the number.", "--json")
    assert json.loads(answer.out)["text"] == "7786"
    assert "ONNX Runtime" in answer.err


@FP32
def test_bench_says_what_is_missing(exported: tuple[Path, dict[str, Any]], run: Run) -> None:
    out, _ = exported
    bad(run("bench", out, "--quiet"), "NVIDIA GPU", "ONNX Runtime", "fastvlm-export bench")


@FP32
def test_validate_parses_the_graphs_anew(
    exported: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = Path(shutil.copytree(exported[0], tmp_path / "bundle"))
    monkeypatch.setattr(proof, "QUESTIONS", 6)  # the export asked many more
    monkeypatch.setattr(proof, "STEPS", 8)
    again = run("validate", out, "--json", "--quiet")
    assert again.code == 0, again.err
    report = json.loads(again.out)["bundles"][0]["report"]
    assert report["engines"]["passed"]
    assert report["engines"]["parsed_anew_by"].startswith("TensorRT for RTX")
    assert report["stored_weights"]["passed"]
    engine = out / engine_file("vision")
    engine.write_bytes(engine.read_bytes()[:1000])
    bad(run("validate", out, "--quiet"), "vision.engine", "differs from the hash")
    toys.sealed(out)
    broken = run("validate", out, "--json", "--quiet")
    assert broken.code == 1
    assert "vision.engine has 1,000 of its" in broken.out


def test_a_backend_without_its_package_gets_a_plan_and_parsed_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(proof, "STEPS", 8)
    out, checkpoint = tmp_path / "out", save_apple(tmp_path / "checkpoint")
    result = run(
        *TENSORRT, "--backend", "tensorrt", "--checkpoint", checkpoint, "--out", out, "-q", "--json"
    )
    assert result.code == 0, result.err
    assert not (out / "engines").exists()
    assert read_plan(out).compute_capabilities == ()
    assert not read_record(out).built
    report = json.loads(result.out)["bundles"][0]["report"]
    assert "no engines are built yet" in report["verdict"]
    assert "fastvlm-export build BUNDLE --backend tensorrt" in report["verdict"]
    assert report["engines"]["parser"] == "tensorrt-rtx"


@pytest.mark.slow
def test_several_targets_share_one_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "QUESTIONS", 6)
    request = pipeline.ExportRequest(
        source=SourceRequest(),
        out=tmp_path / "out",
        targets=("tensorrt", "onnx"),
        steps=4,
        options=Options(compute_capabilities=("120",)),
    )
    outcomes = pipeline.export(request)
    assert all(outcome.passed for outcome in outcomes)
    assert [outcome.path.name for outcome in outcomes] == ["tensorrt", "onnx"]
    assert [bool(outcome.report.engines) for outcome in outcomes] == [True, False]
    assert read_plan(tmp_path / "out" / "tensorrt").compute_capabilities == ("120",)
