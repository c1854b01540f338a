"""Faults planted into exported packages, whose hashes are then made right: each fails the gate."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_export.exporter import pipeline
from fastvlm_export.exporter.bundle import MANIFEST, Bundle, files_of, open_bundle
from fastvlm_export.exporter.clock import Clock
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.progress import Silent
from fastvlm_export.exporter.samples import samples
from fastvlm_export.exporter.source import SourceRequest
from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.validate import proof
from fastvlm_export.validate.contract import compare_contract
from fastvlm_export.validate.parity import ParityResult, Stage
from fastvlm_export.validate.proof_types import Baseline, Proof
from fastvlm_export.validate.report import Report

with quiet_import():
    from coremltools.proto import MIL_pb2, Model_pb2

pytestmark = pytest.mark.e2e

DATA = Path("Data/com.apple.CoreML")


class Exported:
    """A bundle of the bundled model that passed, and what it was held to."""

    def __init__(self, path: Path, baseline: Baseline) -> None:
        self.path, self.baseline = path, baseline

    def with_fault(self, folder: Path, plant: Callable[[Path], None]) -> Proof:
        """The proof of a copy after `plant` has changed it and its manifest been made right."""
        copy = folder / "copy"
        shutil.copytree(self.path, copy)
        plant(copy)
        manifest = json.loads((copy / MANIFEST).read_text("utf-8"))
        manifest["files"] = {
            name: hashed for name, hashed in files_of(copy).items() if name in manifest["files"]
        }
        (copy / MANIFEST).write_text(json.dumps(manifest), "utf-8")
        return self.prove(open_bundle(copy))

    def prove(self, bundle: Bundle) -> Proof:
        images = samples(())[: len(self.baseline.recordings)]
        return proof.prove(
            self.baseline, bundle, images=images, plan=None, peer=None, clock=Clock(Silent())
        )


@pytest.fixture(scope="module", params=["fp16", "int4"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Exported]:
    found: list[Baseline] = []

    def examine(*arguments: Any) -> Baseline:
        found.append(proof.examine(*arguments))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "examine", examine)
        patch.setattr(proof, "QUESTIONS", 6)
        out = tmp_path_factory.mktemp(request.param) / "out"
        (outcome,) = pipeline.export(
            pipeline.ExportRequest(
                source=SourceRequest(), out=out, targets=("coreml",), recipe=request.param, steps=4
            )
        )
        assert outcome.passed
        # It passed on all images; a fault has to show on one.
        yield Exported(out, replace(found[0], answers=None, recordings=found[0].recordings[:1]))


FP16 = pytest.mark.parametrize("exported", ["fp16"], indirect=True)
INT4 = pytest.mark.parametrize("exported", ["int4"], indirect=True)

Change = Callable[[Any], None]


def edited(package: str, change: Change, function: str = "main") -> Callable[[Path], None]:
    """Change the operations of one function of a package."""

    def plant(bundle: Path) -> None:
        path = bundle / package / DATA / "model.mlmodel"
        model = Model_pb2.Model.FromString(path.read_bytes())
        found = model.mlProgram.functions[function]
        change(found.block_specializations[found.opset])
        path.write_bytes(model.SerializeToString())

    return plant


def operation(block: Any, kind: str, index: int) -> Any:
    return [o for o in block.operations if o.type == kind][index]


def scaled_after(kind: str, index: int, factors: tuple[float, ...]) -> Change:
    """Multiply what an operation gives, before anything reads it."""

    def change(block: Any) -> None:
        target = operation(block, kind, index)
        place = list(block.operations).index(target)
        output = target.outputs[0]
        final, dtype = output.name, output.type.tensorType.dataType
        names = [f"{final}_times_{i}" for i in range(len(factors))]
        output.name = names[0]
        for number, (factor, source) in enumerate(zip(factors, names, strict=True)):
            added = MIL_pb2.Operation(type="mul")
            made = added.outputs.add()
            made.CopyFrom(output)
            made.name = names[number + 1] if number + 1 < len(names) else final
            added.inputs["x"].arguments.add().name = source
            value = added.inputs["y"].arguments.add().value
            value.type.tensorType.dataType = dtype
            if dtype == MIL_pb2.DataType.FLOAT16:
                value.immediateValue.tensor.bytes.values = np.float16(factor).tobytes()
            else:
                value.immediateValue.tensor.floats.values.append(factor)
            block.operations.insert(place + 1 + number, added)

    return change


def swapped(kind: str, index: int, first: str = "x", second: str = "y") -> Change:
    def change(block: Any) -> None:
        inputs = operation(block, kind, index).inputs
        one, other = MIL_pb2.Argument(), MIL_pb2.Argument()
        one.CopyFrom(inputs[first])
        other.CopyFrom(inputs[second])
        inputs[first].CopyFrom(other)
        inputs[second].CopyFrom(one)

    return change


def first_broken(result: ParityResult | None) -> Stage | None:
    assert result is not None
    return result.first_broken


def check_caught(found: Proof, stage: Stage) -> None:
    """By how it behaves, or by what is stored; the first stage that any gate names is `stage`."""
    assert found.stored is not None
    gates = [first_broken(r) for r in (found.parity, found.exact)]
    gates.append(found.stored.first_broken)
    print(gates, found.exact.verdict if found.exact else "", found.stored.verdict)
    named = [one for one in gates if one is not None]
    assert named
    assert min(named, key=list(Stage).index) == stage
    assert not Report(source="digits", target="coreml", recipe="any", **vars(found)).passed


def check_weight_caught(found: Proof, stage: Stage, *names: str) -> None:
    """By what is stored, whether an answer shows it or not; no earlier stage behaves otherwise."""
    assert found.stored is not None
    assert not found.stored.passed
    assert found.stored.first_broken == stage
    report = Report(source="digits", target="coreml", recipe="any", **vars(found))
    assert not report.passed
    assert found.stored.verdict in report.verdict
    [first, *_] = [one for one in found.stored.functions if not one.passed]
    assert len(first.missing) == 1
    assert first.missing[0].endswith(names)
    order = list(Stage)
    broken = [first_broken(r) for r in (found.parity, found.exact)]
    assert all(order.index(b) >= order.index(stage) for b in broken if b is not None)


def test_the_untouched_bundle_passes(exported: Exported, tmp_path: Path) -> None:
    found = exported.with_fault(tmp_path, lambda _: None)
    assert found.contract.passed
    assert found.parity.passed
    assert found.exact is not None
    assert found.exact.passed
    assert found.stored is not None
    assert found.stored.passed


@FP16
@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("artifact", "capacity", 2048),
        ("artifact", "prefill_chunk", 64),
        ("artifact", "deployment_target", "iOS26"),
        ("graphs", "vision.main", {}),
        ("preprocessing", "std", [0.5, 0.5, 0.5]),
    ],
)
def test_a_manifest_that_its_packages_do_not_bear_out(
    exported: Exported, tmp_path: Path, section: str, key: str, value: object
) -> None:
    bundle = Path(shutil.copytree(exported.path, tmp_path / "copy"))
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    manifest[section][key] = value
    (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    found = compare_contract(open_bundle(bundle), exported.baseline.reference)
    assert not found.passed
    assert all(f"{section}.{key}" in one.key for one in found.differences), found.verdict


@pytest.mark.parametrize(
    ("package", "function", "kind", "index", "stage"),
    [
        ("vision.mlpackage", "main", "gelu", 7, Stage.IMAGE_FEATURES),
        ("vision.mlpackage", "main", "linear", -1, Stage.IMAGE_FEATURES),
        ("embedding.mlpackage", "main", "gather", 0, Stage.EMBEDDINGS),
        ("decoder.mlpackage", "prefill", "linear", 5, Stage.FIRST_TOKEN),
        ("decoder.mlpackage", "decode", "linear", 5, Stage.TEACHER_FORCED),
    ],
)
def test_an_output_scaled_by_a_thousandth_is_caught(
    exported: Exported,
    tmp_path: Path,
    package: str,
    function: str,
    kind: str,
    index: int,
    stage: Stage,
) -> None:
    change = scaled_after(kind, index, (1.001,))
    check_caught(exported.with_fault(tmp_path, edited(package, change, function)), stage)


@pytest.mark.parametrize(
    ("package", "function", "kind", "index", "stage"),
    [
        ("vision.mlpackage", "main", "sub", 0, Stage.IMAGE_FEATURES),
        ("decoder.mlpackage", "prefill", "sub", 1, Stage.FIRST_TOKEN),
        ("decoder.mlpackage", "decode", "sub", 0, Stage.TEACHER_FORCED),
    ],
)
def test_swapped_inputs_are_caught(
    exported: Exported,
    tmp_path: Path,
    package: str,
    function: str,
    kind: str,
    index: int,
    stage: Stage,
) -> None:
    plant = edited(package, swapped(kind, index), function)
    check_caught(exported.with_fault(tmp_path, plant), stage)


@FP16
@pytest.mark.parametrize(
    ("package", "function", "kind", "index", "stage"),
    [
        ("vision.mlpackage", "main", "conv", 20, Stage.IMAGE_FEATURES),
        ("decoder.mlpackage", "prefill", "silu", 1, Stage.FIRST_TOKEN),
    ],
)
def test_an_overflow_in_half_precision_is_caught(
    exported: Exported,
    tmp_path: Path,
    package: str,
    function: str,
    kind: str,
    index: int,
    stage: Stage,
) -> None:
    """x 2^13, then / 2^13: harmless to real numbers, infinite in float16 storage."""
    change = scaled_after(kind, index, (8192.0, 8192.0, 1 / 8192.0, 1 / 8192.0))
    found = exported.with_fault(tmp_path, edited(package, change, function))
    assert found.parity.first_broken == stage
    assert "NaN" in found.parity.verdict or "inf" in found.parity.verdict
    assert found.exact is not None
    assert found.exact.passed


def blobs(bundle: Path, package: str, function: str, kind: str, name: str) -> list[int]:
    """Offsets of the weights that operations of a kind read as `name`, in order."""
    model = Model_pb2.Model.FromString((bundle / package / DATA / "model.mlmodel").read_bytes())
    found = model.mlProgram.functions[function]
    block = found.block_specializations[found.opset]
    by_name = {out.name: o for o in block.operations for out in o.outputs}
    offsets = []
    for op in (o for o in block.operations if o.type == kind):
        source = op.attributes.get(name) or _bound(op, name, by_name)
        if source is not None and source.HasField("blobFileValue"):
            offsets.append(source.blobFileValue.offset)
    return offsets


def _bound(op: Any, name: str, by_name: dict[str, Any]) -> Any:
    argument = op.inputs[name].arguments[0]
    if argument.WhichOneof("binding") == "value":
        return argument.value
    source = by_name.get(argument.name)
    return source.attributes["val"] if source is not None and source.type == "const" else None


def with_weight(
    package: str, function: str, kind: str, name: str, dtype: Any, change: Callable[[Any], Any]
) -> Callable[[Path], None]:
    """Change one stored number of one weight of middle depth, at the place of its largest."""

    def plant(bundle: Path) -> None:
        offsets = blobs(bundle, package, function, kind, name)
        offset = offsets[len(offsets) // 2]
        path = bundle / package / DATA / "weights" / "weight.bin"
        data = bytearray(path.read_bytes())
        # A record's head: sentinel, kind, size in bytes, offset of the numbers (MLStorage).
        size, start = np.frombuffer(data, np.uint64, 2, offset + 8)
        numbers = np.frombuffer(data, dtype, int(size) // np.dtype(dtype).itemsize, int(start))
        numbers = numbers.copy()
        place = int(np.abs(numbers.astype(np.float32)).argmax())
        numbers[place] = change(numbers[place])
        data[int(start) : int(start) + int(size)] = numbers.tobytes()
        path.write_bytes(bytes(data))

    return plant


@FP16
@pytest.mark.parametrize(
    ("package", "function", "kind", "stage"),
    [
        ("vision.mlpackage", "main", "conv", Stage.IMAGE_FEATURES),
        ("decoder.mlpackage", "prefill", "linear", Stage.FIRST_TOKEN),
        ("embedding.mlpackage", "main", "gather", Stage.EMBEDDINGS),
    ],
)
def test_one_changed_weight_is_caught(
    exported: Exported, tmp_path: Path, package: str, function: str, kind: str, stage: Stage
) -> None:
    name = "x" if kind == "gather" else "weight"
    plant = with_weight(package, function, kind, name, np.float16, lambda w: -w)
    check_weight_caught(exported.with_fault(tmp_path, plant), stage, ".weight")


@INT4
@pytest.mark.parametrize(
    ("package", "function", "stage"),
    [
        ("vision.mlpackage", "main", Stage.IMAGE_FEATURES),
        ("embedding.mlpackage", "main", Stage.EMBEDDINGS),
        ("decoder.mlpackage", "prefill", Stage.FIRST_TOKEN),
    ],
)
def test_one_changed_integer_is_caught(
    exported: Exported, tmp_path: Path, package: str, function: str, stage: Stage
) -> None:
    kind = "constexpr_blockwise_shift_scale"
    plant = with_weight(package, function, kind, "data", np.uint8, lambda q: q ^ 0x44)
    check_weight_caught(exported.with_fault(tmp_path, plant), stage, ".weight")


@FP16
def test_a_truncated_or_foreign_package_is_one_error(exported: Exported, tmp_path: Path) -> None:
    def truncate(bundle: Path) -> None:
        path = bundle / "vision.mlpackage" / DATA / "weights" / "weight.bin"
        path.write_bytes(path.read_bytes()[:1000])

    def replace_model(bundle: Path) -> None:
        path = bundle / "decoder.mlpackage" / DATA / "model.mlmodel"
        path.write_bytes(b"PK\x03\x04 something else")

    for number, plant in enumerate((truncate, replace_model)):
        with pytest.raises(ExportError) as caught:
            exported.with_fault(tmp_path / str(number), plant)
        assert caught.value.hint
        assert ".mlpackage" in caught.value.message
