"""fp16 around integers: what is stored in which type, what stays float32, how near it comes."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from fastvlm_export.exporter import graphs
from fastvlm_export.exporter.graphs import Graph
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.quantize.activations import integer_vision
from fastvlm_export.quantize.half import Half, to_half
from fastvlm_export.quantize.ops import FLOAT_ACTIVATIONS
from fastvlm_export.quantize.ranges import larger, layer_of, magnitude, survives_half
from fastvlm_export.quantize.recipes import Float, Recipe
from fastvlm_export.quantize.rounding import Integers
from fastvlm_export.quantize.runnable import Float32Interpreter, runnable
from fastvlm_export.quantize.weights import QuantizedLinear

from .halves import (
    BLOCK,
    INT4,
    INT8,
    LIMIT,
    RESOLUTION,
    ROUNDING,
    WEIGHTS,
    enlarged,
    error,
    quantized,
    shown,
    silent,
    small,
)

QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"
DEQUANTIZE_WEIGHT = "quantized_decomposed.dequantize_per_channel.default"
CAST = "aten._to_copy.default"
FC1 = "vision_tower.network.0.0.convffn.fc1"


def dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def stored(program: ExportedProgram) -> dict[str, Tensor]:
    return {**program.constants, **program.state_dict}


def nodes(program: ExportedProgram, *kinds: str) -> list[Node]:
    return [n for n in program.graph.nodes if str(n.target) in kinds]


def wide(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, float_format=Float.FP32)


def psnr(found: Tensor, expected: Tensor) -> float:
    noise = (found - expected).square().mean()
    return float(10 * torch.log10(expected.abs().max() ** 2 / noise))


@pytest.mark.parametrize("recipe", [INT8, WEIGHTS], ids=lambda r: r.name)
def test_the_towers_form(recipe: Recipe) -> None:
    program = quantized(recipe).programs["vision"]
    kept = {found.node for found in quantized(recipe).record.kept["vision"]}
    for node in nodes(program, QUANTIZE, DEQUANTIZE):
        _, scale, _, *rest = node.args
        assert rest == [0, 255, torch.uint8]
        assert float(torch.tensor(scale).half()) == scale
        if str(node.target) == DEQUANTIZE:
            assert node.args[0].args[1:] == node.args[1:]
    for node in nodes(program, DEQUANTIZE, DEQUANTIZE_WEIGHT):
        half = torch.float32 if node.name in kept else torch.float16
        assert dtype(node) is node.kwargs["out_dtype"] is half
        scales = [n for n in node.all_input_nodes if n.name.endswith("_scale")]
        assert {dtype(n) for n in scales} <= {half}
    assert bool(nodes(program, QUANTIZE)) == (recipe is INT8)
    types = Counter(x.dtype for name, x in stored(program).items() if "zero_point" not in name)
    assert types.keys() == {torch.int8, torch.float16, *({torch.float32} if kept else ())}
    assert {x.dtype for name, x in stored(program).items() if name.endswith("bias")} <= {
        torch.float16,
        torch.float32,
    }


@pytest.mark.parametrize("recipe", [INT8, INT4, WEIGHTS], ids=lambda r: r.name)
def test_a_decoder_has_the_integers_of_float32(recipe: Recipe) -> None:
    """Its scales differ by fp16's rounding, and nothing but integers and fp16 is stored."""
    for name in ("embedding", "decoder"):
        half = stored(quantized(recipe).programs[name])
        full = stored(quantized(wide(recipe)).programs[name])
        assert half.keys() == full.keys()
        for key, value in half.items():
            if full[key].dtype is torch.float32:
                assert value.dtype is torch.float16, key
                assert error(value, full[key]) < 2**-11
            else:
                assert torch.equal(value, full[key]), key
        assert any(value.dtype is torch.int8 for value in half.values())


@pytest.mark.parametrize("recipe", [INT8, WEIGHTS], ids=lambda r: r.name)
def test_features_are_as_good_as_with_float32_around(recipe: Recipe) -> None:
    model, _ = small()
    image = torch.cat(shown())
    original = graphs.build(model, resolution=RESOLUTION, context=64, image_token_id=1)
    expected = original["vision"].module(image)
    half, full = (
        runnable(quantized(r).programs["vision"])(image)[0] for r in (recipe, wide(recipe))
    )
    print(f"{psnr(half, expected):.1f} dB, in float32 {psnr(full, expected):.1f} dB")
    # Both are draws of the same noise: integers that lie on a boundary fall either way.
    assert psnr(half, expected) > psnr(full, expected) - 3
    if recipe is WEIGHTS:  # no rounding falls to another integer
        assert error(half, full) < 2 * ROUNDING


@pytest.mark.parametrize("recipe", [INT8, INT4, WEIGHTS], ids=lambda r: r.name)
def test_logits_are_near_those_with_float32_around(recipe: Recipe) -> None:
    _, spec = small()
    config = spec.decoder
    x = torch.randn(1, 9, config.hidden_size, generator=torch.Generator().manual_seed(0))
    found = []
    for r in (recipe, wide(recipe)):
        program = quantized(r).programs["decoder"]
        kind = torch.float16 if r is recipe else torch.float32
        past = torch.zeros(1, config.kv_heads, 0, config.head_dim, dtype=kind)
        mask = torch.ones(1, 9, dtype=torch.int64)
        found.append(runnable(program)(x, mask, *[past] * (2 * config.layers)))
    (half, *cache), (full, *_) = found
    assert {y.dtype for y in cache} == {torch.float16}
    assert half.dtype is torch.float32
    print(f"{error(half, full):.1e}")
    assert error(half, full) < 2 * ROUNDING


class Seen(Float32Interpreter):
    """Remembers which operators ran, and the largest magnitude stored in fp16."""

    largest = 0.0

    def __init__(self, program: ExportedProgram) -> None:
        self.ran: list[Any] = []
        super().__init__(program)
        self.ran.clear()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.ran.append(getattr(n.target, "__name__", n.target))
        kind = n.meta.get("val")
        if isinstance(kind, Tensor) and kind.dtype is torch.float16:
            self.largest = larger((self.largest, magnitude(value)))
        return value


def test_weights_are_dequantized_once_not_per_run() -> None:
    """A decoder's, and a tower's."""
    programs = quantized(INT4).programs
    decoder = Seen(programs["decoder"])
    x = torch.zeros(1, 1, small()[1].decoder.hidden_size)
    config = small()[1].decoder
    past = torch.zeros(1, config.kv_heads, 0, config.head_dim)
    decoder.run(x, torch.ones(1, 1, dtype=torch.int64), *[past] * (2 * config.layers))
    assert decoder.ran.count("linear") == 7 * config.layers + 1
    assert "dequantize" not in decoder.ran
    held = [value for value in decoder.constants.values() if isinstance(value, Tensor)]
    assert all(value.is_floating_point() for value in held)
    vision = Seen(programs["vision"])
    vision.run(shown()[0])
    assert "dequantize_per_tensor.default" in vision.ran
    assert "dequantize_per_channel.default" not in vision.ran


def integers(model: FastVLM, inputs: Tensor) -> tuple[Graph, Half]:
    """A tower in INT8, calibrated and scanned on some inputs."""
    built = graphs.build(model, resolution=RESOLUTION, context=64, image_token_id=1)
    graph = integer_vision(built["vision"], INT8, list(inputs.split(1)))
    return graph, to_half(graph, [(inputs,)], LIMIT, silent)


@pytest.fixture
def plain(tiny: FastVLM) -> FastVLM:
    return reparameterize(tiny).model


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(1))


def product(program: ExportedProgram, layer: str) -> Node:
    """The convolution or linear layer of that name."""
    (found,) = (
        n
        for n in nodes(program, "aten.conv2d.default", "aten.linear.default")
        if layer_of(n) == layer
    )
    return found


@pytest.mark.parametrize("peak", [1e6, 3e6])
def test_layers_beyond_fp16_round_to_integers_from_float32(
    plain: FastVLM, images: Tensor, peak: float
) -> None:
    plain = enlarged(plain, peak)
    expected = plain.encode_image(images)
    graph, half = integers(plain, images)
    kept = {found.node for found in half.kept}
    fc2 = product(half.program, f"{BLOCK}.convffn.fc2")
    assert fc2.name in kept
    (leaving,) = fc2.users
    x, weight, bias = fc2.args[:3]
    for node, kind in ((x, DEQUANTIZE), (weight, DEQUANTIZE_WEIGHT), (leaving, QUANTIZE)):
        assert str(node.target) == kind  # at once, without a cast between
        assert node.name in kept
    for node in (x, weight, bias, fc2, weight.args[1]):
        assert dtype(node) is torch.float32
    assert bias.op == "placeholder"
    assert x.kwargs == weight.kwargs == {"out_dtype": torch.float32}

    seen = Seen(half.program)
    (found,) = seen.run(images)
    assert seen.largest <= LIMIT
    (full,) = runnable(graphs.export_program(graph))(images)
    print(f"{psnr(found, expected):.1f} dB, in float32 {psnr(full, expected):.1f} dB")
    assert psnr(found, expected) > psnr(full, expected) - 1


def test_scales_that_fp16_does_not_have_keep_their_layer(plain: FastVLM, images: Tensor) -> None:
    plain.get_submodule(FC1).weight.mul_(1e-7)
    expected = plain.encode_image(images)
    _, half = integers(plain, images)
    assert {found.layer for found in half.kept} == {FC1}
    conv = product(half.program, FC1)
    weight = conv.args[1]
    assert dtype(conv) is dtype(weight) is torch.float32
    assert half.program.state_dict[f"{FC1}.weight_scale"].dtype is torch.float32
    assert half.program.state_dict[f"{FC1}.weight"].abs().amax((1, 2, 3)).eq(127).all()
    (found,) = runnable(half.program)(images)
    assert psnr(found, expected) > 30


class Small(nn.Module):
    """Two convolutions with next to nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x) * 2.0**-12) * 2.0**12
        return out


def test_activations_whose_scale_fp16_does_not_have_are_rounded_in_float32() -> None:
    torch.manual_seed(0)
    module = Small().requires_grad_(False)
    module.second.bias.zero_()
    x = torch.rand(2, 3, 8, 8)
    graph = Graph(
        name="vision",
        module=module,
        inputs={"pixel_values": x},
        outputs=("image_features",),
        dynamic={"pixel_values": {0: "batch_size"}},
    )
    recipe = dataclasses.replace(INT8, decoder=INT8.vision)  # as these layers are called
    half = to_half(integer_vision(graph, recipe, list(x.split(1))), [(x,)], LIMIT, silent)
    lost = [
        n
        for n in nodes(half.program, QUANTIZE, DEQUANTIZE)
        if not survives_half(torch.tensor(n.args[1]))
    ]
    assert len(lost) >= 2
    assert {n.name for n in lost} <= {found.node for found in half.kept}
    for node in lost:
        value = node if str(node.target) == DEQUANTIZE else node.args[0]
        assert dtype(value) is torch.float32
    (found,) = runnable(half.program)(x)
    print(f"{psnr(found, module(x)):.1f} dB")
    assert psnr(found, module(x)) > 35


@pytest.mark.parametrize(
    ("scale", "is_kept"), [(1e-3, False), (1e-9, True), (300.0, True), (1e5, True)]
)
def test_a_decoder_layers_scales_decide(scale: float, is_kept: bool) -> None:
    """300 is in fp16's range, 300 * 127 is beyond the limit."""
    generator = torch.Generator().manual_seed(0)
    stored_as = Integers(
        weight=torch.randint(-127, 128, (8, 32), generator=generator, dtype=torch.int8),
        scale=scale * (0.5 + torch.rand(8, 2, generator=generator)),
        zero_point=None,
        bits=8,
    )
    x = torch.randn(2, 32, generator=generator) / scale / 1e4
    x = x.clamp(-3e4, 3e4)
    module = QuantizedLinear(stored_as, torch.ones(8), FLOAT_ACTIVATIONS).eval()
    graph = Graph(name="one", module=module, inputs={"x": x}, outputs=("y",), dynamic={})
    half = to_half(graph, [(x,)], LIMIT, silent)
    assert bool(half.kept) == is_kept
    program = half.program
    assert program.state_dict["weight"] is stored_as.weight  # not copied
    for name in ("scale", "bias"):
        assert program.state_dict[name].dtype is (torch.float32 if is_kept else torch.float16)
    (found,) = runnable(program)(x)
    assert error(found, module(x)) < ROUNDING
