"""The gate on engines: what holds, and that each of its checks can fail."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import tensorrt, tensorrt_device, tensorrt_inspect
from fastvlm_export.targets import tensorrt_package as packages
from fastvlm_export.targets.tensorrt_build import write_plan
from fastvlm_export.targets.tensorrt_device import Gpu
from fastvlm_export.targets.tensorrt_inspect import EngineContents
from fastvlm_export.targets.tensorrt_package import Backend
from fastvlm_export.targets.tensorrt_plan import PLAN, engine_file, onnx_file, read_plan
from fastvlm_export.targets.tensorrt_record import RECORD
from fastvlm_export.validate import tensorrt_view
from fastvlm_export.validate.report import Report
from fastvlm_export.validate.tensorrt_build import EngineProof, engines

from ..targets import tensorrt_bundles as toys
from .reports import parity_result

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.bundle(tmp_path_factory.mktemp("gate") / "bundle").path


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def found(folder: Path) -> EngineProof:
    return engines(toys.sealed(folder))


def failed(proof: EngineProof, graph: str) -> set[str]:
    return {check.name for check in proof.graphs[graph].checks if not check.passed}


def test_what_was_built_by_the_plan_holds(whole: Path) -> None:
    proof = found(whole)
    assert proof.passed, proof.verdict
    assert "took every one of 12 nodes and built three engines without a GPU" in proof.verdict
    assert "for compute capabilities 80, 120" in proof.verdict
    assert "No engine was loaded or run" in proof.verdict
    assert proof.parsed.startswith("TensorRT for RTX 1.7")
    for graph in proof.graphs.values():
        assert len(graph.checks) == 9
        assert graph.effort is not None
    told = json.loads(
        json.dumps(Report(source="s", target="tensorrt", recipe="fp32", engines=proof).to_dict())
    )
    assert told["engines"]["passed"]
    assert told["engines"]["on_gpu"]["loaded_and_read_back"] == {}
    assert told["engines"]["graphs"]["decoder"]["network"]["layers"] > 6


def test_a_changed_graph_is_not_what_the_engine_was_built_from(bundle: Path) -> None:
    model = onnx.load(bundle / onnx_file("decoder"))
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    onnx.save(model, bundle / onnx_file("decoder"))
    proof = found(bundle)
    assert failed(proof, "decoder") == {"files unlike the record's"}
    assert "decoder.onnx is not what the engine was built from" in proof.verdict
    assert not failed(proof, "vision")


def test_a_graph_with_another_node_is_not_the_records(bundle: Path) -> None:
    model = onnx.load(bundle / onnx_file("embedding"))
    model.graph.node[0].name = "other/Gather"
    model.graph.node[0].output[0] = "rows"
    model.graph.node.append(onnx.helper.make_node("Neg", ["rows"], ["inputs_embeds"], "new/Neg"))
    onnx.save(model, bundle / onnx_file("embedding"))
    assert failed(found(bundle), "embedding") == {
        "files unlike the record's",
        "facts unlike the record's",
    }


def test_an_engine_that_is_cut_off_or_another_is_told(bundle: Path) -> None:
    path = bundle / engine_file("vision")
    data = path.read_bytes()
    path.write_bytes(data[:200])
    proof = found(bundle)
    assert failed(proof, "vision") == {"files unlike the record's", "flaws of the engine"}
    assert "of its" in proof.verdict
    path.write_bytes((bundle / engine_file("decoder")).read_bytes())
    proof = found(bundle)
    assert failed(proof, "vision") == {"files unlike the record's", "flaws of the engine"}
    assert "bytes of weights, the graph" in str(proof.to_dict())
    path.unlink()
    assert "vision.engine is missing" in str(found(bundle).to_dict())
    path.write_bytes(b"not an engine at all" * 1000)
    assert "no engine of TensorRT for RTX" in str(found(bundle).to_dict())


def _plan(folder: Path, graph: str, **changes: Any) -> None:
    plan = read_plan(folder)
    changed = dataclasses.replace(plan.graphs[graph], **changes)
    write_plan(folder, dataclasses.replace(plan, graphs={**plan.graphs, graph: changed}))


def test_a_changed_plan_is_told(bundle: Path) -> None:
    plan = read_plan(bundle)
    _plan(bundle, "vision", outputs={"image_features": "float16[1,4,16]"})
    _plan(bundle, "embedding", profiles=plan.graphs["embedding"].profiles[:1])
    _plan(bundle, "decoder", float32_nodes={"gone/Node": "norm statistics"})
    proof = found(bundle)
    assert failed(proof, "vision") == {"tensors unlike the manifest's", "tensors unlike the plan's"}
    assert failed(proof, "embedding") == {"facts unlike the record's"}
    assert failed(proof, "decoder") == {"exceptions for no node", "facts unlike the record's"}
    assert "there is no node 'gone/Node'" in str(proof.to_dict())


def test_layers_in_another_float_type_are_told_by_node(bundle: Path) -> None:
    write_plan(bundle, dataclasses.replace(read_plan(bundle), float_type="float16"))
    proof = found(bundle)
    assert "layers in another float type" in failed(proof, "vision")
    assert "'tower/Conv' (CONVOLUTION) computes in float32" in str(proof.to_dict())
    assert not proof.passed


def test_without_a_package_the_record_is_what_there_is(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    proof = found(whole)
    assert proof.passed
    assert proof.parsed == ""
    assert "Not parsed anew" in " ".join(tensorrt_view.notes(proof))


def test_a_bundle_without_engines_says_how_to_build_them(tmp_path: Path) -> None:
    folder = toys.bundle(tmp_path / "bundle", engines=False).path
    proof = found(folder)
    assert proof.passed
    assert "takes every one of 12 nodes; no engines are built yet" in proof.verdict
    assert "fastvlm-export build BUNDLE" in proof.verdict
    (folder / "engines").mkdir()
    (folder / engine_file("vision")).write_bytes(b"from nowhere")
    assert "nothing says what it was built from" in found(folder).verdict


def test_a_plan_and_a_record_of_other_packages_are_one_error(bundle: Path) -> None:
    plan = dataclasses.replace(read_plan(bundle), backend=Backend.TENSORRT, compute_capabilities=())
    write_plan(bundle, plan)
    with pytest.raises(ExportError, match="the plan is for tensorrt"):
        found(bundle)


@pytest.mark.parametrize("name", [PLAN, RECORD])
def test_a_missing_file_is_one_error(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    with pytest.raises(ExportError, match=f"has no {name}"):
        found(bundle)


def test_the_report_says_what_was_and_was_not_run_on_a_gpu(whole: Path) -> None:
    report = Report(
        source="toy", target="tensorrt", recipe="fp32", engines=found(whole), parity=parity_result()
    )
    assert report.passed
    assert "No engine was loaded or run: that takes an NVIDIA GPU." in report.verdict
    page = report.to_html()
    assert 'id="engines"' in page
    assert "No engine was loaded or run" in page
    assert "profile decode" in page


def test_a_report_fails_with_its_engines(bundle: Path) -> None:
    _plan(bundle, "vision", outputs={"image_features": "float16[1,4,16]"})
    report = Report(
        source="toy",
        target="tensorrt",
        recipe="fp32",
        engines=found(bundle),
        parity=parity_result(),
    )
    assert not report.passed
    assert "not what they should be: vision" in report.verdict


def test_on_a_gpu_the_engines_are_read_back(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the driver: what it reads is gated, and told."""
    gpu = Gpu(name="NVIDIA Test", capability="80", driver=13000, memory_bytes=1 << 33)
    ready = tensorrt.availability()
    monkeypatch.setattr(tensorrt_device, "find_gpu", lambda: gpu)
    monkeypatch.setattr(tensorrt, "availability", lambda: dataclasses.replace(ready, run=True))
    flaws: list[tuple[str, ...]] = [(), ("it has 1 profiles, not 2",)]

    def read_back(_: Path) -> tuple[EngineContents, ...]:
        problems = flaws.pop(0)
        return tuple(
            EngineContents(graph=name, layers=3, kinds={"gemm": 3}, problems=problems)
            for name in ("vision", "embedding", "decoder")
        )

    monkeypatch.setattr(tensorrt_inspect, "read_back", read_back)
    proof = found(whole)
    assert proof.passed
    assert "They were loaded on NVIDIA Test and read back: as planned." in proof.verdict
    assert "vision: 3 layers after fusion" in " ".join(tensorrt_view.notes(proof))
    broken = found(whole)
    assert failed(broken, "decoder") == {"differences on the GPU"}
    assert "it has 1 profiles, not 2" in broken.verdict


def test_engines_for_other_gpus_are_not_read_back_on_this_one(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(name="NVIDIA Test", capability="89", driver=13000, memory_bytes=1 << 33)
    ready = tensorrt.availability()
    monkeypatch.setattr(tensorrt_device, "find_gpu", lambda: gpu)
    monkeypatch.setattr(tensorrt, "availability", lambda: dataclasses.replace(ready, run=True))
    proof = found(whole)
    assert proof.passed
    assert "not for the NVIDIA Test of compute capability 89 of this machine" in proof.verdict
