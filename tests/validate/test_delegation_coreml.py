"""FLOPs of Core ML delegates, from the package in their payload."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("executorch")

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets.executorch_coreml_payload import PACKAGE, pack
from fastvlm_export.validate.delegation import gather
from fastvlm_export.validate.delegation_coreml import coreml_operators

from .mil.programs import ct, get_new_symbol, mb, save, types


def delegate(folder: Path, package: Path) -> Any:
    (folder / "made").mkdir(exist_ok=True)
    shutil.move(package, folder / "made" / PACKAGE)
    processed = memoryview(pack(folder / "made"))
    return SimpleNamespace(processed=processed, file=SimpleNamespace(source="x.pte"))


def flops(found: Any, longest: int = 0) -> dict[str, int]:
    works = gather(coreml_operators(cast("Any", found), longest))
    return {one.kind: one.flops for one in works}


def test_products_count_two_a_multiplication_and_moves_none(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        weight = np.ones((6, 2, 3, 3), np.float32)  # two groups of two channels
        image = mb.conv(x=x, weight=weight, groups=2, pad_type="same")
        rows = mb.reshape(x=image, shape=(6, 20))
        scores = mb.matmul(x=rows, y=rows, transpose_y=True)  # [6,6], over 20
        shares = mb.softmax(x=scores)
        mixed = mb.matmul(x=shares, y=rows)  # [6,20], over 6
        return mb.linear(x=mixed, weight=np.ones((7, 20), np.float32))

    package = save(tmp_path, build, {"x": np.zeros((1, 4, 4, 5), np.float32)})
    found = flops(delegate(tmp_path, package))
    assert found["conv"] == 2 * 6 * 20 * 2 * 9
    assert found["matmul"] == 2 * 6 * 6 * 20 + 2 * 6 * 20 * 6
    assert found["linear"] == 2 * 6 * 7 * 20
    assert found["softmax"] == 36
    assert found["reshape"] == 0
    assert "const" not in found


def test_a_length_that_only_a_run_tells_is_taken_at_its_bound(tmp_path: Path) -> None:
    @mb.program(
        input_specs=[mb.TensorSpec((1, get_new_symbol(), 4), dtype=types.fp32)],
        opset_version=ct.target.iOS18,
    )
    def program(x: Any) -> Any:
        return mb.linear(x=x, weight=np.ones((3, 4), np.float32))

    shape = ct.Shape((1, ct.RangeDim(1, 32), 4))
    model = ct.convert(
        program,
        inputs=[ct.TensorType(name="x", shape=shape)],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "saved.mlpackage"))
    assert flops(delegate(tmp_path, tmp_path / "saved.mlpackage"), 32)["linear"] == 2 * 32 * 4 * 3


def test_a_damaged_payload_is_an_error(tmp_path: Path) -> None:
    found = SimpleNamespace(processed=memoryview(b"no folder"), file=SimpleNamespace(source="x"))
    with pytest.raises(ExportError, match="damaged"):
        flops(found)
