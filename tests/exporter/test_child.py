"""Workers end with the process that started them, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastvlm_export.exporter import child

# Under nohup or in the background some signals are ignored, and by children, too.
PARENT = """
import signal, subprocess, sys
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
from fastvlm_export.exporter import child
worker = subprocess.Popen(child.command(sys.argv[1]), stdin=subprocess.PIPE)
print(worker.pid, flush=True)
worker.wait()
"""

BUSY = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + BUSY


def ends(pid: int, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("code", [BUSY, DEAF])
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("started", [True, False])
def test_a_worker_ends_with_its_parent(
    tmp_path: Path, code: str, kill: signal.Signals, started: bool
) -> None:
    """Also one that is still starting, in which nothing of its own has run yet."""
    (tmp_path / "busy_worker.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, "busy_worker"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if started:
            assert parent.stdout.readline() == b"up\n"
        parent.send_signal(kill)
    assert ends(pid)


def test_where_the_system_does_not_tell_a_thread_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS: no call of Linux's is made."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.platform = 'darwin'\n")
    (tmp_path / "busy_worker.py").write_text(BUSY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getenv("PYTHONPATH", "")]))
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, "busy_worker"], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == b"up\n"
        parent.kill()
    assert ends(pid)


def test_a_worker_is_the_module_and_reads_its_own_input(tmp_path: Path) -> None:
    (tmp_path / "echo_worker.py").write_text(
        "import sys\nassert __name__ == '__main__'\nprint(sys.argv[1:], sys.stdin.read())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        child.command("echo_worker"),
        input="hello",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    assert done.stdout == "[] hello\n"


def test_a_worker_whose_parent_has_gone_does_not_start() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    line = [*child.command("this")[:-1], str(dead.pid)]
    assert subprocess.run(line, capture_output=True, check=False).returncode == 1


def test_nothing_is_imported_before_the_watch_begins() -> None:
    """A worker's own imports take seconds, in which its parent may die."""
    code = f"import sys, {child.__name__}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_no_worker_is_started_in_another_way() -> None:
    root = Path(child.__file__).parents[1]
    lines = [
        f"{path.name}: {line}"
        for folder in ("exporter", "targets", "validate", "quantize")
        for path in (root / folder).rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if "sys.executable" in line
    ]
    assert [line.split(":")[0] for line in lines] == ["child.py"]
