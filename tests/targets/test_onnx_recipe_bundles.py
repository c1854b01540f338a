"""Whole models under each recipe: the integers in the files, and ONNX Runtime against PyTorch."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx as onnx_package
import onnxruntime as ort
import pytest
import torch
from onnx import external_data_helper, numpy_helper
from torch.export import ExportedProgram

from fastvlm_export.exporter.bundle import sha256_of
from fastvlm_export.quantize.recipes import LayerRule, Precision, Recipe
from fastvlm_export.targets import onnx
from fastvlm_export.targets.base import Array
from fastvlm_export.targets.eager import ProgramSession

from .conftest import Small, in_data_files, make_small

CONV = torch.ops.aten.conv2d.default


def relative_rms(ours: Array, reference: Array) -> float:
    assert ours.shape == reference.shape
    return float(np.sqrt(((ours - reference) ** 2).mean() / (reference**2).mean()))


WITH_INTEGERS = pytest.mark.parametrize("quantized", ["int8", "int4"], indirect=True)


def integer_constants(program: ExportedProgram) -> dict[str, np.ndarray]:
    """The program's int8 and int32 constants: weights, and biases of convolutions."""
    return {
        name: value.numpy()
        for name, value in program.state_dict.items()
        if value.dtype in (torch.int8, torch.int32)
    }


def stored_integers(path: Path) -> Iterator[np.ndarray]:
    """Integers of every weight in a file, as signed [out, in, ...], whatever its layout there."""
    model = onnx_package.load(path)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        weights = [tensors[name] for name in node.input if name in tensors]
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            yield tensors[node.input[0]]
        elif node.op_type == "MatMulInteger":
            yield weights[0].T
        elif node.op_type == "Gather" and weights and weights[0].dtype == np.int8:
            yield weights[0].T if node.attribute[0].i == 1 else weights[0]
        elif node.op_type == "MatMulNBits":
            bits = {a.name: a.i for a in node.attribute}["bits"]
            assert bits == 4
            nibbles = np.stack([weights[0] & 15, weights[0] >> 4], axis=-1).astype(np.int8)
            yield nibbles.reshape(weights[0].shape[0], -1) - np.int8(8)


@pytest.mark.parametrize("graph", ["vision", "embedding", "decoder"])
def test_the_files_hold_the_programs_integers(quantized: Small, graph: str) -> None:
    wanted = integer_constants(quantized.programs[graph])
    found = {(a.dtype, a.shape, a.tobytes()) for a in stored_integers(quantized.paths[graph])}
    assert bool(wanted) == (quantized.recipe.name != "fp16")
    missing = [name for name, a in wanted.items() if (a.dtype, a.shape, a.tobytes()) not in found]
    assert not missing


@WITH_INTEGERS
def test_every_dense_1x1_convolution_is_computed_in_integers(
    quantized: Small, tmp_path: Path
) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(quantized.paths["vision"], options, providers=["CPUExecutionProvider"])
    optimized = onnx_package.load(tmp_path / "optimized.onnx", load_external_data=False)
    found = Counter(node.op_type for node in optimized.graph.node)
    program = quantized.programs["vision"]
    weights = [n.args[1] for n in program.graph.nodes if n.target is CONV]
    integer = [w for w in weights if "dequantize" in w.name]
    linear = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len(integer) == 17
    assert found["QLinearConv"] == len(integer)
    assert found["Conv"] == len(weights) - len(integer)
    assert found["MatMulInteger"] == len(linear) == 6


def test_the_same_recipe_gives_the_same_bytes(quantized: Small, tmp_path: Path) -> None:
    with in_data_files():
        onnx.lower(quantized.programs, quantized.spec, quantized.recipe, tmp_path)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(files) > 9
    for file in files:
        assert sha256_of(tmp_path / file) == sha256_of(quantized.folder / file), file


@WITH_INTEGERS
def test_embedding_and_head_name_one_region_of_one_file(quantized: Small) -> None:
    places = []
    for graph in ("embedding", "decoder"):
        model = onnx_package.load(quantized.paths[graph], load_external_data=False)
        size = quantized.spec.decoder.vocab_size * quantized.spec.decoder.hidden_size
        for tensor in model.graph.initializer:
            if external_data_helper.uses_external_data(tensor) and np.prod(tensor.dims) == size:
                info = external_data_helper.ExternalDataInfo(tensor)
                places.append((info.location, info.offset, info.length, tuple(tensor.dims)))
    assert len(places) == 2
    assert places[0] == places[1]
    stored = quantized.folder / "onnx" / places[0][0]
    assert stored.name == f"{quantized.paths['decoder'].name}_data_1"
    assert stored.stat().st_size == places[0][2] == size
    names = [path.name for path in stored.parent.glob("embed_tokens*")]
    assert names == [quantized.paths["embedding"].name]


# Relative RMS over a run's outputs. Where a float32 sum differs in its last bit, a rounding to
# integers may flip; what reads it then flips more, up to the noise of quantization itself (some 2 %
# of the features). So a run agrees to either float32's rounding or that noise, and of several runs
# some must agree exactly. fp16 rounds everywhere, in ONNX Runtime at other places than in PyTorch.
EXACT, FLIPPED, HALF = 1e-6, 0.06, 3e-3


def check_errors(errors: list[float], recipe: str) -> None:
    if recipe == "fp16":
        assert max(errors) < HALF, errors
    else:
        assert min(errors) < EXACT, errors
        assert max(errors) < FLIPPED, errors


def test_numbers_are_the_programs(bundled_quantized: Small) -> None:
    """Against the very programs, on the trained model and noise: the hardest images."""
    spec, recipe = bundled_quantized.spec, bundled_quantized.recipe.name
    ours = onnx.open(bundled_quantized.bundle)
    reference = ProgramSession(bundled_quantized.programs, spec.decoder, spec.context)
    rng = np.random.default_rng(0)
    size = spec.preprocessing.resolution
    vision, decoder = [], []
    for _ in range(8):
        pixels = rng.random((1, 3, size, size), dtype=np.float32)
        features = reference.encode_image(pixels)
        vision.append(relative_rms(ours.encode_image(pixels), features))
        ids = rng.integers(0, spec.decoder.vocab_size, (1, 12))
        assert (ours.embed(ids) == reference.embed(ids)).all()
        embeds = np.concatenate([reference.embed(ids), features], axis=1)
        ours.reset()
        reference.reset()
        for part in (embeds, embeds[:, :1], embeds[:, 1:4]):
            decoder.append(relative_rms(ours.decode(part), reference.decode(part)))
    check_errors(vision, recipe)
    check_errors(decoder, recipe)


WEIGHT_ONLY = Recipe(
    name="weight-only",
    vision=Precision(bits=8),
    embedding=Precision(bits=8),
    decoder=Precision(bits=4, group_size=32, symmetric=False),
    head=Precision(bits=8),
    layers=(LayerRule(pattern="decoder.layers.1.*", precision=Precision()),),
)


def test_weights_alone_cost_float_rounding_only(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing rounds an activation, as ONNX Runtime does next to a DequantizeLinear."""
    made = make_small(tmp_path_factory, WEIGHT_ONLY.name, WEIGHT_ONLY, tied=True)
    assert not onnx.problems(WEIGHT_ONLY, None)
    assert {path.name for path in made.paths.values()} == {
        "vision_encoder_q4.onnx",
        "embed_tokens_q4.onnx",
        "decoder_model_merged_q4.onnx",
    }
    ours = onnx.open(made.bundle)
    reference = ProgramSession(made.programs, made.spec.decoder, made.spec.context)
    rng = np.random.default_rng(0)
    for _ in range(3):
        pixels = rng.random((1, 3, 128, 128), dtype=np.float32)
        features = reference.encode_image(pixels)
        assert relative_rms(ours.encode_image(pixels), features) < 5e-6
        ids = rng.integers(0, made.spec.decoder.vocab_size, (1, 12))
        assert (ours.embed(ids) == reference.embed(ids)).all()
        ours.reset()
        reference.reset()
        embeds = reference.embed(ids)
        for part in (embeds, embeds[:, :1]):
            assert relative_rms(ours.decode(part), reference.decode(part)) < 5e-6
