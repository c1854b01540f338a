"""How workers are started: as processes that end when the one that started them does.

A parent that is killed can't end its workers, and one that builds an engine or times a model would
go on for minutes. `command` starts a module by way of this one, which watches the parent from the
first moment on, before the worker's own imports (seconds, with torch) have begun.
"""

import contextlib
import ctypes
import os
import runpy
import signal
import sys
import threading
import time

POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


def command(module: str) -> list[str]:
    """The command line of a worker: that module's `__main__`, in this interpreter."""
    # -P: a file in the current folder must not stand in for a module.
    return [sys.executable, "-P", "-m", __name__, module, str(os.getpid())]


def end_with(parent: int) -> None:
    """Have this process end when its parent, of that id, does; at once where it already has."""
    if sys.platform == "linux":
        # By the kernel, also while a library holds the interpreter's lock for minutes.
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not _is_alive(parent):
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while _is_alive(parent):
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _is_alive(parent: int) -> bool:
    """Whether the process that started this one still runs."""
    if sys.platform != "win32":
        return os.getppid() == parent
    import psutil  # noqa: PLC0415 - only here: a worker's start should cost nothing

    # Windows keeps the number of a parent that has gone and may give it to a later process.
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(parent).create_time() <= psutil.Process().create_time())
    return False


def main() -> None:
    """Watch the parent, then become the worker."""
    _, module, parent = sys.argv
    end_with(int(parent))
    sys.argv = sys.argv[:1]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
