"""ExecuTorch programs as sessions: right numbers from right ones, one error from all others."""

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import executorch_file, executorch_proof
from fastvlm_export.targets.executorch_flatbuffer import read_table
from fastvlm_export.targets.executorch_session import ExecuTorchSession

from .conftest import byte_tokenizer
from .executorch_toys import CONTEXT, ROWS, SIDE, Toy


def bundle_of(folder: Path, program: bytes, **changed: Any) -> Any:
    """What a session reads of a bundle, with the byte tokenizer (259 words)."""
    (folder / "model.pte").write_bytes(program)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json(), "utf-8")
    said = {"resolution": SIDE, "image_tokens": ROWS, "context": CONTEXT, "artifact": {}}
    return SimpleNamespace(path=folder, manifest=SimpleNamespace(**(said | changed)))


@pytest.fixture(scope="module")
def session(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> ExecuTorchSession:
    folder = tmp_path_factory.mktemp("bundle")
    return ExecuTorchSession(bundle_of(folder, toy.program.read_bytes()))


@torch.no_grad()
def test_the_session_computes_what_the_modules_do(toy: Toy, session: ExecuTorchSession) -> None:
    draw = np.random.default_rng(0)
    pixels = draw.random((1, 3, SIDE, SIDE), dtype=np.float32)
    ids = np.array([[1, 258, 7]])
    features, words = session.encode_image(pixels), session.embed(ids)
    expected = toy.modules["vision_encoder"](torch.from_numpy(pixels)).numpy()
    assert np.allclose(features, expected, atol=1e-5)
    assert np.array_equal(words, toy.modules["token_embedding"](torch.from_numpy(ids)).numpy())
    embeds = np.concatenate([words, features], 1)
    whole = toy.modules["text_decoder"](torch.from_numpy(embeds), torch.arange(7))[:, -1].numpy()
    for cuts in ((7,), (3, 7), (1, 2, 3, 4, 5, 6, 7)):
        session.reset()
        begin = 0
        for end in cuts:
            logits = session.decode(embeds[:, begin:end])
            begin = end
        assert logits.shape == whole.shape == (1, 260)
        assert np.abs(logits - whole).max() < 1e-4, cuts


def test_the_cache_takes_the_context_and_no_more(session: ExecuTorchSession) -> None:
    session.reset()
    session.decode(session.embed(np.zeros((1, CONTEXT), dtype=np.int64)))
    with pytest.raises(ExportError, match=f"context holds {CONTEXT}"):
        session.decode(session.embed(np.array([[1]])))


def test_a_wrong_id_is_an_error_with_a_next_step(session: ExecuTorchSession) -> None:
    with pytest.raises(ExportError, match="token_embedding") as raised:
        session.embed(np.array([[5000]]))
    assert "fastvlm-export" in raised.value.hint


def test_opening_says_nothing_and_leaves_no_process(
    toy: Toy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import psutil  # noqa: PLC0415

    ExecuTorchSession(bundle_of(tmp_path, toy.program.read_bytes()))
    assert capfd.readouterr() == ("", "")
    assert not psutil.Process().children()


def _renamed(old: bytes, new: bytes) -> Any:
    assert len(old) == len(new)
    return lambda content: content.replace(old, new)


@pytest.mark.parametrize(
    ("change", "said", "words"),
    [
        (_renamed(b"text_decoder", b"text_decodes"), {}, "no method 'text_decoder'"),
        (_renamed(b"get_max_seq_len", b"got_max_seq_len"), {}, "no method 'get_max_seq_len'"),
        (_renamed(b"XnnpackBackend", b"XnnpickBackend"), {}, "needs the backend XnnpickBackend"),
        (_renamed(b"aten::embedding", b"aten::embeddink"), {}, "operators that the runtime lacks"),
        (None, {"resolution": 32}, r"float32\[1,3,16,16\], not float32\[1,3,32,32\]"),
        (None, {"image_tokens": 5}, "output 1 of method 'vision_encoder'"),
        (None, {"context": 64}, "'get_max_seq_len' gives 32, the manifest's context is 64"),
        (None, {"artifact": {"external_weights": 1}}, "has no model.ptd"),
        (lambda content: content[: len(content) // 2], {}, "truncated"),
    ],
)
def test_each_wrong_program_is_one_error(
    toy: Toy, tmp_path: Path, change: Any, said: dict[str, Any], words: str
) -> None:
    content = toy.program.read_bytes()
    bundle = bundle_of(tmp_path, change(content) if change else content, **said)
    with pytest.raises(ExportError, match=words) as raised:
        ExecuTorchSession(bundle)
    assert "fastvlm-export" in raised.value.hint


def test_a_tokenizer_larger_than_the_logits_is_refused(toy: Toy, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, toy.program.read_bytes())
    tokenizer = byte_tokenizer()
    tokenizer._inner.add_special_tokens([f"<|extra_{n}|>" for n in range(2)])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
    with pytest.raises(ExportError, match="ids up to 260, the logits of 'text_decoder' are 260"):
        ExecuTorchSession(bundle)


def _aborting(content: bytes) -> bytes:
    """The gather's table is a number: no reader of files can see it, the runtime aborts."""
    size = executorch_file.parse(memoryview(content), "model.pte").program_bytes
    table = read_table(memoryview(content)[:size], executorch_file.program_schema(), "Program")
    (plan,) = (one for one in table.execution_plan if one.name == "token_embedding")
    args = plan.chains[0].instructions[0].instr_args.args
    number = next(i for i, v in enumerate(plan.values) if v.val and v.val.kind in ("Int", "Bool"))
    before = struct.pack(f"<{1 + len(args)}I", len(args), *args)
    after = struct.pack(f"<{1 + len(args)}I", len(args), number, *args[1:])
    assert content.count(before) == 1
    return content.replace(before, after)


def test_a_program_that_ends_its_process_is_an_error_in_ours(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="ends the process that runs it") as raised:
        ExecuTorchSession(bundle_of(tmp_path, _aborting(toy.program.read_bytes())))
    assert "fastvlm-export" in raised.value.hint


def test_a_program_that_does_not_end_is_stopped(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch_proof, "PROBE_SECONDS", 0.01)
    with pytest.raises(ExportError, match="does not come to an end"):
        ExecuTorchSession(bundle_of(tmp_path, toy.program.read_bytes()))
