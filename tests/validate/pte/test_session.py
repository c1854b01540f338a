"""A bundle's program as a session without rounding: the cache, weights apart, what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets.executorch_session import ExecuTorchSession
from fastvlm_export.validate.executorch_exact import ExactExecuTorchSession

from ...targets.conftest import byte_tokenizer, worst
from ...targets.executorch_toys import CONTEXT, ROWS, SIDE, Toy

ROUNDING = 2e-6  # both compute in float32


def bundle(folder: Path, program: bytes, weights: bytes | None = None) -> Any:
    (folder / "model.pte").write_bytes(program)
    if weights is not None:
        (folder / "model.ptd").write_bytes(weights)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json(), "utf-8")
    artifact = {"external_weights": int(weights is not None)}
    said = {"resolution": SIDE, "image_tokens": ROWS, "context": CONTEXT, "artifact": artifact}
    return SimpleNamespace(path=folder, manifest=SimpleNamespace(**said))


@pytest.fixture(scope="module")
def whole(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bundle(tmp_path_factory.mktemp("whole"), toy.program.read_bytes())


@pytest.mark.parametrize("apart", [False, True])
def test_the_session_computes_what_the_runtime_does(
    toy: Toy, whole: Any, tmp_path: Path, apart: bool
) -> None:
    """In chunks, the cache kept from call to call, and again from the start."""
    opened = bundle(tmp_path, *toy.external) if apart else whole
    ours, theirs = ExactExecuTorchSession(opened), ExecuTorchSession(opened)
    draw = np.random.default_rng(0)
    pixels = draw.random((1, 3, SIDE, SIDE), dtype=np.float32)
    ids = np.array([[1, 258, 7, 9, 11]])
    features, words = theirs.encode_image(pixels), theirs.embed(ids)
    assert worst(ours.encode_image(pixels), features) <= ROUNDING
    assert np.array_equal(ours.embed(ids), words)
    embeds = np.concatenate([words, features], 1)
    for cuts in ((9,), (4, 1, 1, 3), (1,)):
        ours.reset()
        theirs.reset()
        begin = 0
        for count in cuts:
            chunk = embeds[:, begin : begin + count]
            assert worst(ours.decode(chunk), theirs.decode(chunk)) <= ROUNDING, cuts
            begin += count
        assert ours.past == sum(cuts)


def test_the_context_and_empty_calls_are_refused(whole: Any) -> None:
    session = ExactExecuTorchSession(whole)
    session.decode(session.embed(np.zeros((1, CONTEXT), dtype=np.int64)))
    with pytest.raises(ExportError, match=f"context holds {CONTEXT}"):
        session.decode(session.embed(np.array([[1]])))
    session.reset()
    with pytest.raises(ExportError, match="nothing to decode"):
        session.decode(session.embed(np.zeros((1, 0), dtype=np.int64)))
    with pytest.raises(ExportError, match="index out of range"):
        session.embed(np.array([[10**6]]))


def test_a_damaged_program_is_refused_before_anything_is_computed(
    toy: Toy,
    tmp_path: Path,
) -> None:
    whole = toy.program.read_bytes()
    for cut in (100, len(whole) - 400):
        with pytest.raises(ExportError, match=r"truncated|inside its header"):
            ExactExecuTorchSession(bundle(tmp_path, whole[:cut]))
