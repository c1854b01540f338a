import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.prompt import prompt_ids, qwen_2_prompt
from fastvlm_export.exporter.tokenizer import Tokenizer, read_tokenizer

from .. import checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    checkpoints.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return read_tokenizer(folder)


def test_merges_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 262
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert ids == [260, 258, tokenizer.token_to_id("o"), 261]
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.token_to_id("no such token") is None


@given(st.text())
def test_every_text_survives(text: str) -> None:
    import unicodedata  # noqa: PLC0415

    tokenizer = _tokenizer()
    normal = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text)) == normal


_CACHE: list[Tokenizer] = []


def _tokenizer() -> Tokenizer:
    if not _CACHE:
        import tempfile  # noqa: PLC0415

        with tempfile.TemporaryDirectory() as name:
            checkpoints.save_tokenizer(Path(name))
            _CACHE.append(read_tokenizer(Path(name)))
    return _CACHE[0]


def test_digits_are_single_and_contractions_apart(tmp_path: Path) -> None:
    """Qwen2's pre-tokenizer never lets a merge cross digits, words or a contraction."""
    checkpoints.save_tokenizer(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab |= {"12": 262, "l'": 263}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n1 2\nl '\n")
    (tmp_path / "added_tokens.json").write_text("{}")
    tokenizer = read_tokenizer(tmp_path)
    assert 262 not in tokenizer.encode("12") and 263 not in tokenizer.encode("l'll")


def test_as_tokenizer_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    again = read_tokenizer(tmp_path)
    text = qwen_2_prompt("How many? 123 äöü 中文\n\n  x")
    assert again.encode(text) == tokenizer.encode(text)
    assert again.to_json() == tokenizer.to_json()


def test_prompt(tokenizer: Tokenizer) -> None:
    ids = prompt_ids(tokenizer, "hello", image_token_id=262, image_tokens=3)
    assert ids.count(262) == 3 and ids[0] == 260


def test_added_tokens_of_tokenizer_config(folder: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((folder / name).read_text())
    entries = {
        "259": {"content": "<|plain|>", "special": False},
        "260": {"content": "<|special|>", "special": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("<|plain|><|special|>")) == "<|plain|>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", '{"a": "b"}'),
        ("vocab.json", '{"a": -1}'),
        ("vocab.json", "[]"),
        ("merges.txt", "h e l\n"),
        ("merges.txt", "unknown pieces\n"),
        ("added_tokens.json", '{"<x>": "y"}'),
        ("added_tokens.json", '{"<x>": 9999}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"999": {"content": "y"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"260": 3}}'),
        ("tokenizer_config.json", "{"),
    ],
)
def test_broken_files(name: str, content: str, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(ExportError):
        read_tokenizer(tmp_path)


def test_merges_that_are_not_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_bytes((folder / "vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ExportError):
        read_tokenizer(tmp_path)
