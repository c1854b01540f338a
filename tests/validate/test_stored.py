"""Packages of small models, one stored number changed at a time, against the programs."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.quantize.recipes import RECIPES, Recipe
from fastvlm_export.targets import apple_app, coreml, coreml_graphs, coreml_model
from fastvlm_export.targets.coreml_stored import Stored, stored
from fastvlm_export.validate.mil.contents import Contents, fingerprint
from fastvlm_export.validate.parity import Stage
from fastvlm_export.validate.stored import StoredWeights, compare_stored

from ..targets.conftest import CONTEXT, lively_model, make_spec, programs_of
from ..targets.small_coreml import CAPACITY, CHUNK, small_coreml

with quiet_import():
    from coremltools.proto import MIL_pb2, Model_pb2

DATA = Path("Data/com.apple.CoreML")


@dataclass(frozen=True, kw_only=True)
class Written:
    """A small model's programs and their packages in a folder."""

    programs: dict[str, ExportedProgram]
    folder: Path

    def compare(self, folder: Path | None = None, **artifact: Any) -> StoredWeights:
        manifest = SimpleNamespace(
            target="coreml", context=CONTEXT, artifact=artifact or {"capacity": CAPACITY}
        )
        bundle: Any = SimpleNamespace(path=folder or self.folder, manifest=manifest)
        return compare_stored(bundle, self.programs)

    def changed(self, folder: Path, change: Callable[[Path], None]) -> StoredWeights:
        copy = folder / "copy"
        shutil.copytree(self.folder, copy)
        change(copy)
        return self.compare(copy)

    def stored(self, package: str) -> tuple[Stored, ...]:
        return stored(self.programs[package.partition(".")[0]], capacity=CAPACITY)


def write(model: FastVLM, recipe: Recipe, folder: Path) -> Written:
    spec, adapted = make_spec(model), coreml.adapt(recipe)
    programs = programs_of(model, spec, adapted)
    coreml_graphs.write(programs, spec, CHUNK, CAPACITY, "iOS18", folder)
    return Written(programs=programs, folder=folder)


@pytest.fixture(
    scope="module", params=["asymmetric", "lut6", "lut4", "int4", "int8", "fp16", "fp32"]
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    small = small_coreml(tmp_path_factory, request.param)
    return Written(programs=small.programs, folder=small.folder)


def with_recipes(*names: str) -> Any:
    return pytest.mark.parametrize("written", names, indirect=True)


PACKAGES = {
    coreml_model.VISION: {"main": Stage.IMAGE_FEATURES},
    coreml_model.EMBEDDING: {"main": Stage.EMBEDDINGS},
    coreml_model.DECODER: {"prefill": Stage.FIRST_TOKEN, "decode": Stage.TEACHER_FORCED},
}


def test_every_number_is_read_as_often_as_by_the_program(written: Written) -> None:
    """Not once more: then one of two equal tensors could change, and the other be taken for it."""
    found = written.compare()
    assert found.passed, found.verdict
    for package, functions in PACKAGES.items():
        wanted: Counter[Any] = Counter()
        for tensor in written.stored(package):
            wanted[fingerprint(tensor.numbers())] += tensor.reads
        contents = Contents(written.folder / package)
        for function in functions:
            reads = contents.reads(function)
            assert {key: reads[key] for key in wanted} == dict(wanted)


def test_every_constant_of_the_programs_is_accounted_for(written: Written) -> None:
    for package in PACKAGES:
        program = written.programs[package.partition(".")[0]]
        names = {name for tensor in written.stored(package) for name in tensor.names}
        nodes = {node.name: node for node in program.graph.nodes}
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT or not nodes[spec.arg.name].users:
                continue
            if spec.target not in names:  # nothing but zero points of weights is left out
                assert str(spec.target).endswith("_zero_point")
                zeros = {**program.state_dict, **program.constants}[str(spec.target)]
                assert not zeros.any()


def values(package: Path) -> Iterator[tuple[str, Any, Any]]:
    """Function, operation and Value message of every number in a package's model."""
    model = Model_pb2.Model.FromString((package / DATA / "model.mlmodel").read_bytes())
    for name, function in model.mlProgram.functions.items():
        for operation in function.block_specializations[function.opset].operations:
            for value in operation.attributes.values():
                yield name, operation, value
            for argument in operation.inputs.values():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "value":
                        yield name, operation, binding.value


def records(package: Path) -> dict[int, tuple[int, int, int]]:
    """Offset of each entry of the weight file -> type, start and size in bytes of its numbers."""
    data = (package / DATA / "weights/weight.bin").read_bytes()
    offsets = {v.blobFileValue.offset for *_, v in values(package) if v.HasField("blobFileValue")}
    found = {}
    for offset in sorted(offsets):
        kind = int(np.frombuffer(data, np.uint32, 1, offset + 4)[0])
        size, start = map(int, np.frombuffer(data, np.uint64, 2, offset + 8))
        if kind != 14:  # int32: shapes, positions and masks of the lowering, no weights
            found[offset] = kind, start, size
    return found


def flip(package: Path, *places: int) -> None:
    """Change the lowest bit of these bytes of a weight file."""
    path = package / DATA / "weights/weight.bin"
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("package", PACKAGES)
def test_one_changed_bit_anywhere_is_found(written: Written, package: str, tmp_path: Path) -> None:
    """In each tensor of the file in turn, at a random byte."""
    generator = np.random.default_rng(7)
    entries = list(records(written.folder / package).values())
    shutil.copytree(written.folder / package, tmp_path / package)
    wanted = [(tensor, fingerprint(tensor.numbers())) for tensor in written.stored(package)]
    named = set()
    for _, start, size in entries:
        place = start + int(generator.integers(size))
        flip(tmp_path / package, place)
        contents = Contents(tmp_path / package)
        missing: set[str] = set()
        for function in PACKAGES[package]:
            reads = contents.reads(function)
            missing |= {tensor.name for tensor, key in wanted if reads[key] < tensor.reads}
        assert missing
        named |= missing
        flip(tmp_path / package, place)
    small = {tensor.name for tensor, _ in wanted if tensor.numbers().size < 10}
    assert named | small == {tensor.name for tensor, _ in wanted}


@with_recipes("fp16", "int4")
@pytest.mark.parametrize("package", PACKAGES)
def test_the_first_stage_that_reads_it_and_the_tensor_are_named(
    written: Written, package: str, tmp_path: Path
) -> None:
    _, start, size = max(records(written.folder / package).values(), key=lambda record: record[2])
    found = written.changed(tmp_path, lambda copy: flip(copy / package, start + size // 2))
    assert not found.passed
    stages = PACKAGES[package]
    assert found.first_broken == next(iter(stages.values()))
    assert [one.stage for one in found.functions if not one.passed] == list(stages.values())
    largest = max(written.stored(package), key=lambda tensor: tensor.numbers().nbytes)
    assert {one.missing for one in found.functions if not one.passed} == {(largest.name,)}
    assert largest.name in found.verdict
    assert package in found.verdict


@with_recipes("int8")
def test_a_changed_static_range_is_found(written: Written, tmp_path: Path) -> None:
    """Of a `quantize` and its `dequantize` alike: no more than where values are clamped changes."""

    def change(copy: Path) -> None:
        path = copy / coreml_model.VISION / DATA / "model.mlmodel"
        model = Model_pb2.Model.FromString(path.read_bytes())
        main = model.mlProgram.functions["main"]
        operations = main.block_specializations[main.opset].operations
        constants = {o.outputs[0].name: o for o in operations if o.type == "const"}
        quantize_ = next(o for o in operations if o.type == "quantize")
        dequantize = next(o for o in operations if o.type == "dequantize")
        for operation in (quantize_, dequantize):
            binding = operation.inputs["scale"].arguments[0]
            value = binding.value
            if binding.WhichOneof("binding") == "name":
                value = constants[binding.name].attributes["val"]
            raw = value.immediateValue.tensor.bytes
            raw.values = (np.frombuffer(raw.values, np.uint16) + 1).astype(np.uint16).tobytes()
        path.write_bytes(model.SerializeToString())

    found = written.changed(tmp_path, change)
    [broken] = [one for one in found.functions if not one.passed]
    assert broken.stage is Stage.IMAGE_FEATURES
    assert {"quantize_per_tensor scale", "dequantize_per_tensor scale"} <= set(broken.missing)


@with_recipes("fp32", "fp16")
@pytest.mark.parametrize("factor", [1.001, 1.0])
def test_a_number_that_no_program_has_is_foreign(
    written: Written, factor: float, tmp_path: Path
) -> None:
    """But 1 is what a reciprocal divides, and changes nothing elsewhere."""

    def change(copy: Path) -> None:
        path = copy / coreml_model.DECODER / DATA / "model.mlmodel"
        model = Model_pb2.Model.FromString(path.read_bytes())
        decode = model.mlProgram.functions["decode"]
        operations = decode.block_specializations[decode.opset].operations
        silu = next(o for o in operations if o.type == "silu")
        value = silu.inputs["alpha"].arguments.add().value  # read by nobody, but it is there
        value.type.tensorType.dataType = MIL_pb2.DataType.FLOAT32
        value.immediateValue.tensor.floats.values.append(factor)
        path.write_bytes(model.SerializeToString())

    found = written.changed(tmp_path, change)
    broken = [one for one in found.functions if not one.passed]
    if factor == 1:
        assert not broken
        return
    assert [one.function for one in broken] == ["decode"]
    assert found.first_broken is Stage.TEACHER_FORCED
    [name] = broken[0].foreign
    assert "(silu), alpha" in name
    assert name in found.verdict


def test_one_of_two_equal_biases_is_missed(tmp_path: Path) -> None:
    """Small tensors are stored once for each layer, large ones once for all."""
    model = lively_model(300, tied=True, depths=(1, 1, 1, 1, 1), layers=2)
    first, second = (model.decoder.layers[i].self_attn for i in (0, 1))
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            ours, theirs = getattr(first, name), getattr(second, name)
            theirs.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias)
    written = write(model, RECIPES["fp16"], tmp_path)
    assert written.compare().passed
    twins = ("decoder.layers.0.self_attn.q_proj.bias", "decoder.layers.1.self_attn.q_proj.bias")
    bias = next(t for t in written.stored(coreml_model.DECODER) if t.name == twins[0]).numbers()
    package = tmp_path / coreml_model.DECODER
    data = (package / DATA / "weights/weight.bin").read_bytes()
    starts = [start for _, start, _ in records(package).values()]
    copies = [s for s in starts if data[s : s + bias.nbytes] == bias.tobytes()]
    assert copies
    flip(package, copies[-1])
    found = written.compare()
    assert found.first_broken is Stage.FIRST_TOKEN
    assert {one.missing for one in found.functions[2:]} == {twins}


@with_recipes("fp16", "int8")
def test_apples_layout_has_the_tower_alone(written: Written, tmp_path: Path) -> None:
    path = tmp_path / apple_app.PACKAGE
    coreml_graphs.write_tower(written.programs["vision"], "iOS18", path)
    found = written.compare(tmp_path, layout=apple_app.LAYOUT)
    assert found.passed, found.verdict
    [tower] = found.functions
    whole = {tensor.name for tensor in written.stored(coreml_model.VISION)}
    projector = {name for name in whole if name.startswith("projector.")}
    ranges = {"quantize", "dequantize"}
    named = {name for name in whole if name.partition("_")[0] not in ranges}
    first = stored(
        written.programs["vision"], until=coreml_graphs.unprojected(written.programs["vision"])
    )
    cut = {tensor.name for tensor in first}
    assert tower.tensors == len(first)
    assert named - cut == projector
    flip(path, max(records(path).values(), key=lambda record: record[2])[1])
    assert written.compare(tmp_path, layout=apple_app.LAYOUT).first_broken is Stage.IMAGE_FEATURES


def test_a_constant_that_changes_nothing_need_not_be_stored(tmp_path: Path) -> None:
    model = lively_model(300, tied=True, depths=(1, 1, 1, 1, 1), layers=2)
    with torch.no_grad():
        model.decoder.norm.weight.fill_(1)
    written = write(model, RECIPES["fp32"], tmp_path)
    assert written.compare().passed
    reads = {tensor.name: tensor.reads for tensor in written.stored(coreml_model.DECODER)}
    assert reads["decoder.norm.weight"] == 0
    assert reads["decoder.layers.0.input_layernorm.weight"] == 1


@with_recipes("fp16")
def test_what_is_no_package_is_an_error(written: Written, tmp_path: Path) -> None:
    for change, named in (
        (lambda copy: shutil.rmtree(copy / coreml_model.EMBEDDING), coreml_model.EMBEDDING),
        (lambda copy: (copy / coreml_model.VISION / DATA / "model.mlmodel").write_bytes(b"?"), ""),
    ):
        with pytest.raises(ExportError, match=r"\.mlpackage") as caught:
            written.changed(tmp_path / (named or "other"), change)
        assert named in caught.value.message
        assert caught.value.hint
    with pytest.raises(ExportError, match="positions"):
        written.compare(written.folder, capacity="many")


def test_nothing_compared_is_no_pass() -> None:
    nothing = StoredWeights(functions=())
    assert not nothing.passed
    assert nothing.verdict == "No stored weights were compared."
    assert nothing.first_broken is None
