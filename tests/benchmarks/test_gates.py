"""The experiment on gates: how it plants, what it counts, where it goes on."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from gating import cell as cells
from gating import misses
from gating.cell import FALSE_ALARMS, MISSES, Job, Results
from gating.cells import RECIPES
from gating.disturbances import Disturbance, _Moved
from gating.faults import contract
from gating.faults.base import Fault, NoPlaceError, planted
from gating.faults.onnx_graph import Graph
from gating.faults.onnx_graph import edited as edited_graph
from gating.judge import Finding, Judged, timed
from gating.misses import faults_of, shared_out
from gating.table import false_alarms, lines, missed
from onnx import TensorProto, helper, numpy_helper

from fastvlm_export import targets
from fastvlm_export.exporter.bundle import MANIFEST, open_bundle
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.quantize.recipes import RECIPES as BUILT_IN

from .. import shared

REFERENCE: Any = SimpleNamespace(programs=None)


def finding(name: str, *gates: str, severity: float = 0.5) -> dict[str, Any]:
    found = Finding(
        name=name, gates=gates, verdict="v", severity=severity, nearest="n", seconds=1.0
    )
    return asdict(found) | {"gates": list(gates)}


def test_every_recipe_that_a_target_takes_is_a_cell() -> None:
    for target, recipes in RECIPES.items():
        module = targets.get(target)
        taken = [
            name for name, one in BUILT_IN.items() if not module.problems(module.adapt(one), None)
        ]
        assert set(recipes) == set(taken), target


@pytest.mark.parametrize("target", list(RECIPES))
def test_each_fault_is_planted_somewhere_and_core_ones_everywhere(target: str) -> None:
    faults = faults_of(target)
    assert len(faults) >= 40
    assert len({one.name for one in faults}) == len(faults)
    found = shared_out(faults, RECIPES[target])
    for fault in faults:
        under = [recipe for recipe, given in found.items() if fault in given]
        assert under, fault.name
        fit = [one for one in RECIPES[target] if not fault.recipes or one in fault.recipes]
        assert under == fit if fault.core else len(under) == 1, fault.name


def test_the_table_counts_what_was_found_and_by_whom() -> None:
    good = Results(
        target="onnx",
        recipe="fp32",
        false_alarms=[finding("a"), finding("b", severity=0.9)],
        misses=[finding("x", "stored", "exact"), finding("y", "exact")],
    )
    bad = Results(
        target="onnx", recipe="int8", false_alarms=[finding("c", "typed")], misses=[finding("x")]
    )
    assert (false_alarms([good]), missed([good])) == (0, 0)
    assert (false_alarms([good, bad]), missed([good, bad])) == (1, 1)
    text = "\n".join(lines([good, bad]))
    assert "| onnx | fp32 | 2 | 0 | 0.90 of the limit: n (b) |" in text
    assert "| onnx | 2 | 3 | 1 | 0 | 1 | 2 | 0 | 0 | 0 |" in text
    assert "False alarm, onnx int8, c" in text
    assert "Missed, onnx int8, x" in text


def test_inputs_are_moved_to_their_neighbours_and_no_further() -> None:
    given: list[Any] = []
    inner: Any = SimpleNamespace(encode_image=lambda x: given.append(x) or x)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    moved = _Moved(inner, 0).encode_image(pixels)
    assert moved.dtype == np.float32
    steps = np.abs(moved.view(np.int32).astype(np.int64) - pixels.view(np.int32))
    assert set(np.unique(steps)) == {0, 1}
    again = _Moved(inner, 1).encode_image(pixels)
    assert not np.array_equal(moved, again)


def test_a_refusal_is_a_gate() -> None:
    def refuse() -> Judged:
        raise ExportError("no such graph", "hint")

    found = timed("a fault", refuse)
    assert found.gates == ("open",)
    assert found.verdict == "no such graph"

    def break_down() -> Judged:
        raise IndexError("no such thing")

    broken = timed("a fault", break_down)
    assert broken.gates == ("error",)
    assert "no such thing" in broken.verdict
    cell = Results(target="onnx", recipe="fp32", misses=[asdict(broken)])
    assert missed([cell]) == 1


class Cell:
    """Counts what is judged in a cell that nothing was exported for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.judged: list[str] = []
        patch.setattr(cells, "prepare", lambda *_: SimpleNamespace())
        patch.setattr(cells, "disturbances", self.disturbances)
        patch.setattr(cells, "faults_of", lambda target: [Fault(name=name) for name in "xyz"])
        patch.setattr(cells, "findings", self.findings)

    def judge(self, name: str) -> Judged:
        self.judged.append(name)
        return Judged(failed={})

    def disturbances(self, *_: Any) -> Iterator[Disturbance]:
        for name in "abc":
            yield Disturbance(name=name, judge=lambda name=name: self.judge(name))  # type: ignore[misc]

    def findings(self, cell: Any, faults: list[Fault]) -> Iterator[Finding | str]:
        for fault in faults:
            if fault.name == "z":
                yield fault.name
            else:
                yield timed(fault.name, lambda fault=fault: self.judge(fault.name))  # type: ignore[misc]


def test_a_run_goes_on_where_an_earlier_one_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cells, "RECIPES", {"onnx": ("fp32",)})
    fake = Cell(monkeypatch)
    first = Job(target="onnx", recipe="fp32", work=tmp_path, kinds=(FALSE_ALARMS,), most=2)
    cells.run(first)
    assert fake.judged == ["a", "b"]
    every = Job(target="onnx", recipe="fp32", work=tmp_path, kinds=(FALSE_ALARMS, MISSES))
    found = cells.run(every)
    assert fake.judged == ["a", "b", "c", "x", "y"]
    assert found.without_place == ["z"]
    cells.run(every)
    assert fake.judged == ["a", "b", "c", "x", "y"]
    assert [one["name"] for one in cells.load(every).false_alarms] == ["a", "b", "c"]


def test_an_output_is_scaled_before_anything_reads_it(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [tensor("x", TensorProto.FLOAT, [1, 2])],
        [tensor("y", TensorProto.FLOAT, [1, 2])],
        [weight],
    )
    onnx.save(helper.make_model(graph), tmp_path / "a.onnx")
    edited_graph("a.onnx", lambda graph: graph.scale("y", 2.0, 3.0))(tmp_path)
    changed = Graph(tmp_path / "a.onnx")
    assert [one.op_type for one in changed.graph.node] == ["MatMul", "Mul", "Mul"]
    onnx.checker.check_model(changed.model)
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 - here alone

    [found] = ReferenceEvaluator(changed.model).run(None, {"x": np.array([[1, 2]], np.float32)})
    np.testing.assert_array_equal(found, [[6, 12]])


WHOLE = [("onnx", "int8"), ("executorch", "int4"), ("tensorrt", "int4")]  # as others ask for


@pytest.mark.e2e
@pytest.mark.parametrize(("target", "recipe"), WHOLE)
def test_core_faults_find_their_place_and_hide_from_hashes(
    target: str, recipe: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = open_bundle(shared.whole_export(tmp_path_factory, target, recipe))
    for number, fault in enumerate(shared_out(faults_of(target), RECIPES[target])[recipe]):
        if not fault.core or fault.alter:
            continue
        bundle = planted(source, REFERENCE, tmp_path / str(number), fault)
        assert bundle.manifest.files != source.manifest.files, fault.name
        shutil.rmtree(bundle.path)


@pytest.mark.e2e
def test_faults_of_the_contract_change_what_clients_read(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = open_bundle(shared.whole_export(tmp_path_factory, "onnx", "fp32"))
    before = {path.name: path.read_bytes() for path in source.path.glob("*.json")}
    for number, fault in enumerate(contract.faults()):
        bundle = planted(source, REFERENCE, tmp_path / str(number), fault)
        changed = [
            path.name
            for path in bundle.path.glob("*.json")
            if path.name != MANIFEST and path.read_bytes() != before[path.name]
        ]
        manifest = json.loads((bundle.path / MANIFEST).read_text("utf-8"))
        manifest["files"] = json.loads(before[MANIFEST])["files"]
        assert changed or manifest != json.loads(before[MANIFEST]), fault.name


def test_a_fault_without_a_place_is_no_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def plant(*_: Any) -> None:
        raise NoPlaceError("nothing to change")

    monkeypatch.setattr(misses, "planted", plant)
    cell: Any = SimpleNamespace(bundle=None, reference=None)
    assert list(misses.findings(cell, [Fault(name="a")])) == ["a"]
