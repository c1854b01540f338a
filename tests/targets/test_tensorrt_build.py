"""Engines of small graphs, built here without a GPU, and what can go wrong with it."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import tensorrt_build, tensorrt_header, tensorrt_network
from fastvlm_export.targets import tensorrt_package as packages
from fastvlm_export.targets.tensorrt_build import build, run, write_plan
from fastvlm_export.targets.tensorrt_package import Backend
from fastvlm_export.targets.tensorrt_plan import engine_file, onnx_file
from fastvlm_export.targets.tensorrt_record import (
    RECORD,
    BuildRecord,
    Network,
    read_record,
    read_times,
)

from . import tensorrt_bundles as toys

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildRecord, list[str]]:
    out = tmp_path_factory.mktemp("built")
    toys.folder(out)
    said: list[str] = []
    return out, build(out, said.append, engines=True), said


def network_of(
    tmp_path: Path, graph: onnx.ModelProto, *, float_type: str = "float32", **changes: object
) -> Network:
    """What the parser makes of a graph in the vision graph's place."""
    plan = toys.folder(tmp_path, float_type=float_type, vision=graph)
    changed = dataclasses.replace(plan.graphs["vision"], **changes)
    write_plan(tmp_path, dataclasses.replace(plan, graphs={**plan.graphs, "vision": changed}))
    return run(tmp_path, "vision", build=False, say=silent)[0]


def test_engines_are_built_without_a_gpu_and_recorded(
    built: tuple[Path, BuildRecord, list[str]],
) -> None:
    out, record, said = built
    assert record.built
    assert (record.backend, record.parser, record.gpu) == (Backend.RTX, "tensorrt-rtx", "")
    assert record.version == packages.version(Backend.RTX)
    assert record.compute_capabilities == ("80", "120")
    for name, graph in record.graphs.items():
        engine, network = graph.engine, graph.network
        assert engine is not None
        assert network is not None
        assert engine.bytes == (out / engine_file(name)).stat().st_size > network.weight_bytes > 0
        assert list(graph.sources) == [onnx_file(name)]
        assert not tensorrt_header.problems(
            out / engine_file(name),
            Backend.RTX,
            record.version,
            ("120", "80"),
            network.weight_bytes,
        )
        assert (network.folded, network.odd, network.absent) == ((), (), ())
    assert any(line.startswith("decoder: ") for line in said)
    assert read_record(out) == record
    efforts = read_times(out / "report")
    assert set(efforts) == set(record.graphs)
    assert all(one.build_seconds > 0 and one.peak_memory_bytes > 1e7 for one in efforts.values())


def test_the_network_has_the_plans_tensors_and_profiles(
    built: tuple[Path, BuildRecord, list[str]],
) -> None:
    out, record, _ = built
    plan = tensorrt_build.read_plan(out)
    for name, graph in record.graphs.items():
        network = graph.network
        assert network is not None
        assert network.inputs == plan.graphs[name].inputs
        assert list(network.outputs) == list(plan.graphs[name].outputs)
        assert network.profiles == plan.graphs[name].profiles
        assert network.nodes == len(onnx.load(out / onnx_file(name)).graph.node)
        assert network.layers == sum(network.kinds.values())


def test_the_same_graphs_give_the_same_bytes(
    built: tuple[Path, BuildRecord, list[str]], tmp_path: Path
) -> None:
    out, record, _ = built
    toys.folder(tmp_path)
    assert build(tmp_path, silent, engines=True) == record
    assert (tmp_path / RECORD).read_bytes() == (out / RECORD).read_bytes()


def test_without_engines_the_parser_alone_is_asked(tmp_path: Path) -> None:
    toys.folder(tmp_path)
    record = build(tmp_path, silent, engines=False)
    assert not record.built
    assert not (tmp_path / "engines").exists()
    assert all(graph.network and graph.network.nodes for graph in record.graphs.values())


def test_a_plan_for_tensorrt_is_parsed_by_the_package_that_is_there(tmp_path: Path) -> None:
    plan = toys.folder(tmp_path)
    changed = dataclasses.replace(plan, backend=Backend.TENSORRT, compute_capabilities=())
    write_plan(tmp_path, changed)
    record = build(tmp_path, silent, engines=False)
    assert (record.backend, record.parser) == (Backend.TENSORRT, "tensorrt-rtx")
    assert not record.built


def test_without_any_package_nothing_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    toys.folder(tmp_path)
    record = build(tmp_path, silent, engines=False)
    assert (record.parser, record.version) == ("", "")
    assert all(graph.network is None for graph in record.graphs.values())
    assert read_record(tmp_path) == record


def test_layers_in_float32_are_found_where_the_plan_says_float16(tmp_path: Path) -> None:
    network = network_of(tmp_path, toys.vision("float32"), float_type="float16")
    assert any("'tower/Conv' (CONVOLUTION) computes in float32" in one for one in network.odd)
    assert network.float32 == {}


def test_exceptions_are_by_name_and_must_be_there(tmp_path: Path) -> None:
    reasons = dict.fromkeys(("tower/Conv", "tower/Reshape", "tower/Transpose"), "range scan")
    network = network_of(
        tmp_path,
        toys.vision("float32"),
        float_type="float16",
        float32_nodes={**reasons, "tower/Gone": "range scan"},
    )
    assert network.odd == ()
    assert set(network.float32) == set(reasons)
    assert network.absent == ("tower/Gone",)


def test_layers_in_float16_are_found_where_the_plan_says_float32(tmp_path: Path) -> None:
    network = network_of(tmp_path, toys.vision("float16"), float_type="float32")
    assert any("'tower/Conv' (CONVOLUTION) computes in float16" in one for one in network.odd)
    assert not network_of(tmp_path / "half", toys.vision("float16"), float_type="float16").odd


def test_a_node_that_the_parser_refuses_is_named(tmp_path: Path) -> None:
    graph = toys.vision()
    graph.graph.node[1].op_type = "Unheard"
    toys.folder(tmp_path, vision=graph)
    with pytest.raises(ExportError) as caught:
        build(tmp_path, silent, engines=True)
    assert "'tower/Conv' (Unheard)" in caught.value.message
    assert "vision" in caught.value.message
    assert caught.value.hint


def test_a_file_that_is_no_onnx_is_one_error(tmp_path: Path) -> None:
    toys.folder(tmp_path)
    (tmp_path / onnx_file("vision")).write_bytes(b"nonsense" * 100)
    with pytest.raises(ExportError, match="vision: tensorrt_rtx"):
        run(tmp_path, "vision", build=True, say=silent)


def test_an_unknown_capability_is_one_error(tmp_path: Path) -> None:
    plan = toys.folder(tmp_path)
    write_plan(tmp_path, dataclasses.replace(plan, compute_capabilities=("80", "90")))
    with pytest.raises(ExportError, match="does not build for compute capability 90"):
        run(tmp_path, "vision", build=True, say=silent)


def test_what_tensorrt_itself_says_is_the_error(tmp_path: Path) -> None:
    """float8 on a GPU that has none fails inside of TensorRT, after parsing."""
    graph = _float8()
    toys.folder(tmp_path, vision=graph, float_type="float32")
    with pytest.raises(ExportError, match=r"could not build the engine: .*[Ff][Pp]8"):
        run(tmp_path, "vision", build=True, say=silent)


def _float8() -> onnx.ModelProto:
    kind = onnx.TensorProto.FLOAT8E4M3FN
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "fc/Quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "fc/Dequantize"),
        helper.make_node("DequantizeLinear", ["w8", "scale", "zero"], ["w"], "fc/Weight"),
        helper.make_node("MatMul", ["d", "w"], ["y"], "fc/MatMul"),
    ]
    x, y = (toys.tensor(name, "float32", (1, 64)) for name in "xy")
    made = toys.model(nodes, [x], [y], {"scale": np.array(0.5, np.float32)})
    made.graph.initializer.extend(
        [
            helper.make_tensor("w8", kind, [64, 64], [0.5] * 4096),
            helper.make_tensor("zero", kind, [], [0.0]),
        ]
    )
    return made


@pytest.mark.parametrize(
    ("program", "word"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9, often for want of memory"),
        ("import sys; sys.exit('cannot map the library')", "cannot map the library"),
        ("print('chatter')", "exit code 0"),
        ("print('[1]'); print('3')", "exit code 0"),
    ],
)
def test_a_process_that_dies_is_one_error(
    program: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toys.folder(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "dying.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    monkeypatch.setattr(tensorrt_build, "WORKER", "dying")
    with pytest.raises(ExportError, match=word):
        run(tmp_path, "vision", build=True, say=silent)


def test_weights_count_once_and_in_their_own_type() -> None:
    rows = np.arange(4096, dtype=np.int8)
    four = helper.make_tensor("w4", onnx.TensorProto.INT4, [64, 64], [1] * 4096)
    made = toys.model([], [], [], {"a": rows, "b": rows, "small": rows[:8]})
    made.graph.initializer.append(four)
    assert tensorrt_network.weight_bytes(made) == 4096 + 2048


def test_a_header_tells_a_truncated_and_a_foreign_engine(
    built: tuple[Path, BuildRecord, list[str]], tmp_path: Path
) -> None:
    out, record, _ = built
    whole = (out / engine_file("vision")).read_bytes()
    path = tmp_path / "vision.engine"

    def found(data: bytes, version: str = record.version, served: tuple[str, ...] = ()) -> str:
        path.write_bytes(data)
        capabilities = served or record.compute_capabilities
        return "; ".join(tensorrt_header.problems(path, Backend.RTX, version, capabilities))

    assert found(whole) == ""
    assert f"{len(whole) // 2:,} of its {len(whole):,} bytes" in found(whole[: len(whole) // 2])
    assert "no engine of TensorRT for RTX" in found(b"")
    assert "no engine of TensorRT for RTX" in found(b"vtrt")
    assert "no engine of TensorRT for RTX" in found(b"ptrt" + whole[4:])
    assert "built by version 1.7.1" in found(whole, "9.0.0.1")
    assert "is for compute capability 80, 120" in found(whole, served=("89",))
    (many,) = tensorrt_header.problems(
        out / engine_file("vision"), Backend.RTX, record.version, ("80", "120"), 1 << 30
    )
    assert "bytes of weights, the graph 1,073,741,824" in many
    path.write_bytes(b"TensorRT's own format is not known")
    assert not tensorrt_header.problems(path, Backend.TENSORRT, "10.13", ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backend", "cuda"),
        ("graphs", {}),
        ("graphs", []),
        ("lacks", [1]),
        ("version", 1),
        ("surprise", 1),
    ],
)
def test_a_hostile_record_is_one_error(
    key: str, value: object, built: tuple[Path, BuildRecord, list[str]], tmp_path: Path
) -> None:
    values = json.loads((built[0] / RECORD).read_text())
    values[key] = value
    (tmp_path / RECORD).write_text(json.dumps(values))
    with pytest.raises(ExportError, match=f"{RECORD} is damaged"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"vision": 1}', '{"vision": {}}'])
def test_times_that_cannot_be_read_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "engines.json").write_text(text)
    assert read_times(tmp_path) == {}
    assert read_times(tmp_path / "nowhere") == {}


def test_packages_are_found_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.installed() == (Backend.RTX,)
    assert packages.version(Backend.TENSORRT) == ""
    with pytest.raises(ExportError, match="tensorrt is not installed") as caught:
        packages.load(Backend.TENSORRT)
    assert "NVIDIA" in caught.value.hint
    package = packages.load(Backend.RTX)
    assert {"80", "86", "89", "120"} <= set(packages.capabilities(package))
    assert packages.lacks(package) == ()
    older = SimpleNamespace(LayerType=SimpleNamespace(ATTENTION_INPUT=1), DataType=object())
    assert "writing the cache in place (TensorScatter)" in packages.lacks(older)  # type: ignore[arg-type]
    assert packages.capabilities(older) == ()  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ExportError):
        packages.load(Backend.RTX)


def test_a_library_that_is_missing_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ExportError, match=r"libnvinfer\.so\.11"):
        packages.load(Backend.TENSORRT)


@pytest.mark.parametrize(
    ("backend", "asked", "word"),
    [
        (Backend.RTX, ("80", "90"), "not for 90"),
        (Backend.RTX, ("",), "builds for"),
        (Backend.RTX, (), "not for none"),
        (Backend.TENSORRT, ("80",), "builds for the GPU that it runs on"),
    ],
)
def test_capabilities_that_cannot_be_had_are_told_with_those_that_can(
    backend: Backend, asked: tuple[str, ...], word: str
) -> None:
    (problem,) = packages.capability_problems(backend, asked)
    assert word in problem
    assert "--compute-capability" in problem
    assert not packages.capability_problems(Backend.RTX, ("120", "80"))
