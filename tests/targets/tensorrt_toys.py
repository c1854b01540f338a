"""Small models lowered for TensorRT, their sessions, and their engines."""

import functools
import pickle
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.export import ExportedProgram

from fastvlm_export.exporter.config import DecoderConfig
from fastvlm_export.exporter.model.decoder import Decoder
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.exporter.spec import ExportSpec
from fastvlm_export.quantize.apply import needs_calibration, quantize
from fastvlm_export.quantize.calibration import load as load_calibration
from fastvlm_export.quantize.recipes import RECIPES, Recipe
from fastvlm_export.targets import tensorrt_lowering, tensorrt_recipes
from fastvlm_export.targets.base import Array, Session
from fastvlm_export.targets.eager import ProgramSession
from fastvlm_export.targets.tensorrt_lowering import LoweredGraph
from fastvlm_export.targets.tensorrt_onnx_session import TensorRTOnnxSession
from fastvlm_export.targets.tensorrt_plan import GRAPHS, profiles

from ..shared import once
from .conftest import byte_tokenizer, in_data_files, lively_model, make_spec, worst


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A model's programs under an adapted recipe, and the ONNX files that were written of them."""

    spec: ExportSpec
    programs: dict[str, ExportedProgram]
    graphs: dict[str, LoweredGraph]
    folder: Path

    @property
    def reference(self) -> ProgramSession:
        return ProgramSession(self.programs, self.spec.decoder, self.spec.context)

    @property
    def session(self) -> TensorRTOnnxSession:
        manifest = SimpleNamespace(context=self.spec.context)
        bundle: Any = SimpleNamespace(path=self.folder, manifest=manifest)
        return TensorRTOnnxSession(bundle)

    def onnx(self, graph: str) -> onnx.ModelProto:
        return onnx.load(self.folder / self.graphs[graph].file)


def lower(model: FastVLM, spec: ExportSpec, recipe: Recipe, folder: Path) -> Lowered:
    programs = quantized(model, spec, recipe)
    graphs = tensorrt_lowering.write(programs, spec, folder)
    return Lowered(spec=spec, programs=programs, graphs=graphs, folder=folder)


def quantized(model: FastVLM, spec: ExportSpec, recipe: Recipe) -> dict[str, ExportedProgram]:
    recipe = tensorrt_recipes.adapt(recipe)
    calibration = load_calibration(None) if needs_calibration(recipe) else None
    folded = reparameterize(model).model
    return dict(quantize(folded, recipe, spec, calibration, lambda _: None).programs)


def lively(head_dim: int = 16, *, tied: bool = False, biases: bool = True) -> FastVLM:
    """`lively_model` with heads of so many numbers; Vicuna's has no biases."""
    model = lively_model(byte_tokenizer().vocab_size, tied=tied)
    heads: DecoderConfig = replace(model.config.decoder, head_dim=head_dim)
    torch.manual_seed(1)
    decoder = Decoder(heads).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif not biases:
                parameter.zero_()
        decoder.embed_tokens.weight.normal_(0, 1)
    model.decoder = decoder
    model.config = replace(model.config, decoder=heads)
    return model.requires_grad_(False)


def small(recipe: Recipe, folder: Path, head_dim: int = 16, **options: bool) -> Lowered:
    model = lively(head_dim, **options)
    return lower(model, make_spec(model), recipe, folder)


@functools.cache
def _quantized(
    recipe: str, head_dim: int, **options: bool
) -> tuple[ExportSpec, dict[str, ExportedProgram]]:
    model = lively(head_dim, **options)
    spec = make_spec(model)
    return spec, quantized(model, spec, RECIPES[recipe])


def shared(
    factory: pytest.TempPathFactory,
    recipe: str,
    head_dim: int = 16,
    *,
    data_files: bool = False,
    **options: bool,
) -> Lowered:
    """`small` under a built-in recipe, for all workers: not to be changed. See `shared.once`.

    The files are; each worker makes the programs that they were written of.
    """

    def write(folder: Path) -> None:
        folder.mkdir()
        spec, programs = _quantized(recipe, head_dim, **options)
        with in_data_files() if data_files else nullcontext():
            graphs = tensorrt_lowering.write(programs, spec, folder)
        (folder / "graphs").write_bytes(pickle.dumps(graphs))

    chosen = [f"{name}-{on}" for name, on in {"data": data_files, **options}.items()]
    folder = once(factory, "-".join(["tensorrt", recipe, str(head_dim), *chosen]), write)
    spec, programs = _quantized(recipe, head_dim, **options)
    graphs = pickle.loads((folder / "graphs").read_bytes())  # noqa: S301 - our own
    return Lowered(spec=spec, programs=programs, graphs=graphs, folder=folder)


def worst_of_all(ours: Session, reference: Session, spec: ExportSpec) -> dict[str, float]:
    """The largest difference of each stage, relative to the reference's largest number.

    Two conversations: an image between words, single tokens, several at once, and the rest of the
    context, so that the cache is read at every length and after it was filled.
    """
    size = spec.preprocessing.resolution
    pixels = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    ids = np.arange(spec.decoder.vocab_size, dtype=np.int64)[None]
    features, found = reference.encode_image(pixels), {}
    found["features"] = worst(ours.encode_image(pixels), features)
    found["embeddings"] = worst(ours.embed(ids), reference.embed(ids))
    steps: list[Array] = [
        np.concatenate([reference.embed(ids[:, :7]), features, reference.embed(ids[:, 7:9])], 1),
        *(reference.embed(ids[:, i : i + 1]) for i in range(30, 36)),
        reference.embed(ids[:, 40:60]),
    ]
    rest = spec.context - sum(step.shape[1] for step in steps)
    steps.append(reference.embed(np.resize(ids, (1, rest))))
    differences = []
    for _ in range(2):
        ours.reset()
        reference.reset()
        differences += [worst(ours.decode(step), reference.decode(step)) for step in steps]
    return {**found, "logits": max(differences)}


def build(lowered: Lowered, *capabilities: str) -> dict[str, int]:
    """Bytes of each graph's engine. Fails where TensorRT for RTX takes a graph not, or builds none.

    Also: no layer computes in float32 that belongs to none of the nodes which may.
    """
    import tensorrt_rtx  # noqa: PLC0415 - where it is installed

    sizes = {}
    for name in GRAPHS:
        graph, messages = lowered.graphs[name], []

        class Log(tensorrt_rtx.ILogger):
            def __init__(self) -> None:
                tensorrt_rtx.ILogger.__init__(self)

            def log(self, severity: Any, message: str, messages: list[str] = messages) -> None:
                if severity <= tensorrt_rtx.ILogger.ERROR:
                    messages.append(message)

        log = Log()
        builder = tensorrt_rtx.Builder(log)
        typed = 1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(typed)
        parser = tensorrt_rtx.OnnxParser(network, log)
        if not parser.parse_from_file(str(lowered.folder / graph.file)):
            raise AssertionError([parser.get_error(i).desc() for i in range(parser.num_errors)])
        config = builder.create_builder_config()
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            found = getattr(tensorrt_rtx.ComputeCapability, f"SM{capability}")
            config.set_compute_capability(found, index)
        inputs = graph.signature["inputs"]
        spec = lowered.spec
        for profile in profiles(inputs, spec.context, spec.image_tokens):
            shapes = builder.create_optimization_profile()
            for key, sizes_ in profile.shapes.items():
                shapes.set_shape(key, sizes_.min, sizes_.opt, sizes_.max)
            config.add_optimization_profile(shapes)
        engine = builder.build_serialized_network(network, config)
        assert engine is not None, messages
        sizes[name] = engine.nbytes
    return sizes
