import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from fastvlm_export.exporter.model.decoder import CacheInputsDecoder
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.prompt import prompt_ids
from fastvlm_export.quantize.apply import quantize
from fastvlm_export.quantize.recipes import (
    EMBEDDING,
    HEAD,
    RECIPES,
    Activations,
    LayerRule,
    Method,
    NumberFormat,
    Observer,
    Precision,
    Recipe,
    ScaleFormat,
)
from fastvlm_export.quantize.runnable import runnable
from fastvlm_export.quantize.simulate import simulated, variants
from fastvlm_export.quantize.weights import QuantizedLinear, layer_names

from .simulations import Simulation, simulation

MIXED = Recipe(
    name="mixed",
    vision=Precision(bits=8, activations=Activations.STATIC),
    decoder=Precision(bits=4, group_size=16, method=Method.GPTQ),
    embedding=Precision(bits=8),
    head=Precision(bits=8),
    layers=(
        LayerRule(pattern="vision_tower.network.4.*", precision=Precision(bits=8)),
        LayerRule(pattern="vision_tower.network.0.*", precision=Precision()),
        LayerRule(
            pattern="vision_tower.network.2.*",
            precision=Precision(bits=8, activations=Activations.SYMMETRIC),
        ),
        LayerRule(
            pattern="decoder.layers.1.*",
            precision=Precision(bits=8, method=Method.HQQ, activations=Activations.DYNAMIC),
        ),
        LayerRule(
            pattern="projector.*", precision=Precision(bits=8, activations=Activations.AFFINE)
        ),
        LayerRule(
            pattern="decoder.layers.2.mlp.*",
            precision=Precision(
                bits=4,
                group_size=32,
                activations=Activations.AFFINE,
                scale_format=ScaleFormat.BF16,
            ),
        ),
    ),
    observer=Observer.PERCENTILE,
)


SIX = Precision(bits=6, method=Method.PALETTE)
FOUR = Precision(bits=4, group_size=8, method=Method.PALETTE)
TABLES = Recipe(
    name="tables",
    vision=Precision(bits=8, activations=Activations.STATIC),
    embedding=SIX,
    decoder=FOUR,
    head=SIX,
    layers=(
        LayerRule(pattern="vision_tower.network.0.*", precision=FOUR),
        LayerRule(pattern="decoder.layers.1.*", precision=Precision(bits=8)),
    ),
)


@pytest.fixture(scope="module")
def tied() -> Simulation:
    return simulation(RECIPES["int4"], tied=True)


EIGHT = Precision(bits=8, number_format=NumberFormat.FP8, activations=Activations.SYMMETRIC)
FLOATS = Recipe(
    name="floats",
    vision=EIGHT,
    embedding=Precision(bits=8),
    decoder=EIGHT,
    head=EIGHT,
    layers=(
        LayerRule(pattern="decoder.layers.1.*", precision=Precision(bits=8)),
        LayerRule(
            pattern="vision_tower.network.0.*",
            precision=Precision(bits=8, activations=Activations.STATIC),
        ),
    ),
)


@pytest.fixture(
    scope="module", params=["int4, tied", "mixed, untied", "tables, tied", "floats, tied"]
)
def any_simulation(request: pytest.FixtureRequest, tied: Simulation) -> Iterator[Simulation]:
    if request.param == "int4, tied":
        yield tied
    else:
        recipes = {"mixed, untied": MIXED, "tables, tied": TABLES, "floats, tied": FLOATS}
        recipe = recipes[request.param]
        yield simulation(recipe, tied=recipe is not MIXED)


def state(model: FastVLM) -> dict[str, tuple[int, bytes]]:
    """Every module's identity and every tensor's bytes."""
    modules = {name: (id(module), b"") for name, module in model.named_modules()}
    tensors = {
        f"{name} (tensor)": (id(tensor), tensor.detach().numpy().tobytes())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    return modules | tensors


def sequence(s: Simulation) -> Tensor:
    return torch.tensor(
        [prompt_ids(s.spec.tokenizer, "What?", s.spec.image_token_id, s.spec.image_tokens)]
    )


def embeds(s: Simulation, text: Tensor, features: Tensor) -> Tensor:
    x = text.clone()
    x[:, sequence(s)[0] == s.spec.image_token_id] = features
    return x


def decoder_arguments(s: Simulation, x: Tensor) -> list[Tensor]:
    config = s.spec.decoder
    past = torch.zeros(1, config.kv_heads, 0, config.head_dim)
    return [x, torch.ones(1, x.shape[1], dtype=torch.int64), *[past] * (2 * config.layers)]


@torch.no_grad()
def test_all_layers_stacked_compute_what_the_quantized_programs_do(
    any_simulation: Simulation,
) -> None:
    s = any_simulation
    programs = {
        name: runnable(program)
        for name, program in quantize(
            s.model, s.recipe, s.spec, s.calibration, lambda _: None
        ).programs.items()
    }
    ids = sequence(s).clamp(max=s.spec.decoder.vocab_size - 1)
    theirs: dict[str, Tensor] = {}
    (theirs["vision"],) = programs["vision"](s.shown[0])
    (theirs["embedding"],) = programs["embedding"](ids)
    x = embeds(s, theirs["embedding"], theirs["vision"])
    theirs["logits"], *_ = programs["decoder"](*decoder_arguments(s, x))

    def run() -> dict[str, Tensor]:
        found = {"vision": s.model.encode_image(s.shown[0]), "embedding": s.model.embed(ids)}
        y = embeds(s, found["embedding"], found["vision"])
        decoder = CacheInputsDecoder(s.model.decoder, s.spec.context)
        found["logits"], *_ = decoder(*decoder_arguments(s, y))
        return found

    floats = run()
    with ExitStack() as stack:
        for name, layer in s.layers.items():
            stack.enter_context(simulated(s.model, {name: layer}))
        ours = run()
    for name, expected in theirs.items():
        error = float((ours[name] - expected).norm() / expected.norm())
        loss = float((floats[name] - expected).norm() / expected.norm())
        print(f"{name}: {error:.3g} of the quantized output, quantization itself {loss:.3g}")
        assert loss > 1e-3
        assert error < 1e-5


def test_every_layer_that_the_recipe_names_has_a_variant_in_network_order(tied: Simulation) -> None:
    names = list(tied.layers)
    known = layer_names(tied.model)
    assert names == sorted(names, key=known.index)
    assert {EMBEDDING, HEAD, "projector.0", "vision_tower.network.0.0.convffn.fc1"} <= set(names)
    assert all(tied.recipe.precision(name).bits for name in names)
    # Depthwise and squeeze-and-excite convolutions stay as they are.
    assert not [name for name in names if "mixer.reparam_conv" in name or ".se." in name]


@torch.no_grad()
def test_each_layer_alone_changes_the_output_and_leaves_no_trace(
    any_simulation: Simulation,
) -> None:
    s = any_simulation
    before = state(s.model)
    ids = sequence(s).clamp(max=s.spec.decoder.vocab_size - 1)

    def logits() -> Tensor:
        return s.model(embeds(s, s.model.embed(ids), s.model.encode_image(s.shown[0])))

    original = logits()
    for name, layer in s.layers.items():
        with simulated(s.model, {name: layer}):
            changed = logits()
        assert not torch.equal(changed, original), name
        assert state(s.model) == before, name
    assert torch.equal(logits(), original)


def test_the_model_is_restored_when_what_runs_inside_fails(tied: Simulation) -> None:
    before = state(tied.model)
    with pytest.raises(KeyError, match="inside"), simulated(tied.model, tied.layers):
        assert state(tied.model) != before
        raise KeyError("inside")
    assert state(tied.model) == before


def test_the_model_is_restored_when_a_layer_does_not_exist(tied: Simulation) -> None:
    before = state(tied.model)
    some = dict(list(tied.layers.items())[:3])
    with (
        pytest.raises(AttributeError),
        simulated(tied.model, {**some, "decoder.layers.99.mlp": nn.Identity()}),
    ):
        pass
    assert state(tied.model) == before


@torch.no_grad()
def test_a_tied_head_stays_float_while_only_the_embedding_is_quantized(tied: Simulation) -> None:
    x = torch.randn(1, 4, tied.spec.decoder.hidden_size)
    ids = torch.tensor([[1, 2, 3]])
    decoder = tied.model.decoder
    logits, rows = decoder.logits(x), tied.model.embed(ids)
    with simulated(tied.model, {EMBEDDING: tied.layers[EMBEDDING]}):
        assert torch.equal(decoder.logits(x), logits)
        assert not torch.equal(tied.model.embed(ids), rows)
        with simulated(tied.model, {HEAD: tied.layers[HEAD]}):
            both = decoder.logits(x)
        assert torch.equal(decoder.logits(x), logits)
    with simulated(tied.model, {HEAD: tied.layers[HEAD]}):
        assert torch.equal(tied.model.embed(ids), rows)
        with simulated(tied.model, {EMBEDDING: tied.layers[EMBEDDING]}):
            # Whoever came first, both are quantized now.
            assert torch.equal(decoder.logits(x), both)
        assert torch.equal(decoder.logits(x), both)
    assert not torch.equal(both, logits)
    assert not hasattr(decoder, "lm_head")


def test_gptq_chooses_other_integers_than_rounding(tied: Simulation) -> None:
    name = "decoder.layers.0.mlp.down_proj"
    precision = dataclasses.replace(
        tied.recipe.decoder, method=Method.GPTQ, activations=Activations.FLOAT
    )
    recipe = Recipe(name="one", layers=(LayerRule(pattern=name, precision=precision),))
    found = variants(tied.model, recipe, tied.spec, tied.shown, lambda _: None)
    assert list(found) == [name]
    gptq, rounded = found[name], tied.layers[name]
    assert isinstance(gptq, QuantizedLinear)
    assert isinstance(rounded, QuantizedLinear)
    assert not torch.equal(gptq.weight, rounded.weight)
