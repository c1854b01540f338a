"""The image encoder as XNNPACK takes it: the same function in one delegate, the same integers."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from executorch.extension.pybindings import portable_lib
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastvlm_export.exporter import checkpoint, graphs, pipeline
from fastvlm_export.exporter.config import DecoderConfig, FastVLMConfig, fastvithd
from fastvlm_export.exporter.graphs import Graph
from fastvlm_export.exporter.model.fastvithd import LayerNormChannel
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.quantize import calibration
from fastvlm_export.quantize.ranges import lifted
from fastvlm_export.targets import (
    executorch_backends,
    executorch_file,
    executorch_lowering,
)
from fastvlm_export.targets.executorch_depthwise import LARGEST, pieces, split_depthwise
from fastvlm_export.targets.executorch_edit import EditedGraph
from fastvlm_export.targets.executorch_model import PROGRAM, VISION, Backend
from fastvlm_export.targets.executorch_static import float_bias
from fastvlm_export.targets.executorch_vision import channel_norm, vision_method
from fastvlm_export.targets.executorch_xnn import xnn_constant, xnn_graph

from ..conftest import randomize

ROUNDING = 1e-5  # of the largest feature


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest expected value."""
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def odd_graph(depths: tuple[int, ...], widths: tuple[int, ...], resolution: int) -> Graph:
    torch.manual_seed(resolution)
    tower = fastvithd(
        widths=widths, depths=depths, mlp_ratio=3, features=2 * widths[-1], se_width=6, head_width=0
    )
    decoder = DecoderConfig(
        vocab_size=8,
        hidden_size=20,
        intermediate_size=8,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=10,
        tied=True,
    )
    model = randomize(FastVLM(FastVLMConfig(tower=tower, decoder=decoder))).eval()
    model.requires_grad_(False)
    return graphs.build(
        reparameterize(model).model, resolution=resolution, context=8, image_token_id=0
    )["vision"]


@pytest.fixture(scope="module")
def odd() -> Graph:
    """Sides of maps (17, 9, 5, 3) and outputs per channel that are odd."""
    return odd_graph((1, 1, 1, 1, 1), (4, 8, 16, 32, 96), 136)


def bundled_graph() -> tuple[Graph, list[Tensor]]:
    """The trained model's vision graph, and images [1,3,R,R] for it."""
    found = checkpoint.bundled()
    spec = pipeline.contract(found, None, None)
    graph = graphs.build(
        reparameterize(found.model()).model,
        resolution=spec.preprocessing.resolution,
        context=spec.context,
        image_token_id=spec.image_token_id,
    )["vision"]
    return graph, calibration.pixels(calibration.load(None), spec.preprocessing)


def lower(method: ExportedProgram, path: Path) -> executorch_file.Method:
    """Write a program of this method alone, with what XNNPACK takes handed over."""
    partitioners = {VISION: executorch_backends.partitioners(Backend.XNNPACK, VISION)}
    path.write_bytes(executorch_lowering.lower({VISION: method}, partitioners, {}).pte)
    return executorch_file.read(path).methods[VISION]


def run(path: Path, pixels: Tensor) -> Tensor:
    module = portable_lib._load_for_executorch(str(path))
    [found] = module.run_method(VISION, [pixels])
    return found


def test_the_odd_encoder_is_one_delegate_and_the_same_function(odd: Graph, tmp_path: Path) -> None:
    method = lower(vision_method(graphs.export_program(odd)), tmp_path / "odd.pte")
    assert [d.backend for d in method.delegates] == ["XnnpackBackend"]
    assert method.kernels == ()
    pixels = torch.rand(1, 3, 136, 136)
    worst = difference(run(tmp_path / "odd.pte", pixels), odd.module(pixels))
    assert worst <= ROUNDING, worst


def test_integers_of_the_trained_model_arrive_as_they_are(
    executorch_int4: Path, int4_programs: Mapping[str, ExportedProgram]
) -> None:
    """Its tower has 8 bits under every recipe with integers."""
    program, path = int4_programs["vision"], executorch_int4 / PROGRAM
    method = executorch_file.read(path).methods[VISION]
    assert [d.backend for d in method.delegates] == ["XnnpackBackend"]
    assert method.kernels == ()

    expected = integers(program)
    assert expected
    assert stored_integers(method.delegates[0]) == expected

    graph, images = bundled_graph()
    lost, wrong = [], []
    for pixels in images:
        reference = program.module()(torch.cat((pixels, pixels)))[:1]
        lost.append(float((graph.module(pixels) - reference).norm()))
        wrong.append(float((run(path, pixels) - reference).norm()))
    # Floats that differ in their last bits fall to either side of an integer here and there: some
    # images are the same to the last bit, some are off by a part of what the integers cost.
    assert min(w / n for w, n in zip(wrong, lost, strict=True)) <= 1e-3, wrong
    assert sum(wrong) <= 0.5 * sum(lost), (wrong, lost)


def integers(program: ExportedProgram) -> Counter[tuple[str, bytes]]:
    """The program's int8 weights and int32 biases. Zero points are int64, and zero."""
    return Counter(
        (str(value.dtype), value.contiguous().numpy().tobytes())
        for value in lifted(program)
        if value.dtype in (torch.int8, torch.int32)
    )


def stored_integers(delegate: executorch_file.Delegate) -> Counter[tuple[str, bytes]]:
    graph = xnn_graph(delegate)
    kinds = {"xnn_datatype_qcint8": "torch.int8", "xnn_datatype_qcint32": "torch.int32"}
    found = Counter()
    for value in graph.xvalues:
        tensor = getattr(value.xvalue_union, "tensor_value", value.xvalue_union)
        if tensor.datatype.name in kinds and tensor.constant_buffer_idx:
            data = xnn_constant(delegate, graph, tensor.constant_buffer_idx)
            found[kinds[tensor.datatype.name], bytes(data)] += 1
    return found


@pytest.mark.parametrize(("depths", "resolution"), [((1, 3, 1, 1, 2), 72), ((2, 1, 1, 2, 1), 192)])
def test_other_depths_and_sides_are_the_same_function(
    depths: tuple[int, ...], resolution: int
) -> None:
    graph = odd_graph(depths, (8, 8, 32, 32, 64), resolution)
    pixels = torch.rand(1, 3, resolution, resolution)
    found = vision_method(graphs.export_program(graph)).module()(pixels)
    worst = difference(found, graph.module(pixels))
    assert worst <= ROUNDING, worst


def test_pieces_have_every_row_once_and_lie_around_the_middle() -> None:
    for height, width in [(7, 7), (9, 5), (11, 3), (9, 9), (27, 1)]:
        found = pieces(height, width)
        rows = [range(r.first, r.first + r.step * r.count, r.step) for r in found]
        assert sorted(row for part in rows for row in part) == list(range(height))
        for part in rows:
            assert len(part) * width <= LARGEST
            assert part[0] + part[-1] == height - 1
    assert len(pieces(5, 5)) == len(pieces(8, 8)) == len(pieces(13, 13)) == 1


@pytest.mark.parametrize(
    ("outputs", "kernel", "stride", "padding", "bias"),
    [(1, 7, 1, 3, True), (2, 7, 2, 3, True), (3, 3, 1, 1, False), (2, (9, 5), 2, (5, 1), True)],
)
def test_split_convolutions_are_the_same_function(
    outputs: int, kernel: int, stride: int, padding: int, bias: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3 * outputs, kernel, stride, padding, groups=3, bias=bias)
    x = torch.rand(1, 3, 15, 18)
    edited = EditedGraph(torch.export.export(conv, (x,), strict=False))
    split_depthwise(edited)
    assert all(node.target is not torch.ops.aten.conv2d.default for node in edited.graph.nodes)
    [found] = edited.module({})(x)
    worst = difference(found, conv(x))
    assert worst <= ROUNDING, worst


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5])
def test_the_plain_norm_is_the_safe_one(size: float) -> None:
    torch.manual_seed(0)
    norm = LayerNormChannel(48)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(1, 48, 5, 7) * size + size / 3
    mean = torch.full((1, 48, 1, 1), 1 / 48)
    scale, shift = (p.view(1, -1, 1, 1) for p in (norm.weight, norm.bias))
    worst = difference(channel_norm(x, mean, scale, shift), norm(x))
    assert worst <= ROUNDING, worst


def test_float_biases_are_rounded_to_the_integers_that_they_stand_for() -> None:
    torch.manual_seed(0)
    bias = torch.randint(-(2**22), 2**22, (200_000,), dtype=torch.int32)
    scale = torch.exp2(torch.rand(len(bias)) * 40 - 30)
    found = float_bias(bias, scale)
    zeros = torch.zeros(len(bias), dtype=torch.int64)
    limits = -(2**31), 2**31 - 1
    again = torch.ops.quantized_decomposed.quantize_per_channel(
        found, scale, zeros, 0, *limits, torch.int32
    )
    assert torch.equal(again, bias)
