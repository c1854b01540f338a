"""ExecuTorch programs for Core ML, run by the interpreter, against PyTorch; and planted faults."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.exporter.spec import ExportSpec
from fastvlm_export.quantize.apply import quantize
from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.quantize.recipes import RECIPES, Precision, Recipe
from fastvlm_export.targets import coreml_recipes, executorch_coreml, executorch_file
from fastvlm_export.targets.coreml_model import MAIN
from fastvlm_export.targets.eager import ProgramSession
from fastvlm_export.targets.executorch_coreml_payload import BACKEND
from fastvlm_export.targets.executorch_model import DECODER, EMBEDDING, METHODS, PROGRAM, VISION
from fastvlm_export.validate.executorch_coreml import CoreMLDelegateSession, CoreMLPackages, compare
from fastvlm_export.validate.mil import open_model

from ..targets.conftest import CONTEXT, RESOLUTION, lively_model, make_spec, normal, worst

with quiet_import():
    from executorch.exir import to_edge

LIMIT = 5e-6


class Lowered:
    """A small model under a recipe, as one program."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        model = lively_model(300, tied=True, depths=(1, 1, 1, 1, 1), layers=2)
        self.spec: ExportSpec = make_spec(model)
        self.table = model.decoder.embed_tokens.weight.detach()
        folded = reparameterize(model).model
        self.programs: Mapping[str, ExportedProgram] = quantize(
            folded, recipe, self.spec, None, lambda _: None
        ).programs
        self.pte = self.lowered()
        (folder / PROGRAM).write_bytes(self.pte)
        self.bundle = bundle_in(folder)

    def lowered(self) -> bytes:
        return executorch_coreml.lower(self.programs, self.spec, {"get_max_seq_len": CONTEXT}).pte

    def reference(self) -> ProgramSession:
        return ProgramSession(self.programs, self.spec.decoder, CONTEXT, exact=True)


def bundle_in(folder: Path) -> Any:
    return SimpleNamespace(path=folder, manifest=SimpleNamespace(context=CONTEXT))


USED = {
    "fp32": RECIPES["fp32"],
    # Integers of 4 and 8 bits that no image has to be shown for: whole recipes are test_coreml.py's
    "integers": Recipe(
        name="integers", decoder=Precision(bits=4, group_size=16), head=Precision(bits=8)
    ),
}


@pytest.fixture(scope="module", params=list(USED))
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    assert coreml_recipes.problems(USED[request.param], None) == []
    return Lowered(tmp_path_factory.mktemp(request.param), USED[request.param])


FP32 = pytest.mark.parametrize("lowered", ["fp32"], indirect=True)


def test_every_method_computes_what_its_program_does(lowered: Lowered) -> None:
    ours, reference = CoreMLDelegateSession(lowered.bundle, exact=True), lowered.reference()
    pixels = normal(1, 3, RESOLUTION, RESOLUTION)
    assert worst(ours.encode_image(pixels), reference.encode_image(pixels)) < LIMIT
    ids = np.arange(300)[None, ::7]
    assert worst(ours.embed(ids), reference.embed(ids)) < LIMIT
    for turn in range(2):  # the second finds what the first left in the states
        for step, length in enumerate((9, 1, 1, 30, 1)):
            embeds = normal(1, length, 64, seed=10 * turn + step)
            assert worst(ours.decode(embeds), reference.decode(embeds)) < LIMIT
        ours.reset()
        reference.reset()


@FP32
def test_a_prompt_may_be_cut_anywhere_and_fill_the_context(lowered: Lowered) -> None:
    session, embeds = CoreMLDelegateSession(lowered.bundle), normal(1, CONTEXT, 64)
    whole = session.decode(embeds)
    session.reset()
    for start, end in ((0, 1), (1, 70), (70, CONTEXT)):
        piece = session.decode(embeds[:, start:end])
    assert worst(piece, whole) < LIMIT
    with pytest.raises(ExportError, match="context holds"):
        session.decode(embeds[:, :1])


@FP32
def test_each_method_is_one_delegate_that_the_runtime_knows(lowered: Lowered) -> None:
    file = executorch_file.read(lowered.bundle.path / PROGRAM)
    assert set(file.methods) == {VISION, EMBEDDING, DECODER} == set(METHODS.values())
    assert file.backends == (BACKEND,)
    for method in file.methods.values():
        assert (len(method.delegates), method.kernels, method.buffers) == (1, (), ())
    assert file.constant_methods["get_max_seq_len"] == (CONTEXT,)
    decoder = file.methods[DECODER]
    shapes = [one.shape for one in (*decoder.inputs, *decoder.outputs)]
    assert shapes == [f"float32[<=1,<={CONTEXT},<=64]", f"int64[<={CONTEXT}]", "float32[1,1,300]"]


@FP32
def test_the_same_programs_give_the_same_bytes(lowered: Lowered) -> None:
    assert lowered.lowered() == lowered.pte


@FP32
def test_only_the_decoder_keeps_states_and_takes_any_number_of_rows(lowered: Lowered) -> None:
    packages = CoreMLPackages(lowered.bundle)
    models = {name: open_model(path, MAIN) for name, path in packages.paths.items()}
    assert [name for name, model in models.items() if model.make_state()] == [DECODER]
    assert models[DECODER].inputs == {"inputs_embeds": (1, -1, 64), "cache_position": (-1,)}
    assert models[EMBEDDING].inputs == {"input_ids": (1, -1)}
    assert models[VISION].inputs == {"pixel_values": (1, 3, RESOLUTION, RESOLUTION)}
    identifiers = {metadata["identifier"] for metadata in packages.metadata.values()}
    assert len(identifiers) == 3  # the runtime keeps compiled packages by them


def test_every_stored_number_is_the_programs(lowered: Lowered, tmp_path: Path) -> None:
    found = list(compare(lowered.bundle, lowered.programs))
    assert [one.function for one in found] == [VISION, EMBEDDING, DECODER]
    assert all(one.passed and one.numbers > 1000 for one in found)
    row = lowered.table[123].numpy().tobytes()
    assert 1 <= lowered.pte.count(row) <= 2  # in the table, and in the head where both are float
    changed = lowered.pte.replace(row, row[:-1] + bytes([row[-1] ^ 1]), 1)
    (tmp_path / PROGRAM).write_bytes(changed)
    found = list(compare(bundle_in(tmp_path), lowered.programs))
    [broken] = [one.function for one in found if not one.passed]
    assert broken in (EMBEDDING, DECODER)


def opened(folder: Path, pte: bytes) -> CoreMLDelegateSession:
    (folder / PROGRAM).write_bytes(pte)
    return CoreMLDelegateSession(bundle_in(folder))


@FP32
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (b"CoreMLBackend", b"QnnBackendABC", "runs QnnBackendABC besides Core ML"),
        (b"text_decoder", b"text_encoder", "no method 'text_decoder'"),
        (b'"sedon"', b'"sedom"', "does not end in a table of files"),
        (b'"outputNames"', b'"outputNamez"', "outputNames"),
        (b', "cache_position"', b', "other_position"', "the package others"),
        (b'"inputs_embeds", "cache_position"', b'"cache_position", "inputs_embeds"', "takes"),
    ],
)
def test_a_changed_program_is_one_error(
    lowered: Lowered, tmp_path: Path, old: bytes, new: bytes, named: str
) -> None:
    assert old in lowered.pte
    with pytest.raises(ExportError, match=named):
        opened(tmp_path, lowered.pte.replace(old, new)).decode(normal(1, 3, 64))


def test_operators_beside_the_delegate_are_named(tmp_path: Path) -> None:
    class Plus(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    program = torch.export.export(Plus(), (torch.zeros(1, 3, 8, 8),))
    with quiet_import():
        pte = to_edge(dict.fromkeys(METHODS.values(), program)).to_executorch().buffer
    with pytest.raises(ExportError, match=r"vision_encoder.* runs .*aten::add\.out besides"):
        opened(tmp_path, pte)
