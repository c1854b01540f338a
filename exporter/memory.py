"""The most memory that a process has held."""

import sys
from pathlib import Path

import psutil


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes.

    Linux carries `ru_maxrss` over from the process that started this one, so a small child of a
    large parent would report the parent's; VmHWM is this program's own.
    """
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # noqa: PLC0415 - not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
