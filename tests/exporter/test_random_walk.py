"""Hundreds of exports, some killed, and a user who works in the same folders: no byte is lost.

Each export runs in a process of its own. At one of its steps, drawn by chance, it is killed or
interrupted, or the user does something: adds, edits, renames and links files and folders, in and
around what is exported to, by their paths or from a shell that stands in the old bundle.
"""

import contextlib
import errno
import functools
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fastvlm_export.exporter import ownership, scratch
from fastvlm_export.exporter import publish as publishing
from fastvlm_export.exporter.bundle import MANIFEST, check_current, files_of, open_bundle
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.publish import publish, staging

from .bundles import write

OPERATIONS = 500
OUTS = ("m", "m.2026", "sub/m", "M")
MOST_ENTRIES = 20
STEPS = 25
"""About as many as an export has, from its beginning or from its publication on."""

KILLED, INTERRUPTED, BROKEN = 9, 130, 70


@dataclass
class User:
    """Does things below `root`, and knows what must still be there afterwards."""

    root: Path
    random: random.Random
    count: int = 0
    texts: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)
    shell: int | None = None
    near: Path | None = None
    """Where it does every second thing: the output of the export that runs."""

    def new(self, kind: str) -> str:
        self.count += 1
        return f"{kind}-{self.count}"

    def act(self) -> None:
        """One thing; what the system refuses has not happened."""
        actions = [self.add, self.add, self.edit, self.rename, self.link, self.folder, self.copy]
        actions += [self.hidden, self.report] + [self.in_shell] * (self.shell is not None)
        with contextlib.suppress(OSError):
            self.random.choice(actions)()

    def folders(self) -> list[Path]:
        return [self.root, *(path for path in visible(self.root) if is_folder(path))]

    def place(self, kind: str) -> Path:
        """A new name, as often as not in or at one of the outputs."""
        if self.near is not None and self.random.random() < 0.5:
            return self.near / self.random.choice(["", "onnx", "report"]) / self.new(kind)
        if self.random.random() < 0.15:
            return self.root / self.random.choice(OUTS)
        return self.random.choice(self.folders()) / self.new(kind)

    def add(self) -> None:
        path, text = self.place("file"), self.new("text")
        with path.open("x") as file:
            file.write(text)
        self.own(path, text)

    def hidden(self) -> None:
        name = self.random.choice([".m.2024.photos", ".DS_Store", ".fastvlm-mine", "m.failed"])
        path, text = self.random.choice(self.folders()) / name, self.new("text")
        path.mkdir()
        (path / self.new("file")).write_text(text)
        self.own(path, text)

    def report(self) -> None:
        path, text = self.root / self.random.choice(OUTS) / "report", self.new("text")
        path.mkdir(exist_ok=True)
        (path / self.new("file")).write_text(text)
        self.own(path, text)

    def in_shell(self) -> None:
        """By the folder itself, whatever its name is by now."""
        assert self.shell is not None
        name, text = self.new("file"), self.new("text")
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=self.shell)
        os.write(descriptor, text.encode())
        os.close(descriptor)
        self.texts.add(text)
        self.names.add(name)

    def edit(self) -> None:
        near = self.near if self.near and self.random.random() < 0.5 else self.root
        path = self.random.choice([one for one in visible(near) if is_file(one)] or [self.root])
        before = path.read_text()
        text = self.new("text")[: len(before)] if self.random.random() < 0.3 else self.new("text")
        if text in before or len(text) < 5 or any(text in one for one in self.texts):
            return
        self.touch(path)
        status = path.stat()
        path.write_text(text)
        self.touch(path)  # a manifest has become another one
        if self.random.random() < 0.3:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.texts.discard(before)
        self.texts.add(text)

    def rename(self) -> None:
        source = self.random.choice(list(visible(self.root)))
        target = self.place("moved")
        if os.path.lexists(target):
            return
        self.touch(source)
        source.rename(target)
        self.names.discard(source.name)
        self.own(target)

    def link(self) -> None:
        path, target = self.place("link"), self.random.choice(list(visible(self.root)))
        if is_file(target) and self.random.random() < 0.5:
            path.hardlink_to(target)
        else:
            path.symlink_to(target)
        self.own(path)

    def folder(self) -> None:
        path = self.place("folder")
        path.mkdir()
        # An empty folder is as good as none at an output's own name, and only there.
        if path.relative_to(self.root).as_posix() not in OUTS:
            self.own(path)

    def copy(self) -> None:
        """Of a whole bundle: the copy is one, too, as long as nobody changes it."""
        source = self.root / self.random.choice(OUTS)
        target = self.place("copy")
        if not is_folder(source) or target.is_relative_to(source):
            return
        target.mkdir()
        self.own(target, *(self.copied(source, target)))

    def copied(self, source: Path, target: Path) -> list[str]:
        for path in visible(source):
            to = target / path.relative_to(source)
            if is_folder(path):
                to.mkdir(exist_ok=True)
            elif is_file(path):
                to.write_bytes(path.read_bytes())
        return []

    def move_away(self, out: Path) -> None:
        """As the error says to do."""
        if os.path.lexists(out):
            self.touch(out)
            self.touch(out / "x")
            target = self.root / self.new("kept")
            out.rename(target)
            self.own(target)

    def tidy(self) -> None:
        """Delete a thing of the user's own choice."""
        path = self.random.choice(list(self.root.iterdir()))
        if path.name.startswith(".fastvlm-export-") or path.name == "sub":
            return
        if is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()
        paths = everything(self.root)
        self.texts &= {path.read_text() for path in paths if is_file(path)}
        self.names &= {path.name for path in paths}

    def own(self, path: Path, *texts: str) -> None:
        """From now on this name, unless it is an output's, and these texts must be somewhere."""
        self.texts |= set(texts)
        self.touch(path)
        if path.name not in {Path(out).name for out in OUTS}:
            self.names.add(path.name)

    def touch(self, path: Path) -> None:
        """The bundles that hold this path are not as they were exported any more."""
        for folder in path.parents:
            if (folder / MANIFEST).is_file():
                self.touched.add(identity(folder))


def identity(bundle: Path) -> str:
    return (bundle / MANIFEST).read_text()


def visible(root: Path) -> list[Path]:
    """Everything below a folder, links not followed, staging folders left out."""
    return [path for path in everything(root) if ".fastvlm-export-" not in str(path)]


def everything(root: Path) -> list[Path]:
    return sorted(
        Path(folder) / name
        for folder, folders, files in os.walk(root)
        for name in (*folders, *files)
    )


def is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def snapshot(out: Path) -> object:
    """What stands at a path, down to its bytes."""
    if not is_folder(out):
        return os.path.lexists(out)
    found = {path: path.read_text() if is_file(path) else None for path in everything(out)}
    return {path.relative_to(out).as_posix(): text for path, text in found.items()}


class Disturbance:
    """Called before and after each step of an export; does what was drawn at the drawn one."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.left, self.action, self.busy, self.armed = step, action, False, True

    def __call__(self) -> None:
        if self.busy or not self.armed:
            return
        self.left -= 1
        if self.left == 0:
            self.busy = True
            self.action()
            self.busy = False

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def disturbed(*given: Any, **named: Any) -> Any:
            self()
            result = step(*given, **named)
            self()
            return result

        return disturbed


class Walk:
    """The folders, the user and the exports."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root / "home"
        (self.root / "sub").mkdir(parents=True)
        self.random = random.Random(seed)  # noqa: S311 - chance, not secrecy
        self.user = User(self.root, self.random)
        self.state = root / "state"
        self.exports = 0
        self.last = OUTS[0]
        self.ended: dict[str, int] = {}

    def step(self) -> None:
        if self.random.random() < 0.3:
            self.user.act()
        else:
            self.export()
        if len(list(self.root.iterdir())) > MOST_ENTRIES:
            self.user.tidy()
        self.check()

    def export(self) -> None:
        out = self.root / self.random.choice([*OUTS, *[self.last] * len(OUTS)])
        self.last = out.relative_to(self.root).as_posix()
        if self.random.random() < 0.3:
            with contextlib.suppress(OSError):
                self.user.move_away(out)
        before = snapshot(out)
        self.exports += 1
        drawn = self.random.choice(["nothing", "kill", "interrupt", "user", "user, then kill"])
        job = Job(
            out=out,
            text=f"export-{self.exports}",
            kind=self.random.choice(["one", "one", "several", "failed", "build"]),
            force=self.random.random() < 0.7,
            two_renames=self.random.random() < 0.5,
            drawn=drawn,
            step=self.random.randint(1, STEPS),
            late=self.random.random() < 0.7,
            seed=self.random.random(),
        )
        child = os.fork()
        if not child:
            os._exit(self.run(job))
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        self.ended[f"{code}"] = self.ended.get(f"{code}", 0) + 1
        assert code != BROKEN, self.state.read_text()
        self.user.__dict__.update(pickle.loads(self.state.read_bytes()))  # noqa: S301
        self.user.shell = None
        if "user" not in drawn:
            after = snapshot(out)
            is_new = isinstance(after, dict) and job.text in after.values()
            several = isinstance(after, dict) and job.text in str(after)
            moved_aside = job.two_renames and after is False
            put_back = before is False
            assert after == before or is_new or several or moved_aside or put_back

    def run(self, job: "Job") -> int:
        """In the child: the export, and how it ended."""
        user = self.user
        try:
            user.random = random.Random(job.seed)  # noqa: S311 - likewise
            user.count += 1000 * self.exports
            scratch._swept.clear()

            def save() -> None:
                kept = {name: getattr(user, name) for name in ("count", "texts", "names")}
                self.state.write_bytes(pickle.dumps(kept | {"touched": user.touched}))

            def disturb() -> None:
                if "user" in job.drawn:
                    for _ in range(3):
                        user.act()
                if "kill" in job.drawn:
                    save()
                    os._exit(KILLED)
                if job.drawn == "interrupt":
                    raise KeyboardInterrupt

            with contextlib.suppress(OSError):
                user.shell = os.open(job.out, os.O_RDONLY | os.O_DIRECTORY)
            user.near = job.out
            self.patch(Disturbance(job.step if job.drawn != "nothing" else 0, disturb), job)
            code = 0
            try:
                job.run()
            except ExportError:
                code = 2
            except KeyboardInterrupt:
                code = INTERRUPTED
            save()
        except BaseException:  # the parent says it
            import traceback  # noqa: PLC0415

            self.state.write_text(traceback.format_exc())
            return BROKEN
        return code

    def patch(self, disturbance: Disturbance, job: "Job") -> None:
        """In a child, so for good: each change to the disk is a step."""
        for name in ("rename", "unlink", "rmdir", "mkdir", "open"):
            setattr(os, name, disturbance.around(getattr(os, name)))
        ownership._entries = disturbance.around(ownership._entries)
        ownership.remove = disturbance.around(ownership.remove)
        swap = (lambda new, old: False) if job.two_renames else publishing._swap
        publishing._swap = disturbance.around(swap)
        disturbance.armed = not job.late

        def arm(path: Path) -> None:  # in place of writing to the disk: the first step of `publish`
            disturbance.armed = True

        publishing._sync = arm

    def check(self) -> None:
        """Nothing of the user's is lost, and what was not touched is whole."""
        paths = everything(self.root)
        found = {path.read_text() for path in paths if is_file(path)}
        assert self.user.texts <= found
        assert self.user.names <= {path.name for path in paths}
        for path in paths:
            if path.name == MANIFEST and is_file(path) and ".fastvlm-" not in str(path):
                folder = path.parent
                if identity(folder) not in self.user.touched and is_output(self.root, folder):
                    self.check_whole(folder)

    def check_whole(self, folder: Path) -> None:
        """Its files are its manifest's; but one that `build` linked may have been edited since."""
        try:
            open_bundle(folder)
        except ExportError as error:
            only = "is damaged: config.json differs from the hash in manifest.json."
            edited = (folder / "config.json").read_text() in self.user.texts
            assert error.message.endswith(only) and edited, error.message


def is_output(root: Path, folder: Path) -> bool:
    names = {folder.relative_to(root).as_posix(), folder.parent.relative_to(root).as_posix()}
    return bool(names & set(OUTS))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export: where to, of what kind, and what happens at which of its steps."""

    out: Path
    text: str
    kind: str
    force: bool
    two_renames: bool
    drawn: str
    step: int
    late: bool
    seed: float

    def run(self) -> None:
        if self.kind == "build":
            self.build()
            return
        ownership.check_out(self.out, force=self.force)
        with staging(self.out) as folder:
            if self.kind == "several":
                for target in ("onnx", "coreml"):
                    (folder / target).mkdir()
                    write(folder / target, self.text, target)
            else:
                write(folder, self.text)
            final = ownership.place_of_failed(self.out, {}) if self.kind == "failed" else self.out
            publish(folder, final, force=self.force or self.kind == "failed")

    def build(self) -> None:
        """As `build` does: the files that stay are links to the old ones."""
        bundle = open_bundle(self.out)
        if problem := ownership.problem(self.out):
            raise ExportError(problem)
        with staging(self.out) as folder:
            try:
                manifest = write(folder, self.text)
                assert set(manifest.files) == set(files_of(folder))
                (folder / "config.json").unlink()
                (folder / "config.json").hardlink_to(self.out / "config.json")
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                raise ExportError("it has gone") from error
            publish(
                folder,
                self.out,
                force=True,
                check=functools.partial(check_current, bundle),
            )


@pytest.mark.parametrize("seed", [int(os.environ.get("FASTVLM_EXPORT_WALK", "1"))])
def test_no_byte_of_the_user_s_is_lost(tmp_path: Path, seed: int) -> None:
    walk = Walk(tmp_path, seed)
    for _ in range(OPERATIONS):
        walk.step()
    assert {"0", "2", f"{KILLED}", f"{INTERRUPTED}"} <= set(walk.ended), walk.ended
