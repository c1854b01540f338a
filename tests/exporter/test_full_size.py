"""FastVLM-0.5B at 1024 px with random weights, through the command line: sizes, memory, gates."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

GIB = 2**30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "recipe", "megabytes", "memory"),
    [
        ("onnx", "int8", 700, 10 * GIB),
        ("onnx", "int4", 600, 10 * GIB),
        ("coreml", "int4", 700, 16 * GIB),  # the table is in two packages
        ("executorch", "int8", 700, 16 * GIB),
        ("executorch", "int4", 600, 16 * GIB),
    ],
)
def test_a_quantized_export_passes_and_stays_small(
    tmp_path: Path, target: str, recipe: str, megabytes: float, memory: int
) -> None:
    program = "from fastvlm_export.exporter.cli import main; main()"
    command = [sys.executable, "-c", program, "--random", "fastvlm-0.5b", "--resolution", "1024"]
    command += [
        "--target",
        target,
        "--recipe",
        recipe,
        "--out",
        str(tmp_path / "out"),
        "--runs",
        "1",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)["bundles"][0]["report"]
    export = report["export"]
    size = sum(file["bytes"] for file in export["files"]) / 1e6
    print(
        target,
        recipe,
        f"{size:.0f} MB",
        f"{export['peak_memory_bytes'] / GIB:.2f} GiB",
        export["seconds"],
    )
    print(report["verdict"])
    assert done.returncode == 0
    if target == "executorch":
        vision, _, decoder = report["placement"]["methods"]
        assert len(vision["delegates"]) == len(decoder["delegates"]) == 1
    assert size < megabytes
    assert export["peak_memory_bytes"] < memory
