"""Every number of a TensorRT bundle's graphs is the programs'; one that is not is named."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.validate import stored

from ..targets.tensorrt_toys import Lowered, shared


@pytest.fixture
def lowered(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Lowered:
    """A copy to be damaged."""
    recipe, head_dim = request.param
    # Numbers in a head, and data files, as other tests have them that share it.
    found = shared(tmp_path_factory, recipe, head_dim, data_files=recipe == "int4")
    shutil.copytree(found.folder / "onnx", tmp_path / "onnx")
    return dataclasses.replace(found, folder=tmp_path)


def compared(lowered: Lowered) -> stored.StoredWeights:
    bundle: Any = SimpleNamespace(
        path=lowered.folder, manifest=SimpleNamespace(target="tensorrt", artifact={})
    )
    assert stored.has_stored(bundle)
    return stored.compare_stored(bundle, lowered.programs)


def damage(path: Path, name: str) -> None:
    """Change one number of one tensor."""
    model = onnx.load(path)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    if tensor.data_type == onnx.TensorProto.INT4:
        raw = bytearray(tensor.raw_data)
        raw[5] ^= 1
        tensor.raw_data = bytes(raw)
    else:
        values = numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[3] += np.asarray(1, values.dtype)
        tensor.CopyFrom(numpy_helper.from_array(values, name))
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "lowered", [("fp32", 20), ("fp16", 16), ("int4", 16), ("fp8", 16)], indirect=True
)
def test_all_numbers_are_there_and_a_changed_one_is_named(lowered: Lowered) -> None:
    found = compared(lowered)
    assert found.passed, found.verdict
    assert all(one.tensors and one.numbers > 1000 for one in found.functions)
    path = lowered.folder / "onnx/decoder.onnx"
    initializers = onnx.load(path).graph.initializer
    integers = [t.name for t in initializers if t.data_type == onnx.TensorProto.INT4]
    floats = [t.name for t in initializers if "k_proj.bias" in t.name]
    damage(path, integers[0] if integers else floats[0])
    found = compared(lowered)
    assert not found.passed
    assert str(found.first_broken) == "first_token"
    broken = found.functions[2]
    assert len(broken.missing) == len(broken.foreign) == 1
    assert "decoder.layers" in broken.missing[0]


@pytest.mark.parametrize("lowered", [("fp32", 20)], indirect=True)
def test_a_damaged_graph_is_an_error_that_says_what_to_do(lowered: Lowered) -> None:
    path = lowered.folder / "onnx/vision.onnx"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ExportError, match="can't be read") as caught:
        compared(lowered)
    assert "--target tensorrt" in caught.value.hint
    with pytest.raises(ExportError, match=r"vision\.onnx") as caught:
        assert lowered.session
    assert "--target tensorrt" in caught.value.hint
