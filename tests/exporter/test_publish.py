"""Nothing is deleted but what an export wrote: at the first look, and at the moment of the swap."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvlm_export.exporter import ownership, scratch
from fastvlm_export.exporter import publish as publishing
from fastvlm_export.exporter.bundle import REPORT_FILES, open_bundle
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.publish import publish, staging
from fastvlm_export.targets import tensorrt_record
from fastvlm_export.validate import report

from .bundles import made, names, write


def export(out: Path, content: str, *, force: bool = True) -> None:
    """What an export does to the folders around it."""
    ownership.check_out(out, force=force)
    with staging(out) as folder:
        write(folder, content)
        publish(folder, out, force=force)


def content(out: Path) -> str:
    open_bundle(out)
    return (out / "onnx" / "graph.onnx").read_text()


@pytest.fixture(params=["one step", "two renames"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(publishing, "_swap", lambda new, old: False)


@pytest.mark.usefixtures("_either_way")
def test_publishing_replaces_the_old_bundle_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("one", "two", "three"):
        export(out, text)
        assert content(out) == text
        assert names(tmp_path) == ["out"]
    assert names(out) == ["config.json", "manifest.json", "onnx"]


def test_an_empty_folder_may_be_there_before(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(tmp_path / "out", "new", force=False)
    assert content(tmp_path / "out") == "new"


def test_a_folder_of_bundles_is_replaced_as_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("one", "two"):
        ownership.check_out(out, force=True)
        with staging(out) as folder:
            for target in ("onnx", "coreml"):
                write(made(folder / target, "x").parent / target, text, target)
            publish(folder, out, force=True)
        assert content(out / "onnx") == content(out / "coreml") == text
        assert names(tmp_path) == ["out"]


def test_a_failed_run_leaves_the_old_bundle(tmp_path: Path) -> None:
    out = made(tmp_path / "out", "old")

    def fails() -> None:
        with staging(out) as folder:
            write(folder, "new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert content(out) == "old"
    assert names(tmp_path) == ["out"]


REPUBLISH = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
from tests.exporter.test_publish import export
print("ready", flush=True)
count = 0
while True:
    export(Path(sys.argv[1]), str(count))
    count += 1
"""


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_moment_a_whole_bundle_is_there(tmp_path: Path, kill: signal.Signals) -> None:
    out = tmp_path / "out"
    for attempt in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", REPUBLISH, str(out)], stdout=subprocess.PIPE, stderr=-3
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.05 + 0.013 * attempt)
        child.send_signal(kill)
        child.wait()
        if out.exists():
            assert content(out).isdecimal()
    export(out, "new")
    assert content(out) == "new"
    assert names(tmp_path) == ["out"]  # what killed runs left behind is gone


def test_a_bundle_moved_aside_by_a_killed_run_is_put_back(tmp_path: Path) -> None:
    claim = scratch.claim(tmp_path, publishing.STAGING, out="out")
    made(claim.path / publishing.OLD, "old")
    made(claim.path / publishing.NEW, "unfinished")
    claim.release()
    with staging(tmp_path / "another"):
        assert content(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_a_bundle_that_was_being_removed_is_never_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the removal; then the new one is moved away."""
    out = made(tmp_path / "out", "old")
    monkeypatch.setattr(publishing, "_swap", lambda new, old: False)
    settle = publishing._settle

    def killed(folder: Path, found: ownership.Contents) -> None:
        (folder / "onnx" / "graph.onnx").unlink()
        monkeypatch.setattr(publishing, "_settle", lambda claim, name: claim.release())
        raise KeyboardInterrupt

    remove = ownership.remove
    monkeypatch.setattr(ownership, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        export(out, "new")
    monkeypatch.setattr(ownership, "remove", remove)
    monkeypatch.setattr(publishing, "_settle", settle)
    assert content(out) == "new"
    out.rename(tmp_path / "kept")
    with staging(tmp_path / "another"):
        pass
    assert names(tmp_path) == ["kept"]


# What stands at OUT when the export begins.


def web_project(out: Path) -> list[str]:
    (out / "public").mkdir(parents=True)
    (out / "public" / "manifest.json").write_text('{"name": "my app"}')
    (out / "index.html").write_text("<html>")
    return ["index.html", "public/"]


def web_project_itself(out: Path) -> list[str]:
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "my app", "files": {}}')
    (out / "app.js").write_text("run()")
    return ["manifest.json", "app.js"]


def checkpoint_with_a_bundle(out: Path) -> list[str]:
    made(out / "bundle")
    (out / "model.safetensors").write_text("weights")
    return ["model.safetensors", "bundle/"]


def bundle_with_a_thesis(out: Path) -> list[str]:
    (made(out) / "thesis.txt").write_text("years")
    return ["thesis.txt"]


def bundle_with_hidden_files(out: Path) -> list[str]:
    made(out)
    (out / ".DS_Store").write_text("x")
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")
    return [".DS_Store", ".git/"]


def bundle_with_a_file_in_a_folder_of_ours(out: Path) -> list[str]:
    (made(out) / "onnx" / "notes.md").write_text("mine")
    return ["onnx/notes.md"]


def bundle_with_an_empty_folder(out: Path) -> list[str]:
    (made(out) / "onnx" / "empty").mkdir()
    return ["onnx/empty/"]


def bundle_with_a_file_in_the_report(out: Path) -> list[str]:
    (made(out) / "report").mkdir()
    (out / "report" / "report.json").write_text("{}")
    (out / "report" / "remarks.txt").write_text("mine")
    return ["report/remarks.txt"]


def bundle_with_an_edited_file(out: Path) -> list[str]:
    (made(out) / "config.json").write_text('{"mine": 1}')
    return ["config.json (edited)"]


def bundle_with_an_edit_of_the_same_size(out: Path) -> list[str]:
    (made(out, "abc") / "onnx" / "graph.onnx").write_text("abd")
    return ["onnx/graph.onnx (edited)"]


def bundle_with_an_edited_manifest(out: Path) -> list[str]:
    manifest = made(out) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("{", '{ "note": "mine",', 1))
    return ["manifest.json"]


def bundle_with_a_reformatted_manifest(out: Path) -> list[str]:
    manifest = made(out) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("  ", "\t"))
    return ["manifest.json (edited)"]


def bundle_with_a_link_for_a_file(out: Path) -> list[str]:
    made(out)
    (out.parent / "kept.json").write_text("{}")
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(out.parent / "kept.json")
    return ["config.json (a link)"]


def bundle_with_a_link_for_a_folder(out: Path) -> list[str]:
    made(out)
    (out / "onnx").rename(out.parent / "moved")
    (out / "onnx").symlink_to(out.parent / "moved")
    return ["onnx (a link)"]


def bundle_with_a_linked_report(out: Path) -> list[str]:
    (out.parent / "reports").mkdir()
    (out.parent / "reports" / "report.json").write_text("{}")
    (made(out) / "report").symlink_to(out.parent / "reports")
    return ["report (a link)"]


def bundle_with_a_name_in_other_case(out: Path) -> list[str]:
    (made(out) / "Config.json").write_text("mine")
    return ["Config.json"]


def package_with_its_own_manifest(out: Path) -> list[str]:
    """Where case does not matter, `manifest.json` finds this file."""
    out.mkdir()
    (out / "Manifest.json").write_text("{}")
    return ["Manifest.json"]


def bundle_of_an_earlier_version(out: Path) -> list[str]:
    manifest = made(out) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 3', '"schema": 2'))
    return ["manifest.json (has schema 2; this version reads 3)"]


def bundle_in_a_bundle(out: Path) -> list[str]:
    made(made(out) / "inner")
    return ["inner/"]


def one_bundle_in_a_folder(out: Path) -> list[str]:
    made(out / "onnx")
    return ["onnx/"]


def bundles_that_a_user_collected(out: Path) -> list[str]:
    made(out / "monday")
    made(out / "tuesday")
    return ["monday/", "tuesday/"]


def bundles_with_notes_beside_them(out: Path) -> list[str]:
    made(out / "onnx")
    made(out / "coreml", target="coreml")
    (out / "notes.txt").write_text("mine")
    return ["notes.txt"]


def bundles_with_a_note_in_one(out: Path) -> list[str]:
    made(out / "onnx")
    (made(out / "coreml", target="coreml") / "notes.txt").write_text("mine")
    return ["coreml/notes.txt"]


def bundles_one_a_link(out: Path) -> list[str]:
    made(out / "onnx")
    (out / "coreml").symlink_to(made(out.parent / "elsewhere", target="coreml"))
    return ["coreml (a link)"]


def pipe(out: Path) -> list[str]:
    os.mkfifo(made(out) / "pipe")
    return ["pipe"]


FOREIGN = [
    web_project,
    web_project_itself,
    checkpoint_with_a_bundle,
    bundle_with_a_thesis,
    bundle_with_hidden_files,
    bundle_with_a_file_in_a_folder_of_ours,
    bundle_with_an_empty_folder,
    bundle_with_a_file_in_the_report,
    bundle_with_an_edited_file,
    bundle_with_an_edit_of_the_same_size,
    bundle_with_an_edited_manifest,
    bundle_with_a_reformatted_manifest,
    bundle_with_a_link_for_a_file,
    bundle_with_a_link_for_a_folder,
    bundle_with_a_linked_report,
    bundle_with_a_name_in_other_case,
    package_with_its_own_manifest,
    bundle_of_an_earlier_version,
    bundle_in_a_bundle,
    one_bundle_in_a_folder,
    bundles_that_a_user_collected,
    bundles_with_notes_beside_them,
    bundles_with_a_note_in_one,
    bundles_one_a_link,
    pipe,
]


def tree(root: Path) -> dict[str, str | None]:
    """Every file, folder and link below a folder; links by where they point."""
    found: dict[str, str | None] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = path.read_bytes().hex() if path.is_file() else None
    return found


@pytest.mark.parametrize("make", FOREIGN)
def test_what_no_export_wrote_is_refused_by_name_before_any_work(
    tmp_path: Path, make: Callable[[Path], list[str]]
) -> None:
    out = tmp_path / "out"
    words = make(out)
    before = tree(tmp_path)
    for force in (False, True):
        with pytest.raises(ExportError) as caught:
            ownership.check_out(out, force=force)
        if force or not words[0].endswith("(edited)"):  # nothing is read where nothing is replaced
            for word in words:
                assert word in caught.value.message
        assert "--out" in caught.value.hint
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("make", FOREIGN)
@pytest.mark.parametrize("force", [False, True])
def test_what_appears_during_an_export_is_left_alone(
    tmp_path: Path, make: Callable[[Path], list[str]], force: bool
) -> None:
    out = tmp_path / "out"
    ownership.check_out(out, force=force)
    with pytest.raises(ExportError) as caught, staging(out) as folder:
        write(folder, "new")
        make(out)
        before = tree(out)
        publish(folder, out, force=force)
    assert tree(out) == before
    assert content(tmp_path / "out.new") == "new"
    assert str(tmp_path / "out.new") in caught.value.message
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_bundle_that_appears_during_an_export_is_left_alone_without_force(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    made(tmp_path / "out.new", "an earlier run's")
    with pytest.raises(ExportError, match=r"appeared .*\n.*out\.new-1"), staging(out) as folder:
        write(folder, "new")
        made(out, "of a colleague")
        publish(folder, out)
    assert content(out) == "of a colleague"
    assert content(tmp_path / "out.new") == "an earlier run's"
    assert content(tmp_path / "out.new-1") == "new"


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_an_output_that_becomes_no_folder_is_left_alone(tmp_path: Path, kind: str) -> None:
    out, target = tmp_path / "out", tmp_path / "target"
    with pytest.raises(ExportError), staging(out) as folder:
        write(folder, "new")
        if kind == "file":
            out.write_text("mine")
        else:
            if kind == "link":
                made(target, "mine")
            out.symlink_to(target)
        publish(folder, out, force=True)
    assert out.read_text() == "mine" if kind == "file" else out.is_symlink()
    assert target.exists() == (kind == "link")
    assert content(tmp_path / "out.new") == "new"


@pytest.mark.parametrize("what", ["file", "link to a bundle", "dangling link", "under a file"])
def test_an_output_that_is_no_folder_is_refused(tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "under a file":
        (tmp_path / "file").write_text("mine")
        out = tmp_path / "file" / "out"
    else:
        out.symlink_to(made(tmp_path / "target") if "to a" in what else tmp_path / "nothing")
    for force in (False, True):
        with pytest.raises(ExportError, match="not a"):
            ownership.check_out(out, force=force)


def test_many_names_are_counted_not_listed(tmp_path: Path) -> None:
    out = made(tmp_path / "out")
    for number in range(100):
        (out / f"photo{number:03}.jpg").write_text("x")
    with pytest.raises(ExportError, match=r"photo000\.jpg, .*photo004\.jpg and 95 more\."):
        ownership.check_out(out, force=True)


def test_a_folder_that_may_not_be_emptied_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's: the super user, as who tests may run, may write everywhere."""
    out = made(tmp_path / "out")
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != out / "onnx" and access(path, mode)
    )
    with pytest.raises(ExportError, match=r"may not delete the files in .*out/onnx"):
        ownership.check_out(out, force=True)


def test_an_old_bundle_that_cannot_be_removed_is_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = made(tmp_path / "out", "old")
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name == "graph.onnx":
            raise PermissionError(1, "not yours", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    export(out, "new")
    assert content(out) == "new"
    assert (tmp_path / "out.old" / "onnx" / "graph.onnx").read_text() == "old"
    assert f"kept at {tmp_path / 'out.old'}" in caplog.text


# What the user does between the last look and the end of the swap.


def at(monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[], object]) -> None:
    """Do something right before a step of the swap."""
    step = getattr(publishing, name)

    def before(*arguments: object) -> object:
        action()
        return step(*arguments)

    monkeypatch.setattr(publishing, name, before)


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("step", ["_exchange", "_discard"])
@pytest.mark.parametrize("make", ["file", "edit", "folder", "link"])
def test_what_is_added_at_the_last_moment_is_kept_and_said(
    tmp_path: Path,
    step: str,
    make: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = made(tmp_path / "out", "old")
    inside = os.open(out, os.O_RDONLY)  # as a shell that stands in the folder

    def add() -> None:
        os.fchdir(inside)
        match make:
            case "file":
                Path("thesis.txt").write_text("years")
            case "edit":
                Path("config.json").write_text("mine")
            case "folder":
                Path("onnx/mine").mkdir()
            case "link":
                Path("onnx/mine").symlink_to("/nowhere")

    at(monkeypatch, step, add)
    before = Path.cwd()
    try:
        export(out, "new")
    finally:
        os.chdir(before)
        os.close(inside)
    assert content(out) == "new"
    kept = tmp_path / "out.old"
    assert (kept / "onnx" / "graph.onnx").read_text() == "old"
    assert {
        "file": lambda: (kept / "thesis.txt").read_text() == "years",
        "edit": lambda: (kept / "config.json").read_text() == "mine",
        "folder": (kept / "onnx" / "mine").is_dir,
        "link": (kept / "onnx" / "mine").is_symlink,
    }[make]()
    assert f"kept at {kept}" in caplog.text
    assert names(tmp_path) == ["out", "out.old"]


def test_a_file_that_is_added_during_the_removal_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made(tmp_path / "out", "old")
    remove = ownership.remove

    def late(folder: Path, found: ownership.Contents) -> None:
        (folder / "onnx" / "late.txt").write_text("mine")
        remove(folder, found)

    monkeypatch.setattr(ownership, "remove", late)
    export(out, "new")
    assert content(out) == "new"
    assert (tmp_path / "out.old" / "onnx" / "late.txt").read_text() == "mine"


def test_a_folder_that_takes_the_name_between_two_renames_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made(tmp_path / "out", "old")
    monkeypatch.setattr(publishing, "_swap", lambda new, old: False)
    calls = itertools.count()
    at(monkeypatch, "_put", lambda: made(out, "theirs") if next(calls) else None)
    with pytest.raises(ExportError, match=r"cannot be replaced.*\n.*out\.new"):
        export(out, "new")
    assert content(out) == "theirs"
    assert content(tmp_path / "out.old") == "old"
    assert content(tmp_path / "out.new") == "new"
    assert names(tmp_path) == ["out", "out.new", "out.old"]


def test_two_exports_to_one_name_end_with_one_of_them_whole(tmp_path: Path) -> None:
    out = made(tmp_path / "out", "old")
    with staging(out) as first, staging(out) as second:
        write(first, "first")
        write(second, "second")
        publish(first, out, force=True)
        publish(second, out, force=True)
    assert content(out) == "second"
    assert names(tmp_path) == ["out"]


# Staging folders and what lies beside them.


@pytest.fixture
def dead() -> Iterator[int]:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    yield child.pid


def test_a_user_s_folders_beside_the_output_stay(tmp_path: Path, dead: int) -> None:
    mine = [".sib.2024.photos", f".sib.{dead}.abc", f".sib.{dead}.abc.old", ".sib", "sib.old"]
    mine += [".fastvlm-export-", f".fastvlm-export-{'0' * 32}", f".fastvlm-export-{'0' * 32}.old"]
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_text(name)
    export(tmp_path / "sib", "new")
    assert content(tmp_path / "sib") == "new"
    for name in mine:
        assert (tmp_path / name / "photo.jpg").read_text() == name


def test_a_running_export_s_folder_stays(tmp_path: Path) -> None:
    """Whatever the other's name is: `m.20261129` looked like a staging folder of `m`."""
    with staging(tmp_path / "m.20261129") as running:
        write(running, "running")
        for out in ("m", "m.20261129", "m.20261129.1"):
            export(tmp_path / out, "other")
            assert (running / "onnx" / "graph.onnx").read_text() == "running"
        publish(running, tmp_path / "m.20261129", force=True)
    assert content(tmp_path / "m.20261129") == "running"


def test_a_finished_bundle_of_a_killed_run_goes_and_a_user_s_file_in_it_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed between the swap and the removal: what was swapped out is in the staging folder."""
    for name in ("clean", "touched"):
        claim = scratch.claim(tmp_path, publishing.STAGING, out=name)
        made(claim.path / publishing.SWAP, "old")
        if name == "touched":
            (claim.path / publishing.SWAP / "thesis.txt").write_text("years")
        claim.release()
        made(tmp_path / name, "new")
    with staging(tmp_path / "another"):
        pass
    assert names(tmp_path) == ["clean", "touched", "touched.old"]
    assert (tmp_path / "touched.old" / "thesis.txt").read_text() == "years"
    assert "touched.old" in caplog.text


def test_what_cannot_be_moved_out_of_a_leftover_stays_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = scratch.claim(tmp_path, publishing.STAGING, out="out")
    (made(claim.path / publishing.SWAP, "old") / "thesis.txt").write_text("years")
    claim.release()
    made(tmp_path / "out", "new")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with staging(tmp_path / "another"):
        pass
    assert (claim.path / publishing.SWAP / "thesis.txt").read_text() == "years"


def test_a_staging_folder_s_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    claim = scratch.claim(tmp_path, publishing.STAGING, out="out")
    (claim.path / publishing.NEW).symlink_to(tmp_path / "photos")
    (claim.path / "more").mkdir()
    (claim.path / "more" / "photos").symlink_to(tmp_path / "photos")
    claim.release()
    with staging(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["photos"]
    assert names(tmp_path / "photos") == ["a.jpg"]


def test_nothing_of_the_staging_folder_is_published(tmp_path: Path) -> None:
    export(tmp_path / "out", "new")
    assert not [path for path in (tmp_path / "out").rglob("*") if scratch.MARKER in path.name]


def test_every_file_of_a_report_is_known_by_name() -> None:
    assert {report.JSON_FILE, report.HTML_FILE, tensorrt_record.TIMES} == set(REPORT_FILES)


# Inputs.


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    for name in ("ck", "photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "ck" / "model.safetensors").write_text("weights")
    (tmp_path / "photos" / "a.jpg").write_text("x")
    (tmp_path / "me.jpg").write_text("x")
    return {
        "--checkpoint": tmp_path / "ck",
        "--calibration": tmp_path / "photos",
        "--image": tmp_path / "me.jpg",
    }


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("ck", "is --checkpoint"),
        ("ck/bundle", "lies in --checkpoint"),
        ("ck/a/b/c", "lies in --checkpoint"),
        ("photos/out", "lies in --calibration"),
        ("me.jpg", "is --image"),
        (".", "holds --checkpoint"),
        ("link", "is --checkpoint"),
        ("link/bundle", "lies in --checkpoint"),
        ("ck/../ck/bundle", "lies in --checkpoint"),
        ("link/../ck", "is --checkpoint"),
    ],
)
def test_an_output_is_apart_from_every_input(
    tmp_path: Path, inputs: dict[str, Path], out: str, words: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "ck")
    with pytest.raises(ExportError, match=words):
        ownership.check_apart(tmp_path / out, inputs)


@pytest.mark.parametrize("out", ["out", "ck2", "ck.failed", "new/ck", "photos2/out"])
def test_an_output_beside_the_inputs_is_fine(
    tmp_path: Path, inputs: dict[str, Path], out: str
) -> None:
    ownership.check_apart(tmp_path / out, inputs)


def test_an_input_behind_links_is_an_input(tmp_path: Path) -> None:
    """A checkpoint of links into the output, as download caches have them; and a linked folder."""
    out = made(tmp_path / "out")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "tokenizer.json").symlink_to(out / "config.json")
    with pytest.raises(ExportError, match="holds --checkpoint"):
        ownership.check_apart(out, {"--checkpoint": linked})
    (tmp_path / "alias").symlink_to(out)
    with pytest.raises(ExportError, match="lies in --checkpoint"):
        ownership.check_apart(out / "new", {"--checkpoint": tmp_path / "alias"})


def test_names_that_differ_by_case_are_told_apart_by_what_they_are(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a system where case does not matter, `CK` is `ck`."""
    ownership.check_apart(tmp_path / "CK" / "bundle", inputs)
    stat = Path.stat

    def insensitive(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        return stat(Path(str(path).replace("/CK", "/ck")), follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", insensitive)
    with pytest.raises(ExportError, match="lies in --checkpoint"):
        ownership.check_apart(tmp_path / "CK" / "bundle", inputs)
    with pytest.raises(ExportError, match="is --checkpoint"):
        ownership.check_apart(tmp_path / "CK", inputs)


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (None, "m.failed"),
        (made, "m.failed"),
        (bundle_with_a_thesis, "m.failed-1"),
        (bundle_with_an_edited_file, "m.failed-1"),
        (web_project, "m.failed-1"),
        (bundle_of_an_earlier_version, "m.failed-1"),
    ],
)
def test_what_fails_goes_beside_what_is_not_ours(
    tmp_path: Path, make: Callable[[Path], object] | None, place: str
) -> None:
    if make:
        make(tmp_path / "m.failed")
    assert ownership.place_of_failed(tmp_path / "m", {}) == tmp_path / place


def test_what_fails_does_not_go_where_an_input_is(tmp_path: Path) -> None:
    inputs = {"--checkpoint": tmp_path / "m.failed", "--calibration": tmp_path / "m.failed-2"}
    for path in inputs.values():
        path.mkdir()
    (tmp_path / "m.failed-1").symlink_to(tmp_path / "m.failed")
    assert ownership.place_of_failed(tmp_path / "m", inputs) == tmp_path / "m.failed-3"


def test_a_long_name_is_cut_where_something_is_added(tmp_path: Path) -> None:
    out = tmp_path / ("m" * 250)
    export(out, "old")
    with pytest.raises(ExportError, match="appeared"), staging(out) as folder:
        write(folder, "new")
        publish(folder, out)
    assert content(ownership.place_of_failed(out, {}).with_suffix(".new")) == "new"
    with pytest.raises(ExportError, match="too long a name"):
        ownership.check_out(tmp_path / ("m" * 300), force=True)


def test_a_copy_of_a_bundle_is_a_bundle(tmp_path: Path) -> None:
    shutil.copytree(made(tmp_path / "first"), tmp_path / "copy")
    export(tmp_path / "copy", "new")
    assert content(tmp_path / "copy") == "new"
