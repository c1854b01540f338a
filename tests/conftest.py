import functools
import gc
import os

# Models this small only lose by sharing the cores; children inherit it. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else threads that wait for each other burn a core: of PyTorch's, most of the time there is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Sessions start a thread for each core that they may use, and those wait like this, too.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(_cores)]})

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvlm_export.exporter.config import DecoderConfig, FastVLMConfig, fastvithd
from fastvlm_export.exporter.model.fastvlm import FastVLM

from . import groups, shared


def randomize(model: FastVLM) -> FastVLM:
    """Give BatchNorms and layer scales values at which a wrong fold shows."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1, 0.3)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.3, 2)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            torch.nn.init.normal_(parameter, 0, 0.5)
    return model


def tiny_model(*, train_form: bool = True, tied: bool = False) -> FastVLM:
    """A FastVLM with odd sizes, seeded."""
    torch.manual_seed(0)
    tower = fastvithd(
        widths=(8, 16, 32, 32, 64),
        depths=(1, 2, 1, 2, 1),
        mlp_ratio=3,
        features=128,
        se_width=6,
        head_width=5,
        train_form=train_form,
    )
    decoder = DecoderConfig(
        vocab_size=120,
        hidden_size=48,
        intermediate_size=80,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=8,
        tied=tied,
    )
    return (
        randomize(FastVLM(FastVLMConfig(tower=tower, decoder=decoder))).eval().requires_grad_(False)
    )


WHOLE_EXPORTS: set[str] = set()
"""Fixtures, each a whole export of the trained model: what asks for one is marked `e2e`."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whole exports, and put the longest groups first."""
    for item in items:
        if WHOLE_EXPORTS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.e2e)
    items.sort(key=lambda item: groups.place(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker runs all of a group, so that no other waits for what it makes."""
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415 - where it is installed

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return groups.group(nodeid)

    config.option.loadscopereorder = False  # by the number of tests: ours are in order
    return Groups(config, log)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What imports made stays: else each full collection looks through it, for up to a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def torchlib_once() -> Iterator[None]:
    """Let torch.onnx parse its hundreds of translations once, not for each of our graphs."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError):  # tests of other targets need nothing of it
            from torch.onnx._internal.exporter import _registration  # noqa: PLC0415

            apis = _registration.onnxscript_apis
            patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


@pytest.fixture
def tiny() -> FastVLM:
    return tiny_model()


@pytest.fixture
def tiny_released() -> FastVLM:
    """In the form of released checkpoints: branches folded, BatchNorms and layer scales not."""
    return tiny_model(train_form=False)


def _whole_export(target: str, recipe: str) -> Any:
    name = f"{target}_{recipe}"
    WHOLE_EXPORTS.add(name)

    @pytest.fixture(scope="session", name=name)
    def fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return shared.whole_export(tmp_path_factory, target, recipe)

    return fixture


# Bundles of the trained model, for all workers: not to be changed. See `shared`.
onnx_fp32 = _whole_export("onnx", "fp32")
onnx_fp16 = _whole_export("onnx", "fp16")
onnx_int8 = _whole_export("onnx", "int8")
onnx_int4 = _whole_export("onnx", "int4")
executorch_fp32 = _whole_export("executorch", "fp32")
executorch_int8 = _whole_export("executorch", "int8")
executorch_int4 = _whole_export("executorch", "int4")
tensorrt_fp32 = _whole_export("tensorrt", "fp32")
tensorrt_int4 = _whole_export("tensorrt", "int4")
