"""Folders of one run: removed when their owner is dead for certain, and only then."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastvlm_export.exporter import scratch
from fastvlm_export.exporter.scratch import MARKER, SCRATCH, ScratchFolder

from .bundles import names


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_swept", set())


def left_behind(parent: Path, kind: str = SCRATCH) -> Path:
    """What a killed owner leaves: a folder with a file, its lock free."""
    claim = scratch.claim(parent, kind)
    (claim.path / "files").mkdir()
    (claim.path / "files" / "x").write_text("x")
    claim.release()
    return claim.path


def test_a_folder_goes_with_its_block_and_with_its_object(tmp_path: Path) -> None:
    with ScratchFolder(tmp_path) as folder:
        assert names(folder) == []
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
    assert names(tmp_path) == []
    held = ScratchFolder(tmp_path)
    (held.path / "file").write_text("x")
    del held
    assert names(tmp_path) == []


def test_it_lies_among_the_system_s_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ScratchFolder() as folder:
        assert folder.parent.parent == tmp_path
        assert folder.parent.stat().st_mode & 0o777 == 0o700


KILLED = """
import os, signal, sys
from pathlib import Path
from fastvlm_export.exporter.scratch import ScratchFolder
folder = ScratchFolder(Path(sys.argv[1]))
(folder.path / "model.mlpackage").write_text("half")
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
print("ready", flush=True)
sys.stdin.readline()
"""


def test_what_a_killed_process_left_goes_and_what_a_running_one_has_stays(tmp_path: Path) -> None:
    line = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(
        [*line, "runs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        [used] = names(tmp_path)
        subprocess.run([*line, "killed"], check=False)
        assert len(names(tmp_path)) == 2
        with ScratchFolder(tmp_path):
            assert used in names(tmp_path)
            assert len(names(tmp_path)) == 2
        assert names(tmp_path) == [used]
        running.communicate(b"\n")
    assert names(tmp_path) == []


def test_a_child_that_outlives_the_owner_does_not_hold_the_folder(tmp_path: Path) -> None:
    """Descriptors are not handed on: the lock is the owner's alone."""
    claim = scratch.claim(tmp_path, SCRATCH)
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        claim.release()
        assert [found.path for found in scratch.leftovers(tmp_path, SCRATCH)] == [claim.path]
        child.kill()


@pytest.mark.parametrize(
    "what",
    ["another kind", "no marker", "another token", "no JSON", "a list", "a link", "renamed"],
)
def test_what_one_sign_speaks_against_is_left_alone(tmp_path: Path, what: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = left_behind(tmp_path if what != "a link" else elsewhere)
    match what:
        case "another kind":
            path = path.rename(str(path).replace(SCRATCH, "photos"))
        case "no marker":
            (path / MARKER).unlink()
        case "another token":
            (path / MARKER).write_text(json.dumps({"token": "0" * 32}))
        case "no JSON":
            (path / MARKER).write_text("")
        case "a list":
            (path / MARKER).write_text("[1]")
        case "a link":
            link = tmp_path / path.name
            link.symlink_to(path)
        case "renamed":
            path = path.rename(f"{path}.mine")
    scratch.sweep(tmp_path)
    assert (path / "files" / "x").read_text() == "x"


def test_a_marker_that_is_a_link_is_not_read(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    (path / MARKER).rename(tmp_path / "marker")
    (path / MARKER).symlink_to(tmp_path / "marker")
    scratch.sweep(tmp_path)
    assert (path / "files" / "x").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only the super user may give files away")
def test_another_user_s_folder_is_left_alone(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    os.chown(path, 12345, 12345)
    scratch.sweep(tmp_path)
    assert (path / "files" / "x").exists()


def test_where_nobody_can_lock_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl  # noqa: PLC0415 - not on every system

    path = left_behind(tmp_path)

    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with ScratchFolder(tmp_path) as folder:
        (folder / "x").write_text("x")
        assert (path / "files" / "x").exists()
    assert names(tmp_path) == [path.name]


def test_a_removal_that_is_cut_short_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker goes last."""
    path = left_behind(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(scratch, "_remove", lambda _: None)
        scratch.sweep(tmp_path)
    assert (path / MARKER).exists()
    scratch._swept.clear()
    scratch.sweep(tmp_path)
    assert names(tmp_path) == []


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    with ScratchFolder(tmp_path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "photos").symlink_to(tmp_path / "photos")
        (folder / "a.jpg").symlink_to(tmp_path / "photos" / "a.jpg")
    assert names(tmp_path) == ["photos"]
    assert (tmp_path / "photos" / "a.jpg").read_text() == "mine"
