"""The parent's end of a latency worker: start it, ask it, end it."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from ..exporter import child
from ..exporter.errors import ExportError
from ..targets.executorch_proof import EXPENDABLE

WORKER = "fastvlm_export.validate.latency_worker"


class WorkerProcess:
    """A child process that answers JSON lines: see latency_worker."""

    def __init__(self, job: Mapping[str, Any], stderr: IO[bytes]) -> None:
        self.name: str = job["name"]
        self.setting = ""
        self.stderr = stderr
        self.process = subprocess.Popen(  # noqa: S603 - our own module in our own interpreter
            child.command(WORKER),
            env={**os.environ, EXPENDABLE: "1"},  # where it dies, `ask` says so
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
        )
        self._send(job)

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Send one request and wait for its answer; raises ExportError when there is none."""
        self._send({"do": do, **arguments})
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            self._died(do)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ExportError(f"{self.name}: {answer['error']}", answer["hint"])
        return answer

    def _send(self, message: Mapping[str, Any]) -> None:
        # Where the process has gone, the next read finds that out and says why.
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin:
                self.process.stdin.write(json.dumps(message) + "\n")
                self.process.stdin.flush()

    def _died(self, do: str) -> None:
        code = self.process.wait()
        self.stderr.seek(0)
        said = [line for line in self.stderr.read().decode(errors="replace").splitlines() if line]
        reason = said[-1].strip() if said else f"exit code {code}"
        if code < 0:
            reason = f"killed by signal {-code}" + (
                ", often for want of memory" if code == -9 else ""
            )
        raise ExportError(
            f"{self.name} stopped during '{do}': {reason}",
            "See whether it computes at all: fastvlm-export validate BUNDLE",
        )

    def close(self) -> None:
        """End the process, whatever it is doing."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with contextlib.suppress(OSError):  # what a process that has gone did not take
                    stream.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def start(job: Mapping[str, Any]) -> Iterator[WorkerProcess]:
    """A worker for one job, ended at exit."""
    with tempfile.TemporaryFile() as stderr:
        worker = WorkerProcess(job, stderr)
        try:
            yield worker
        finally:
            worker.close()
