"""A bundle, one stored number changed at a time, against the programs that it was made from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

pytest.importorskip("executorch", reason="needs executorch")

from fastvlm_export.targets.executorch_contents import Contents
from fastvlm_export.targets.executorch_file import read
from fastvlm_export.targets.executorch_model import METHODS, PROGRAM, VISION
from fastvlm_export.targets.executorch_stored import expected, fingerprint
from fastvlm_export.validate.parity_types import Stage
from fastvlm_export.validate.stored import compare_stored
from fastvlm_export.validate.stored_types import StoredWeights

Named = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Written:
    """Programs and the folder of the file that they were lowered to."""

    programs: Mapping[str, ExportedProgram]
    folder: Path

    def compare(self, folder: Path | None = None) -> StoredWeights:
        manifest = SimpleNamespace(target="executorch", artifact={"backend": "xnnpack"})
        bundle: Any = SimpleNamespace(path=folder or self.folder, manifest=manifest)
        return compare_stored(bundle, self.programs)

    def constants(self, graph: str) -> Named:
        program = self.programs[graph]
        return {**program.state_dict, **program.constants}

    def changed(self, folder: Path, before: bytes, after: bytes) -> StoredWeights:
        """The comparison once every copy of some bytes has become others."""
        content = (self.folder / PROGRAM).read_bytes()
        assert before in content
        folder.mkdir(exist_ok=True)
        (folder / PROGRAM).write_bytes(content.replace(before, after))
        return self.compare(folder)


@pytest.fixture(scope="module")
def written(executorch_int4: Path, int4_programs: Mapping[str, ExportedProgram]) -> Written:
    """All kinds of numbers: 4 and 8 bits, static and affine layers, and convolutions in float32."""
    return Written(programs=int4_programs, folder=executorch_int4)


def test_the_file_holds_what_the_programs_do(written: Written) -> None:
    found = written.compare()
    assert found.passed, found.verdict
    assert [one.function for one in found.functions] == list(METHODS.values())
    assert [one.stage for one in found.functions] == [
        Stage.IMAGE_FEATURES,
        Stage.EMBEDDINGS,
        Stage.FIRST_TOKEN,
    ]


def test_every_constant_of_the_programs_is_looked_up(written: Written) -> None:
    """All but weights' zero points, which are zero."""
    for program in written.programs.values():
        names = {tensor.name for tensor in expected(program).tensors}
        nodes = {node.name: node for node in program.graph.nodes}
        for spec in program.graph_signature.input_specs:
            if spec.kind is not InputKind.USER_INPUT and nodes[spec.arg.name].users:
                assert spec.target in names or str(spec.target).endswith("_zero_point")


def test_the_integers_are_those_of_the_recipe(written: Written) -> None:
    """Each kind by a name of its own, looked up in the file by hand."""
    file = read(written.folder / PROGRAM)
    reads = {name: Contents(method).reads for name, method in file.methods.items()}
    kinds = {kind for found in reads.values() for kind, _ in found}
    assert {"int4", "bfloat16", "int8", "int32", "float32"} <= kinds
    for graph, method in METHODS.items():
        for tensor in expected(written.programs[graph]).tensors:
            prints = [set(map(fingerprint, form)) for form in tensor.forms()]
            assert not tensor.reads or any(one <= set(reads[method]) for one in prints), tensor.name


def low_bit(values: bytes) -> bytes:
    """The same bytes, the lowest bit of the middle one turned over."""
    changed = bytearray(values)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def faults(written: Written) -> Iterator[tuple[str, bytes]]:
    """The names of tensors, one of each kind, and the bytes that they should be stored as."""
    decoder, vision = written.constants("decoder"), written.constants("vision")
    table = written.constants("embedding")
    packed = next(name for name in decoder if name.endswith("0.mlp.up_proj.weight"))
    halves = (decoder[packed].int() + 8).to(torch.uint8)
    yield packed, (halves[:, ::2] | halves[:, 1::2] << 4).numpy().tobytes()
    scale = next(name for name in decoder if name.endswith("1.mlp.up_proj.scale"))
    yield scale, decoder[scale].bfloat16().view(torch.int16).numpy().tobytes()
    for name in ("projector.0.weight", "projector.0.scale", "projector.2.bias"):
        yield name, vision[name].detach().numpy().tobytes()
    bias = next(name for name, value in vision.items() if value.dtype is torch.int32)
    yield bias, vision[bias].numpy().tobytes()
    for name, value in table.items():
        yield name, value.detach().numpy().tobytes()


def test_one_changed_number_is_named(written: Written, tmp_path: Path) -> None:
    for number, (name, stored) in enumerate(faults(written)):
        found = written.changed(tmp_path / str(number), stored, low_bit(stored))
        assert not found.passed, name
        missing = [one for function in found.functions for one in function.missing]
        assert name in missing, (name, missing)
        assert name in found.verdict
        assert any(function.foreign for function in found.functions), name


def test_a_changed_range_is_named(written: Written, tmp_path: Path) -> None:
    ranges = expected(written.programs["vision"]).ranges
    node, one = next(iter(ranges.items()))
    before = np.float32(one.scale).tobytes()
    found = written.changed(tmp_path, before, low_bit(before))
    broken = found.functions[0]
    assert broken.function == VISION
    assert f"{node}'s scale and zero point" in broken.missing
    assert any("static range" in name for name in broken.foreign)
    assert found.first_broken is Stage.IMAGE_FEATURES
