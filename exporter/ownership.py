"""What may be replaced: a folder that is, file by file, exactly what an export wrote.

Neither a name nor the presence of a manifest makes a folder ours. It is ours when its manifest is
one that this version writes and lists every file in it, with the hash that the file still has; the
report aside, whose three files are known by name. Anything else is somebody's own: a file that was
added or edited, a link, a folder without a listed file, hidden or not.
"""

import contextlib
import errno
import itertools
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .bundle import MANIFEST, REPORT_FILES, REPORT_FOLDER, Manifest, Source, sha256_of
from .errors import ExportError

SHOWN = 5
LONGEST_STEM = 200
"""Of a name that something is added to: most systems take 255 bytes."""

UNFINISHED = re.compile(r"\.report\.(json|html)\.[0-9a-f]{32}")
"""A report's file while it is written; its run was killed where one is found."""

MOVE_HINT = "Move it away, or choose another --out."
_SETTLED_SECONDS = 2.0
"""A file that changed later than this before it was read may change again unseen by its times."""

_Stamp = tuple[int, ...]
_hashes: dict[_Stamp, str] = {}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a folder holds: our files and their folders, and what is not ours, each by its name.

    `files` has the hash of each that the manifest gives one; `folders` come before what is in them.
    `is_bundle` tells a bundle with something foreign in it from a folder that is something else.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    is_bundle: bool = True


def contents(folder: Path, *, hashes: bool = True, cut_short: bool = False) -> Contents:
    """Look through a bundle, or a folder of bundles that one export to several targets wrote.

    Without `hashes`, edits are not looked for: nothing is read but the manifests. `cut_short`: it
    may be what `remove` has left where it was interrupted.
    """
    entries = _entries(folder)
    if MANIFEST in entries:
        return _bundle(folder, entries, hashes=hashes)[1]
    found = {name: _bundle_in(folder / name, entry, hashes) for name, entry in entries.items()}
    sources = {one[0] for one in found.values() if one}
    # An export to one target writes no folder around it: a single bundle in one is the user's.
    least = 0 if cut_short else 2
    if len(found) < least or len(sources) > 1 or not all(found.values()):
        return Contents(foreign=tuple(map(_shown, entries.values())), is_bundle=False)
    parts = {name: one[1] for name, one in found.items() if one}
    return Contents(
        files={
            f"{name}/{file}": sha256
            for name, part in parts.items()
            for file, sha256 in part.files.items()
        },
        folders=tuple(
            path
            for name, part in parts.items()
            for path in (name, *(f"{name}/{one}" for one in part.folders))
        ),
        foreign=tuple(f"{name}/{one}" for name, part in parts.items() for one in part.foreign),
    )


def remove(folder: Path, found: Contents) -> None:
    """Remove our files from a folder, their folders and itself.

    Raises OSError where a file has changed just now or a folder holds anything else, which stays.
    """
    # The manifest last: a removal that is cut short must leave what still says what is ours in it.
    manifests = [name for name, sha256 in found.files.items() if _is_manifest(name) and not sha256]
    for name, expected in found.files.items():
        if expected and not is_same_file(folder / name, expected):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder / name))
        if name not in manifests:
            (folder / name).unlink()
    for name in (*reversed(found.folders), ""):
        if Path(name, MANIFEST).as_posix() in manifests:
            (folder / name / MANIFEST).unlink()
        (folder / name).rmdir()


def is_same_file(path: Path, expected: str) -> bool:
    """Whether this is a plain file whose SHA-256 is the expected one.

    A file that was read before and has not changed since is not read again.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return False
    stamp = _stamp(status)
    if stamp not in _hashes:
        found = sha256_of(path)
        if time.time() - max(status.st_mtime, status.st_ctime) < _SETTLED_SECONDS:
            return found == expected
        if _stamp(path.lstat()) != stamp:  # while it was read
            return False
        _hashes[stamp] = found
    return _hashes[stamp] == expected


def problem(folder: Path, *, hashes: bool = True) -> str:
    """Why an export may not replace this folder, in a sentence; empty where it may."""
    if folder.is_symlink() or not folder.is_dir():
        return f"{folder} is not a folder."
    try:
        found = contents(folder, hashes=hashes)
        if not found.is_bundle:
            shown = listed(found.foreign)
            return f"{folder} is not empty, and it is not a bundle: it holds {shown}."
        if found.foreign:
            return f"{folder} is not as an export wrote it: it holds {listed(found.foreign)}."
        locked = [
            str(path)
            for path in (folder, *(folder / name for name in found.folders))
            if not os.access(path, os.W_OK | os.X_OK)
        ]
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}."
    return f"This user may not delete the files in {listed(locked)}." if locked else ""


def listed(names: "tuple[str, ...] | list[str]") -> str:
    """The first few, and how many more there are."""
    shown = list(names[:SHOWN])
    if more := len(names) - len(shown):
        shown.append(f"{more} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def free_name(path: Path, suffix: str, kind: str = "") -> Path:
    """A name beside a path that nothing has: with a suffix, a number where one is needed, a kind.

    `kind` is a file's own suffix, such as ".toml".
    """
    places = _numbered(path, suffix, kind)
    return next(place for place in places if not os.path.lexists(place))


def _numbered(path: Path, suffix: str, kind: str = "") -> Iterator[Path]:
    stem = f"{path.name[:LONGEST_STEM]}.{suffix}"
    for number in itertools.count():
        yield path.with_name(f"{stem}{f'-{number}' if number else ''}{kind}")


def check_out(out: Path, *, force: bool) -> None:
    """Refuse an output path that holds something, or that can't be written, before any work.

    With `force` it may hold what an export wrote, exactly; see `contents`.
    """
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ExportError(f"{out} is not a folder.", "Choose another --out.")
        if out.is_dir() and any(out.iterdir()):
            if found := problem(out, hashes=force):
                raise ExportError(found, MOVE_HINT)
            if not force:
                raise ExportError(
                    f"{out} exists and is not empty.",
                    "Choose another --out, or replace it with --force.",
                )
        parent = out.absolute().parent
        while not parent.exists():
            parent = parent.parent
    except OSError as error:
        what = "is too long a name" if error.errno == errno.ENAMETOOLONG else error.strerror
        raise ExportError(f"{out}: {what}.", "Choose another --out.") from error
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ExportError(f"{parent} is not a writable folder.", "Choose another --out.")


def place_of_failed(out: Path, inputs: Mapping[str, Path]) -> Path:
    """Where a folder goes whose proof failed: beside `out`, in the place of an earlier one."""

    def is_usable(place: Path) -> bool:
        try:
            check_out(place, force=True)
            check_apart(place, inputs)
        except ExportError:
            return False
        return True

    return next(filter(is_usable, _numbered(out, "failed")))


def check_apart(out: Path, inputs: Mapping[str, Path], option: str = "--out") -> None:
    """Refuse an output that is an input, lies in one, or holds one; `inputs` are by their option.

    Links are followed, and folders are told apart by what they are, not by how they are spelled.
    Raises ExportError with all of them.
    """
    problems = [
        f"{option} {out} {how} {name} {path}, which is only read."
        for name, path in inputs.items()
        if (how := _overlap(out, path))
    ]
    if problems:
        raise ExportError("\n".join(problems), f"Choose another {option}.")


def _overlap(out: Path, path: Path) -> str:
    """How an output and an input that exists meet, as a verb; empty where they don't."""
    if not path.exists():
        return ""  # an error of its own
    above, inputs = list(_places(out)), [path]
    with contextlib.suppress(OSError):  # a file, or a folder that its reader will complain about
        inputs += path.iterdir()  # a checkpoint's files may be links into another folder
    at_out, at_path = _place(out), _place(path)
    if at_out is not None and at_out == at_path:
        return "is"
    if path.is_dir() and at_path in above:
        return "lies in"
    if at_out is not None and any(at_out in _places(one) for one in inputs):
        return "holds"
    return ""


def _place(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _places(path: Path) -> Iterator[tuple[int, int]]:
    """What a path and the folders above it are, once its links are followed."""
    real = Path(os.path.realpath(path))
    for one in (real, *real.parents):
        if place := _place(one):
            yield place


def _entries(folder: Path) -> dict[str, "os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}


def _bundle_in(
    folder: Path, entry: "os.DirEntry[str]", hashes: bool
) -> tuple[Source, Contents] | None:
    """A bundle that has its target's name; None for anything else."""
    if not entry.is_dir(follow_symlinks=False):
        return None
    entries = _entries(folder)
    if MANIFEST not in entries:
        return None
    manifest, found = _bundle(folder, entries, hashes=hashes)
    return (manifest.source, found) if manifest and manifest.target == entry.name else None


def _bundle(
    folder: Path, entries: Mapping[str, "os.DirEntry[str]"], *, hashes: bool
) -> tuple[Manifest | None, Contents]:
    """The manifest of a folder that has one, if it is ours, and what the folder holds."""
    try:
        if not entries[MANIFEST].is_file(follow_symlinks=False):
            raise ValueError
        text = (folder / MANIFEST).read_text("utf-8")
        manifest = Manifest.from_json(text)
    except (ExportError, ValueError) as error:
        why = error.message.removeprefix(f"{MANIFEST} ") if isinstance(error, ExportError) else ""
        names = [f"{MANIFEST} ({why.rstrip('.') or 'not ours'})"]
        names += [_shown(entry) for name, entry in entries.items() if name != MANIFEST]
        return None, Contents(foreign=tuple(names), is_bundle=False)
    files, folders = {MANIFEST: ""}, []
    foreign = [f"{MANIFEST} (edited)"] if not manifest.is_text(text) else []
    above = {parent.as_posix() for name in manifest.files for parent in Path(name).parents}
    above.add(REPORT_FOLDER)
    waiting = [entry for name, entry in entries.items() if name != MANIFEST]
    while waiting:
        entry = waiting.pop()
        path = Path(entry.path)
        name = path.relative_to(folder).as_posix()
        if entry.is_dir(follow_symlinks=False) and name in above:
            folders.append(name)
            waiting += _entries(path).values()
        elif not entry.is_file(follow_symlinks=False):
            foreign.append(_shown(entry, name))
        elif _is_report(name):
            files[name] = ""
        elif name not in manifest.files:
            foreign.append(name)
        elif hashes and not is_same_file(path, manifest.files[name]):
            foreign.append(f"{name} (edited)")
        else:
            files[name] = manifest.files[name]
    return manifest, Contents(files=files, folders=tuple(folders), foreign=tuple(sorted(foreign)))


def _is_manifest(name: str) -> bool:
    return PurePosixPath(name).name == MANIFEST


def _is_report(name: str) -> bool:
    folder, _, file = name.partition("/")
    return folder == REPORT_FOLDER and (file in REPORT_FILES or bool(UNFINISHED.fullmatch(file)))


def _shown(entry: "os.DirEntry[str]", name: str = "") -> str:
    name = name or entry.name
    if entry.is_symlink():
        return f"{name} (a link)"
    return f"{name}/" if entry.is_dir(follow_symlinks=False) else name


def _stamp(status: os.stat_result) -> _Stamp:
    """Changes whenever a file's contents do."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
