"""The ONNX graphs of TensorRT's engines: PyTorch's numbers, TensorRT's operators, named types.

Differences are of the largest number of a stage. FLOAT32 and HALF are roundings of a few dozen
operators in a row; in BFLOAT16 a rounding is 8 times HALF's.
"""

import functools
import importlib.util
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from fastvlm_export.exporter import checkpoint as checkpoints
from fastvlm_export.exporter import pipeline
from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import onnx_files, tensorrt_float32
from fastvlm_export.targets.tensorrt_plan import GRAPHS

from . import tensorrt_toys
from .conftest import in_data_files
from .tensorrt_toys import Lowered, build, lower, worst_of_all

FLOAT32, HALF, BFLOAT16 = 5e-6, 1e-2, 8e-2

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)


Small = Callable[..., Lowered]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """`tensorrt_toys.shared`: each model lowered once."""
    return functools.partial(tensorrt_toys.shared, tmp_path_factory)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("head_dim", [16, 20])
def test_float32_is_pytorchs_whatever_the_heads(head_dim: int, small: Small) -> None:
    lowered = small("fp32", head_dim, data_files=head_dim == 16)
    found = worst_of_all(lowered.session, lowered.reference, lowered.spec)
    assert max(found.values()) < FLOAT32, found
    decoder = lowered.onnx("decoder")
    assert not operators(decoder)["Attention"]
    assert operators(decoder)["TensorScatter"] == 2 * lowered.spec.decoder.layers
    assert not any(graph.float32_nodes for graph in lowered.graphs.values())
    assert {node.domain for node in decoder.graph.node} == {""}


@pytest.mark.parametrize(("tied", "biases"), [(True, True), (False, False)])
def test_tied_heads_and_vicunas_layers(tied: bool, biases: bool, small: Small) -> None:
    lowered = small("fp32", tied=tied, biases=biases)
    found = worst_of_all(lowered.session, lowered.reference, lowered.spec)
    assert max(found.values()) < FLOAT32, found


@pytest.mark.parametrize(("head_dim", "fused"), [(8, False), (16, True), (24, True)])
def test_float16_is_fused_where_there_is_a_kernel_and_else_in_float32(
    head_dim: int, fused: bool, small: Small
) -> None:
    lowered = small("fp16", head_dim)
    found = worst_of_all(lowered.session, lowered.reference, lowered.spec)
    assert max(found.values()) < HALF, found
    decoder, layers = lowered.onnx("decoder"), lowered.spec.decoder.layers
    assert operators(decoder)["Attention"] == (layers if fused else 0)
    reasons = lowered.graphs["decoder"].float32_nodes
    assert (tensorrt_float32.NO_KERNEL in reasons.values()) is not fused
    assert {node.name for node in decoder.graph.node}.issuperset(reasons)
    attention = {name for name, why in reasons.items() if why == tensorrt_float32.NO_KERNEL}
    assert all(".self_attn/" in name for name in attention)
    # The tower's second stage with attention has one token, and both have two heads or one.
    assert operators(lowered.onnx("vision"))["Softmax"] > 0


def test_what_the_range_scan_keeps_in_float32_is_named_and_the_cache_is_written_in_place(
    tmp_path: Path,
) -> None:
    recipe = replace(RECIPES["fp16"], range_limit=4.0)
    lowered = tensorrt_toys.small(recipe, tmp_path)
    found = worst_of_all(lowered.session, lowered.reference, lowered.spec)
    assert max(found.values()) < HALF, found
    reasons = lowered.graphs["decoder"].float32_nodes
    assert "range scan: decoder.layers.0.self_attn" in reasons.values()
    decoder = lowered.onnx("decoder").graph
    ins, outs = ({value.name for value in end} for end in (decoder.input, decoder.output))
    scatters = [node for node in decoder.node if node.op_type == "TensorScatter"]
    assert len(scatters) == 2 * lowered.spec.decoder.layers
    assert all(node.input[0] in ins and node.output[0] in outs for node in scatters)
    half = onnx.TensorProto.FLOAT16
    caches = [v for v in (*decoder.input, *decoder.output) if v.name.endswith(("key", "value"))]
    assert {value.type.tensor_type.elem_type for value in caches} == {half}


def test_nodes_are_named_after_their_modules(small: Small) -> None:
    lowered = small("fp32", data_files=True)
    for graph in GRAPHS:
        names = [node.name for node in lowered.onnx(graph).graph.node]
        assert len(names) == len(set(names)) == lowered.graphs[graph].nodes
    decoder = {node.name for node in lowered.onnx("decoder").graph.node}
    assert {
        "decoder.layers.1.self_attn/TensorScatter",
        "decoder.layers.2.mlp.up_proj/MatMul",
        "decoder.norm/RMSNormalization",
        "graph/LessOrEqual",
    } <= decoder
    counted = operators(lowered.onnx("decoder"))
    assert counted["Range"] == counted["Shape"] == 2  # once for all layers


def test_sizes_are_the_contracts(small: Small) -> None:
    lowered = small("fp16")
    spec, config = lowered.spec, lowered.spec.decoder
    cache = f"float16[1,{config.kv_heads},{spec.context},{config.head_dim}]"
    decoder = lowered.graphs["decoder"].signature
    assert decoder["inputs"]["inputs_embeds"] == f"float32[1,sequence_length,{config.hidden_size}]"
    assert decoder["inputs"]["attention_mask"] == "int64[1,attended_length]"
    assert decoder["inputs"]["past_key_values.2.value"] == cache
    assert decoder["outputs"]["present.0.key"] == cache
    assert decoder["outputs"]["logits"] == f"float32[1,1,{config.vocab_size}]"
    size = spec.preprocessing.resolution
    vision = lowered.graphs["vision"].signature
    assert vision["inputs"] == {"pixel_values": f"float32[1,3,{size},{size}]"}
    features = f"float32[1,{spec.image_tokens},{config.hidden_size}]"
    assert vision["outputs"] == {"image_features": features}


def test_large_weights_lie_in_data_files_and_the_same_model_gives_the_same_bytes(
    tmp_path: Path, small: Small
) -> None:
    with in_data_files():
        lowered = tensorrt_toys.small(RECIPES["fp32"], tmp_path)
    first, second = (
        {path.name: path.read_bytes() for path in (folder / "onnx").iterdir()}
        for folder in (small("fp32", data_files=True).folder, tmp_path)
    )
    assert first == second
    assert {"vision.onnx_data", "decoder.onnx_data"} <= first.keys()
    found = worst_of_all(lowered.session, lowered.reference, lowered.spec)
    assert max(found.values()) < FLOAT32, found
    assert onnx_files.INLINE_LIMIT > 10_000


@needs_rtx
@pytest.mark.parametrize(
    ("recipe", "head_dim"),
    [
        ("fp32", 20),
        ("fp16", 8),
        ("fp16", 16),
        ("fp16", 24),
        ("int8", 20),
        pytest.param("int4", 16, marks=pytest.mark.slow),  # built in tests/exporter, too
        ("bf16", 24),
    ],
)
def test_engines_build(recipe: str, head_dim: int, small: Small) -> None:
    lowered = small(recipe, head_dim)
    sizes = build(lowered, "80", "120")
    assert all(size > 10_000 for size in sizes.values()), sizes


@pytest.mark.e2e
@pytest.mark.parametrize("recipe", ["fp16", "int8"])  # the others: tests/exporter
def test_the_trained_model_answers_as_in_pytorch(recipe: str, tmp_path: Path) -> None:
    checkpoint = checkpoints.bundled()
    spec = pipeline.contract(checkpoint, None, None)
    lowered = lower(checkpoint.model(), spec, RECIPES[recipe], tmp_path)
    found = worst_of_all(lowered.session, lowered.reference, spec)
    assert found["embeddings"] == 0
    assert found["logits"] < HALF, found
    # Noise is rounded to integers where a bit decides between two.
    assert found["features"] < {"fp16": HALF}.get(recipe, 0.1), found
    if recipe == "fp16":
        reasons = [why for graph in lowered.graphs.values() for why in graph.float32_nodes.values()]
        norms = 2 * spec.decoder.layers + 1
        tower = operators(lowered.onnx("vision"))
        assert tower["Attention"] == tower["LayerNormalization"] == 3
        assert reasons == [tensorrt_float32.NORM_STATISTICS] * (3 + norms)


@pytest.mark.parametrize(
    ("recipe", "head_dim", "limit"), [("bf16", 24, BFLOAT16), ("fp8", 16, 0.3)]
)
def test_bfloat16_and_fp8_in_onnx_runtime(
    recipe: str, head_dim: int, limit: float, small: Small
) -> None:
    """ONNX Runtime has no bfloat16: each operator's float32 result is rounded to it. In fp8 an
    eighth of a number is between one and the next, so that a bit's difference may grow to that.
    """
    lowered = small(recipe, head_dim)
    found = worst_of_all(lowered.session, lowered.reference, lowered.spec)
    assert found["embeddings"] == 0
    assert max(found.values()) < limit, found
    decoder = lowered.onnx("decoder")
    cache = {value.type.tensor_type.elem_type for value in decoder.graph.input[2:]}
    assert cache == {onnx.TensorProto.BFLOAT16}
    if recipe == "fp8":
        weights = [
            t for t in decoder.graph.initializer if t.data_type == onnx.TensorProto.FLOAT8E4M3FN
        ]
        assert len([t for t in weights if t.dims]) == 7 * lowered.spec.decoder.layers + 1
