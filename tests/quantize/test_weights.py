import copy
import dataclasses
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastvlm_export.exporter import graphs
from fastvlm_export.exporter.checkpoint import Checkpoint, bundled
from fastvlm_export.exporter.config import DecoderConfig
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.model.decoder import Decoder
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.preprocess import preprocess
from fastvlm_export.exporter.prompt import prompt_ids
from fastvlm_export.quantize import rounding, weights
from fastvlm_export.quantize.calibration import load
from fastvlm_export.quantize.ops import FLOAT_ACTIVATIONS, PER_TOKEN
from fastvlm_export.quantize.recipes import (
    EMBEDDING,
    HEAD,
    RECIPES,
    Activations,
    LayerRule,
    Method,
    Precision,
    Recipe,
)
from fastvlm_export.quantize.weights import (
    QuantizedEmbedding,
    QuantizedLinear,
    check_groups,
    layer_widths,
    quantize_decoder,
)
from fastvlm_export.validate.digits import held_out_scenes

INT8 = Precision(bits=8)
DYNAMIC8 = Precision(bits=8, activations=Activations.DYNAMIC)
INT4 = Precision(bits=4, group_size=16, activations=Activations.DYNAMIC)
GPTQ4 = dataclasses.replace(INT4, method=Method.GPTQ)
SCALED = tuple(method for method in Method if method is not Method.PALETTE)
BOTH = Recipe(name="both", embedding=INT8, head=DYNAMIC8)
TINY = DecoderConfig(
    vocab_size=120,
    hidden_size=48,
    intermediate_size=80,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=8,
    tied=True,
)


def decoder(*, tied: bool = False, config: DecoderConfig = TINY) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(dataclasses.replace(config, tied=tied))
    made.embed_tokens.weight.data *= 0.3
    return made.eval().requires_grad_(False)


def silent(_: str) -> None:
    pass


def sequences(count: int = 6, width: int = 48) -> list[Tensor]:
    """Embeddings of text-like sequences: a few directions hold most of the power."""
    torch.manual_seed(2)
    power = torch.arange(1, width + 1) ** -0.7
    return [torch.randn(1, 20 + i, width) * power for i in range(count)]


def prompts(checkpoint: Checkpoint, model: FastVLM, images: list[Image.Image]) -> list[Tensor]:
    """A question about each image, as the decoder's inputs [1,S,D]."""
    found = []
    for image in images:
        features = model.encode_image(torch.from_numpy(preprocess(image, checkpoint.preprocessing)))
        image_id = checkpoint.image_token_id
        ids = prompt_ids(checkpoint.tokenizer, "Read the number.", image_id, features.shape[1])
        places = torch.tensor([ids]) == image_id
        x = model.embed(torch.tensor([ids]).masked_fill(places, 0))
        x[places] = features[0]
        found.append(x)
    return found


def integers(layer: nn.Module) -> int:
    assert isinstance(layer, QuantizedLinear | QuantizedEmbedding)
    return layer.weight.data_ptr()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("precision", "limit"),
    [
        (DYNAMIC8, 0.02),
        (dataclasses.replace(DYNAMIC8, method=Method.GPTQ), 0.02),
        (dataclasses.replace(INT8, group_size=16), 0.02),
        (INT4, 0.2),
        (GPTQ4, 0.2),
        (dataclasses.replace(INT4, group_size=None, method=Method.HQQ), 0.3),
        (dataclasses.replace(INT4, symmetric=False), 0.2),
    ],
)
def test_every_layer_becomes_integers_and_the_logits_stay(
    precision: Precision, limit: float, tied: bool
) -> None:
    original = decoder(tied=tied)
    quantized = copy.deepcopy(original)
    recipe = Recipe(name="all", embedding=INT8, decoder=precision, head=DYNAMIC8)
    records = quantize_decoder(quantized, recipe, sequences(), silent)
    assert sorted(record.layer for record in records) == sorted(layer_widths(original))
    left = [
        name for name, m in quantized.named_modules() if isinstance(m, nn.Linear | nn.Embedding)
    ]
    assert not left
    x = sequences(1)[0]
    error = (quantized(x) - original(x)).norm() / original(x).norm()
    assert 0 < error < limit, error


def test_a_linear_layer_computes_what_its_buffers_say() -> None:
    quantized = decoder()
    original = copy.deepcopy(quantized)
    quantize_decoder(quantized, Recipe(name="x", decoder=INT8), [], silent)
    layer, before = quantized.layers[1].self_attn.q_proj, original.layers[1].self_attn.q_proj
    assert isinstance(layer, QuantizedLinear)
    assert (layer.weight.dtype, layer.scale.shape, layer.zero_point) == (torch.int8, (48, 1), None)
    x = torch.randn(2, 5, 48)
    expected = x @ (layer.weight * layer.scale).T + before.bias
    torch.testing.assert_close(layer(x), expected)
    assert (before.weight - layer.weight * layer.scale).abs().max() <= layer.scale.max() / 2 * 1.001


def test_an_embedding_gives_the_rows_of_its_table() -> None:
    quantized = decoder()
    quantize_decoder(quantized, BOTH, [], silent)
    table = quantized.embed_tokens
    assert isinstance(table, QuantizedEmbedding)
    ids = torch.tensor([[3, 119, 0], [3, 7, 8]])
    torch.testing.assert_close(table(ids), (table.weight * table.scale)[ids])


def test_activations_are_rounded_as_the_weights_are_grouped() -> None:
    quantized = decoder()
    rules = (
        LayerRule(pattern="*.0.*", precision=INT4),
        LayerRule(pattern="*.1.*", precision=DYNAMIC8),
    )
    quantize_decoder(quantized, Recipe(name="x", decoder=INT8, layers=rules), [], silent)
    groups = [layer.mlp.up_proj.activation_group for layer in quantized.layers]
    assert groups == [16, PER_TOKEN, FLOAT_ACTIVATIONS]


def test_the_last_rule_that_matches_decides_about_a_layer() -> None:
    quantized = decoder()
    rules = (
        LayerRule(pattern="decoder.layers.1.*", precision=INT8),
        LayerRule(pattern="*.down_proj", precision=Precision()),
    )
    records = quantize_decoder(quantized, Recipe(name="x", decoder=INT4, layers=rules), [], silent)
    bits = {record.layer: (record.bits, record.group_size) for record in records}
    assert bits["decoder.layers.0.mlp.up_proj"] == (4, 16)
    assert bits["decoder.layers.1.mlp.up_proj"] == (8, None)
    assert "decoder.layers.1.mlp.down_proj" not in bits
    assert isinstance(quantized.layers[1].mlp.down_proj, nn.Linear)


def test_a_tied_table_is_stored_once() -> None:
    quantized = decoder(tied=True)
    quantize_decoder(quantized, BOTH, [], silent)
    head = quantized.lm_head
    assert isinstance(head, QuantizedLinear)
    assert (head.activation_group, head.bias) == (PER_TOKEN, None)
    for model in (quantized, copy.deepcopy(quantized)):
        assert integers(model.lm_head) == integers(model.embed_tokens)
        assert model.lm_head.scale.data_ptr() == model.embed_tokens.scale.data_ptr()


def test_a_tied_table_of_two_precisions_is_two_tables() -> None:
    quantized = decoder(tied=True)
    original = copy.deepcopy(quantized)
    recipe = dataclasses.replace(BOTH, head=GPTQ4)
    quantize_decoder(quantized, recipe, sequences(), silent)
    assert integers(quantized.lm_head) != integers(quantized.embed_tokens)
    assert (quantized.lm_head.scale.shape, quantized.embed_tokens.scale.shape) == (
        (120, 3),
        (120, 1),
    )
    x = sequences(1)[0]
    assert (quantized(x) - original(x)).norm() < 0.2 * original(x).norm()


def test_a_tied_head_stays_float_beside_a_quantized_embedding() -> None:
    quantized = decoder(tied=True)
    original = copy.deepcopy(quantized)
    quantize_decoder(quantized, Recipe(name="x", embedding=INT8), [], silent)
    assert isinstance(quantized.embed_tokens, QuantizedEmbedding)
    assert isinstance(quantized.lm_head, nn.Linear)
    x = sequences(1)[0]
    torch.testing.assert_close(quantized(x), original(x))


def test_a_tied_embedding_stays_float_beside_a_quantized_head() -> None:
    quantized = decoder(tied=True)
    quantize_decoder(quantized, Recipe(name="x", head=INT4), [], silent)
    assert isinstance(quantized.embed_tokens, nn.Embedding)
    assert isinstance(quantized.lm_head, QuantizedLinear)


def test_a_float_recipe_changes_nothing() -> None:
    quantized = decoder(tied=True)
    names = [name for name, _ in quantized.named_modules()]
    assert quantize_decoder(quantized, RECIPES["fp32"], [], silent) == ()
    assert [name for name, _ in quantized.named_modules()] == names


def test_gptq_learns_from_what_quantized_layers_before_it_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The inputs behind each Hessian, seen again by running the finished decoder."""
    learned: list[Tensor] = []
    real = weights.hessian

    def spy(inputs: list[Tensor], width: int) -> Tensor:
        learned.append(torch.cat([x.flatten(0, 1) for x in inputs]))
        return real(inputs, width)

    monkeypatch.setattr(weights, "hessian", spy)
    quantized = decoder()
    recipe = dataclasses.replace(BOTH, decoder=GPTQ4, head=GPTQ4)
    quantize_decoder(quantized, recipe, sequences(), silent)
    received: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, inputs: received.setdefault(name, []).append(inputs[0].flatten(0, 1))

    stages = [
        f"layers.{i}.{stage}"
        for i in range(3)
        for stage in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    for name in (*stages, "lm_head"):
        quantized.get_submodule(name).register_forward_pre_hook(keep(name))
    for x in sequences():
        quantized(x)
    assert len(learned) == 13
    for name, seen in zip((*stages, "lm_head"), learned, strict=True):
        torch.testing.assert_close(seen, torch.cat(received[name]), rtol=1e-3, atol=1e-4)


def test_gptq_loses_less_of_the_logits_than_rounding_to_nearest() -> None:
    original, errors = decoder(), {}
    fresh = sequences(9)[6:]
    for method in SCALED:
        quantized = copy.deepcopy(original)
        precision = dataclasses.replace(GPTQ4, method=method)
        quantize_decoder(quantized, Recipe(name="x", decoder=precision), sequences(), silent)
        errors[method] = sum(float((quantized(x) - original(x)).norm()) for x in fresh)
    assert errors[Method.GPTQ] < 0.9 * errors[Method.RTN], errors


def test_divergence_of_the_bundled_model() -> None:
    """Mean KL over all positions of prompts about held-out images: the order is what counts."""
    checkpoint = bundled()
    model = checkpoint.model()
    canvases = [Image.fromarray(scene.pixels) for scene in held_out_scenes(6, seed=11)]
    inputs = prompts(checkpoint, model, [image.image for image in load(None).images])
    asked = prompts(checkpoint, model, canvases)
    expected = [model.decoder(x).log_softmax(-1) for x in asked]
    found: dict[tuple[int, Method], float] = {}
    for bits, group in ((8, None), (4, 32)):
        for method in SCALED:
            quantized = copy.deepcopy(model.decoder)
            precision = dataclasses.replace(DYNAMIC8, bits=bits, group_size=group, method=method)
            quantize_decoder(
                quantized, dataclasses.replace(BOTH, decoder=precision), inputs, silent
            )
            kl = [
                (e.exp() * (e - quantized(x).log_softmax(-1))).sum(-1).mean()
                for e, x in zip(expected, asked, strict=True)
            ]
            found[bits, method] = float(torch.stack(kl).mean())
    print({f"int{bits} {method}": f"{kl:.2e}" for (bits, method), kl in found.items()})
    assert max(found[8, method] for method in SCALED) < 0.003, found
    assert max(found[4, method] for method in SCALED) < 0.1, found
    assert found[4, Method.GPTQ] < 0.7 * found[4, Method.RTN], found


def memory_levels(work: Callable[[], object]) -> list[int]:
    """Bytes of tensors that `work` holds, after each of its allocations and releases."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = work()
    assert result is not None  # alive until here
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    found = [event for event in results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())]
    return list(itertools.accumulate(changes))


def test_memory_stays_within_one_layer_over_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "CHUNK", 2**12)
    large = dataclasses.replace(TINY, layers=8, hidden_size=96, intermediate_size=192, head_dim=16)
    recipe = dataclasses.replace(BOTH, decoder=INT4)
    made = decoder(config=large)
    total = sum(4 * p.numel() for p in made.parameters())
    layer = sum(4 * p.numel() for p in made.layers[0].parameters())
    quantize_decoder(made, recipe, [], silent)  # what is imported and cached the first time

    def work() -> Decoder:
        fresh = decoder(config=large)
        quantize_decoder(fresh, recipe, [], silent)
        return fresh

    levels = memory_levels(work)
    assert max(levels) < total + layer, f"{(max(levels) - total) / layer} layers over the model"
    assert total * 0.25 < levels[-1] < total * 0.4, f"{levels[-1] / total} of the model is left"


@pytest.mark.parametrize("method", SCALED)
def test_float_weights_are_gone_before_the_next_layer(method: Method) -> None:
    quantized = decoder(tied=True)
    refs = [
        [weakref.ref(m.weight) for m in layer.modules() if isinstance(m, nn.Linear)]
        for layer in quantized.layers
    ]
    table = weakref.ref(quantized.embed_tokens.weight)
    alive: list[int] = []

    def say(_: str) -> None:
        alive.append(sum(ref() is not None for layer in refs for ref in layer))

    precision = dataclasses.replace(INT4, method=method)
    recipe = Recipe(name="x", embedding=INT8, decoder=precision, head=INT8)
    quantize_decoder(quantized, recipe, sequences(), say)
    assert alive == [21, 14, 7, 0]
    assert table() is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_exported_program_is_the_eager_model(tied: bool, tiny_released: FastVLM) -> None:
    model = dataclasses.replace(tiny_released.config.decoder, tied=tied)
    tiny_released.decoder = decoder(tied=tied, config=model)
    recipe = dataclasses.replace(BOTH, decoder=INT4)
    quantize_decoder(tiny_released.decoder, recipe, [], silent)
    built = graphs.build(tiny_released, resolution=64, context=32, image_token_id=3)
    programs = {name: graphs.export_program(built[name]) for name in ("embedding", "decoder")}
    torch.manual_seed(0)
    for name, program in programs.items():
        inputs = [
            torch.randn_like(x) if x.is_floating_point() else x for x in built[name].inputs.values()
        ]
        ours, theirs = program.module()(*inputs), built[name].module(*inputs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        calls = [str(node.target) for node in program.graph.nodes if "quantized" in node.name]
        assert len(calls) == (1 if name == "embedding" else 3 * 7 + 1)
    tables = [
        programs[name].state_dict[key].data_ptr()
        for name, key in (
            ("embedding", "embed_tokens.weight"),
            ("decoder", "decoder.lm_head.weight"),
        )
    ]
    assert (tables[0] == tables[1]) is tied


def test_group_sizes_that_do_not_divide_are_all_named() -> None:
    rules = (
        LayerRule(
            pattern="decoder.layers.1.mlp.up_proj", precision=Precision(bits=4, group_size=9)
        ),
        LayerRule(pattern="decoder.layers.0.*", precision=Precision(group_size=7)),  # float: unused
    )
    recipe = Recipe(name="x", decoder=Precision(bits=4, group_size=32), head=INT4, layers=rules)
    with pytest.raises(ExportError) as caught:
        quantize_decoder(decoder(), recipe, [], silent)
    lines = caught.value.message.split("\n")
    assert lines == [
        "Group size 32 does not divide 48, the input width of decoder.layers.1.self_attn.q_proj, "
        "decoder.layers.2.self_attn.q_proj, decoder.layers.1.self_attn.k_proj, "
        "decoder.layers.2.self_attn.k_proj, decoder.layers.1.self_attn.v_proj, "
        "decoder.layers.2.self_attn.v_proj, decoder.layers.1.self_attn.o_proj, "
        "decoder.layers.2.self_attn.o_proj, decoder.layers.1.mlp.gate_proj, "
        "decoder.layers.2.mlp.gate_proj, decoder.layers.2.mlp.up_proj.",
        "Group size 9 does not divide 48, the input width of decoder.layers.1.mlp.up_proj.",
        "Group size 32 does not divide 80, the input width of decoder.layers.1.mlp.down_proj, "
        "decoder.layers.2.mlp.down_proj.",
    ]


def test_layers_of_one_kind_are_named_together() -> None:
    recipe = Recipe(name="x", decoder=Precision(bits=4, group_size=24))
    with pytest.raises(ExportError) as caught:
        check_groups(recipe, layer_widths(decoder()))
    assert caught.value.message == (
        "Group size 24 does not divide 80, the input width of decoder.layers.*.mlp.down_proj."
    )
    assert "leave it out" in caught.value.hint


@pytest.mark.parametrize("tied", [True, False])
def test_widths_are_those_of_the_layers(tied: bool) -> None:
    widths = layer_widths(decoder(tied=tied))
    assert len(widths) == 3 * 7 + 2
    assert widths["decoder.layers.2.mlp.down_proj"] == 80
    assert (widths[EMBEDDING], widths[HEAD]) == (48, 48)


def test_what_does_not_fit_a_layer_is_an_error_that_names_the_key() -> None:
    gptq = Precision(bits=8, method=Method.GPTQ)
    static = Precision(bits=8, activations=Activations.STATIC)
    with pytest.raises(ExportError) as caught:
        quantize_decoder(
            decoder(), Recipe(name="x", embedding=gptq, decoder=static, head=gptq), [], silent
        )
    assert caught.value.message.split("\n") == [
        "embedding.method: gptq is not for embedding (rtn, hqq, palette)",
        "embedding.method: gptq has no calibration sequences to learn from",
        "decoder.activations: static is not for decoder (float, dynamic, affine)",
        "head.method: gptq has no calibration sequences to learn from",
    ]


def test_progress_is_told_layer_by_layer() -> None:
    said: list[str] = []
    quantize_decoder(decoder(), RECIPES["int8"], [], said.append)
    assert said[0] == "quantize decoder layer 1 of 3"
    assert len(said) == 4
