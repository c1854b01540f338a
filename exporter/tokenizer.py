"""Text to token ids and back: a byte-level BPE read from a checkpoint folder.

Apple's folders hold `vocab.json`, `merges.txt` and `added_tokens.json` and no `tokenizer.json`;
the tokenizer is then put together from those as Qwen2's is: NFC, Qwen2's pre-tokenizer, bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from .errors import ExportError
from .json_file import LARGEST_SIZE, read_json, read_json_if_there

# How Qwen2 cuts text before BPE: contractions, letters, single digits, punctuation, white space.
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A tokenizer of Hugging Face's `tokenizers`, without templates: ids in, ids out."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self.vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens in it are parsed, none are added."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, None where the vocabulary has no such token."""
        found = self._inner.token_to_id(token)
        return None if found is None else int(found)

    def to_json(self) -> str:
        """The content of a Hugging Face `tokenizer.json`."""
        return str(self._inner.to_str(pretty=True))


@dataclass(frozen=True, kw_only=True)
class _Added:
    """A token beside the BPE vocabulary."""

    text: str
    id: int
    special: bool = True
    strip: tuple[bool, bool] = (False, False)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder; ExportError with every problem where it has none."""
    problems: list[str] = []
    tokenizer = collect_tokenizer(folder, problems)
    if tokenizer is None or problems:
        raise ExportError(
            "\n".join(problems), f"Put the tokenizer's files into {folder} and run again."
        )
    return tokenizer


def collect_tokenizer(folder: Path, problems: list[str]) -> Tokenizer | None:
    """As `read_tokenizer`, with problems noted instead of raised."""
    before = len(problems)
    try:
        if (folder / "tokenizer.json").exists():
            read_json(folder / "tokenizer.json", problems)
            if len(problems) > before:
                return None
            inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            inner = _qwen2(folder, problems)
        else:
            problems.append(
                "no tokenizer: neither tokenizer.json nor vocab.json with merges.txt is there"
            )
            return None
    except Exception as error:  # `tokenizers` raises plain Exception
        problems.append(f"the tokenizer cannot be read: {error}")
        return None
    inner.no_padding()
    inner.no_truncation()
    _add(inner, _added_tokens(folder, problems), problems)
    tokenizer = Tokenizer(inner)
    if not tokenizer.vocab_size:
        problems.append("the tokenizer has no tokens")
    return tokenizer if len(problems) == before else None


def _qwen2(folder: Path, problems: list[str]) -> tokenizers.Tokenizer:
    vocabulary = read_json(folder / "vocab.json", problems)
    ids = {token: vocabulary.integer(token, low=0) for token in vocabulary.values}
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    if len(merges) < len(pairs):
        problems.append("merges.txt has lines that are not two pieces")
    known = {token: id_ for token, id_ in ids.items() if id_ is not None}
    inner = tokenizers.Tokenizer(models.BPE(known, merges))
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    return inner


def _added_tokens(folder: Path, problems: list[str]) -> list[_Added]:
    """Tokens of added_tokens.json and tokenizer_config.json, by id; the latter knows more."""
    plain = read_json_if_there(folder, "added_tokens.json", problems)
    found: dict[str, _Added] = {}
    for token in plain.values:
        id_ = plain.integer(token, low=0)
        if id_ is not None:
            found[token] = _Added(text=token, id=id_)
    detailed = read_json_if_there(folder, "tokenizer_config.json", problems)
    detailed = detailed.section("added_tokens_decoder")
    for key in detailed.values:
        entry = detailed.section(key)
        text = entry.text("content")
        if not key.isascii() or not key.isdigit() or len(key) > 10 or int(key) > LARGEST_SIZE:
            problems.append(f"{detailed.where}: '{key}' is not a token id")
        elif text:
            found[text] = _Added(
                text=text,
                id=int(key),
                special=entry.flag("special") is not False,
                strip=(bool(entry.flag("lstrip")), bool(entry.flag("rstrip"))),
            )
    return sorted(found.values(), key=lambda token: token.id)


def _add(inner: tokenizers.Tokenizer, added: list[_Added], problems: list[str]) -> None:
    """Add what is not there yet, and check that every token got the id that its file states."""
    for token in added:
        if inner.token_to_id(token.text) is None:
            content = AddedToken(
                token.text,
                special=token.special,
                normalized=False,
                lstrip=token.strip[0],
                rstrip=token.strip[1],
            )
            (inner.add_special_tokens if token.special else inner.add_tokens)([content])
        got = inner.token_to_id(token.text)
        if got != token.id:
            problems.append(f"the tokenizer gives '{token.text}' the id {got}, not {token.id}")
