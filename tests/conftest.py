import gc
import os

# Models this small only lose by sharing the cores; children inherit it. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from fastvlm_export.exporter.config import DecoderConfig, FastVLMConfig, fastvithd
from fastvlm_export.exporter.model.fastvlm import FastVLM

from . import shared


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


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What imports made stays: else each full collection looks through it, for up to a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny() -> FastVLM:
    return tiny_model()


@pytest.fixture
def tiny_released() -> FastVLM:
    """In the form of released checkpoints: branches folded, BatchNorms and layer scales not."""
    return tiny_model(train_form=False)


@pytest.fixture(scope="session")
def executorch_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the trained model, for all workers: not to be changed. See `shared`."""
    return shared.once(tmp_path_factory, "executorch-fp32", shared.command_line)


@pytest.fixture(scope="session")
def executorch_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another."""
    return shared.once(tmp_path_factory, "executorch-int4", shared.int4)


@pytest.fixture(scope="session")
def executorch_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another."""
    return shared.once(tmp_path_factory, "executorch-int8", shared.int8)


@pytest.fixture(scope="session")
def tensorrt_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the trained model with engines, for all workers: not to be changed."""
    return shared.once(tmp_path_factory, "tensorrt-fp32", shared.tensorrt)


@pytest.fixture(scope="session")
def tensorrt_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another."""
    return shared.once(tmp_path_factory, "tensorrt-int4", shared.tensorrt_int4)
