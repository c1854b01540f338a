"""The lock file and the tested ranges: complete, exact, and tied to no package index."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements" / "lock.txt").read_text()
PINNED = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[A-Za-z0-9.!]+)( ; (?P<marker>[^#]+))?")
TORCH = PYPROJECT["tool"]["uv"]["dependency-metadata"]


def _lines() -> list[str]:
    return [line for line in LOCK.splitlines() if line and not line.lstrip().startswith("#")]


def _locked() -> dict[str, str]:
    found = [PINNED.fullmatch(line) for line in _lines()]
    return {match["name"]: match["version"] for match in found if match}


def _direct() -> list[Requirement]:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        lines += extra
    direct = [Requirement(line) for line in lines]
    return [one for one in direct if one.name != project["name"]]


def test_every_line_pins_one_version() -> None:
    names = [match["name"] for line in _lines() if (match := PINNED.fullmatch(line))]
    assert [line for line in _lines() if not PINNED.fullmatch(line)] == []
    # One version for every system and Python: only one of two would have been tested.
    assert len(names) == len(set(names)) > 50


def test_the_lock_names_no_index_and_no_path() -> None:
    assert not re.search(r"[/\\@]|--|https?:|file:", LOCK)


@pytest.mark.parametrize("requirement", _direct(), ids=str)
def test_what_pyproject_asks_for_is_locked_within_its_range(requirement: Requirement) -> None:
    locked = _locked().get(canonicalize_name(requirement.name))
    assert locked is not None, "missing: make lock"
    assert requirement.specifier.contains(locked), "outside of the range: make lock"


@pytest.mark.parametrize("requirement", _direct(), ids=str)
def test_ranges_end_on_both_sides(requirement: Requirement) -> None:
    operators = sorted(one.operator for one in requirement.specifier)
    assert operators == ["<", ">="]


def test_the_lock_is_closed() -> None:
    """What locked packages require here is locked, too: followed through what is installed."""
    locked = _locked()
    described = {Requirement(line).name for one in TORCH for line in one["requires-dist"]}
    todo, seen = [canonicalize_name(one.name) for one in _direct()], set()
    missing: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name in seen or not _installed_as_locked(name, locked):
            continue
        seen.add(name)
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker and not needed.marker.evaluate({"extra": ""}):
                continue
            if name == "torch" and needed.name not in described:
                continue
            needed_name = canonicalize_name(needed.name)
            todo.append(needed_name)
            if needed_name not in locked:
                missing[needed_name] = name
    assert missing == {}
    assert "numpy" in seen or "torch" in seen


def _installed_as_locked(name: str, locked: dict[str, str]) -> bool:
    try:
        installed = Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
    return name in locked and installed.public == locked[name]


NAMED_OTHERWISE = {
    "PIL": "pillow",
    "cuda": "cuda-bindings",
    "google": "protobuf",
    "onnx_ir": "onnx-ir",
    "sklearn": "scikit-learn",
}
"""Modules whose distribution has another name."""


def test_every_package_that_is_imported_is_declared() -> None:
    """Not only brought along by another package, which may stop doing so."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    development = {str(Requirement(line)) for line in extras["dev"]}
    declared = {one.name for one in _direct() if str(one) not in development}
    missing: dict[str, str] = {}
    for room in ("exporter", "quantize", "targets", "validate"):
        for path in (ROOT / room).rglob("*.py"):
            for module in _imported(ast.parse(path.read_text("utf-8"))):
                name = NAMED_OTHERWISE.get(module, module)
                if module not in sys.stdlib_module_names and name not in declared:
                    missing[name] = str(path.relative_to(ROOT))
    assert missing == {}


def _imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_no_build_of_torch_is_forced() -> None:
    """CUDA's libraries come with the builds of torch that use them, never with the lock."""
    locked = _locked()
    assert [one["version"] for one in TORCH if one["name"] == "torch"] == [locked["torch"]]
    assert [name for name in locked if name.startswith("nvidia-") or name == "triton"] == []
    assert "+" not in LOCK
