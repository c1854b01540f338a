"""Graphs for parsers that lack operators: the same numbers in older operators."""

import importlib.util
import shutil
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import (
    tensorrt,
    tensorrt_build,
    tensorrt_package,
    tensorrt_plan,
    tensorrt_worker,
)
from fastvlm_export.targets.base import Options
from fastvlm_export.targets.tensorrt_build import write_plan
from fastvlm_export.targets.tensorrt_lacking import REPLACEABLE, UNCHANGED
from fastvlm_export.targets.tensorrt_older import OPERATORS, without
from fastvlm_export.targets.tensorrt_onnx_session import TensorRTOnnxSession, load
from fastvlm_export.targets.tensorrt_package import NO_FUSED_ATTENTION, Backend
from fastvlm_export.targets.tensorrt_plan import GRAPHS, onnx_file
from fastvlm_export.targets.tensorrt_record import BuildRecord, read_record
from fastvlm_export.validate.tensorrt_build import GraphProof

from . import tensorrt_bundles as toys
from . import tensorrt_opened
from .conftest import normal, worst
from .tensorrt_toys import Lowered, shared, worst_of_all

ALL = tuple(OPERATORS)
CASES = {"fp32": (20, 5e-6), "fp16": (16, 1e-2), "bf16": (24, 8e-2)}
"""Recipe -> numbers in a head, and the limit of test_tensorrt_lowering."""


def written_out(lowered: Lowered, operators: tuple[str, ...], folder: Path) -> TensorRTOnnxSession:
    """A session of the graphs without the operators, written to a folder of their own."""
    shutil.copytree(lowered.folder / "onnx", folder / "onnx")
    for name in GRAPHS:
        older = without(lowered.folder / onnx_file(name), operators)
        if older.counts:
            (folder / onnx_file(name)).write_bytes(older.model)
        onnx.checker.check_model(folder / onnx_file(name))
    manifest = SimpleNamespace(context=lowered.spec.context)
    bundle: Any = SimpleNamespace(path=folder, manifest=manifest)
    return TensorRTOnnxSession(bundle)


@pytest.fixture(scope="module", params=list(CASES))
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return shared(tmp_path_factory, request.param, CASES[request.param][0])


@pytest.mark.parametrize("operators", [*((one,) for one in ALL), ALL], ids="+".join)
def test_numbers_are_the_same(
    lowered: Lowered, operators: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    limit = CASES[request.node.callspec.params["lowered"]][1]
    ours = written_out(lowered, operators, tmp_path)
    for name in GRAPHS:
        kinds = {node.op_type for node in onnx.load(tmp_path / onnx_file(name)).graph.node}
        assert not kinds & set(operators)
    found = worst_of_all(ours, lowered.session, lowered.spec)
    print(found)
    assert max(found.values()) < limit, found
    assert found["embeddings"] == 0
    found = worst_of_all(ours, lowered.reference, lowered.spec)
    assert max(found.values()) < limit, found


@pytest.mark.parametrize("lowered", ["fp32", "fp16"], indirect=True)
def test_padding_behind_the_mask_changes_nothing(
    lowered: Lowered, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    limit = CASES[request.node.callspec.params["lowered"]][1]
    written_out(lowered, ALL, tmp_path)
    sessions = [load(folder / onnx_file("decoder")) for folder in (lowered.folder, tmp_path)]
    caches = sessions[0].get_inputs()[2:]
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[caches[0].type]
    pasts = [{one.name: np.zeros(one.shape, dtype) for one in caches} for _ in sessions]
    valid = 0
    for new, attended in ((7, 12), (1, 16), (1, 16), (5, 14), (1, lowered.spec.context)):
        valid += new
        mask = (np.arange(attended) < valid).astype(np.int64)[None]
        embeds = normal(1, new, lowered.spec.decoder.hidden_size, seed=valid)
        given = {"inputs_embeds": embeds, "attention_mask": mask}
        theirs, ours = (
            session.run(None, {**given, **past})
            for session, past in zip(sessions, pasts, strict=True)
        )
        assert [one.dtype for one in ours] == [one.dtype for one in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert worst(a.astype(np.float32), b.astype(np.float32)) < limit
        pasts = [
            dict(zip(past, out[1:], strict=True))
            for past, out in zip(pasts, (theirs, ours), strict=True)
        ]


needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)


class Older(ModuleType):
    """tensorrt_rtx with a parser that lacks operators, and says so only where it is `honest`."""

    def __init__(self, operators: Collection[str], *, honest: bool = True) -> None:
        super().__init__("tensorrt_rtx")
        self.package = package = tensorrt_package.load(Backend.RTX)
        self.seen: list[set[str]] = []
        seen = self.seen

        class Parser(package.OnnxParser):  # type: ignore[misc, name-defined]
            def supports_operator(self, name: str) -> bool:
                known = name not in operators or not honest
                return known and bool(super().supports_operator(name))

            def parse(self, model: bytes, path: str) -> bool:
                return super().parse(self._strip(onnx.ModelProto.FromString(model)), path)

            def parse_from_file(self, path: str) -> bool:
                return super().parse(self._strip(onnx.load(path, load_external_data=False)), path)

            def _strip(self, model: onnx.ModelProto) -> bytes:
                """Operators that are lacking under names that no parser knows."""
                seen.append({node.op_type for node in model.graph.node})
                for node in model.graph.node:
                    if node.op_type in operators:
                        node.op_type += "_"
                return model.SerializeToString()

            def get_error(self, index: int) -> Any:
                error = super().get_error(index)
                return SimpleNamespace(
                    node_name=error.node_name,
                    desc=error.desc,
                    node_operator=lambda: error.node_operator().removesuffix("_"),
                )

        self.OnnxParser = Parser

    def __getattr__(self, name: str) -> Any:
        return getattr(self.package, name)


def built(
    lowered: Lowered, recipe: str, package: Older, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> BuildRecord:
    """Engines of the lowered graphs, by that package."""
    shutil.copytree(lowered.folder / "onnx", folder / "onnx")
    options = Options(compute_capabilities=("80", "120"))
    write_plan(folder, tensorrt.plan_of(lowered.graphs, lowered.spec, RECIPES[recipe], options))
    monkeypatch.setattr(tensorrt_worker, "load", lambda _: package)
    monkeypatch.setattr(tensorrt_build, "run", tensorrt_worker.work)
    return tensorrt_build.build(folder, lambda _: None, engines=True)


@needs_rtx
@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("lowered", ["fp16"], indirect=True)
def test_a_parser_that_lacks_all_builds_engines_and_the_record_says_so(
    lowered: Lowered, honest: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, layers = Older(ALL, honest=honest), lowered.spec.decoder.layers
    record = built(lowered, "fp16", package, tmp_path, monkeypatch)
    assert record.built
    assert read_record(tmp_path) == record
    assert record.lacks == tuple(tensorrt_package.OPERATORS.values())
    assert not package.seen[-1] & set(ALL), "the decoder, which is built last"
    for name, graph in record.graphs.items():
        network = graph.network
        assert network is not None
        assert (network.odd, network.absent, network.folded) == ((), (), ()), name
        assert network.nodes == len(lowered.onnx(name).graph.node)
        signature = lowered.graphs[name].signature
        assert network.inputs == signature["inputs"]
        assert list(network.outputs) == list(signature["outputs"])
        assert (tmp_path / onnx_file(name)).read_bytes() == (
            lowered.folder / onnx_file(name)
        ).read_bytes()
    decoder = record.graphs["decoder"].network
    assert decoder is not None
    there = Counter(node.op_type for node in lowered.onnx("decoder").graph.node)
    assert decoder.written_out == {name: there[name] for name in sorted(ALL)}
    assert min(decoder.written_out.values()) > 0
    assert not {"KV_CACHE_UPDATE", "ROTARY_EMBEDDING"} & decoder.kinds.keys()
    attention = {f"decoder.layers.{i}.self_attn/Attention" for i in range(layers)}
    assert attention <= decoder.float32.keys()
    assert not attention & lowered.graphs["decoder"].float32_nodes.keys()
    proof: Any = SimpleNamespace(
        network=decoder, plan=tensorrt_plan.read_plan(tmp_path).graphs["decoder"]
    )
    reasons = GraphProof.reasons.__get__(proof)
    assert {reasons[node][1] for node in attention} == {NO_FUSED_ATTENTION}
    planned = lowered.graphs["decoder"].float32_nodes
    assert {n: why for n, (_, why) in reasons.items() if n not in attention}.items() <= (
        planned.items()
    )


@needs_rtx
@pytest.mark.parametrize("operator", ALL)
@pytest.mark.parametrize("lowered", ["bf16"], indirect=True)
def test_only_what_the_parser_lacks_is_written_out(
    lowered: Lowered, operator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = built(lowered, "bf16", Older([operator]), tmp_path, monkeypatch)
    found = [graph.network for graph in record.graphs.values() if graph.network]
    assert {name for one in found for name in one.written_out} == {operator}
    assert record.lacks == (tensorrt_package.OPERATORS[operator],)
    assert not any((*one.odd, *one.absent, *one.folded) for one in found)


@needs_rtx
def test_data_files_are_read_from_where_they_lie(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = shared(tmp_path_factory, "int4", data_files=True)
    older = without(lowered.folder / onnx_file("decoder"), ALL)
    model = onnx.ModelProto.FromString(older.model)
    assert len(older.model) < 200_000
    assert {item.data_location for item in model.graph.initializer} == {0, 1}
    record = built(lowered, "int4", Older(ALL), tmp_path / "older", monkeypatch)
    for graph in record.graphs.values():
        assert graph.network is not None
        assert graph.engine is not None
        assert graph.engine.bytes > graph.network.weight_bytes
    found = worst_of_all(
        written_out(lowered, ALL, tmp_path / "onnx runtime"), lowered.session, lowered.spec
    )
    assert max(found.values()) < CASES["fp16"][1], found


def test_a_session_takes_turns_with_two_sets_of_buffers(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    exported = tensorrt_opened.exported(tmp_path_factory)
    path = exported.folder / onnx_file("decoder")
    path.write_bytes(without(path, ALL).model)
    ours = exported.opens(backend=Backend.TENSORRT, in_place=False).session
    assert "two sets" in ours.how
    for _ in range(2):
        ours.reset()
        exported.eager.reset()
        for step, new in enumerate((250, *[1] * 10, 240, *[1] * 3)):
            embeds = normal(1, new, 64, seed=step)
            assert worst(ours.decode(embeds), exported.eager.decode(embeds)) < 2e-5, step


@pytest.mark.parametrize("lowered", ["fp32"], indirect=True)
def test_the_opset_is_the_oldest_that_has_all(lowered: Lowered) -> None:
    def opset(*operators: str) -> tuple[int, int]:
        older = without(lowered.folder / onnx_file("decoder"), operators)
        model = onnx.ModelProto.FromString(older.model)
        return model.opset_import[0].version, model.ir_version

    assert opset(*ALL) == (21, 10)
    assert opset("TensorScatter") == (23, 11)
    assert opset("RotaryEmbedding") == (24, 11)


@pytest.mark.parametrize("lowered", ["fp16"], indirect=True)
def test_what_is_new_is_named_after_what_it_is_of_and_what_is_alike_is_shared(
    lowered: Lowered,
) -> None:
    older = without(lowered.folder / onnx_file("decoder"), ALL)
    nodes = onnx.ModelProto.FromString(older.model).graph.node
    old = {node.name for node in lowered.onnx("decoder").graph.node}
    assert len({node.name for node in nodes}) == len(nodes)
    assert {node.name for node in nodes} - old == older.origins.keys()
    assert set(older.origins.values()) <= old
    assert all(new.startswith(f"{of}/") for new, of in older.origins.items())
    places = [node for node in nodes if node.name.endswith("TensorScatter/GreaterOrEqual")]
    assert len(places) == 1, "where new positions go is decided once for all layers"


def test_nothing_is_written_where_nothing_lacks(tmp_path: Path) -> None:
    toys.folder(tmp_path)
    assert without(tmp_path / onnx_file("vision"), ALL) is UNCHANGED
    assert without(tmp_path / "not there", ()) is UNCHANGED
    assert OPERATORS.keys() == set(REPLACEABLE)


def test_a_file_that_is_no_onnx_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    with pytest.raises(ExportError, match=r"graph\.onnx can't be read"):
        without(path, ALL)
    path.write_bytes(b"nonsense" * 100)
    with pytest.raises(ExportError, match=r"graph\.onnx can't be read"):
        without(path, ALL)


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "word"),
    [
        ("Attention", "qkv", {"is_causal": 1}, "is_causal = 1"),
        ("Attention", "qkvf", {}, "a mask of FLOAT"),
        ("Attention", "qk", {}, "2 inputs"),
        ("RotaryEmbedding", "qcs", {}, "3 inputs"),
        ("RotaryEmbedding", "qcsp", {"interleaved": 1}, "interleaved = 1"),
        ("RMSNormalization", "qw", {"axis": 1}, "axis = 1"),
        ("TensorScatter", "qkp", {"mode": "circular"}, "mode = 'circular'"),
        ("TensorScatter", "qkp", {"axis": 1}, "axis = 1"),
    ],
)
def test_forms_that_are_not_ours_are_refused_by_name(
    operator: str, inputs: str, attributes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    heads = {name: [1, 2, 4, 8] for name in "qkv"}
    shapes = {**heads, "f": [4, 4], "w": [8], "c": [9, 4], "s": [9, 4], "p": [1, 4]}
    values = [
        helper.make_tensor_value_info(name, 7 if name == "p" else 1, shapes[name])
        for name in inputs
    ]
    node = helper.make_node(operator, list(inputs), ["y"], f"my/{operator}", **attributes)
    out = helper.make_tensor_value_info("y", 1, None)
    path = tmp_path / "graph.onnx"
    path.write_bytes(toys.model([node], values, [out], {}).SerializeToString())
    with pytest.raises(ExportError, match=word) as caught:
        without(path, ALL)
    assert f"'my/{operator}' ({operator})" in caught.value.message
