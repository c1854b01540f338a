"""The decoder as ExecuTorch's runtime runs it: the same function, its cache, one delegate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    XNNConvert,
    XNNDatatype,
    XNNFullyConnected,
    XNNQuantizedTensorValue,
)
from torch import Tensor
from torch.export import ExportedProgram

from fastvlm_export.exporter import graphs
from fastvlm_export.exporter.config import DecoderConfig
from fastvlm_export.exporter.model.decoder import Decoder
from fastvlm_export.quantize.ranges import lifted
from fastvlm_export.quantize.recipes import RECIPES, LayerRule, Recipe
from fastvlm_export.quantize.weights import quantize_decoder
from fastvlm_export.targets import executorch_backends, executorch_lowering, executorch_recipes
from fastvlm_export.targets.executorch_decoder import BLOCK, decoder_method
from fastvlm_export.targets.executorch_file import Method, parse
from fastvlm_export.targets.executorch_model import DECODER, Backend
from fastvlm_export.targets.executorch_xnn import xnn_constant, xnn_graph

CONTEXT = 2 * BLOCK + 19  # several blocks of the cache, the last one not whole
ROUNDING = 3e-6  # of the largest logit


@dataclass(frozen=True)
class Lowered:
    """A program, and the method that it became in the runtime."""

    program: ExportedProgram
    config: DecoderConfig
    context: int
    module: Any
    pte: bytes  # the runtime reads it in place

    @property
    def method(self) -> Method:
        return parse(memoryview(self.pte), "test").methods[DECODER]

    def run(self, embeds: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + embeds.shape[1])
        logits: Tensor = self.module.run_method(DECODER, [embeds, positions])[0].clone()
        return logits

    def compare(self, lengths: Sequence[int]) -> float:
        """The worst difference over chunks of one sequence, as a share of the largest logit."""
        past = [torch.zeros(1, self.config.kv_heads, 0, self.config.head_dim)] * (
            2 * self.config.layers
        )
        reference, worst = self.program.module(), 0.0
        for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
            embeds = torch.randn(1, length, self.config.hidden_size)
            mask = torch.ones(1, start + length, dtype=torch.int64)
            expected, *past = reference(embeds, mask, *past)
            found = self.run(embeds, start)
            assert found.shape == expected.shape
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
        return worst


def traced(
    config: DecoderConfig, context: int, *, biases: bool = True, recipe: Recipe | None = None
) -> ExportedProgram:
    torch.manual_seed(context)
    decoder = Decoder(config).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.3)
        elif parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5)
    for layer in decoder.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.bias = projection.bias if biases else None
    if recipe:
        quantize_decoder(decoder, recipe, [], lambda _: None)
    model = SimpleNamespace(config=SimpleNamespace(decoder=config), decoder=decoder)
    return graphs.export_program(graphs._decoder(model, context))


def lowered(program: ExportedProgram, config: DecoderConfig, context: int) -> Lowered:
    from executorch.extension.pybindings import portable_lib  # noqa: PLC0415

    methods = {DECODER: decoder_method(program, config, context)}
    partitioners = {DECODER: executorch_backends.partitioners(Backend.XNNPACK, DECODER)}
    pte = executorch_lowering.lower(methods, partitioners, {}).pte
    module = portable_lib._load_for_executorch_from_buffer(pte)
    return Lowered(program, config, context, module, pte)


@pytest.fixture(scope="module")
def grouped() -> Lowered:
    """Three query heads per key head, sizes that nothing divides, a table shared with the head."""
    config = DecoderConfig(
        vocab_size=101,
        hidden_size=42,
        intermediate_size=70,
        layers=2,
        heads=6,
        kv_heads=2,
        head_dim=10,
        tied=True,
    )
    return lowered(traced(config, CONTEXT), config, CONTEXT)


def test_is_one_delegate_and_reads_and_writes_its_cache_in_place(grouped: Lowered) -> None:
    method = grouped.method
    assert [delegate.backend for delegate in method.delegates] == ["XnnpackBackend"]
    written = [name for name in method.kernels if name.startswith("aten::index_put_")]
    assert len(written) == 2 * grouped.config.layers
    read = [name for name in method.kernels if name.startswith("aten::empty")]
    assert len(read) == 2 * grouped.config.layers  # the filled part of each, without a copy
    assert not any("copy_" in name.split(".")[0][-5:] for name in method.kernels)
    assert len(method.buffers) == 2 * grouped.config.layers


@pytest.mark.parametrize(
    "lengths",
    [
        (63, 1, 1, 62, 1, 1, 18),
        (CONTEXT,),
        (1, 1, 1),
        (CONTEXT - 1, 1),
        (BLOCK, BLOCK, 19),
        (5, 1, CONTEXT - 6),
    ],
    ids=lambda x: "+".join(map(str, x)),
)
def test_chunks_of_any_length_give_the_program_s_logits(
    grouped: Lowered, lengths: tuple[int, ...]
) -> None:
    """Each case starts at position 0 over what the one before left in the cache."""
    assert grouped.compare(lengths) <= ROUNDING


def test_what_an_earlier_answer_left_never_matters(grouped: Lowered) -> None:
    embeds = torch.randn(1, 4, grouped.config.hidden_size)
    first = grouped.run(embeds, 0)
    grouped.run(torch.randn(1, CONTEXT, grouped.config.hidden_size) * 1e4, 0)
    assert torch.equal(grouped.run(embeds, 0), first)


@pytest.mark.parametrize(
    ("length", "start"), [(CONTEXT + 1, 0), (1, CONTEXT), (3, CONTEXT - 2), (1, 10**9)]
)
def test_positions_beyond_the_context_are_an_error(
    grouped: Lowered, length: int, start: int
) -> None:
    embeds = torch.randn(1, length, grouped.config.hidden_size)
    with pytest.raises(RuntimeError):
        grouped.run(embeds, start)
    assert grouped.compare((3, 1)) <= ROUNDING  # and the program still runs


def test_a_key_head_for_each_query_head_is_the_same_function() -> None:
    config = DecoderConfig(
        vocab_size=33,
        hidden_size=64,
        intermediate_size=96,
        layers=1,
        heads=4,
        kv_heads=4,
        head_dim=16,
        tied=False,
    )
    program = traced(config, 20)
    method = decoder_method(program, config, 20).module()
    eager = SimpleNamespace(run_method=lambda _, inputs: [method(*inputs)])
    assert Lowered(program, config, 20, eager, b"").compare((3, 1, 16)) <= ROUNDING


def test_integers_arrive_and_give_the_program_s_logits() -> None:
    """Of 4 and of 8 bits; an untied head, no biases, one key head for all."""
    recipe = replace(
        executorch_recipes.adapt(RECIPES["int4"], Backend.XNNPACK),
        layers=(
            LayerRule(
                pattern="decoder.layers.*.self_attn.*",
                precision=executorch_recipes.adapt(RECIPES["int8"], Backend.XNNPACK).decoder,
            ),
        ),
    )
    config = DecoderConfig(
        vocab_size=33,
        hidden_size=64,
        intermediate_size=96,
        layers=1,
        heads=4,
        kv_heads=1,
        head_dim=16,
        tied=False,
    )
    program = lowered(traced(config, 20, biases=False, recipe=recipe), config, 20)
    (delegate,) = program.method.delegates
    graph = xnn_graph(delegate)
    stored = []
    roundings = 0
    for node in graph.xnodes:
        roundings += isinstance(node.xnode_union, XNNConvert)
        if isinstance(node.xnode_union, XNNFullyConnected):
            weight = graph.xvalues[node.xnode_union.filter_id].xvalue_union
            if isinstance(weight, XNNQuantizedTensorValue):
                data = xnn_constant(delegate, graph, weight.tensor_value.constant_buffer_idx)
                stored.append(integers(data, weight.tensor_value))
    held = constants(program.program)
    weights = [
        held[str(node.args[1])]
        for node in program.program.graph.nodes
        if str(node.target) == "fastvlm.quantized_linear.default"
    ]
    assert len(stored) == len(weights) == 8  # seven of the layer, and the head
    assert all(map(torch.equal, stored, weights))
    assert roundings == 5  # q, k and v share one, and so do gate and up
    # A sum in another order may land on the next integer: then by less than 1 of 255 steps.
    assert program.compare((3, 1, 16)) <= 0.01


def integers(data: memoryview, tensor: Any) -> Tensor:
    """XNNPACK's int8 [N,K], or two 4-bit numbers plus 8 per byte, the first one low."""
    rows, width = tensor.dims
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if tensor.datatype == XNNDatatype.xnn_datatype_qcint8:
        return raw.view(torch.int8).view(rows, width)
    assert tensor.datatype == XNNDatatype.xnn_datatype_qbint4
    pairs = torch.stack((raw & 15, raw >> 4), 1).to(torch.int8) - 8
    return pairs.view(rows, width)


def constants(program: ExportedProgram) -> dict[str, Tensor]:
    """Placeholder -> tensor."""
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    return dict(zip(names, lifted(program), strict=False))
