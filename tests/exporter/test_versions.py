"""Versions outside of the tested ranges: found from the metadata, told once, with what to do."""

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastvlm_export.exporter import cli, versions
from fastvlm_export.exporter.versions import Untested, untested, version_of

LINES = (
    "numpy<3,>=2.0",
    "torch<2.14,>=2.13",
    "onnx<1.24,>=1.20; extra == 'onnx'",
    "onnxruntime<1.33,>=1.24.1; extra == 'onnx'",
    'onnx<1.24,>=1.20; extra == "tensorrt"',
    "cuda-bindings<14,>=13; sys_platform == 'nowhere' and extra == 'tensorrt'",
    "coremltools<10,>=9.0; extra == 'coreml'",
    "pytest<10,>=9; extra == 'dev'",
)


def found(installed: dict[str, str], *extras: str) -> list[tuple[str, str, str]]:
    there = untested(extras or None, requirements=LINES, installed=installed.get)
    return [(one.package, one.installed, one.tested) for one in there]


def test_versions_in_their_ranges_and_absent_packages_are_not_reported() -> None:
    there = {"numpy": "2.4.6", "torch": "2.13.0+cpu", "onnxruntime": "1.32.0", "onnx": "1.20"}
    assert found(there) == []
    assert found({}) == []


@pytest.mark.parametrize(
    ("package", "version", "tested"),
    [
        ("numpy", "1.26.4", ">=2.0,<3"),
        ("numpy", "3.0.0", ">=2.0,<3"),
        ("torch", "2.14.0+cu130", ">=2.13,<2.14"),
        ("torch", "2.14.0.dev20260901", ">=2.13,<2.14"),
        ("onnxruntime", "1.24.0", ">=1.24.1,<1.33"),
        ("onnxruntime", "1.33.0rc1", ">=1.24.1,<1.33"),
        ("coremltools", "10.0b1", ">=9.0,<10"),
        ("onnx", "a local build", ">=1.20,<1.24"),
    ],
)
def test_versions_beyond_either_end_are_reported(package: str, version: str, tested: str) -> None:
    assert found({package: version}) == [(package, version, tested)]


def test_a_pre_release_within_the_range_is_tested_enough() -> None:
    assert found({"onnxruntime": "1.32.0rc1"}) == []


def test_only_what_takes_part_is_reported() -> None:
    there = {"coremltools": "8.0", "numpy": "1.0", "pytest": "8.0", "cuda-bindings": "12.9"}
    assert [name for name, _, _ in found(there)] == ["coremltools", "numpy"]
    assert [name for name, _, _ in found(there, "onnx")] == ["numpy"]
    assert [name for name, _, _ in found(there, "coreml")] == ["coremltools", "numpy"]


def test_a_package_that_two_extras_need_is_reported_once() -> None:
    assert found({"onnx": "1.19"}) == [("onnx", "1.19", ">=1.20,<1.24")]


def test_the_remedy_is_a_whole_command() -> None:
    one = Untested(package="onnx", installed="1.19", tested=">=1.20,<1.24")
    assert one.remedy == "pip install 'onnx>=1.20,<1.24'"
    assert one.to_dict()["remedy"] == one.remedy


def test_the_ranges_are_those_of_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    """No version is below 0: every package that is installed and not for development is found."""
    try:
        lines = metadata.requires(versions.DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        pytest.skip("the distribution is not installed")
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]
    names = {Requirement(line).name for line in project["dependencies"]}
    if not names <= {Requirement(line).name for line in lines}:
        pytest.skip("installed before pyproject.toml changed: make")
    monkeypatch.setattr(versions, "_installed", lambda _: "0.0.1")
    assert names <= {one.package for one in untested()}
    assert not {"pytest", "mypy"} & {one.package for one in untested()}


def test_without_the_distribution_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "DISTRIBUTION", "no-such-distribution")
    assert untested() == []


def test_a_module_is_found_under_another_distributions_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(versions, "_distributions", lambda: {"runtime_x": ["numpy"]})
    assert version_of("runtime_x") == metadata.version("numpy")
    assert version_of("no_such_module") == versions.UNKNOWN


def test_the_export_warns_in_one_line_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Untested(package="onnx", installed="1.19", tested=">=1.20,<1.24")
    monkeypatch.setattr(versions, "untested", lambda targets: [one] if "onnx" in targets else [])
    monkeypatch.setattr(sys, "argv", ["fastvlm-export", "--checkpoint", "no/such/folder"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2  # no folder: the warning alone stops nothing
    lines = capsys.readouterr().err.splitlines()
    assert "onnx 1.19 (>=1.20,<1.24)" in lines[0]
    assert "Warning" in lines[0]
    assert len([line for line in lines if "1.19" in line]) == 1


NARROW = """
import sys
from fastvlm_export.exporter import cli, versions
from fastvlm_export.targets import onnx
from fastvlm_export.exporter.versions import Untested
one = Untested(package="onnxruntime", installed="1.19.0", tested=">=1.20,<1.24")
versions.untested = lambda extras=None: [one]
find_spec = onnx.find_spec
onnx.find_spec = lambda name: None if name == "onnxscript" else find_spec(name)
cli.main()
"""


@pytest.mark.parametrize("columns", ["60", "80"])
def test_targets_prints_whole_commands_in_narrow_terminals(columns: str) -> None:
    environment = {"COLUMNS": columns, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    shown = subprocess.run(
        [sys.executable, "-c", NARROW, "targets"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = shown.stdout.splitlines()
    assert "onnx: onnxscript not found: pip install 'fastvlm-export[onnx]'" in lines
    untested_lines = [line for line in lines if "1.19.0" in line]
    assert len(untested_lines) == 1
    assert untested_lines[0].endswith("pip install 'onnxruntime>=1.20,<1.24'")


def test_targets_json_names_them_by_target() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", NARROW, "targets", "--json"],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    for row in json.loads(shown.stdout):
        assert [one["package"] for one in row["untested"]] == ["onnxruntime"]
        assert row["untested"][0]["tested"] == ">=1.20,<1.24"
