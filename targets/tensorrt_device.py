"""The NVIDIA GPU of this machine, as its driver describes it: asked through libcuda alone.

No package is imported for it and no context is created, so that asking costs milliseconds and no
device memory. CUDA's driver API: https://docs.nvidia.com/cuda/cuda-driver-api/
"""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

LIBRARY: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
"""The driver's own library; it comes with the driver, never with a toolkit or a wheel."""

FIRST_DRIVERS: Final = {12: "525", 13: "580"}
"""CUDA's major version -> the first branch of drivers that runs it (CUDA's release notes)."""

_CAPABILITY_MAJOR: Final = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_CAPABILITY_MINOR: Final = 76
_REASONS: Final = {
    34: "a stub of the driver's library was found before the real one",
    100: "the driver sees no GPU (is CUDA_VISIBLE_DEVICES set?)",
    803: "the driver's library and kernel module are of different versions (restart the machine)",
    804: "the compatibility libraries of CUDA do not support this GPU",
    999: "unknown error; is the kernel module loaded? Try nvidia-smi",
}
"""`cuInit`'s results that a user can do something about."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first GPU that the driver shows to this process.

    `capability` is spelled as on the command line, "86" for 8.6. `driver` is the newest CUDA that
    the driver runs, 1000 * major + 10 * minor. `memory_bytes` is all of the GPU's.
    """

    name: str
    capability: str
    driver: int
    memory_bytes: int


class _DriverError(Exception):
    """What keeps the driver from showing a GPU, as a clause without a full stop."""


def find_gpu(load: Callable[[str], Any] = ctypes.CDLL) -> Gpu | None:
    """The first GPU of this machine; None where there is no driver or no GPU that it shows.

    `load` opens a shared library by name. Never raises: `driver_problem` says what is missing.
    """
    try:
        return _ask(load)
    except _DriverError:
        return None


def driver_problem(backend: str, version: str, load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """Why engines can't run here and what to do about it, as sentences; empty where they can.

    `backend` is the package's name ("tensorrt-rtx" or "tensorrt"), `version` the installed one's.
    """
    try:
        gpu = _ask(load)
    except _DriverError as error:
        return (
            f"Engines can't run here: {error}. Run them on a machine with an NVIDIA GPU and a "
            f"driver of {_branch(cuda_of(backend))} or newer."
        )
    needed = cuda_of(backend)
    if needed and gpu.driver < 1000 * needed:
        return (
            f"The driver of {gpu.name} is too old: it runs CUDA up to {spelled(gpu.driver)}, and "
            f"{backend} {version} is built for CUDA {needed}. Install driver {_branch(needed)} or "
            "newer: https://www.nvidia.com/drivers"
        )
    return ""


def cuda_of(backend: str) -> int | None:
    """The major version of CUDA that the installed package is built for; None where unknown.

    It is a part of the distribution's name: tensorrt-rtx-cu13, tensorrt-cu12.
    """
    return max((n for n in FIRST_DRIVERS if _is_installed(f"{backend}-cu{n}")), default=None)


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def spelled(version: int) -> str:
    """CUDA's version number as people write it: 13000 -> "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _branch(cuda: int | None) -> str:
    """The first driver for a version of CUDA: of one that is not in the table, the newest known."""
    return FIRST_DRIVERS.get(cuda or 0, FIRST_DRIVERS[max(FIRST_DRIVERS)])


def _ask(load: Callable[[str], Any]) -> Gpu:
    try:
        cuda = load(LIBRARY)
    except OSError as error:
        raise _DriverError(f"no NVIDIA driver is installed ({LIBRARY} was not found)") from error
    status = cuda.cuInit(0)
    if status:
        raise _DriverError(_REASONS.get(status, f"the driver does not start (CUDA error {status})"))
    count, driver, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _check(cuda.cuDriverGetVersion(ctypes.byref(driver)))
    _check(cuda.cuDeviceGetCount(ctypes.byref(count)))
    if not count.value:
        raise _DriverError(_REASONS[100])
    _check(cuda.cuDeviceGet(ctypes.byref(device), 0))
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _check(cuda.cuDeviceGetName(name, len(name), device))
    _check(cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
    major, minor = (_attribute(cuda, a, device) for a in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR))
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=f"{major}{minor}",
        driver=driver.value,
        memory_bytes=memory.value,
    )


def _attribute(cuda: Any, attribute: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _check(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
    return value.value


def _check(status: int) -> None:
    if status:
        raise _DriverError(_REASONS.get(status, f"the driver answers with CUDA error {status}"))
