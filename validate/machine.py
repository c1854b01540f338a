"""The machine that numbers were measured on: a timing without it says nothing."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from ..exporter.memory import peak_memory
from ..targets.base import available_cores

__all__ = ["Machine", "describe", "instructions", "peak_memory", "reset_peak_memory"]

PACKAGES = (
    "torch",
    "onnxruntime",
    "onnx",
    "onnxscript",
    "coremltools",
    "executorch",
    "tensorrt-rtx-cu13",
    "tensorrt",
    "numpy",
    "pillow",
    "tokenizers",
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`cores` are those this process may use, `memory_bytes` the whole of the machine's.

    `load` is the number of processes that wanted a core over the last minute, before measuring:
    more than a fraction of one means that something else was running.
    """

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    packages: Mapping[str, str]
    load: float | None

    @property
    def busy(self) -> bool:
        """True where others took so much that timings are worth less."""
        return self.load is not None and self.load > max(0.5, 0.25 * self.cores)


def describe() -> Machine:
    """Look at this machine; imports none of the packages that it names."""
    return Machine(
        cpu=_cpu(),
        cores=available_cores(),
        memory_bytes=psutil.virtual_memory().total,
        system=_system(),
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def instructions() -> str:
    """The processor's, as PyTorch uses them: sines and sums differ between them in last bits."""
    import torch  # noqa: PLC0415 - only what quantizes needs it

    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def reset_peak_memory() -> bool:
    """Start `peak_memory` anew from what is held now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _system() -> str:
    """Linux 6.1.0 (x86_64), macOS 15.1 (arm64): on a Mac the release that people know."""
    mac = platform.mac_ver()[0]
    name = f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"
    return f"{name} ({platform.machine()})"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin" and (brand := _brand_on_a_mac()):
        return brand
    return platform.processor() or platform.machine()


def _brand_on_a_mac() -> str:
    """`Apple M4`; empty where sysctl does not say. `platform` knows no more than `arm`."""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        found = subprocess.run(  # noqa: S603 - a fixed command of the system's
            command, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
