"""Folders that belong to one run: they go when it ends, or with the next run if it was killed.

Such a folder has an unguessable token in its name and in a marker file inside, and its owner holds
a lock on that file, which the system releases when the process dies, however it dies. A leftover is
removed only when the name, the marker and the free lock all say that it is ours and its owner dead.
What lies in it is ours: nobody else knows the name. Links in it are removed, never followed.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

MARKER = "owner.json"
SCRATCH = "scratch"
FILES = "files"
_NAME = re.compile(r"\.fastvlm-(?P<kind>[a-z]+)-(?P<token>[0-9a-f]{32})")
_MOST_BYTES = 4096
_LOCKED_BYTE = 1 << 20
"""Windows locks a range of bytes and lets nobody else read those: one beyond the marker's end."""

_swept: set[Path] = set()
"""Folders in which this process has looked for leftovers."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A folder with a marker, and the descriptor that holds the marker's lock.

    `facts` are what its owner wrote into the marker, readable by who takes over a leftover.
    """

    path: Path
    facts: Mapping[str, str]
    descriptor: int

    def remove(self) -> None:
        """Remove the folder; the marker last, so that a removal that is cut short can be resumed.

        What cannot be removed stays, with its marker, for a later run.
        """
        for entry in _entries(self.path):
            if entry.name != MARKER:
                _remove(Path(entry.path))
        self.release()
        if [entry.name for entry in _entries(self.path)] == [MARKER]:
            with contextlib.suppress(OSError):
                (self.path / MARKER).unlink()
                self.path.rmdir()

    def release(self) -> None:
        """Give the lock back and leave the folder as it is."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


class ScratchFolder:
    """A temporary folder at `path`, removed at `cleanup`, at exit, or when the object goes.

    As `tempfile.TemporaryDirectory`, and one whose process was killed is removed when the next is
    made beside it. `parent` is the system's folder for temporary files where none is given.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        sweep(parent)
        claimed = claim(parent, SCRATCH)
        self.path = claimed.path / FILES
        self._finalizer = weakref.finalize(self, claimed.remove)
        self.path.mkdir()

    def cleanup(self) -> None:
        """Remove the folder and all that is in it."""
        self._finalizer()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cleanup()


def claim(parent: Path, kind: str, **facts: str) -> Claim:
    """Make a folder of ours in `parent`, and hold it until `remove` or the end of the process."""
    token = secrets.token_hex(16)
    path = parent / f".fastvlm-{kind}-{token}"
    path.mkdir(mode=0o700)
    descriptor = os.open(path / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    # Locked first, written then: whoever finds a marker without a token leaves the folder alone.
    _lock(descriptor, wait=True)
    os.write(descriptor, json.dumps({**facts, "token": token}).encode())
    return Claim(path=path, facts=facts, descriptor=descriptor)


def leftovers(parent: Path, kind: str) -> Iterator[Claim]:
    """The folders of this kind in `parent` whose owners are dead, each taken over when yielded."""
    for entry in _entries(parent):
        match = _NAME.fullmatch(entry.name)
        if match and match["kind"] == kind and (found := _take_over(Path(entry.path))):
            yield found


def sweep(parent: Path) -> None:
    """Remove the scratch folders in `parent` whose owners are dead, once in a process."""
    if parent not in _swept:
        _swept.add(parent)
        for found in leftovers(parent, SCRATCH):
            found.remove()


def _take_over(path: Path) -> Claim | None:
    """A claim on a folder that a dead process left; None where anything speaks against that."""
    match = _NAME.fullmatch(path.name)
    try:
        status = path.lstat()
        if not match or not stat.S_ISDIR(status.st_mode) or not _is_own(status):
            return None
        descriptor = os.open(path / MARKER, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    if _lock(descriptor, wait=False):
        facts = _read(descriptor)
        if facts.pop("token", None) == match["token"]:
            return Claim(path=path, facts=facts, descriptor=descriptor)
    os.close(descriptor)
    return None


def _is_own(status: os.stat_result) -> bool:
    """Whether a file is this user's: folders for temporary files are shared."""
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def _read(descriptor: int) -> dict[str, str]:
    try:
        values: Any = json.loads(os.read(descriptor, _MOST_BYTES))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {str(key): value for key, value in values.items() if isinstance(value, str)}


def _remove(path: Path) -> None:
    """Remove a file, a link or a tree of ours; what resists stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, *, wait: bool) -> bool:
        """Lock an open file for this process; False where another one has."""
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _lock(descriptor: int, *, wait: bool) -> bool:
        """Lock an open file for this process; False where another one has, or nobody can."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if wait and error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            return False
        return True
