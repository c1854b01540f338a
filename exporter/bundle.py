"""A bundle: one folder that holds an artifact and the contract that it was built to.

It is written beside its final name and put there by one rename, so that a failed or killed run
leaves the previous one as it was. `manifest.json` describes it and hashes every other file;
`report/` is not part of the artifact, differs from run to run, and is left out of the hashes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import ExportError
from .preprocess import Preprocessing, Strategy

SCHEMA = 3
MANIFEST = "manifest.json"
REPORT_FOLDER = "report"
REPORT_FILES = ("report.json", "report.html", "engines.json")
"""All that is ever written into the report's folder."""

VALIDATE_HINT = "Export it again: fastvlm-export --checkpoint DIR --target TARGET --out DIR"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights came from: `name` is a folder's base name, `bundled` or a preset's name.

    `layout` is the checkpoint's; `seed` is set for random weights.
    """

    name: str
    layout: str
    sha256: str
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a client or a later `validate` needs to know about a bundle.

    `recipe` is the recipe as data, with its `name`; `quantization` is what applying it found:
    calibration images with their hashes, operators that stayed in float32. `artifact` is what a
    client must know of the target's files beside their tensors: layout, prefill chunk, ...
    """

    schema: int
    source: Source
    target: str
    recipe: Mapping[str, Any]
    quantization: Mapping[str, Any]
    resolution: int
    context: int
    image_tokens: int
    preprocessing: Preprocessing
    prompt_template: str
    image_token: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    model: Mapping[str, Any]
    graphs: Mapping[str, Mapping[str, Mapping[str, str]]]
    versions: Mapping[str, str]
    files: Mapping[str, str]
    artifact: Mapping[str, str | int] = field(default_factory=dict)

    def to_json(self) -> str:
        """Sorted, indented, with a final newline: the same manifest is the same bytes."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    def is_text(self, text: str) -> bool:
        """Whether this is the text of the manifest as it was written: with nothing edited in it."""
        values = json.loads(text)
        as_written = json.dumps(values, indent=2, sort_keys=True) + "\n"
        return text == as_written and values == json.loads(self.to_json())

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read `to_json`'s text. Raises ExportError when it says anything that it can't mean."""
        try:
            values = json.loads(text)
            if values.get("schema") != SCHEMA:
                raise ExportError(
                    f"{MANIFEST} has schema {values.get('schema')!r}; this version reads {SCHEMA}.",
                    VALIDATE_HINT,
                )
            contract = values["preprocessing"]
            contract = Preprocessing(
                strategy=Strategy(contract["strategy"]),
                resolution=_positive(contract["resolution"]),
                mean=_three(contract["mean"]),
                std=_three(contract["std"]),
                resampling=contract["resampling"],
            )
            values |= {
                "source": Source(**values["source"]),
                "preprocessing": contract,
                "eos_token_ids": tuple(int(i) for i in values["eos_token_ids"]),
            }
            for key in ("resolution", "context", "image_tokens"):
                _positive(values[key])
            for key in ("files", "recipe", "quantization", "artifact"):
                if not isinstance(values[key], dict):
                    raise TypeError(f"{key} is not a table")
            for key, value in values["artifact"].items():
                if not isinstance(value, str | int) or isinstance(value, bool):
                    raise TypeError(f"artifact's {key} is {value!r}, no text or whole number")
            return cls(**values)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ExportError(f"{MANIFEST} is damaged: {error!r}.", VALIDATE_HINT) from error


def _positive(value: Any) -> int:
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{value!r} is not a positive whole number")
    return value


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle: every file in its manifest was there and had its hash."""

    path: Path
    manifest: Manifest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(folder: Path) -> dict[str, str]:
    """Relative POSIX path -> SHA-256, of every file but the manifest and the report."""
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in (MANIFEST, REPORT_FOLDER)
    }


def open_bundle(path: Path, progress: Callable[[str], None] = lambda _: None) -> Bundle:
    """Read the manifest and check every file against its hash.

    Raises ExportError, naming all that is missing, changed, or points outside the folder; where
    another export put its bundle there in the meantime, it says that instead.
    """
    if not (path / MANIFEST).is_file():
        raise ExportError(
            f"{path} is not a bundle: it has no {MANIFEST}.",
            "Give the folder that an export wrote with --out.",
        )
    try:
        text = (path / MANIFEST).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path / MANIFEST} cannot be read: {error}", VALIDATE_HINT) from error
    bundle = Bundle(path=path, manifest=Manifest.from_json(text))
    with reading(bundle):
        problems = []
        for name, expected in bundle.manifest.files.items():
            progress(name)
            if found := _problem(path, name, expected):
                problems.append(f"{name} {found}")
        if problems:
            raise ExportError(f"{path} is damaged: {'; '.join(problems)}.", VALIDATE_HINT)
    return bundle


def _problem(path: Path, name: str, expected: str) -> str:
    """What is wrong with a file of a bundle; empty where nothing is."""
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
        return "points outside the bundle"
    if not (path / name).resolve().is_relative_to(path.resolve()):
        return "is a link to a place outside the bundle"
    if not (path / name).is_file():
        return "is missing"
    try:
        return "" if sha256_of(path / name) == expected else f"differs from the hash in {MANIFEST}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def check_current(bundle: Bundle) -> None:
    """Raise ExportError where a bundle has been replaced or removed since it was opened."""
    try:
        same = Manifest.from_json((bundle.path / MANIFEST).read_text("utf-8")) == bundle.manifest
    except (OSError, UnicodeDecodeError, ExportError):
        same = False
    if not same:
        raise ExportError(
            f"{bundle.path} was replaced or removed while it was being read.",
            "Run the same command again.",
        )


@contextmanager
def reading(bundle: Bundle) -> Iterator[None]:
    """Within, whatever fails because the bundle was replaced is told as that.

    So is a replacement that nothing failed of: what was found is then not of this bundle alone.
    """
    try:
        yield
    except Exception:
        check_current(bundle)
        raise
    check_current(bundle)
