"""Which GPU is there and what keeps engines from running, asked of drivers that are not there."""

import ctypes
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest

from fastvlm_export.targets import tensorrt_device as device
from fastvlm_export.targets.tensorrt_device import Gpu

RTX = "tensorrt-rtx"


class Driver:
    """libcuda with the functions that are asked, as the driver API's reference describes them."""

    def __init__(self, **answers: Any) -> None:
        self.init = answers.get("init", 0)
        self.count = answers.get("count", 1)
        self.version = answers.get("version", 13010)
        self.name = answers.get("name", b"NVIDIA GeForce RTX 4090")
        self.capability = answers.get("capability", (8, 9))
        self.broken = answers.get("broken", "")
        self.memory = 24 * 2**30
        self.started = False

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name == self.broken:
            return lambda *_: 201  # CUDA_ERROR_INVALID_CONTEXT, as an example
        raise AttributeError(name)

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's name
        assert flags == 0
        self.started = self.init == 0
        return self.init

    def cuDriverGetVersion(self, out: Any) -> int:  # noqa: N802
        out._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:  # noqa: N802
        assert self.started
        out._obj.value = self.count
        return 0

    def cuDeviceGet(self, out: Any, ordinal: int) -> int:  # noqa: N802
        assert ordinal < self.count
        out._obj.value = 7
        return 0

    def cuDeviceGetName(self, buffer: Any, size: int, handle: ctypes.c_int) -> int:  # noqa: N802
        assert handle.value == 7
        assert len(self.name) < size
        buffer.value = self.name
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, handle: ctypes.c_int) -> int:  # noqa: N802
        assert handle.value == 7
        out._obj.value = self.memory
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, handle: ctypes.c_int) -> int:  # noqa: N802
        assert handle.value == 7
        out._obj.value = self.capability[{75: 0, 76: 1}[attribute]]
        return 0


def opens(driver: Driver) -> Callable[[str], Driver]:
    def load(name: str) -> Driver:
        assert name == device.LIBRARY
        return driver

    return load


def no_library(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.fixture
def built_for(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installed distributions, by name."""

    def install(*names: str) -> None:
        def distribution(name: str) -> str:
            if name not in names:
                raise metadata.PackageNotFoundError(name)
            return name

        monkeypatch.setattr(device.metadata, "distribution", distribution)

    return install


def test_the_first_gpu_is_described() -> None:
    assert device.find_gpu(opens(Driver())) == Gpu(
        name="NVIDIA GeForce RTX 4090", capability="89", driver=13010, memory_bytes=24 * 2**30
    )
    blackwell = device.find_gpu(opens(Driver(capability=(12, 0))))
    assert blackwell is not None
    assert blackwell.capability == "120"


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (no_library, "no NVIDIA driver is installed"),
        (opens(Driver(count=0)), "the driver sees no GPU"),
        (opens(Driver(init=100)), "the driver sees no GPU"),
        (opens(Driver(init=803)), "restart the machine"),
        (opens(Driver(init=34)), "a stub"),
        (opens(Driver(init=999)), "kernel module loaded"),
        (opens(Driver(init=42)), "does not start (CUDA error 42)"),
    ],
)
def test_without_a_gpu_nothing_is_raised_and_the_reason_is_said(
    load: Callable[[str], Any], said: str, built_for: Callable[..., None]
) -> None:
    built_for("tensorrt-rtx-cu13")
    assert device.find_gpu(load) is None
    problem = device.driver_problem(RTX, "1.7.1", load)
    assert said in problem
    assert "driver of 580 or newer" in problem


def test_a_function_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Driver, "cuDeviceTotalMem_v2")
    load = opens(Driver(broken="cuDeviceTotalMem_v2"))
    assert device.find_gpu(load) is None
    assert "CUDA error 201" in device.driver_problem(RTX, "1.7.1", load)


def test_a_driver_that_is_older_than_the_packages_cuda_is_refused_by_number(
    built_for: Callable[..., None],
) -> None:
    built_for("tensorrt-rtx-cu13")
    old = opens(Driver(version=12080))
    assert device.find_gpu(old) is not None
    problem = device.driver_problem(RTX, "1.7.1", old)
    for part in ("RTX 4090", "up to 12.8", "tensorrt-rtx 1.7.1", "CUDA 13", "driver 580"):
        assert part in problem
    assert device.driver_problem(RTX, "1.7.1", opens(Driver(version=13000))) == ""


def test_each_package_is_held_to_its_own_cuda(built_for: Callable[..., None]) -> None:
    built_for("tensorrt-cu12", "tensorrt-rtx-cu13")
    assert device.cuda_of("tensorrt") == 12
    assert device.cuda_of(RTX) == 13
    twelve = opens(Driver(version=12080))
    assert device.driver_problem("tensorrt", "10.13", twelve) == ""
    assert "too old" in device.driver_problem(RTX, "1.7.1", twelve)
    assert "driver 525" in device.driver_problem("tensorrt", "10.13", opens(Driver(version=11080)))


def test_a_package_of_unknown_cuda_is_not_refused(built_for: Callable[..., None]) -> None:
    built_for()
    assert device.cuda_of("tensorrt") is None
    assert device.driver_problem("tensorrt", "9.0", opens(Driver(version=11000))) == ""
