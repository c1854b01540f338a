"""Engines and GPUs that can't be used: one clear error each, saying what to do."""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import tensorrt_device
from fastvlm_export.targets.tensorrt_cuda import Cuda
from fastvlm_export.targets.tensorrt_package import Backend
from fastvlm_export.targets.tensorrt_session import TensorRTSession

from . import tensorrt_opened
from .conftest import normal
from .cuda_stand_in import CudaApi, Status
from .tensorrt_opened import Exported, pixels
from .tensorrt_stand_ins import GPU, Context, Engine, Location, Package


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return tensorrt_opened.exported(tmp_path_factory)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_a_gpu_that_is_full_is_told_and_what_was_taken_is_given_back(
    exported: Exported, share: float
) -> None:
    api = CudaApi(memory=int(share * exported.opens().api.taken))
    with pytest.raises(ExportError, match=r"memory is full: [\d.]+ MiB more were wanted") as caught:
        exported.opens(api=api)
    assert "--context" in caught.value.hint
    del caught
    gc.collect()
    assert api.taken == 0


def test_a_failure_on_the_gpu_is_told_where_it_is_waited_for(
    exported: Exported,
) -> None:
    machine = exported.opens()
    machine.api.fails_at_sync = Status.ILLEGAL_ADDRESS
    with pytest.raises(ExportError, match="illegal address \\(CUDA error 700\\)"):
        machine.session.encode_image(pixels())


def test_a_context_that_can_not_be_made_is_told(exported: Exported) -> None:
    def refuse(text: str) -> Callable[[Package], None]:
        return lambda package: setattr(package, "no_context", text)

    with pytest.raises(ExportError, match="cannot be prepared: no kernel"):
        exported.opens(change=refuse("no kernel for this"))
    with pytest.raises(ExportError, match=r"memory is full: .*OutOfMemory"):
        exported.opens(change=refuse("Error Code 2: OutOfMemory (Requested size was 123 bytes.)"))


VALIDITY = [
    (1, "another version of TensorRT for RTX", "build "),
    (2, "built for compute capability 80, 86; Simulated GPU has 86", "--compute-capability 86"),
    (4, "needs a newer NVIDIA driver", "drivers"),
    (8, "another version", "build "),
    (16, "does not fit", "--context"),
    (32, "damaged, cut short", "build "),
    (1 | 32, "damaged, cut short", "build "),
    (64, "cannot be loaded", "build "),
]


@pytest.mark.parametrize(("found", "said", "hint"), VALIDITY)
def test_what_an_engines_header_tells_is_one_clear_error(
    exported: Exported, found: int, said: str, hint: str
) -> None:
    with pytest.raises(ExportError, match=said) as caught:
        exported.opens(change=lambda package: setattr(package, "valid", (2, found)))
    assert hint in caught.value.hint


SAYINGS = [
    ("Error Code 6: API Usage Error (The engine plan file is generated on an incompatible device, "
     "expecting compute 8.6 got compute 8.9, please rebuild.)", "was built for compute"),
    ("Error Code 1: Serialization (Serialization assertion stdVersionRead == "
     "kSERIALIZATION_VERSION failed.Version tag does not match. Note: Current Version: 240, "
     "Serialized Engine Version: 239)", "another version"),
    ("Error Code 1: Serialization (Serialization assertion magicTagRead == kMAGIC_TAG failed.Magic "
     "tag does not match)", "damaged, cut short"),
    ("Error Code 2: OutOfMemory (no further information)", "memory is full"),
    ("Error Code 1: Cuda Runtime (CUDA driver version is insufficient for CUDA runtime version)",
     "needs a newer NVIDIA driver"),
    ("something new", "something new"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), SAYINGS)
@pytest.mark.parametrize("backend", list(Backend))
def test_what_the_log_says_of_an_engine_is_one_clear_error(
    exported: Exported, backend: Backend, text: str, said: str
) -> None:
    with pytest.raises(ExportError, match=said) as caught:
        exported.opens(backend=backend, change=lambda package: setattr(package, "says", text))
    assert caught.value.hint


def test_a_gpu_that_no_engine_was_built_for_is_named(exported: Exported) -> None:
    for capability, hint in (("120", "--compute-capability 120"), ("90", "--backend tensorrt")):
        api = CudaApi()
        package = Package(exported.folder, exported.plan, api)
        package.says = "something new"
        gpu = dataclasses.replace(GPU, name="Another GPU", capability=capability)
        with pytest.raises(ExportError, match=f"80, 86; Another GPU has {capability}") as caught:
            TensorRTSession(exported.bundle(), package=package, cuda=Cuda(api), gpu=gpu)
        assert hint in caught.value.hint


def test_an_engine_that_is_cut_short_or_missing(exported: Exported) -> None:
    path = exported.folder / "engines" / "decoder.engine"
    whole = path.read_bytes()
    try:
        for size in (4, len(whole) - 1):
            path.write_bytes(whole[:size])
            for backend in Backend:
                with pytest.raises(ExportError, match="damaged, cut short") as caught:
                    exported.opens(backend=backend)
                assert "fastvlm-export build" in caught.value.hint
        path.unlink()
        with pytest.raises(ExportError, match="no engine for its decoder graph") as caught:
            exported.opens()
        assert "fastvlm-export build" in caught.value.hint
    finally:
        path.write_bytes(whole)


def test_an_engine_of_another_plan_is_refused(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "get_tensor_shape", lambda self, name: (1, 7))
        with pytest.raises(ExportError, match=r"input pixel_values is float32\[1,7\], not float32"):
            exported.opens()
    with pytest.raises(ExportError, match="read from the host's memory"):
        exported.opens(change=lambda package: setattr(package, "location", Location.HOST))


def test_an_output_of_another_shape_is_not_copied(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = exported.opens().session
    monkeypatch.setattr(Context, "get_tensor_shape", lambda self, name: (1, 5, 259))
    with pytest.raises(ExportError, match=r"gives logits of shape \[1, 5, 259\], not \[1, 1, 259"):
        session.decode(normal(1, 5, 64))


def test_a_driver_that_does_not_start_is_told() -> None:
    with pytest.raises(ExportError, match=r"cudaSetDevice: no driver \(CUDA error 35\)") as caught:
        Cuda(CudaApi(set_device=35))
    assert "newer driver" in caught.value.hint
    with pytest.raises(ExportError, match=r"CUDA error 700\)") as caught:
        Cuda(CudaApi(set_device=700))
    assert "nvidia-smi" in caught.value.hint


def test_without_a_driver_a_bundle_is_refused_before_anything_is_read(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    for function in (tensorrt_device.find_gpu, tensorrt_device.driver_problem):
        monkeypatch.setattr(function, "__defaults__", (missing,))
    package = Package(exported.folder, exported.plan, CudaApi())
    with pytest.raises(ExportError, match="no NVIDIA driver is installed") as caught:
        TensorRTSession(exported.bundle(), package=package)
    assert "fastvlm-export validate" in caught.value.hint
    assert not package.engines
