"""Reading packages: functions and weights are shared, damage and foreign files are one error."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.validate.mil import open_model
from fastvlm_export.validate.mil.blobs import BlobFile
from fastvlm_export.validate.mil.numbers import BY_NAME
from fastvlm_export.validate.mil.package import open_package

from .programs import ct, get_new_symbol, mb, normal, save, types

X = normal(2, 16).astype(np.float16)
WEIGHT = normal(16, 16, seed=1).astype(np.float16)


def linear(x: Any, cache: Any) -> Any:
    scale = (np.abs(normal(16, 1, seed=2)) + 0.1).astype(np.float16)
    data = (
        np.random.default_rng(0)
        .integers(-8, 8, (16, 16))
        .astype(types.nptype_from_builtin(types.int4))
    )
    hidden = mb.linear(x=x, weight=WEIGHT)
    packed = mb.constexpr_blockwise_shift_scale(data=data, scale=scale)
    stored = mb.coreml_update_state(state=cache, value=mb.linear(x=hidden, weight=packed))
    return mb.softmax(x=stored, axis=-1)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    return save(folder, linear, {"x": X}, states={"cache": (2, 16)})


@pytest.fixture
def copied(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "copy.mlpackage"))


def model_file(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/model.mlmodel"


def weight_file(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/weights/weight.bin"


def refused(package: Path, match: str, function: str = "main") -> ExportError:
    with pytest.raises(ExportError, match=match) as raised:
        open_model(package, function)
    assert raised.value.hint
    return raised.value


def test_what_is_no_package(tmp_path: Path, copied: Path) -> None:
    refused(tmp_path / "none.mlpackage", "does not exist")
    refused(model_file(copied), "is no folder")
    refused(tmp_path, "has no Manifest.json")
    refused(copied, "has no function 'decode'; it has main", "decode")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "Manifest.json is no JSON"),
        ("[]", "does not say where the model is"),
        ('{"itemInfoEntries": {}, "rootModelIdentifier": "a"}', "does not say where"),
        ('{"itemInfoEntries": {"a": {"path": 7}}, "rootModelIdentifier": "a"}', "does not say"),
        ('{"itemInfoEntries": {"a": {"path": "x"}}, "rootModelIdentifier": "a"}', "is missing"),
        ('{"itemInfoEntries": {"a": {"path": "../../../x"}}, "rootModelIdentifier": "a"}',
         "outside the package"),
        ('{"itemInfoEntries": {"a": {"path": "/etc/passwd"}}, "rootModelIdentifier": "a"}',
         "outside the package"),
        ('{"itemInfoEntries": {"a": {"path": "a\\u0000"}}, "rootModelIdentifier": "a"}',
         "no possible file"),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_name_the_model(copied: Path, content: str, match: str) -> None:
    (copied / "Manifest.json").write_text(content)
    refused(copied, match)


def test_damaged_files(copied: Path) -> None:
    model, weights = model_file(copied), weight_file(copied)
    whole, numbers = model.read_bytes(), weights.read_bytes()
    weights.write_bytes(numbers[: len(numbers) // 2])
    assert "truncated" in refused(copied, "weight.bin has").message
    weights.write_bytes(numbers[:32])
    refused(copied, "is no weight file")
    weights.write_bytes(numbers[:64] + bytes(64) + numbers[128:])
    refused(copied, "has no entry at 64")
    weights.write_bytes(b"")
    refused(copied, "is no weight file")
    weights.unlink()
    refused(copied, r"weight\.bin is missing")
    weights.write_bytes(numbers)
    model.write_bytes(whole[: len(whole) // 2])
    refused(copied, "is no Core ML model")
    model.write_bytes(b"")
    refused(copied, "holds no model, not an ML program")
    model.unlink()
    refused(copied, r"model\.mlmodel is missing")


def edited(package: Path, change: Any) -> Path:
    """The package after `change` of its Model message."""
    spec = ct.utils.load_spec(str(model_file(package)))
    change(spec)
    model_file(package).write_bytes(spec.SerializeToString())
    return package


def operations(spec: Any) -> Any:
    return spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations


def test_a_program_of_something_else(copied: Path) -> None:
    def unknown(spec: Any) -> None:
        for operation in operations(spec):
            if operation.type == "softmax":
                operation.type = "soft_maximum"

    error = refused(edited(copied, unknown), "soft_maximum 'softmax_0'")
    assert "function 'main'" in error.message

    def network(spec: Any) -> None:
        spec.neuralNetwork.layers.add()

    refused(edited(copied, network), "holds neuralNetwork, not an ML program")


def test_compressed_weights_that_do_not_fit(copied: Path) -> None:
    def flatten(spec: Any) -> None:
        for operation in operations(spec):
            if operation.type == "constexpr_blockwise_shift_scale":
                scale = operation.inputs["scale"].arguments[0].value.type.tensorType
                del scale.dimensions[1]
                scale.rank = 1

    refused(edited(copied, flatten), r"shift_scale .* cannot be expanded: blocks of \[16, 16\]")


def test_weights_outside_the_package(copied: Path) -> None:
    def outside(spec: Any) -> None:
        for operation in operations(spec):
            if operation.type == "const" and operation.attributes["val"].HasField("blobFileValue"):
                value = operation.attributes["val"].blobFileValue
                value.fileName = "@model_path/../../../weight.bin"

    refused(edited(copied, outside), "outside the package")


def test_inputs_that_are_not_as_declared(package: Path) -> None:
    model = open_model(package, "main")
    assert model.inputs == {"x": (2, 16)}
    state = model.make_state()
    assert set(state) == {"cache"} and not state["cache"].any()
    for inputs, match in (
        ({}, "x is missing"),
        ({"x": X, "y": X}, "y is no input"),
        ({"x": X[:1]}, r"x is float16 \[1, 16\], but it takes float16 \[2, 16\]"),
        ({"x": X.astype(np.float32)}, "x is float32"),
        ({"x": X.tolist()}, "x is list, not an array"),
    ):
        with pytest.raises(ExportError, match=match) as raised:
            model.predict(inputs, state)  # type: ignore[arg-type]
        assert "x: float16 [2, 16]" in raised.value.hint


def test_a_flexible_shape_is_checked_against_its_range(tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1, get_new_symbol()))])
    def program(x: Any) -> Any:
        return mb.relu(x=x)

    shape = ct.Shape((1, ct.RangeDim(1, 5, default=2)))
    model = ct.convert(
        program,
        convert_to="mlprogram",
        inputs=[ct.TensorType(name="x", shape=shape)],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    path = tmp_path / "flexible.mlpackage"
    model.save(str(path))
    opened = open_model(path, "main")
    assert opened.inputs == {"x": (1, -1)}
    for size in (1, 5):
        (result,) = opened.predict({"x": normal(1, size)}).values()
        assert result.shape == (1, size)
    with pytest.raises(ExportError, match=r"\[1, 6\], but it takes float32 \[1, 1\.\.5\]"):
        opened.predict({"x": normal(1, 6)})


def test_two_models_of_a_package_share_its_weights_until_it_changes(copied: Path) -> None:
    first, second = open_package(copied), open_package(copied)
    assert first is second
    one, two = open_model(copied, "main"), open_model(copied, "main")
    shared = [
        a.data_ptr()
        for a, b in zip(one._program.slots, two._program.slots, strict=True)
        if a is not None and b is not None and a.data_ptr() == b.data_ptr()
    ]
    assert len(shared) >= 2
    whole = weight_file(copied).read_bytes()
    weight_file(copied).write_bytes(whole)
    changed = model_file(copied)
    changed.write_bytes(changed.read_bytes() + b"")
    assert open_package(copied) is not first


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("int4", -8, 7), ("uint1", 0, 1), ("uint2", 0, 3), ("uint3", 0, 7), ("uint4", 0, 15),
     ("uint6", 0, 63), ("uint8", 0, 255), ("int8", -128, 127), ("int16", -9, 9),
     ("uint16", 0, 9), ("int32", -9, 9), ("uint32", 0, 9), ("fp16", -9, 9), ("fp32", -9, 9)],
)  # fmt: skip
def test_weight_files_are_read_as_coremltools_writes_them(
    tmp_path: Path, kind: str, low: int, high: int
) -> None:
    from coremltools.libmilstoragepython import _BlobStorageWriter  # noqa: PLC0415

    dtype = BY_NAME[kind]
    values = np.random.default_rng(0).integers(low, high, 37, endpoint=True).astype(dtype.numpy)
    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    name = {"fp32": "float"}.get(kind, kind)
    written = values.view(np.uint16) if kind == "fp16" else values
    getattr(writer, f"write_{name}_data")(np.ascontiguousarray(written))
    offset = getattr(writer, f"write_{name}_data")(np.ascontiguousarray(written))
    del writer
    np.testing.assert_array_equal(BlobFile(path).read(offset, dtype, 37), values)
    with pytest.raises(ExportError, match="bytes at"):
        BlobFile(path).read(offset, dtype, 370)
    other = BY_NAME["int8" if kind != "int8" else "uint8"]
    with pytest.raises(ExportError, match=f"holds {kind} at"):
        BlobFile(path).read(offset, other, 37)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_files_give_an_error_or_a_result(copied: Path, seed: int) -> None:
    """Whatever is in the files, the interpreter neither crashes nor raises anything else."""
    rng = random.Random(seed)  # noqa: S311
    files = [model_file(copied), weight_file(copied), copied / "Manifest.json"]
    whole = {file: file.read_bytes() for file in files}
    results = 0
    for _ in range(120):
        file = rng.choice(files)
        data = bytearray(whole[file])
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(len(data))
            data[at] = rng.choice((0, 255, rng.randrange(256), data[at] ^ 1 << rng.randrange(8)))
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        file.write_bytes(bytes(data))
        try:
            model = open_model(copied, "main")
            model.predict({"x": X}, model.make_state())
            results += 1
        except ExportError:
            pass
        file.write_bytes(whole[file])
    assert 0 < results < 120
