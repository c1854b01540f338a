"""Linear layers in fp8: which, with which numbers, and how near they come."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from fastvlm_export.exporter import graphs
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.quantize import fp8, recipe_file
from fastvlm_export.quantize.apply import decoder_inputs, needs_calibration, quantize
from fastvlm_export.quantize.ops import LARGEST_FP8, dequantize_fp8, fp8_linear, round_fp8
from fastvlm_export.quantize.ranges import FP8_LINEAR
from fastvlm_export.quantize.recipes import (
    EMBEDDING,
    HEAD,
    RECIPES,
    Activations,
    Float,
    LayerRule,
    Method,
    NumberFormat,
    Observer,
    Precision,
    Recipe,
)
from fastvlm_export.quantize.runnable import runnable
from fastvlm_export.quantize.simulate import variants

from . import halves
from .halves import error, quantized, shown, small

FP8 = RECIPES["fp8"]
LAYER = FP8.decoder
WIDE = dataclasses.replace(FP8, name="fp8-fp32", float_format=Float.FP32)
HALF = dataclasses.replace(FP8, name="fp8-fp16", float_format=Float.FP16)
EIGHT = torch.float8_e4m3fn


def values_of_fp8() -> np.ndarray:
    """All finite numbers of e4m3, by its definition: 4 bits of exponent, 3 of mantissa."""
    found = [m * 2.0**-9 for m in range(8)]
    found += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    found = found[:-1]  # the last one is NaN
    return np.array(sorted({sign * v for v in found for sign in (-1, 1)}))


GRID = values_of_fp8()


def nearest(x: np.ndarray) -> np.ndarray:
    """Float64 to the nearest number of e4m3, half to the even one; beyond 448 is 448."""
    places = np.searchsorted(GRID, x).clip(1, len(GRID) - 1)
    below, above = GRID[places - 1], GRID[places]
    # Neighbours alternate between even and odd, zero being even.
    even = (places - 1 - np.searchsorted(GRID, 0.0)) % 2 == 0
    closer = np.where(x - below < above - x, below, above)
    return np.where(x - below == above - x, np.where(even, below, above), closer)


def stored(program: ExportedProgram) -> dict[str, Tensor]:
    return {**program.constants, **program.state_dict}


def layers(program: ExportedProgram) -> dict[str, Node]:
    """The fp8 operators by the name of their weight's layer."""
    signature = program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    found = [n for n in program.graph.nodes if str(n.target) == FP8_LINEAR]
    return {names[n.args[1].name].removesuffix(".weight"): n for n in found}


def test_the_largest_number_is_448() -> None:
    assert LARGEST_FP8 == GRID[-1] == 448
    assert len(GRID) == 253
    assert set(GRID) == set(torch.from_numpy(GRID).to(EIGHT).double().tolist())


@settings(deadline=None, max_examples=200)
@given(
    values=st.lists(st.floats(-2000, 2000, width=32), min_size=1, max_size=20),
    exponent=st.integers(-12, 3),
)
def test_rounding_goes_to_the_nearest_and_never_beyond(values: list[float], exponent: int) -> None:
    """Scales are powers of two here, so that the division is exact."""
    scale = 2.0**exponent
    found = round_fp8(torch.tensor(values, dtype=torch.float32), scale)
    expected = nearest(np.array(values, np.float32).astype(np.float64) / scale) * scale
    np.testing.assert_array_equal(found.double().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_operator_is_its_definition_and_can_be_traced(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(6, 16).to(EIGHT), torch.rand(6).to(dtype)
    x, bias = torch.randn(2, 3, 16).to(dtype), torch.randn(6).to(dtype)
    found = fp8_linear(x, weight, scale, bias, 0.03125)
    assert found.dtype is dtype
    rounded = nearest(x.double().numpy() / 0.03125) * 0.03125
    by_hand = rounded @ (weight.double() * scale.double()[:, None]).numpy().T
    by_hand += bias.double().numpy()
    digits = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    np.testing.assert_allclose(found.double().numpy(), by_hand, atol=digits * np.abs(by_hand).max())
    # PyTorch's check of the schema multiplies its arguments, which it can't for fp8.
    checks = ("test_faketensor", "test_aot_dispatch_dynamic")
    for b in (bias, None):
        torch.library.opcheck(fp8_linear, (x, weight, scale, b, 0.03125), test_utils=checks)


def test_linear_layers_become_fp8_and_nothing_else() -> None:
    model, _ = small()
    found: dict[str, Node] = {}
    for name, program in quantized(FP8).programs.items():
        prefix = "decoder." if name == "embedding" else ""
        found |= {prefix + layer: node for layer, node in layers(program).items()}
        for key, value in stored(program).items():
            layer = prefix + key.rpartition(".")[0]
            wanted = EIGHT if key.endswith(".weight") and layer in found else torch.bfloat16
            assert value.dtype is wanted, key
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert found.keys() == linear | {HEAD}
    assert any(name.startswith("vision_tower.") for name in found)
    assert not layers(quantized(FP8).programs["embedding"])
    records = {record.layer: record for record in quantized(FP8).record.layers}
    assert records.keys() == found.keys()
    for record in records.values():
        assert (record.bits, record.number_format) == (8, NumberFormat.FP8)
        assert 0.01 < record.error < 0.04  # 2^-4 / sqrt(12) of a value's own power of two
    plain = quantized(FP8).record.to_dict()["layers"]
    assert {layer["number_format"] for layer in plain} == {"fp8"}


@pytest.mark.parametrize("recipe", [FP8, WIDE, HALF], ids=lambda r: r.name)
def test_weights_and_scales_are_those_computed_by_hand(recipe: Recipe) -> None:
    model, _ = small()
    kind = {Float.FP32: torch.float32, Float.FP16: torch.float16, Float.BF16: torch.bfloat16}
    dtype = kind[recipe.float_format]
    checked = 0
    for name in ("vision", "decoder"):
        program = quantized(recipe).programs[name]
        kept = {r.node for r in quantized(recipe).record.kept.get(name, ())}
        for layer, node in layers(program).items():
            place = EMBEDDING if layer == HEAD else layer
            weight = model.get_submodule(place).get_parameter("weight").detach()
            scale = stored(program)[f"{layer}.scale"]
            if node.name not in kept:
                assert scale.dtype is dtype, layer
            peak = weight.abs().amax(1) / 448
            expected = peak.clamp(min=torch.finfo(dtype).smallest_normal).to(dtype)
            assert torch.equal(scale.float(), expected.float()), layer
            found = stored(program)[f"{layer}.weight"]
            divided = (weight / expected.float()[:, None]).double().numpy()
            np.testing.assert_array_equal(found.double().numpy(), nearest(divided))
            checked += found.numel()
    assert checked > 50_000


def test_input_scales_are_the_largest_magnitude_over_448() -> None:
    """By hand: hooks on the float model, over every image and every prompt."""
    model, spec = small()
    peaks: dict[str, float] = {}

    def seen(name: str, x: Tensor) -> None:
        peaks[name] = max(peaks.get(name, 0.0), float(x.abs().max()))

    hooks = [
        module.register_forward_pre_hook(lambda _, x, n=name: seen(n, x[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    hooks.append(model.decoder.norm.register_forward_hook(lambda _, __, y: seen(HEAD, y)))
    with torch.no_grad():
        for x in decoder_inputs(model, shown(), spec, halves.silent):
            model.decoder(x)
        for pixels in shown():
            model.encode_image(pixels)
    for hook in hooks:
        hook.remove()
    for name in ("vision", "decoder"):
        for layer, node in layers(quantized(WIDE).programs[name]).items():
            assert node.args[4] == pytest.approx(peaks[layer] / 448, rel=1e-5), layer
        for layer, node in layers(quantized(FP8).programs[name]).items():
            rounded = float(torch.tensor(peaks[layer] / 448).bfloat16())
            assert node.args[4] == pytest.approx(rounded, rel=2**-7), layer
            assert float(torch.tensor(node.args[4]).bfloat16()) == node.args[4]


@pytest.mark.parametrize("recipe", [FP8, WIDE, HALF], ids=lambda r: r.name)
def test_outputs_stay_near_the_float_model(recipe: Recipe) -> None:
    """As near as random weights, which agree on nothing, let four bits of each value come."""
    model, spec = small()
    built = graphs.build(
        model, resolution=halves.RESOLUTION, context=spec.context, image_token_id=1
    )
    with torch.no_grad():
        expected = built["vision"].module(shown()[0])
        x = decoder_inputs(model, shown()[:1], spec, halves.silent)[0]
        logits = model.decoder(x)[:, -1]
    programs = quantized(recipe).programs
    config = spec.decoder
    kind = programs["decoder"].example_inputs[0][2]
    cache = kind[0] if isinstance(kind, tuple | list) else kind
    past = [torch.zeros(1, config.kv_heads, 0, config.head_dim, dtype=cache.dtype)]
    mask = torch.ones(1, x.shape[1], dtype=torch.int64)
    found, *_ = runnable(programs["decoder"])(x, mask, *past * (2 * config.layers))
    features = runnable(programs["vision"])(shown()[0])[0]
    for what, f, e in (("features", features, expected), ("logits", found[:, -1], logits)):
        off = float((f - e).norm() / e.norm())
        print(f"{recipe.name} {what}: {off:.3g}")
        assert 1e-3 < off < (0.1 if what == "features" else 0.35), what


def test_the_eager_program_computes_what_the_interpreter_does() -> None:
    """In float32 both are the operator's definition; nothing is rounded in between."""
    _, spec = small()
    program = quantized(WIDE).programs["decoder"]
    config = spec.decoder
    x = torch.randn(1, 5, config.hidden_size, generator=torch.Generator().manual_seed(0))
    past = [torch.zeros(1, config.kv_heads, 0, config.head_dim)] * (2 * config.layers)
    mask = torch.ones(1, 5, dtype=torch.int64)
    with torch.no_grad():
        expected = program.module()(x, mask, *past)
    for found, wanted in zip(runnable(program)(x, mask, *past), expected, strict=True):
        assert error(found, wanted) < 1e-5


def test_ranges_need_images_and_prompts() -> None:
    assert needs_calibration(FP8)
    assert FP8.ranged
    model, spec = small()
    alone = Recipe(name="x", layers=(LayerRule(pattern="projector.*", precision=LAYER),))
    found = quantize(model, alone, spec, halves.calibration(), halves.silent)
    assert {r.layer for r in found.record.layers} == {"projector.0", "projector.2"}


def test_it_stands_beside_integers_and_tables() -> None:
    """Each layer as its own rule says; a tied head leaves the table to the embedding."""
    model, spec = small()
    recipe = Recipe(
        name="mixed",
        vision=Precision(bits=8, activations=Activations.STATIC),
        embedding=Precision(bits=8),
        decoder=Precision(bits=4, group_size=16, method=Method.GPTQ),
        head=LAYER,
        layers=(
            LayerRule(pattern="decoder.layers.0.mlp.*", precision=LAYER),
            LayerRule(
                pattern="decoder.layers.1.*", precision=Precision(bits=6, method=Method.PALETTE)
            ),
            LayerRule(pattern="projector.*", precision=LAYER),
        ),
    )
    found = quantize(model, recipe, spec, halves.calibration(), halves.silent)
    kinds = {r.layer: (r.number_format, r.method) for r in found.record.layers}
    assert kinds["projector.0"] == kinds[HEAD] == (NumberFormat.FP8, Method.RTN)
    assert kinds["decoder.layers.0.mlp.up_proj"] == (NumberFormat.FP8, Method.RTN)
    assert kinds["decoder.layers.0.self_attn.q_proj"] == (NumberFormat.INTEGER, Method.GPTQ)
    assert kinds["decoder.layers.1.mlp.up_proj"] == (NumberFormat.INTEGER, Method.PALETTE)
    assert kinds[EMBEDDING] == (NumberFormat.INTEGER, Method.RTN)
    modules = variants(model, recipe, spec, shown(), halves.silent)
    assert {n for n, m in modules.items() if isinstance(m, fp8.Fp8Linear)} == {
        n for n, (kind, _) in kinds.items() if kind is NumberFormat.FP8
    }
    for name in ("vision", "decoder"):
        for layer, node in layers(found.programs[name]).items():
            simulated = modules[layer]
            assert isinstance(simulated, fp8.Fp8Linear)
            assert simulated.input_scale == node.args[4]
            weight = stored(found.programs[name])[f"{layer}.weight"]
            assert torch.equal(simulated.weight.float(), weight.float())


def test_what_leaves_the_calibrated_range_is_cut() -> None:
    x = torch.tensor([1e6, -1e6, math.inf, 0.0])
    assert round_fp8(x, 0.5).tolist() == [224, -224, 224, 0]
    weight, scale = torch.ones(1, 4).to(EIGHT), torch.ones(1)
    linear = fp8.Fp8Linear(weight, scale, None, 0.5).eval()
    graph = graphs.Graph(
        name="one", module=linear, inputs={"x": x[None]}, outputs=("y",), dynamic={}
    )
    program = graphs.export_program(graph)
    for exact in (True, False):
        (found,) = runnable(program, exact=exact)(torch.tensor([[1e6, 3.3, 0.0, 0.0]]))
        rounded = 3.3 if exact else float(nearest(np.array([6.6]))[0] / 2)
        assert float(found) == pytest.approx(224 + rounded, rel=1e-6)


def test_channels_of_zeros_and_of_tiny_weights_survive() -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1] = 0, weight[1] * 1e-4
    for float_format in Float:
        eight, scale, lost = fp8._rounded(weight, float_format)
        found = dequantize_fp8(eight, scale)
        assert not found[0].any()
        assert scale.min() > 0
        assert float((found[1] - weight[1]).norm() / weight[1].norm()) < 0.1
        assert 0 < lost < 0.05


def test_weights_that_are_not_finite_are_named() -> None:
    _, spec = small()
    broken = halves.reparameterize(halves.lively_model(spec.decoder.vocab_size, tied=True)).model
    with torch.no_grad():
        broken.get_parameter("projector.0.weight")[0, 0] = math.nan
    with pytest.raises(ExportError, match=r"projector\.(0|1|2)"):
        quantize(broken, FP8, spec, halves.calibration(), halves.silent)


@pytest.mark.parametrize("observer", Observer)
def test_every_observer_gives_a_range(observer: Observer) -> None:
    model, _ = small()
    recipe = Recipe(name="x", vision=LAYER, observer=observer, percentile=99.0)
    scales = fp8.input_scales(model, recipe, shown(), (), halves.silent)
    widest = fp8.input_scales(
        model, dataclasses.replace(recipe, observer=Observer.MINMAX), shown(), (), halves.silent
    )
    assert scales.keys() == widest.keys()
    assert all(0 < scales[name] <= widest[name] * 1.001 for name in scales)
    if observer is Observer.PERCENTILE:
        assert sum(scales.values()) < sum(widest.values())


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("embedding", {}, 'embedding.format is "fp8"'),
        ("decoder", {"bits": 4}, "decoder.bits is 4"),
        ("decoder", {"activations": Activations.FLOAT}, 'decoder.activations is "float"'),
        ("decoder", {"group_size": 32}, "decoder.group_size is 32"),
        ("head", {"method": Method.HQQ}, 'head.method is "hqq"'),
        ("vision", {"symmetric": False}, "vision.symmetric is false"),
        ("vision", {"activation_bits": 4}, "vision.activation_bits is 4"),
    ],
)
def test_what_fp8_cannot_be_is_one_error(part: str, changes: dict, words: str) -> None:  # type: ignore[type-arg]
    model, spec = small()
    recipe = dataclasses.replace(FP8, **{part: dataclasses.replace(LAYER, **changes)})
    with pytest.raises(ExportError) as raised:
        quantize(model, recipe, spec, halves.calibration(), halves.silent)
    assert words in raised.value.message


def test_a_recipe_file_needs_the_format_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "int4"\nfloat = "bf16"\n[vision]\nformat = "fp8"\n[decoder]\nformat = "fp8"\n'
        '[head]\nformat = "fp8"\nbits = 8\nactivations = "symmetric"\n[embedding]\nkeep = true\n'
    )
    recipe = recipe_file.read(path)
    assert (recipe.vision, recipe.decoder, recipe.head) == (LAYER, LAYER, LAYER)
    assert recipe.limits == FP8.limits
    path.write_text(recipe_file.write(recipe))
    assert 'format = "fp8"' in path.read_text()
    assert recipe_file.read(path) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    path.write_text('base = "fp8"\n[decoder]\nformat = "integer"\nactivations = "dynamic"\n')
    assert recipe_file.read(path).decoder == RECIPES["int8"].decoder


def test_old_manifests_have_no_format() -> None:
    values = RECIPES["int8"].to_dict()
    for part in ("vision", "embedding", "decoder", "head"):
        del values[part]["number_format"]
    assert Recipe.from_dict(values) == RECIPES["int8"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[embedding]\nformat = "fp8"', 'embedding.format is "fp8", not "integer"'),
        ('[decoder]\nformat = "fp8"\nbits = 4', "decoder.bits is 4, not 8 (all there is with fp8)"),
        ('[decoder]\nformat = "fp8"\ngroup_size = 32', "decoder.group_size says nothing about fp8"),
        ('[head]\nformat = "fp8"\nmethod = "palette"', "head.method says nothing about fp8"),
        ('[vision]\nformat = "fp8"\nactivations = "static"', 'activations is "static", not "symm'),
        ('[vision]\nformat = "e5m2"', 'vision.format is "e5m2", not "integer" or "fp8"'),
        ('[vision]\nformat = "integer"', "vision.format needs vision.bits"),
        (
            '[vision]\nformat = "fp8"\nkeep = true',
            "vision.format and vision.keep = true contradict",
        ),
    ],
)
def test_wrong_files(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ExportError) as raised:
        recipe_file.read(path)
    assert words in raised.value.message
