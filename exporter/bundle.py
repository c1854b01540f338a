"""A bundle: one folder that holds an artifact and the contract that it was built to.

It is written beside its final name and put there by one rename, so that a failed or killed run
leaves the previous one as it was. `manifest.json` describes it and hashes every other file;
`report/` is not part of the artifact, differs from run to run, and is left out of the hashes.
"""

import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
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
ASIDE = ".old"
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
        except (AttributeError, KeyError, TypeError, ValueError) as error:
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

    Raises ExportError, naming all that is missing, changed, or points outside the folder.
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
    manifest = Manifest.from_json(text)
    problems = []
    for name, expected in manifest.files.items():
        progress(name)
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
            problems.append(f"{name} points outside the bundle")
        elif not (path / name).resolve().is_relative_to(path.resolve()):
            problems.append(f"{name} is a link to a place outside the bundle")
        elif not (path / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256_of(path / name) != expected:
            problems.append(f"{name} differs from the hash in {MANIFEST}")
    if problems:
        raise ExportError(f"{path} is damaged: {'; '.join(problems)}.", VALIDATE_HINT)
    return Bundle(path=path, manifest=manifest)


def is_ours(folder: Path) -> bool:
    """Whether an export wrote this folder: a bundle, or several side by side."""
    return (folder / MANIFEST).is_file() or any(folder.glob(f"*/{MANIFEST}"))


def check_out(out: Path, *, force: bool) -> None:
    """Refuse an output path that holds something, or that can't be written, before any work."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ExportError(f"{out} is not a folder.", "Choose another --out.")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise ExportError(
                f"{out} exists and is not empty.",
                "Choose another --out, or replace it with --force.",
            )
        # --force replaces what an export wrote, never a folder of something else.
        if not is_ours(out):
            raise ExportError(
                f"{out} is not a bundle, and --force replaces bundles only.",
                "Choose another --out, or remove that folder yourself.",
            )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ExportError(f"{parent} is not a writable folder.", "Choose another --out.")


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, removed at exit if it was not published."""
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent, out.name)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", dir=parent))
    folder.chmod(0o755)  # mkdtemp's 0700 would follow the bundle to its final name
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path, name: str) -> None:
    """Remove staging folders whose process was killed; put back what it had moved aside."""
    prefix = f".{name}."
    for folder in sorted(parent.iterdir(), reverse=True):  # X.old before X
        pid = folder.name.removeprefix(prefix).split(".")[0]
        if not folder.name.startswith(prefix) or not pid.isdigit() or _alive(int(pid)):
            continue
        if folder.name.endswith(ASIDE) and not (parent / name).exists():
            folder.rename(parent / name)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def publish(folder: Path, out: Path) -> None:
    """Put a finished folder at `out` by one rename; what was there before is removed after it.

    At any moment `out` is either the old folder or the new one, whole.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    if not out.exists():
        folder.rename(out)
    elif not any(out.iterdir()):
        folder.replace(out)
    else:
        _exchange(folder, out)
        shutil.rmtree(folder, ignore_errors=True)
    _sync(out.absolute().parent)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a power cut can't leave a name without its bytes."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders' names in one step where the system can, else in two renames."""
    arguments = (os.fsencode(new), os.fsencode(old))
    at_cwd = -100
    result = -1
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            result = libc.renameat2(at_cwd, arguments[0], at_cwd, arguments[1], 2)  # EXCHANGE
        elif sys.platform == "darwin":
            result = libc.renamex_np(*arguments, 2)  # RENAME_SWAP
    except (AttributeError, OSError, TypeError):
        result = -1  # no such call in this C library
    if result == 0:
        return
    unsupported = (0, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
    if ctypes.get_errno() not in unsupported:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    aside = new.with_name(f"{new.name}{ASIDE}")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
