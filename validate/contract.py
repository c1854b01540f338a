"""What a bundle says beside its numbers, held against the checkpoint and its own files.

A client reads sizes, preprocessing, special tokens and the tokenizer from files beside the
artifact. A wrong value there makes a right artifact answer wrongly, and no comparison of numbers
sees it. So every such value is made again from the checkpoint, or read from the artifact, and
compared.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import targets
from ..exporter import prompt
from ..exporter.bundle import MANIFEST, Bundle
from ..targets.base import Statement
from .formats import plain

if TYPE_CHECKING:
    from .proof_types import Reference

SHOWN = 3
"""Differences in a verdict; the report lists every one."""
LONGEST = 80
"""Characters of a value that are shown."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A value that is not what it should be. `key` is empty where a whole file is meant."""

    file: str
    key: str
    found: str
    wanted: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.key}" if self.key else self.file
        return f"{where} is {self.found}, not {self.wanted}"


@dataclass(frozen=True, kw_only=True)
class Contract:
    """The files that were compared, how many values they have, and those that differ."""

    files: tuple[str, ...]
    values: int
    differences: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        """Whether anything was compared and nothing differs."""
        return self.values > 0 and not self.differences

    @property
    def verdict(self) -> str:
        """One sentence: the first values that differ, or that none does."""
        if not self.values:
            return "Nothing beside the numbers was compared."
        if not self.differences:
            return f"What clients read beside the numbers is right: {self.values} values."
        more = len(self.differences) - SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        shown = "; ".join(map(str, self.differences[:SHOWN]))
        return f"What clients read is not what the checkpoint says: {shown}{rest}."

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "files": list(self.files),
            "values": self.values,
            "differences": [dataclasses.asdict(one) for one in self.differences],
        }


def compare_contract(bundle: Bundle, reference: "Reference") -> Contract:
    """Compare the manifest and every client's file. Raises ExportError for a damaged artifact."""
    target = targets.get(bundle.manifest.target)
    stated = [
        _manifest(bundle, reference),
        *target.statements(bundle, reference.spec, reference.programs),
    ]
    pairs = [(one.where, json_value(one.found), json_value(one.wanted)) for one in stated]
    return Contract(
        files=tuple(dict.fromkeys(where for where, *_ in pairs)),
        values=sum(_count(wanted) for *_, wanted in pairs),
        differences=tuple(
            one for where, found, wanted in pairs for one in _differences(where, "", found, wanted)
        ),
    )


def json_value(value: Any) -> Any:
    """The value as a JSON file would give it back."""
    return json.loads(json.dumps(plain(value)))


def _manifest(bundle: Bundle, reference: "Reference") -> Statement:
    """What every target's manifest says of the checkpoint."""
    spec, checkpoint, manifest = reference.spec, reference.checkpoint, bundle.manifest
    wanted = {
        "resolution": spec.preprocessing.resolution,
        "context": spec.context,
        "image_tokens": spec.image_tokens,
        "preprocessing": dataclasses.asdict(spec.preprocessing),
        "prompt_template": prompt.TEMPLATE,
        "image_token": prompt.IMAGE_TOKEN,
        "image_token_id": spec.image_token_id,
        "eos_token_ids": spec.eos_token_ids,
        "model": dataclasses.asdict(checkpoint.config),
    }
    stated = dataclasses.asdict(manifest)
    return Statement(where=MANIFEST, found={key: stated[key] for key in wanted}, wanted=wanted)


def _count(value: Any) -> int:
    """Values in lists and tables, at any depth."""
    if isinstance(value, dict):
        return sum(map(_count, value.values()))
    return sum(map(_count, value)) if isinstance(value, list) else 1


def _differences(file: str, key: str, found: Any, wanted: Any) -> Iterator[Difference]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in dict.fromkeys((*wanted, *found)):
            inner = f"{key}.{name}" if key else name
            yield from _differences(
                file, inner, found.get(name, _ABSENT), wanted.get(name, _ABSENT)
            )
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(file, f"{key}[{number}]", one, other)
    elif found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
        yield Difference(
            file=file,
            key=key,
            found="missing" if found is None and not key else _shown(found),
            wanted="as exported" if found is None and not key else _shown(wanted),
        )


_ABSENT = object()


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
