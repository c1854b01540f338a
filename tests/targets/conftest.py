"""A small random FastVLM whose answers depend on the image, a tokenizer, and its ONNX folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from torch import nn
from torch.export import ExportedProgram

from fastvlm_export.exporter import checkpoint as checkpoints
from fastvlm_export.exporter import pipeline
from fastvlm_export.exporter.config import DecoderConfig, FastVLMConfig, fastvithd
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.exporter.spec import ExportSpec
from fastvlm_export.exporter.tokenizer import QWEN2_PIECES, Tokenizer
from fastvlm_export.quantize.apply import needs_calibration, quantize
from fastvlm_export.quantize.calibration import load as load_calibration
from fastvlm_export.quantize.recipes import RECIPES, Recipe
from fastvlm_export.targets import onnx, onnx_files
from fastvlm_export.targets.base import Array

from ..shared import once

RESOLUTION, CONTEXT = 128, 160


@dataclass(frozen=True, kw_only=True)
class Small:
    """A raw model, the contract it is exported to, its traced graphs and the written folder."""

    model: FastVLM
    spec: ExportSpec
    recipe: Recipe
    programs: dict[str, ExportedProgram]
    folder: Path

    @property
    def paths(self) -> dict[str, Path]:
        return {name: self.folder / file for name, file in onnx.files(self.recipe).items()}

    @property
    def bundle(self) -> Any:
        """What `onnx.open` reads of a bundle, of the files in this folder."""
        return bundle_of(self.folder, self.spec.context)


def bundle_of(folder: Path, context: int) -> Any:
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    manifest = SimpleNamespace(context=context, files=dict.fromkeys(names, ""))
    return SimpleNamespace(path=folder, manifest=manifest)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and Qwen2's special tokens."""
    inner = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return Tokenizer(inner)


def lively_model(
    vocab_size: int,
    *,
    tied: bool,
    seed: int = 0,
    depths: tuple[int, ...] = (1, 2, 1, 1, 1),
    layers: int = 3,
) -> FastVLM:
    """Weights that keep a signal's size, so that image and text both move the answer."""
    torch.manual_seed(seed)
    config = FastVLMConfig(
        tower=fastvithd(
            widths=(16, 32, 32, 32, 64),
            depths=depths,
            features=128,
            se_width=16,
            head_width=0,
            train_form=True,
        ),
        decoder=DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=96,
            layers=layers,
            heads=4,
            kv_heads=2,
            head_dim=16,
            tied=tied,
        ),
    )
    model = FastVLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "layer_scale" not in name:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
            elif "layer_scale" in name or "norm" in name:
                parameter.uniform_(0.5, 1.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        model.decoder.embed_tokens.weight.normal_(0, 1)
    return model


def worst(ours: Array, reference: Array) -> float:
    assert ours.shape == reference.shape
    assert ours.dtype == np.float32
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_spec(model: FastVLM) -> ExportSpec:
    """Its contract, with the byte tokenizer."""
    tokenizer = byte_tokenizer()
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    return ExportSpec(
        decoder=model.config.decoder,
        features=model.config.tower.features,
        projector_layers=model.config.projector_layers,
        context=CONTEXT,
        image_tokens=model.config.tower.image_tokens(RESOLUTION),
        preprocessing=Preprocessing(strategy=Strategy.PAD, resolution=RESOLUTION),
        tokenizer=tokenizer,
        image_token_id=tokenizer.vocab_size,
        eos_token_ids=(end,),
    )


def make_small(folder: Path, *, tied: bool, recipe: Recipe = RECIPES["fp32"]) -> Small:
    model = lively_model(byte_tokenizer().vocab_size, tied=tied)
    return export(model, make_spec(model), folder, recipe)


def export(model: FastVLM, spec: ExportSpec, folder: Path, recipe: Recipe) -> Small:
    calibration = load_calibration(None) if needs_calibration(recipe) else None
    folded = reparameterize(model).model
    programs = dict(quantize(folded, recipe, spec, calibration, lambda _: None).programs)
    onnx.lower(programs, spec, recipe, folder)
    return Small(model=model, spec=spec, recipe=recipe, programs=programs, folder=folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make_small(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """With weights in several external data files, as large models have them."""
    with in_data_files():
        return make_small(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session", params=["fp16", "int8", "int4"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Tied, with weights in data files, where embedding and head share one table."""
    with in_data_files():
        folder = tmp_path_factory.mktemp(request.param)
        return make_small(folder, tied=True, recipe=RECIPES[request.param])


@contextmanager
def in_data_files() -> Iterator[None]:
    """Treat small models as large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "INLINE_LIMIT", 10_000)
        patch.setattr(onnx_files, "CHUNK_LIMIT", 200_000)
        yield


def bundled_model(folder: Path, recipe: str) -> Small:
    checkpoint = checkpoints.bundled()
    spec = pipeline.contract(checkpoint, None, None)
    return export(checkpoint.model(), spec, folder, RECIPES[recipe])


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The trained model that comes with the package."""
    return bundled_model(tmp_path_factory.mktemp("bundled"), "fp32")


@pytest.fixture(scope="session", params=["fp16", "int8", "int4"])
def bundled_quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Small:
    return bundled_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """ExecuTorch's: see `executorch_toys.Toy`."""
    from . import executorch_toys  # noqa: PLC0415 - imports executorch

    folder = once(tmp_path_factory, "executorch-toy", executorch_toys.write_toy)
    return executorch_toys.read_toy(folder)


@pytest.fixture(scope="session")
def int4_programs() -> dict[str, ExportedProgram]:
    """The programs that the bundle `executorch_int4` was lowered from, made once more."""
    from fastvlm_export.targets import executorch  # noqa: PLC0415

    checkpoint = checkpoints.bundled()
    spec = pipeline.contract(checkpoint, None, None)
    recipe = executorch.adapt(RECIPES["int4"])
    folded = reparameterize(checkpoint.model()).model
    return dict(quantize(folded, recipe, spec, load_calibration(None), lambda _: None).programs)
