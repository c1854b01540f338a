"""Putting a finished bundle in its place, without losing a byte that somebody else wrote.

A bundle is written into a folder beside its final name, and put there by one rename. What was there
before is looked at again in that moment, whatever was found when the export began: only a folder
that is exactly a bundle is replaced, and once the new one stands, the files that the old manifest
lists are removed one by one. Whatever else turns up is kept under a name of its own.
"""

import contextlib
import ctypes
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import ownership, scratch
from .errors import ExportError

STAGING = "export"
OUT = "out"
NEW, SWAP, OLD = "new", "swap", "old"
"""In a staging folder: what is being written; a finished bundle that trades places with the old
one, and then that one; and the old one where the system has no such trade."""

_log = logging.getLogger(__name__)


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, removed at exit if it was not published.

    What runs that were killed left in the same place is cleared away first.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in scratch.leftovers(parent, STAGING):
        _settle(leftover, leftover.facts.get(OUT, ""))
    claim = scratch.claim(parent, STAGING, **{OUT: out.name})
    try:
        folder = claim.path / NEW
        folder.mkdir()
        yield folder
    finally:
        _settle(claim, out.name)


def publish(
    folder: Path, out: Path, *, force: bool = False, check: Callable[[], None] = lambda: None
) -> None:
    """Put a finished folder from `staging` at `out`; with `force`, in the place of a bundle there.

    At any moment `out` is either the old folder or the new one, whole. Raises ExportError where
    something stands at `out` that may not be replaced, or `check`, which is asked at the last
    moment, raises one: the finished folder is kept beside it then, and the error says where.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    try:
        check()
        _put(folder, out)
    except OSError as error:
        if not os.path.lexists(out) or _is_empty(out):
            raise _kept(folder, out, f"{out} cannot be written: {error.strerror}.") from error
        _replace(folder, out, force=force)
    except ExportError as error:
        raise _kept(folder, out, error.message) from error
    _sync(out.absolute().parent)


def _put(folder: Path, out: Path) -> None:
    """Move a folder to a name that is free, or an empty folder's; OSError for any other."""
    if sys.platform == "win32" and out.is_dir() and not out.is_symlink():
        out.rmdir()  # where rename replaces nothing; fails unless the folder is empty
    os.rename(folder, out)  # noqa: PTH104 - unlike replace, it overwrites nothing on any system


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _replace(folder: Path, out: Path, *, force: bool) -> None:
    """Trade places with the bundle at `out`, and remove that."""
    if not force:
        raise _kept(folder, out, f"Something appeared at {out} during the run, and was left alone.")
    if problem := ownership.problem(out):
        raise _kept(folder, out, f"{problem} It was left alone.")
    swap = folder.with_name(SWAP)
    folder.rename(swap)
    try:
        _exchange(swap, out)
    except OSError as error:
        raise _kept(swap, out, f"{out} cannot be replaced: {error.strerror}.") from error
    _discard(swap, out)


def _exchange(new: Path, out: Path) -> None:
    """Let `new` and `out` trade places, in one step where the system can.

    Raises OSError where `new` is still where it was.
    """
    if _swap(new, out):
        return
    aside = new.with_name(OLD)
    out.rename(aside)
    try:
        _put(new, out)
    except OSError:
        # Somebody was faster. The old one goes back if it can, and is kept beside it if not.
        if not os.path.lexists(out):
            aside.rename(out)
        else:
            _keep(aside, out)
        raise
    aside.rename(new)  # only a whole one may be put back, and this one is removed now


def _swap(new: Path, old: Path) -> bool:
    """Swap two folders' names in one step; False where the system has no such call."""
    arguments = (os.fsencode(new), os.fsencode(old))
    at_cwd = -100
    result = -1
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            result = libc.renameat2(at_cwd, arguments[0], at_cwd, arguments[1], 2)  # EXCHANGE
        elif sys.platform == "darwin":
            result = libc.renamex_np(*arguments, 2)  # RENAME_SWAP
        else:
            return False
    except (AttributeError, OSError, TypeError):
        return False  # no such call in this C library
    if result == 0:
        return True
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))


def _settle(claim: scratch.Claim, name: str) -> None:
    """Clear a staging folder away: what was being written, and what `_exchange` had moved aside."""
    out = claim.path.with_name(name) if name else claim.path
    for place in (claim.path / OLD, claim.path / SWAP):
        if not os.path.lexists(place):
            continue
        if place.name == OLD and not os.path.lexists(out):
            with contextlib.suppress(OSError):
                place.rename(out)
        else:
            _discard(place, out)
    if os.path.lexists(claim.path / OLD) or os.path.lexists(claim.path / SWAP):
        claim.release()  # what is not ours could not be moved out of it: it stays where it is
    else:
        claim.remove()


def _discard(old: Path, out: Path) -> None:
    """Remove an old bundle, file by file; whatever in it is not ours is kept beside `out`."""
    with contextlib.suppress(OSError):  # something was added just now, or may not be removed
        found = ownership.contents(old, cut_short=True)
        if found.is_bundle and not found.foreign:
            ownership.remove(old, found)
            return
    place = old
    with contextlib.suppress(OSError):
        place = _keep(old, out)
    _log.warning("What stood at %s was not only a bundle. It is kept at %s.", out, place)


def _kept(folder: Path, out: Path, message: str) -> ExportError:
    """Keep a finished bundle that may not take its place, and say so."""
    try:
        place = _keep(folder, out, "new")
    except OSError as error:
        return ExportError(
            f"{message}\nThe new bundle could not be kept beside it: {error.strerror}.",
            "Run the command again with another --out.",
        )
    return ExportError(
        f"{message}\nThe new bundle is at {place}.",
        f"Move what is at {out} away, then: mv {place} {out}",
    )


def _keep(path: Path, out: Path, suffix: str = "old") -> Path:
    """Move something beside `out`, to a name that nothing has."""
    place = ownership.free_name(out, suffix)
    os.rename(path, place)  # noqa: PTH104 - a folder overwrites nothing, see `_put`
    return place


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a power cut can't leave a name without its bytes."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
