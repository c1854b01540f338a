"""Static activations around zero: what is written, with which numbers, and how near it comes."""

import dataclasses
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from fastvlm_export.exporter import graphs
from fastvlm_export.exporter.graphs import Graph
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.quantize import recipe_file
from fastvlm_export.quantize.activations import quantize_vision
from fastvlm_export.quantize.apply import Quantized
from fastvlm_export.quantize.observers import around_zero
from fastvlm_export.quantize.recipes import (
    RECIPES,
    Activations,
    Float,
    LayerRule,
    Observer,
    Precision,
    Recipe,
)
from fastvlm_export.quantize.runnable import runnable
from fastvlm_export.quantize.vision_layers import CONV, LINEAR, layer_name

from ..conftest import tiny_model
from . import halves

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
DEQUANTIZE_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default
SYMMETRIC = Recipe(name="symmetric", vision=Precision(bits=8, activations=Activations.SYMMETRIC))
HALF = dataclasses.replace(halves.INT8, name="symmetric-half", vision=SYMMETRIC.vision)
"""What TensorRT makes of the built-in int8, but for its head and table."""
RESOLUTION = 96


def images(count: int = 3) -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.rand(1, 3, RESOLUTION, RESOLUTION, generator=source) for _ in range(count)]


def built() -> Graph:
    model = reparameterize(tiny_model()).model
    return graphs.build(model, resolution=RESOLUTION, context=64, image_token_id=1)["vision"]


@pytest.fixture(scope="module")
def both() -> tuple[Graph, ExportedProgram, ExportedProgram]:
    """A graph, its symmetric program and its static one."""
    graph = built()
    programs = (quantize_vision(graph, r, images()) for r in (SYMMETRIC, RECIPES["int8"]))
    return graph, *programs


def layers(program: ExportedProgram) -> list[Node]:
    nodes = (n for n in program.graph.nodes if n.target in (CONV, LINEAR))
    return [n for n in nodes if n.args[1].target is DEQUANTIZE_WEIGHT]


def counts(program: ExportedProgram) -> Counter[object]:
    return Counter(node.target for node in program.graph.nodes)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_same_places_are_rounded_as_by_static_activations(
    both: tuple[Graph, ExportedProgram, ExportedProgram],
) -> None:
    _, program, static = both
    found, before = counts(program), counts(static)
    assert found[QUANTIZE] == before[QUANTIZE] > 0
    assert found[DEQUANTIZE] == before[DEQUANTIZE]
    assert [layer_name(n) for n in layers(program)] == [layer_name(n) for n in layers(static)]
    for node in program.graph.nodes:
        if node.target in (QUANTIZE, DEQUANTIZE):
            scale, *rest = node.args[1:]
            assert scale > 0
            assert rest == [0, -128, 127, torch.int8]


def test_biases_are_floats_and_weights_the_integers_of_static_layers(
    both: tuple[Graph, ExportedProgram, ExportedProgram],
) -> None:
    graph, program, static = both
    found, before = ({**p.constants, **p.state_dict} for p in (program, static))
    assert {value.dtype for value in found.values()} == {torch.int8, torch.int64, torch.float32}
    weights = [name for name, value in found.items() if value.dtype is torch.int8]
    assert len(weights) == len(layers(program))
    for name in weights:
        assert torch.equal(found[name], before[name]), name
        assert torch.equal(found[f"{name}_scale"], before[f"{name}_scale"]), name
        bias = name.removesuffix("weight") + "bias"
        if bias in before:
            assert torch.equal(found[bias], graph.module.get_parameter(bias)), bias


def test_scales_are_the_largest_magnitude_over_127(
    both: tuple[Graph, ExportedProgram, ExportedProgram],
) -> None:
    """By hand: each layer's float inputs and outputs, over all calibration images."""
    graph, program, _ = both
    peaks: dict[str, list[float]] = {}

    def watch(name: str) -> object:
        def hook(_: nn.Module, given: tuple[Tensor], made: Tensor) -> None:
            new = [float(given[0].abs().max()), float(made.abs().max())]
            peaks[name] = [max(pair) for pair in zip(peaks.get(name, [0.0, 0.0]), new, strict=True)]

        return hook

    names = [layer_name(n) for n in layers(program)]
    hooks = [
        graph.module.get_submodule(n).register_forward_hook(watch(n))  # type: ignore[arg-type]
        for n in names
    ]
    for pixels in images():
        graph.module(pixels)
    for hook in hooks:
        hook.remove()
    for node in layers(program):
        entering, leaving = peaks[layer_name(node)]
        np.testing.assert_allclose(node.args[0].args[1], entering / 127, rtol=1e-4)
        if node.target is CONV:
            (rounding,) = node.users
            np.testing.assert_allclose(rounding.args[1], leaving / 127, rtol=1e-4)


@pytest.mark.parametrize("observer", Observer)
def test_features_stay_near_whichever_observer(
    both: tuple[Graph, ExportedProgram, ExportedProgram], observer: Observer
) -> None:
    graph, program, static = both
    if observer is not SYMMETRIC.observer:
        program = quantize_vision(
            graph, dataclasses.replace(SYMMETRIC, observer=observer), images()
        )
    pixels = images()[0]
    expected = graph.module(pixels)
    found = error(runnable(program)(pixels)[0], expected)
    unsigned = error(runnable(static)(pixels)[0], expected)
    print(f"{observer}: {found:.3g} of the features, static {unsigned:.3g}")
    assert 0 < found < 0.1


def test_an_observers_range_counts_by_its_farther_end() -> None:
    values = torch.linspace(-3.0, 1.0, 100_001)
    scales = {}
    for observer in Observer:
        recipe = dataclasses.replace(SYMMETRIC, observer=observer, percentile=90.0)
        seen = around_zero(recipe).observer_or_fake_quant_ctr(
            dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_symmetric
        )
        seen(values)
        scale, zero_point = seen.calculate_qparams()
        assert zero_point.tolist() == [0]
        scales[observer] = float(scale) * 127
    assert scales[Observer.MINMAX] == pytest.approx(3.0, rel=1e-6)
    assert scales[Observer.PERCENTILE] == pytest.approx(2.8, rel=1e-3)  # 5 % below
    assert 2.9 < scales[Observer.HISTOGRAM] <= 3.0 + 1e-6


def test_zeros_need_no_range() -> None:
    graph = built()
    fc1 = graph.module.get_submodule("vision_tower.network.0.0.convffn.fc1")
    with torch.no_grad():
        fc1.get_parameter("weight").zero_()
        fc1.get_parameter("bias").zero_()
    program = quantize_vision(graph, SYMMETRIC, images(1))
    found = runnable(program)(images(1)[0])[0]
    assert error(found, graph.module(images(1)[0])) < 0.1


def test_layers_can_be_static_and_symmetric_side_by_side() -> None:
    recipe = dataclasses.replace(
        RECIPES["int8"], layers=(LayerRule(pattern="projector*", precision=SYMMETRIC.vision),)
    )
    graph = built()
    program = quantize_vision(graph, recipe, images())
    kinds = {(layer_name(n).startswith("projector"), n.args[0].args[5]) for n in layers(program)}
    assert kinds == {(True, torch.int8), (False, torch.uint8)}
    found = runnable(program)(images()[0])[0]
    assert 0 < error(found, graph.module(images()[0])) < 0.1


def quantized() -> Quantized:
    return halves.quantized(HALF)


def test_scales_around_float16_are_numbers_of_float16() -> None:
    program = quantized().programs["vision"]
    roundings = [n for n in program.graph.nodes if n.target in (QUANTIZE, DEQUANTIZE)]
    assert roundings
    for node in roundings:
        assert node.args[2:] == (0, -128, 127, torch.int8)
        assert float(torch.tensor(node.args[1]).half()) == node.args[1]
    values = {**program.constants, **program.state_dict}
    assert torch.int32 not in {value.dtype for value in values.values()}
    assert any(value.dtype is torch.float16 for value in values.values())


def test_features_around_float16_are_as_good_as_around_float32() -> None:
    """In the median of the images: integers that lie on a boundary fall either way."""
    model, spec = halves.small()
    graph = graphs.build(
        model, resolution=spec.preprocessing.resolution, context=64, image_token_id=1
    )["vision"]
    wide = halves.quantized(dataclasses.replace(HALF, float_format=Float.FP32))
    half, full = (
        statistics.median(
            error(runnable(q.programs["vision"])(pixels)[0], graph.module(pixels))
            for pixels in halves.shown()
        )
        for q in (quantized(), wide)
    )
    print(f"float16 {half:.3g}, float32 {full:.3g}")
    assert half < 1.5 * full


def test_without_roundings_the_program_is_its_weights_alone(
    both: tuple[Graph, ExportedProgram, ExportedProgram],
) -> None:
    """`exact` clamps to what calibration saw and rounds nothing: the float run's neighbour."""
    graph, program, _ = both
    only_weights = quantize_vision(graph, Recipe(name="w", vision=Precision(bits=8)), images())
    pixels = images()[0]
    found = runnable(program, exact=True)(pixels)[0]
    assert error(found, runnable(only_weights)(pixels)[0]) < 1e-4


def test_a_recipe_file_says_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "int8"\nobserver = "histogram"\n[vision]\nactivations = "symmetric"\n')
    recipe = recipe_file.read(path)
    assert recipe.vision == SYMMETRIC.vision
    assert recipe.ranged
    path.write_text(recipe_file.write(recipe))
    assert recipe_file.read(path) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
