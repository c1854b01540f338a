import copy
import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastvlm_export.exporter import checkpoint, graphs
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.graphs import Graph
from fastvlm_export.exporter.model.fastvithd import SqueezeExcite
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.quantize import calibration, recipes
from fastvlm_export.quantize.activations import integer_vision, quantize_vision
from fastvlm_export.quantize.observers import PercentileObserver
from fastvlm_export.quantize.ops import AFFINE
from fastvlm_export.quantize.recipes import Activations, LayerRule, Method, Observer, Precision
from fastvlm_export.quantize.vision_layers import LARGEST_BIAS, LARGEST_FLOAT_BIAS

from ..conftest import tiny_model

INT8 = recipes.get("int8")
RESOLUTION = 96
MAPS = (8, 24, 24)
"""What goes into the first block."""

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
DEQUANTIZE_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default
CONV, LINEAR = torch.ops.aten.conv2d.default, torch.ops.aten.linear.default
FC1 = "vision_tower.network.0.0.convffn.fc1"
FC2 = "vision_tower.network.0.0.convffn.fc2"


def vision(model: FastVLM, resolution: int = RESOLUTION) -> Graph:
    found = graphs.build(model, resolution=resolution, context=64, image_token_id=1)
    return found["vision"]


@pytest.fixture
def graph(tiny: FastVLM) -> Graph:
    return vision(reparameterize(tiny).model)


class FirstBlock(nn.Module):
    """Of the tower, the first block alone: its layers have the names that they have in there."""

    def __init__(self, model: FastVLM) -> None:
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.network = nn.Sequential(model.vision_tower.network[0][:1])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.vision_tower.network(x)
        return out


@pytest.fixture
def block(tiny: FastVLM) -> Graph:
    """Tracing the whole tower takes seconds."""
    return Graph(
        name="vision",
        module=FirstBlock(reparameterize(tiny).model).eval(),
        inputs={"pixel_values": torch.zeros(2, *MAPS)},
        outputs=("image_features",),
        dynamic={"pixel_values": {0: "batch_size"}},
    )


@pytest.fixture(scope="module")
def quantized() -> tuple[Graph, ExportedProgram]:
    """A graph and its integers, shared by the tests that change neither."""
    graph = vision(reparameterize(tiny_model()).model)
    return graph, quantize_vision(graph, INT8, images())


Again = tuple[dict[str, Tensor], list[str], ExportedProgram]


@pytest.fixture(scope="module")
def again(quantized: tuple[Graph, ExportedProgram]) -> Again:
    """The same once more: the graph's state before it, and what was said."""
    graph, _ = quantized
    before, lines = copy.deepcopy(graph.module.state_dict()), []
    return before, lines, quantize_vision(graph, INT8, images(), lines.append)


def images(
    count: int = 3, shape: tuple[int, int, int] = (3, RESOLUTION, RESOLUTION)
) -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.rand(1, *shape, generator=source) for _ in range(count)]


def matrix_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Dense 1x1 convolutions outside of squeeze-and-excite, and linear layers, by name."""
    excite = [name for name, part in module.named_modules() if isinstance(part, SqueezeExcite)]
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
        or (
            isinstance(part, nn.Conv2d)
            and part.kernel_size == (1, 1)
            and part.groups == 1
            and not name.startswith(tuple(excite))
        )
    }


def integer_layers(program: ExportedProgram) -> set[str]:
    return {
        name.removesuffix(".weight")
        for name, value in program.state_dict.items()
        if name.endswith(".weight") and value.dtype is torch.int8
    }


def counts(program: ExportedProgram) -> Counter[object]:
    return Counter(node.target for node in program.graph.nodes if node.op == "call_function")


def psnr(expected: Tensor, got: Tensor) -> float:
    error = (expected - got).square().mean()
    return float(10 * torch.log10(expected.abs().max() ** 2 / error))


def run(program: ExportedProgram, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = program.module()(pixels)
    return out


def vision_recipe(**changes: object) -> recipes.Recipe:
    return dataclasses.replace(INT8, vision=dataclasses.replace(INT8.vision, **changes))


def test_matrix_products_become_integers_and_nothing_else(
    quantized: tuple[Graph, ExportedProgram], again: Again
) -> None:
    graph, _ = quantized
    before, lines, program = again
    layers = matrix_layers(graph.module)
    convs = sum(isinstance(layer, nn.Conv2d) for layer in layers.values())
    linears = len(layers) - convs
    assert (convs, linears) == (19, 8)
    assert integer_layers(program) == layers.keys()
    found = counts(program)
    assert found[QUANTIZE] == found[DEQUANTIZE] == 2 * convs + linears
    assert found[DEQUANTIZE_WEIGHT] == 2 * convs + linears  # weights; biases of convolutions only
    assert not any("quantize_per_channel" in str(target).split(".") for target in found)
    assert lines == ["image 1 of 3", "image 2 of 3", "image 3 of 3"]
    after = graph.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_operator_reads_what_the_docstring_says(
    quantized: tuple[Graph, ExportedProgram],
) -> None:
    graph, program = quantized
    layers = matrix_layers(graph.module)
    for node in program.graph.nodes:
        if node.target not in (CONV, LINEAR):
            continue
        *_, (name, _) = node.meta["nn_module_stack"].values()
        inputs = [part.target for part in node.all_input_nodes]
        users = {user.target for user in node.users}
        if name not in layers:
            assert DEQUANTIZE_WEIGHT not in inputs, name
        elif node.target is CONV:
            assert inputs == [DEQUANTIZE, DEQUANTIZE_WEIGHT, DEQUANTIZE_WEIGHT], name
            assert users == {QUANTIZE}, name
        else:
            assert inputs[:2] == [DEQUANTIZE, DEQUANTIZE_WEIGHT], name
            assert DEQUANTIZE_WEIGHT not in inputs[2:], name
            assert QUANTIZE not in users, name


def test_integers_and_scales_are_those_computed_by_hand(
    quantized: tuple[Graph, ExportedProgram],
) -> None:
    graph, program = quantized
    state = program.state_dict
    checked = 0
    for name, layer in matrix_layers(graph.module).items():
        weight = layer.get_parameter("weight").detach().double().flatten(1).numpy()
        scale = np.abs(weight).max(1) / 127
        np.testing.assert_allclose(state[f"{name}.weight_scale"].numpy(), scale, rtol=1e-6)
        integers = state[f"{name}.weight"].flatten(1).numpy()
        np.testing.assert_array_equal(integers, np.rint(weight / scale[:, None]))
        assert not state[f"{name}.weight_zero_point"].any()
        checked += integers.size
    assert checked > 10_000

    (conv,) = (
        node
        for node in program.graph.nodes
        if node.target is CONV and [*node.meta["nn_module_stack"].values()][-1][0] == FC1
    )
    input_scale = np.float32(conv.args[0].args[1])
    bias_scale = state[f"{FC1}.bias_scale"].numpy()
    np.testing.assert_array_equal(bias_scale, input_scale * state[f"{FC1}.weight_scale"].numpy())
    bias = state[f"{FC1}.bias"]
    assert bias.dtype is torch.int32
    exact = graph.module.get_parameter(f"{FC1}.bias").detach().double().numpy()
    assert np.abs(bias.numpy() * bias_scale.astype(np.float64) - exact).max() <= bias_scale.max()


def test_any_batch_runs_and_images_do_not_mix(quantized: tuple[Graph, ExportedProgram]) -> None:
    graph, program = quantized
    together = torch.cat(images(5))
    whole = run(program, together)
    assert whole.shape[0] == 5
    one = torch.cat([run(program, image) for image in images(5)])
    assert psnr(whole, one) > 40
    assert psnr(graph.module(together).detach(), whole) > 25


def test_calibration_is_reproducible(
    quantized: tuple[Graph, ExportedProgram], again: Again
) -> None:
    _, program = quantized
    *_, other = again
    assert torch.equal(run(program, images()[0]), run(other, images()[0]))


def test_rules_keep_layers_in_float_or_store_only_their_weights(graph: Graph) -> None:
    weight_only = Precision(bits=4)
    recipe = dataclasses.replace(
        INT8,
        layers=(
            LayerRule(pattern="projector.*", precision=Precision()),
            LayerRule(pattern=FC1, precision=weight_only),
        ),
    )
    program = quantize_vision(graph, recipe, images(1))
    layers = {name for name in matrix_layers(graph.module) if not name.startswith("projector")}
    assert integer_layers(program) == layers
    assert program.state_dict[f"{FC1}.weight"].abs().max() == 7
    for name in (f"{FC1}.bias", "projector.0.weight"):
        assert program.state_dict[name].dtype is torch.float32
    found = counts(program)
    # FC1 loses its input, output and bias; the projector's two layers their inputs.
    assert found[QUANTIZE] == 2 * 19 + 8 - 2 - 2
    assert found[DEQUANTIZE_WEIGHT] == 2 * 19 + 8 - 1 - 2


def test_linear_layers_are_rounded_at_run_time_with_the_same_integers(
    quantized: tuple[Graph, ExportedProgram],
) -> None:
    """Convolutions stay what they are beside static linear layers, ranges and all."""
    graph, static = quantized
    affine = dataclasses.replace(INT8.vision, activations=Activations.AFFINE)
    program = quantize_vision(graph, dataclasses.replace(INT8, vision=affine), images())
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    linear = [node for node in nodes if str(node.target) == "fastvlm.quantized_linear.default"]
    names = [name for name, m in matrix_layers(graph.module).items() if isinstance(m, nn.Linear)]
    assert len(linear) == len(names) > 0
    assert LINEAR not in {node.target for node in nodes}
    assert all(node.args[3] is None and node.args[5:] == (8, AFFINE) for node in linear)
    theirs = {**static.state_dict, **static.constants}
    for key, value in {**program.state_dict, **program.constants}.items():
        layer = key.removesuffix(".scale")
        if layer in names:
            assert torch.equal(value, theirs[f"{layer}.weight_scale"][:, None]), key
        else:
            assert torch.equal(value, theirs[key]), key
    ranges, before = (
        [n.args[1:] for n in p.graph.nodes if n.target is QUANTIZE] for p in (program, static)
    )
    assert set(ranges) < set(before)


def test_weights_alone_need_no_images(graph: Graph) -> None:
    program = quantize_vision(graph, vision_recipe(activations=Activations.FLOAT), ())
    assert counts(program)[QUANTIZE] == 0
    assert integer_layers(program) == matrix_layers(graph.module).keys()
    assert psnr(graph.module(images()[0]).detach(), run(program, images()[0])) > 35


def test_a_recipe_that_leaves_vision_alone_changes_nothing(graph: Graph) -> None:
    program = quantize_vision(graph, recipes.get("fp32"), ())
    assert torch.equal(run(program, images()[0]), graph.module(images()[0]))


def test_impossible_precisions_are_one_error(block: Graph) -> None:
    recipe = vision_recipe(group_size=32, method=Method.GPTQ, symmetric=False, activation_bits=4)
    with pytest.raises(ExportError) as caught:
        quantize_vision(block, recipe, images(1, MAPS))
    for key in ("group_size", '"gptq"', "symmetric", "activation_bits = 4"):
        assert key in caught.value.message
    with pytest.raises(ExportError, match="dynamic"):
        quantize_vision(block, vision_recipe(activations=Activations.DYNAMIC), images(1, MAPS))
    with pytest.raises(ExportError, match="bits = 16"):
        quantize_vision(block, vision_recipe(bits=16), images(1, MAPS))


@pytest.mark.parametrize(
    ("observer", "value"),
    [
        (Observer.MINMAX, float("nan")),
        (Observer.HISTOGRAM, float("nan")),
        (Observer.PERCENTILE, float("inf")),
    ],
)
def test_values_that_are_not_finite_name_the_layer(
    block: Graph, observer: Observer, value: float
) -> None:
    with torch.no_grad():
        block.module.get_parameter(f"{FC1}.bias")[2] = value
    recipe = dataclasses.replace(INT8, observer=observer)
    with pytest.raises(ExportError, match=rf"at the output of {FC1}"):
        quantize_vision(block, recipe, images(1, MAPS))


@pytest.mark.parametrize("observer", Observer)
def test_an_activation_that_is_always_zero_keeps_the_layer_behind_it(
    block: Graph, observer: Observer
) -> None:
    with torch.no_grad():
        block.module.get_parameter(f"{FC1}.weight").zero_()
        block.module.get_parameter(f"{FC1}.bias").zero_()
        bias = block.module.get_parameter(f"{FC2}.bias").fill_(2.0).clone()
    program = quantize_vision(
        block, dataclasses.replace(INT8, observer=observer), images(shape=MAPS)
    )
    stored = program.state_dict[f"{FC2}.bias"] * program.state_dict[f"{FC2}.bias_scale"]
    torch.testing.assert_close(stored, bias, rtol=1e-6, atol=0)
    assert psnr(block.module(images(1, MAPS)[0]).detach(), run(program, images(1, MAPS)[0])) > 25


@pytest.mark.parametrize(
    ("activations", "largest"),
    [(Activations.STATIC, LARGEST_BIAS), (Activations.AFFINE, LARGEST_FLOAT_BIAS)],
)
def test_a_bias_far_above_its_weights_survives(
    block: Graph, activations: Activations, largest: int
) -> None:
    with torch.no_grad():
        weight = block.module.get_parameter(f"{FC1}.weight")
        weight[0] *= 1e-12
        weight[1] = 0
        bias = block.module.get_parameter(f"{FC1}.bias").fill_(3.0).clone()
    recipe = dataclasses.replace(
        INT8, vision=dataclasses.replace(INT8.vision, activations=activations)
    )
    program = quantize_vision(block, recipe, images(1, MAPS))
    integers = program.state_dict[f"{FC1}.bias"]
    assert integers.abs().max() <= largest * (1 + 1e-6)
    stored = integers * program.state_dict[f"{FC1}.bias_scale"]
    torch.testing.assert_close(stored[:2], bias[:2], rtol=1e-6, atol=0)
    torch.testing.assert_close(stored, bias, rtol=1e-4, atol=0)


def test_a_tensor_between_two_convolutions_is_rounded_once() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).eval().requires_grad_(False)
    graph = Graph(
        name="vision",
        module=module,
        inputs={"pixel_values": torch.zeros(2, 3, 8, 8)},
        outputs=("image_features",),
        dynamic={"pixel_values": {0: "batch_size"}},
    )
    recipe = dataclasses.replace(
        INT8, layers=(LayerRule(pattern="*", precision=INT8.vision),), decoder=Precision()
    )
    program = quantize_vision(graph, recipe, [torch.rand(1, 3, 8, 8)])
    assert integer_layers(program) == {"0", "1"}
    assert counts(program)[QUANTIZE] == 3


def test_percentiles_agree_with_numpy() -> None:
    torch.manual_seed(0)
    observer = PercentileObserver(99.9, dtype=torch.uint8, quant_min=0, quant_max=255)
    parts = [torch.randn(50_000) * size for size in (1.0, 1.5, 0.5)]
    parts[1][:20] = 40.0  # outliers, 0.013 %
    for part in parts:
        observer(part)
    low, high = np.percentile(torch.cat(parts).numpy(), [0.05, 99.95])
    scale, zero_point = observer.calculate_qparams()
    assert float(scale) * 255 == pytest.approx(high - low, rel=0.01)
    assert int(zero_point) == pytest.approx(-low / (high - low) * 255, abs=2)


def test_the_bundled_tower_keeps_its_features() -> None:
    bundled = checkpoint.bundled()
    model = reparameterize(bundled.model()).model
    graph = vision(model, bundled.resolution)
    pixels = calibration.pixels(calibration.load(None), bundled.preprocessing)[:6]
    canvases = torch.cat(pixels[:4])
    expected = graph.module(canvases)
    for observer in Observer:
        recipe = dataclasses.replace(INT8, observer=observer)
        with torch.no_grad():
            features = integer_vision(graph, recipe, pixels).module(canvases)
        found = [psnr(*pair) for pair in zip(expected, features, strict=True)]
        print(observer, [f"{value:.1f} dB" for value in found])
        assert min(found) > 30


def test_onnx_runtime_fuses_every_convolution(
    quantized: tuple[Graph, ExportedProgram], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    graph, program = quantized
    exported = torch.onnx.export(program, dynamo=True, opset_version=21, verbose=False)
    assert exported is not None
    exported.save(tmp_path / "vision.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.InferenceSession(tmp_path / "vision.onnx", options)

    layers = matrix_layers(graph.module).values()
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert found["QLinearConv"] == sum(isinstance(layer, nn.Conv2d) for layer in layers)
    pixels = images()[0]
    (got,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    expected = run(program, pixels)
    print(f"{psnr(expected, torch.from_numpy(got)):.1f} dB")
    assert psnr(expected, torch.from_numpy(got)) > 35


def test_torchao_is_imported_without_a_word() -> None:
    code = "import fastvlm_export.quantize.activations"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
