"""What an engine tells of itself against what was planned, through a stand-in for TensorRT."""

import dataclasses
import json
from typing import Any

import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import tensorrt_device, tensorrt_inspect
from fastvlm_export.targets.tensorrt_engine import Loader
from fastvlm_export.targets.tensorrt_inspect import read_back

from . import tensorrt_opened
from .cuda_stand_in import CudaApi
from .tensorrt_opened import Exported
from .tensorrt_stand_ins import GPU, Engine, Package


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return tensorrt_opened.exported(tmp_path_factory)


def loader_of(exported: Exported, **changes: Any) -> Loader:
    plan = dataclasses.replace(exported.plan, **changes)
    package = Package(exported.folder, exported.plan, CudaApi())
    return Loader(package, plan, exported.folder, version="1.7.1", gpu=GPU)  # type: ignore[arg-type]


def inspected(exported: Exported, layers: list[Any], **changes: Any) -> Any:
    loader = loader_of(exported, **changes)
    loader.package.inspector = json.dumps({"Layers": layers})
    return {one.graph: one for one in read_back(exported.folder, loader)}


def layer(name: str, *outputs: dict[str, str], nodes: tuple[str, ...] = ()) -> dict[str, Any]:
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Name": name, "LayerType": "gemm", "Outputs": list(outputs), "Metadata": metadata}


HALF = {"Name": "x", "Format/Datatype": "Row major linear FP16 format (kLINEAR)"}
SINGLE = {"Name": "y", "Format/Datatype": "Row major linear FP32 format (kLINEAR)"}
NEWER = {"Name": "z", "DataType": "Float", "Format": "Row major linear"}
"""TensorRT 11 writes the type apart from the format."""


def test_an_engine_as_planned_has_no_problems(exported: Exported) -> None:
    found = inspected(exported, ["a", "b", "c"])
    assert [one.problems for one in found.values()] == [()] * 3
    assert found["vision"].layers == 3
    assert not found["vision"].detailed
    assert found["vision"].in_place == ()
    names = [f"present.{i}.{kind}" for i in range(3) for kind in ("key", "value")]
    assert sorted(found["decoder"].in_place) == names
    assert json.loads(json.dumps(found["decoder"].to_dict()))["device_memory_bytes"] == 4096


def test_layers_are_counted_by_kind_and_type(exported: Exported) -> None:
    found = inspected(exported, [layer("a", HALF), layer("b", SINGLE, HALF), layer("c", NEWER)])
    assert found["vision"].detailed
    assert found["vision"].kinds == {"gemm": 3}
    assert found["vision"].formats == {"float16": 2, "float32": 2}
    assert found["vision"].float32 == (), "the plan's own type is float32"


def test_float32_where_none_was_planned_is_named(exported: Exported) -> None:
    graphs = {
        name: dataclasses.replace(graph, float32_nodes={"norm/Sqrt": "norm statistics"})
        for name, graph in exported.plan.graphs.items()
    }
    layers = [
        layer("half", HALF, nodes=("linear/MatMul",)),
        layer("statistics", SINGLE, nodes=("norm/Mul", "norm/Sqrt")),
        layer("odd", SINGLE, nodes=("linear/MatMul",)),
        layer("odd, too", NEWER, nodes=("linear/Add",)),
        layer("TensorRT's own", SINGLE),
    ]
    found = inspected(exported, layers, graphs=graphs, float_type="float16")
    assert found["decoder"].float32 == ("odd", "odd, too")


def test_what_differs_from_the_plan_is_listed(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "get_tensor_profile_shape", lambda self, name, number: [(1, 1)] * 3)
    found = inspected(exported, [])
    assert any(text.startswith("profile decode has") for text in found["decoder"].problems)
    monkeypatch.setattr(Engine, "get_tensor_name", lambda self, index: f"tensor{index}")
    monkeypatch.setattr(Engine, "get_tensor_mode", lambda self, name: 1)
    monkeypatch.setattr(Engine, "get_tensor_shape", lambda self, name: ())
    monkeypatch.setattr(tensorrt_inspect, "type_name", lambda dtype: "float32")
    monkeypatch.setattr(Engine, "get_tensor_dtype", lambda self, name: None)
    problems = inspected(exported, [])["vision"].problems
    assert "input pixel_values is missing" in problems
    assert "output image_features is missing" in problems
    assert "input tensor0 is not in the plan" in problems


def test_without_a_driver_nothing_is_read_and_the_reason_is_said(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(tensorrt_device.find_gpu, "__defaults__", (missing,))
    monkeypatch.setattr(tensorrt_device.driver_problem, "__defaults__", (missing,))
    with pytest.raises(ExportError, match="no NVIDIA driver is installed") as caught:
        read_back(exported.folder)
    assert "fastvlm-export validate" in caught.value.hint
