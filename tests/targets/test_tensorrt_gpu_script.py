"""The script for a machine with a GPU, on one without: it says so, and its table can be trusted."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import tensorrt_device
from fastvlm_export.targets.base import Options
from fastvlm_export.targets.tensorrt_package import Backend
from fastvlm_export.validate.latency import Timing

from ..validate import reports

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tensorrt_gpu.py"
GPU = tensorrt_device.Gpu(
    name="NVIDIA GeForce RTX 4090", capability="89", driver=13010, memory_bytes=24 * 2**30
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("tensorrt_gpu", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_ends_at_once_and_says_why(tmp_path: Path) -> None:
    if tensorrt_device.find_gpu():
        pytest.skip("there is an NVIDIA GPU")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Engines can't run here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_engines_are_built_for_the_gpu_that_is_there(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_device, "find_gpu", lambda: GPU)
    monkeypatch.setattr(tensorrt_device, "driver_problem", lambda *_: "")
    assert script.machine(None) == (
        GPU,
        Options(backend=Backend.RTX, compute_capabilities=("89",)),
    )
    hopper = dataclasses.replace(GPU, name="NVIDIA H100", capability="90")
    monkeypatch.setattr(tensorrt_device, "find_gpu", lambda: hopper)
    with pytest.raises(ExportError, match="not for 90") as caught:
        script.machine(Backend.RTX)
    assert "NVIDIA H100 may need --backend tensorrt" in caught.value.hint


def test_the_table_has_a_line_for_each_recipe(script: Any) -> None:
    told = {name: Timing(seconds=(0.001, 0.002, 0.003)) for name in ("encode", "prefill", "decode")}
    subjects = [
        dataclasses.replace(reports.subject(name), on_device=told) for name in ("fp16", "int4")
    ]
    timed = dataclasses.replace(reports.latency_result(), subjects=tuple(subjects))
    report: dict[str, Any] = {
        "passed": True,
        "runtime": {"name": "TensorRT", "device": True},
        "export": {
            "files": [
                {"path": "engines/decoder.engine", "bytes": 10_000_000},
                {"path": "onnx/decoder.onnx", "bytes": 99_000_000},
                {"path": "engines/vision.engine", "bytes": 2_500_000},
            ]
        },
        "accuracy": {"candidate": {"right": 299, "total": 300}},
        "parity": {
            "measurements": [
                {
                    "stage": "image_features",
                    "checks": [{"name": "RMS relative", "value": 0.00021}],
                },
                {"stage": "teacher_forced", "checks": [{"name": "mean KL", "value": 3e-6}]},
            ]
        },
    }
    failed = {**report, "passed": False}
    heading = script.title(GPU, Options(backend=Backend.RTX), None, 1024)
    text = script.table(heading, {"fp16": report, "int4": failed}, timed, ["fp8: no such format"])
    head, _, headings, _, fp16, int4, last = text.splitlines()
    assert head.startswith("fastvlm-digits, 1024 px, NVIDIA GeForce RTX 4090 (24 GiB), TensorRT")
    assert head.endswith("driver of CUDA 13.1; 40 prompt tokens:")
    assert headings.count("|") == fp16.count("|") == int4.count("|")
    cells = [cell.strip() for cell in fp16.strip("|").split("|")]
    assert cells[:6] == ["`fp16`", "yes", "12.5 MB", "2.1e-04", "3.0e-06", "299 of 300"]
    assert cells[6] == "270, 2"
    assert cells[10].endswith(", 0.125"), "2 ms for 16 tokens"
    assert "| NO |" in int4
    assert last == "fp8: no such format"
    elsewhere = {**report, "runtime": {"name": "ONNX Runtime", "device": False}}
    assert "not on the GPU" in script.cells("fp16", elsewhere, subjects[0])
