"""A small random FastVLM whose answers depend on the image, a tokenizer, and its ONNX folder."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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

from .. import shared
from ..shared import once

E2E = pytest.mark.e2e

RESOLUTION, CONTEXT = 128, 160


@dataclass(frozen=True, kw_only=True)
class Small:
    """A raw model, the contract it is exported to, its traced graphs and the written folder."""

    model: FastVLM
    spec: ExportSpec
    recipe: Recipe
    folder: Path
    traced: Callable[[], Mapping[str, ExportedProgram]]

    @property
    def programs(self) -> Mapping[str, ExportedProgram]:
        return self.traced()

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
    head_dim: int = 16,
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
            head_dim=head_dim,
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


def programs_of(model: FastVLM, spec: ExportSpec, recipe: Recipe) -> dict[str, ExportedProgram]:
    calibration = load_calibration(None) if needs_calibration(recipe) else None
    folded = reparameterize(model).model
    return dict(quantize(folded, recipe, spec, calibration, lambda _: None).programs)


_PROGRAMS: dict[str, dict[str, ExportedProgram]] = {}


def programs_once(
    name: str, model: FastVLM, spec: ExportSpec, recipe: Recipe
) -> dict[str, ExportedProgram]:
    """Made where a test first asks for them, once in each worker: not to be changed."""
    if name not in _PROGRAMS:
        _PROGRAMS[name] = programs_of(model, spec, recipe)
    return _PROGRAMS[name]


def make_small(
    factory: pytest.TempPathFactory, name: str, recipe: Recipe, *, tied: bool, apart: bool = False
) -> Small:
    """A random model, once for all workers; `apart` has its weights in data files."""
    model = lively_model(byte_tokenizer().vocab_size, tied=tied)
    return export(factory, f"small-{name}", model, make_spec(model), recipe, apart=apart)


def export(
    factory: pytest.TempPathFactory,
    name: str,
    model: FastVLM,
    spec: ExportSpec,
    recipe: Recipe,
    *,
    apart: bool = False,
) -> Small:
    traced = functools.partial(programs_once, name, model, spec, recipe)

    def write(out: Path) -> None:
        out.mkdir()
        with in_data_files() if apart else nullcontext():
            onnx.lower(traced(), spec, recipe, out)

    folder = once(factory, f"{name}-onnx", write)
    return Small(model=model, spec=spec, recipe=recipe, folder=folder, traced=traced)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make_small(tmp_path_factory, "untied", RECIPES["fp32"], tied=False)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """With weights in several external data files, as large models have them."""
    return make_small(tmp_path_factory, "tied", RECIPES["fp32"], tied=True, apart=True)


@pytest.fixture(scope="session", params=["fp16", "int8", "int4"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Tied, with weights in data files, where embedding and head share one table."""
    recipe = RECIPES[request.param]
    return make_small(tmp_path_factory, request.param, recipe, tied=True, apart=True)


@contextmanager
def in_data_files() -> Iterator[None]:
    """Treat small models as large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "INLINE_LIMIT", 10_000)
        patch.setattr(onnx_files, "CHUNK_LIMIT", 200_000)
        yield


def _bundled(folder: Path, recipe: str) -> Small:
    checkpoint = checkpoints.bundled()
    spec = pipeline.contract(checkpoint, None, None)

    def traced() -> Mapping[str, ExportedProgram]:
        found = shared.programs("onnx", recipe)
        model = checkpoint.model()
        return found or programs_once(f"bundled-{recipe}", model, spec, RECIPES[recipe])

    return Small(
        model=checkpoint.model(), spec=spec, recipe=RECIPES[recipe], folder=folder, traced=traced
    )


@pytest.fixture(scope="session")
def bundled(onnx_fp32: Path) -> Small:
    """The trained model that comes with the package."""
    return _bundled(onnx_fp32, "fp32")


@pytest.fixture(
    scope="session", params=[pytest.param(name, marks=E2E) for name in ("fp16", "int8", "int4")]
)
def bundled_quantized(request: pytest.FixtureRequest) -> Small:
    return _bundled(request.getfixturevalue(f"onnx_{request.param}"), request.param)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """ExecuTorch's: see `executorch_toys.Toy`."""
    from . import executorch_toys  # noqa: PLC0415 - imports executorch

    folder = once(tmp_path_factory, "executorch-toy", executorch_toys.write_toy)
    return executorch_toys.read_toy(folder)


@pytest.fixture(scope="session")
def int4_programs(executorch_int4: Path) -> Mapping[str, ExportedProgram]:
    """The programs that the bundle `executorch_int4` was lowered from."""
    found = shared.programs("executorch", "int4")
    if found:
        return found
    from fastvlm_export.targets import executorch  # noqa: PLC0415

    checkpoint = checkpoints.bundled()
    spec = pipeline.contract(checkpoint, None, None)
    recipe = executorch.adapt(RECIPES["int4"])
    return programs_of(checkpoint.model(), spec, recipe)
