"""An Android device through `adb`: facts, files to one folder of its, one program run there."""

import contextlib
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..exporter.errors import ExportError
from .device_latency import DeviceFacts

SCHEME = "adb://"
REMOTE = "/data/local/tmp/fastvlm-export"
"""The one folder on the device that is written to; `remove` leaves nothing of it."""

PID = "fastvlm-export-pid"
QUICK_SECONDS = 30.0
LEAST_BYTES_PER_SECOND = 2e6  # USB 2 moves ten times as much
INSTALL = "Install Android's platform tools (https://developer.android.com/tools/adb), then: "
STATES = {
    "unauthorized": "Unlock it and allow USB debugging in its dialogue, then: adb devices",
    "offline": "Plug it in again or restart its connection: adb reconnect",
    "no permissions": "Give this user access to it (udev rules on Linux), then: adb devices",
}


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a program on the device printed and how it ended."""

    code: int
    stdout: str
    stderr: str


class Adb:
    """One device that answers. `find` is how to get one."""

    def __init__(self, serial: str) -> None:
        self.serial = serial

    @classmethod
    def find(cls, url: str) -> "Adb":
        """The device of adb://SERIAL, or with adb:// the only one; ExportError where there is none.

        Serials of devices on the network hold a colon: adb://192.168.1.7:5555.
        """
        asked = url.removeprefix(SCHEME).rstrip("/")
        if shutil.which("adb") is None:
            raise ExportError(
                f"--device {url} needs adb, which is not on the PATH.", INSTALL + "adb devices"
            )
        states = _devices()
        ready = [serial for serial, state in states.items() if state == "device"]
        listed = ", ".join(f"{serial} ({state})" for serial, state in states.items()) or "none"
        if asked and asked not in states:
            raise ExportError(
                f"adb knows no device {asked}; it lists: {listed}.",
                "Plug it in with USB debugging on, then: adb devices",
            )
        serial = asked or (ready[0] if len(ready) == 1 else "")
        if not serial and len(ready) > 1:
            raise ExportError(
                f"{url} names none of {len(ready)} devices: {', '.join(ready)}.",
                f"Choose one: --device {SCHEME}{ready[0]}",
            )
        if not serial and len(states) == 1:
            (serial,) = states
        if not serial:
            raise ExportError(
                f"No Android device is ready; adb lists: {listed}.",
                "Plug one in with USB debugging on, then: adb devices",
            )
        state = states[serial]
        if state != "device":
            raise ExportError(
                f"The device {serial} is there, but {state}.", STATES.get(state, "See: adb devices")
            )
        return cls(serial)

    def facts(self) -> DeviceFacts:
        """What the device says of itself; empty where it keeps silent."""
        properties = dict(re.findall(r"\[([^\]]+)\]: \[([^\]]*)\]", self._say("getprop")))

        def first(*names: str) -> str:
            return next((found for name in names if (found := properties.get(name))), "")

        maker, release = first("ro.product.manufacturer"), first("ro.build.version.release")
        soc = f"{first('ro.soc.manufacturer')} {first('ro.soc.model')}".strip()
        memory = re.search(r"MemTotal:\s*(\d+) kB", self._say("cat", "/proc/meminfo"))
        cores = re.search(r"^\d+$", self._say("nproc"), re.MULTILINE)
        load = re.match(r"\s*(\d+\.\d+) ", self._say("cat", "/proc/loadavg"))
        return DeviceFacts(
            serial=self.serial,
            model=f"{maker} {first('ro.product.model')}".strip(),
            system=f"Android {release}" if release else "",
            soc=soc or first("ro.board.platform", "ro.hardware"),
            abis=tuple(first("ro.product.cpu.abilist", "ro.product.cpu.abi").split(",")),
            cores=int(cores[0]) if cores else None,
            memory_bytes=1024 * int(memory[1]) if memory else None,
            load=float(load[1]) if load else None,
            thermal_before=self.thermal_status(),
        )

    def thermal_status(self) -> int | None:
        """Android's thermal status, 0 where nothing is held back; None before Android 10."""
        found = re.search(r"Thermal Status: (\d+)", self._say("dumpsys", "thermalservice"))
        return int(found[1]) if found else None

    def free_bytes(self) -> int | None:
        """Room where files are pushed to; None where `df` is not understood."""
        lines = self._say("df", "-k", str(Path(REMOTE).parent)).splitlines()
        fields = lines[-1].split() if len(lines) > 1 else []
        return 1024 * int(fields[3]) if len(fields) > 3 and fields[3].isdigit() else None

    def push(self, files: Mapping[str, Path], say: Callable[[str], None]) -> None:
        """Copy files into the remote folder, each under its name there."""
        self.remove(files)
        made = self._shell("mkdir", "-p", REMOTE)
        if made.code:
            raise ExportError(
                f"{REMOTE} cannot be made on {self.serial}: {last(made)}",
                f"Try it by hand: adb -s {self.serial} shell mkdir -p {REMOTE}",
            )
        for name, file in files.items():
            size = file.stat().st_size
            say(f"push {name}, {size / 1e6:.1f} MB")
            limit = QUICK_SECONDS + size / LEAST_BYTES_PER_SECOND
            pushed = self._adb("push", str(file), f"{REMOTE}/{name}", timeout=limit)
            if pushed.code:
                full = "No space left" in pushed.stdout + pushed.stderr
                raise ExportError(
                    f"{name} cannot be pushed to {self.serial}: {last(pushed)}",
                    f"Free {size / 1e6:.0f} MB on the device and run again."
                    if full
                    else "See whether the device still answers: adb devices",
                )

    def run(self, program: str, arguments: Sequence[str], timeout: float) -> Output:
        """Run a pushed program in the remote folder, for `timeout` seconds at most."""
        # The shell says its process id and becomes the program: one that hangs can be ended.
        started = shlex.join([f"./{program}", *arguments])
        script = (
            f"cd {REMOTE} && chmod 755 {shlex.quote(program)} && echo {PID} $$ && exec {started}"
        )
        try:
            return self._adb("shell", script, timeout=timeout, watched=True)
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"{program} had not finished on {self.serial} after {timeout:.0f} s; it was ended.",
                "Measure less: --runs 2",
            ) from error

    def remove(self, names: Iterable[str]) -> None:
        """Delete these files, and the remote folder unless it holds anything else.

        A device that has gone keeps them until the next push.
        """
        with contextlib.suppress(ExportError):
            self._shell("rm", "-f", *(f"{REMOTE}/{name}" for name in names))
            self._shell("rmdir", REMOTE)

    def _say(self, *words: str) -> str:
        """What a command prints; empty where it fails, for the device may not have it."""
        found = self._shell(*words)
        return "" if found.code else found.stdout

    def _shell(self, *words: str) -> Output:
        return self._adb("shell", shlex.join(words))

    def _adb(
        self, *arguments: str, timeout: float = QUICK_SECONDS, watched: bool = False
    ) -> Output:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(  # noqa: S603 - the serial is one that adb listed
                ["adb", "-s", self.serial, *arguments],  # noqa: S607 - the user's own adb
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
            try:
                code = process.wait(timeout)
            except BaseException as error:
                process.kill()
                process.wait()
                if watched:
                    self._end(_text(out))
                    raise
                if isinstance(error, subprocess.TimeoutExpired):
                    raise ExportError(
                        f"adb {arguments[0]} got no answer from {self.serial} in {timeout:.0f} s.",
                        "Plug the device in again, then: adb devices",
                    ) from error
                raise
            return Output(code=code, stdout=_text(out), stderr=_text(err))

    def _end(self, printed: str) -> None:
        """End what a watched command started on the device: adb leaves it running."""
        found = re.search(rf"^{PID} (\d+)", printed, re.MULTILINE)
        if found:
            with contextlib.suppress(ExportError):
                self._shell("kill", "-9", found[1])


def ending(output: Output) -> str:
    """How a program that failed ended, with the last that it said."""
    number = output.code - 128 if output.code > 128 else 0
    known = {one.value for one in signal.Signals}
    how = f"signal {signal.Signals(number).name}" if number in known else f"exit code {output.code}"
    return f"{how}: {last(output)}"


def _devices() -> dict[str, str]:
    """Serial -> state, as `adb devices` lists them."""
    try:
        found = subprocess.run(
            ["adb", "devices"],  # noqa: S607 - the user's own adb
            capture_output=True,
            text=True,
            errors="replace",
            timeout=QUICK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ExportError(f"adb does not answer: {error}", INSTALL + "adb devices") from error
    if found.returncode:
        said = (found.stderr or found.stdout).strip().splitlines() or ["nothing"]
        raise ExportError(f"adb devices failed: {said[-1]}", "Try: adb kill-server; adb devices")
    rows = re.findall(r"^(\S+)\t+(no permissions|\S+)", found.stdout, re.MULTILINE)
    return dict(rows)


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace").replace("\r\n", "\n")


def last(output: Output) -> str:
    """The last line that says something, standard error first."""
    for text in (output.stderr, output.stdout):
        said = [line.strip() for line in text.splitlines() if line.strip() and PID not in line]
        if said:
            return said[-1]
    return "it said nothing"
