"""The ONNX decoder of every head size: whatever the fused operator cannot do is done around it."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.export import ExportedProgram

from fastvlm_export.exporter import graphs
from fastvlm_export.exporter.config import DecoderConfig, FastVLMConfig, fastvithd
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.quantize.half import to_half
from fastvlm_export.quantize.recipes import RECIPES, Float
from fastvlm_export.quantize.runnable import runnable
from fastvlm_export.quantize.weights import quantize_decoder
from fastvlm_export.targets import onnx_attention, onnx_files, onnx_lowering
from fastvlm_export.targets.base import Array
from fastvlm_export.targets.eager import TorchSession
from fastvlm_export.targets.onnx_session import OnnxSession, load_graph

from .conftest import normal

CONTEXT, WIDTH = 24, 32
CHUNKS = (7, 1, 1, 5, 1)  # a prefill, decoding, a second prefill on a cache that is not empty
LIMITS = {"fp32": 3e-6, "fp16": 1e-2, "int8": 0.05, "int4": 0.05}
"""Of the largest logit. Under dynamic activations a value on the edge between two integers rounds
either way; a wrong angle or a wrong mask moves the logits by more than their own size."""


@dataclass(frozen=True, kw_only=True)
class Case:
    head_dim: int
    heads: int
    kv_heads: int
    recipe: str

    def __str__(self) -> str:
        return f"{self.recipe}-{self.head_dim}x{self.heads}/{self.kv_heads}"


# Every recipe with heads that the operator rotates, heads that
# are rotated before it, and heads that it does not take; one key/value head, some, and as many
# as heads. Under int4 all heads together are a multiple of 32.
CASES = [
    Case(head_dim=head_dim, heads=heads, kv_heads=kv_heads, recipe=recipe)
    for head_dim, heads, kv_heads, recipe in [
        (128, 2, 1, "fp32"),
        (24, 3, 3, "fp32"),
        (20, 4, 1, "fp32"),
        (16, 4, 1, "fp16"),
        (24, 4, 2, "fp16"),
        (10, 2, 2, "fp16"),
        (96, 2, 2, "int8"),
        (40, 4, 1, "int8"),
        (20, 6, 2, "int8"),
        (64, 2, 1, "int4"),
        (8, 4, 4, "int4"),
        (20, 8, 2, "int4"),
    ]
]


def model_of(case: Case) -> FastVLM:
    """Two layers of weights that keep a signal's size, with biases."""
    torch.manual_seed(case.head_dim)
    decoder = DecoderConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=64,
        layers=2,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        rope_theta=100.0,  # so that every pair of a head turns within the context
        tied=False,
    )
    tower = fastvithd(
        widths=(8, 8, 8, 8, 8),
        depths=(1, 1, 1, 1, 1),
        features=16,
        se_width=8,
        head_width=0,
        train_form=False,
    )
    model = FastVLM(FastVLMConfig(tower=tower, decoder=decoder)).eval()
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3)
    return model


def program_of(model: FastVLM, case: Case) -> ExportedProgram:
    """The decoder's graph under the recipe."""
    recipe = RECIPES[case.recipe]
    if recipe.decoder.bits:
        quantize_decoder(model.decoder, recipe, [], lambda _: None)
    built = graphs.build(model, resolution=64, context=CONTEXT, image_token_id=50)["decoder"]
    if recipe.float_format is not Float.FP16:
        return graphs.export_program(built)
    x = torch.from_numpy(normal(1, CONTEXT, WIDTH))
    past = torch.zeros(1, case.kv_heads, 0, case.head_dim)
    shown = (x, torch.ones(1, CONTEXT, dtype=torch.int64), *[past] * 4)
    return to_half(built, [shown], recipe.range_limit, lambda _: None).program


class Lowered:
    """One decoder as a file, and what PyTorch computes of the same program."""

    def __init__(self, case: Case, path: Path) -> None:
        model = model_of(case)
        self.config, self.path, self.case = model.config.decoder, path, case
        program = program_of(model, case)
        names = onnx_lowering.interface("decoder", program, self.config)
        onnx_files.save(onnx_lowering.to_onnx(program, names), path)
        cache_type = graphs.traced_inputs(program)[2].dtype
        self.cache_type = np.dtype(str(cache_type).removeprefix("torch."))
        reference = TorchSession(
            dict.fromkeys(("vision", "embedding", "decoder"), runnable(program)),
            self.config,
            CONTEXT,
            cache_type,
        )
        self.embeds = normal(1, sum(CHUNKS), WIDTH, seed=1)
        self.expected = self.run(reference.decode)

    def run(self, decode: Callable[[Array], Array]) -> list[Array]:
        ends = list(itertools.accumulate(CHUNKS))
        starts = [0, *ends[:-1]]
        return [decode(self.embeds[:, a:b]) for a, b in zip(starts, ends, strict=True)]

    def check(self, decode: Callable[[Array], Array]) -> None:
        for found, wanted in zip(self.run(decode), self.expected, strict=True):
            assert found.shape == wanted.shape
            error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
            assert error <= LIMITS[self.case.recipe]


@pytest.fixture(scope="module", params=CASES, ids=str)
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return Lowered(request.param, tmp_path_factory.mktemp("heads") / "decoder.onnx")


def test_logits_are_pytorchs_with_the_cache_in_one_buffer(lowered: Lowered) -> None:
    session = OnnxSession(
        dict.fromkeys(("vision", "embedding", "decoder"), lowered.path), context=CONTEXT
    )
    for _ in range(2):  # what the first run left in the buffers must not be seen
        session.reset()
        lowered.check(session.decode)


def test_logits_are_pytorchs_with_a_growing_cache(lowered: Lowered) -> None:
    """As Transformers.js runs it: each step's present is the next one's past."""
    runtime, config = load_graph(lowered.path), lowered.config
    names = [node.name for node in runtime.get_inputs()][2:]
    shape = (1, config.kv_heads, 0, config.head_dim)
    past = [np.zeros(shape, lowered.cache_type) for _ in names]
    done = 0

    def decode(embeds: Array) -> Array:
        nonlocal past, done
        done += embeds.shape[1]
        feed = {"inputs_embeds": embeds, "attention_mask": np.ones((1, done), np.int64)}
        logits, *past = runtime.run(None, feed | dict(zip(names, past, strict=True)))
        assert {x.shape for x in past} == {(1, config.kv_heads, done, config.head_dim)}
        out: Array = logits[:, 0]
        return out

    lowered.check(decode)


def test_the_fused_operator_does_what_it_can(lowered: Lowered) -> None:
    nodes = onnx.load(lowered.path).graph.node
    count = Counter(node.op_type for node in nodes)
    attention = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    assert len(attention) == (2 if lowered.case.head_dim % 8 == 0 else 0)
    assert count["Softmax"] == 2 - len(attention)
    fused = lowered.case.head_dim % 16 == 0
    assert count["RotaryEmbedding"] == (0 if fused else 4)
    for node in attention:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["do_rotary"] == fused
        assert len(node.input) == (9 if fused else 7)


@pytest.mark.parametrize("head_dim", [20, 24])
def test_rows_of_a_batch_may_have_shorter_prompts(head_dim: int, tmp_path: Path) -> None:
    """Filled up on the right, as the fused operator takes them: the same angles either way."""
    case = Case(head_dim=head_dim, heads=4, kv_heads=2, recipe="fp32")
    runtime = load_graph(Lowered(case, tmp_path / "decoder.onnx").path)
    names = [node.name for node in runtime.get_inputs()][2:]
    embeds, lengths = normal(2, 6, WIDTH, seed=2), (4, 6)

    def step(x: Array, mask: Array, past: list[Array]) -> list[Array]:
        feed = {"inputs_embeds": x, "attention_mask": mask.astype(np.int64)}
        out: list[Array] = runtime.run(None, feed | dict(zip(names, past, strict=True)))
        return out

    def empty(rows: int) -> list[Array]:
        return [np.zeros((rows, 2, 0, head_dim), np.float32) for _ in names]

    mask = np.arange(6)[None] < np.array(lengths)[:, None]
    together = step(embeds, mask, empty(2))[1:]
    for row, length in enumerate(lengths):
        alone = step(embeds[row : row + 1, :length], np.ones((1, length)), empty(1))[1:]
        for ours, wanted in zip(together, alone, strict=True):
            assert np.abs(ours[row, :, :length] - wanted[0]).max() < 1e-6


@pytest.mark.parametrize("rotary", [True, False], ids=["rotated inside", "rotated before"])
@pytest.mark.parametrize("head_dim", [2, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256])
def test_the_rules_are_those_of_the_installed_runtime(head_dim: int, rotary: bool) -> None:
    """The operator alone, asked directly: it takes what we say it takes, and nothing else."""
    names = ["q", "k", "v", "past_k", "past_v", "last", "total"]
    make, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto
    inputs = [make(name, kind.FLOAT, [1, 2, head_dim]) for name in names[:3]]
    inputs += [make(name, kind.FLOAT, [1, 1, 0, head_dim]) for name in names[3:5]]
    inputs += [make(name, kind.INT32, shape) for name, shape in (("last", [1]), ("total", []))]
    if rotary:
        names += ["cos", "sin"]
        inputs += [make(name, kind.FLOAT, [2, head_dim // 2]) for name in names[7:]]
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "key", "value"],
        domain=onnx_attention.MICROSOFT,
        num_heads=1,
        kv_num_heads=1,
        do_rotary=int(rotary),
    )
    outputs = [make(name, kind.FLOAT, None) for name in node.output]
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    taken = (onnx_attention.rotates if rotary else onnx_attention.mixes)(head_dim)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in inputs}
    feed = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    feed |= {"last": np.array([1], np.int32), "total": np.array(2, np.int32)}
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        session.run(None, feed)
    except Exception as error:  # ONNX Runtime's classes share no other base
        assert not taken, error
        assert "head_size" in str(error)
    else:
        assert taken
