"""Random float modules in the interpreter and in ExecuTorch's runtime: the same numbers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("executorch", reason="needs executorch")

from executorch.extension.pybindings import portable_lib

from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.targets import executorch_lowering
from fastvlm_export.targets.executorch_file import parse
from fastvlm_export.targets.executorch_xnn import xnn_table
from fastvlm_export.validate.pte import Program

with quiet_import():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

ROUNDING = 2e-6  # of an output's largest number: both compute in float32
METHOD = "forward"


class Images(nn.Module):
    """What takes images [B,C,H,W], which XNNPACK lays out as [B,H,W,C]."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, bias=False)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=2, dilation=2, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1)
        self.slope = nn.PReLU(6, 0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            F.relu(self.plain(x)),
            self.grouped(x).clamp(-0.3, 0.4),
            self.depthwise(x),
            self.up(x),
            self.slope(x),
            F.max_pool2d(x, (3, 2), (2, 1), (1, 0)),
            F.avg_pool2d(x, 2, count_include_pad=False),
            x.mean((2, 3), keepdim=True),
            F.pad(x, (1, 2, 3, 0), value=0.7),
            torch.cat((x[:, 1:3, 2:5], x[:, 3:5, 1:4], x[:, :1, :3]), 1),
        )


class Numbers(nn.Module):
    """What takes numbers one by one, alone or in pairs."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        positive = x * x + 0.5
        return (
            *(x + y, x - y, x * y, y / positive, torch.minimum(x, y), torch.maximum(x, y)),
            *(torch.abs(x), -x, torch.ceil(x), torch.floor(x), torch.exp(x), torch.log(positive)),
            *(torch.sqrt(positive), torch.rsqrt(positive), torch.sin(x), torch.cos(x)),
            *(torch.tanh(x), torch.sigmoid(x), F.gelu(x), F.hardswish(x), F.elu(x, 0.7)),
            *(F.leaky_relu(x, 0.2), x.clamp(-0.5, 0.6), torch.pow(x, 2), F.relu(y - x)),
        )


class Rows(nn.Module):
    """Matrices, and axes that change places."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.matrix = nn.Parameter(torch.randn(6, 3))
        self.addend = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        scores = torch.softmax(torch.bmm(x, y.permute(0, 2, 1)), -1)
        return (
            self.linear(x),
            torch.addmm(self.addend, x.view(-1, 6), self.matrix),
            torch.mm(x.view(-1, 6), self.matrix),
            torch.bmm(scores, y),
            x.reshape(2, 2, 12).permute(2, 0, 1),
        )


KINDS = {
    Images: "Conv2d DepthwiseConv2d ConvTranspose2d PReLU MaxPooling2d AvgPooling2d "
    "GlobalAvgPooling2d StaticConstantPad StaticSlice Concatenate3 StaticTranspose",
    Numbers: "Add Subtract Multiply Div Minimum Maximum Abs Negate Ceiling Floor Exp Log "
    "SquareRoot ReciprocalSquareRoot Sin Cos Tanh Sigmoid Gelu Hardswish LeakyReLU Clamp "
    "Square",
    Rows: "FullyConnected BatchMatrixMultiply Softmax StaticReshape StaticTranspose",
}


def lowered(module: nn.Module, inputs: Sequence[Tensor], partitioners: Sequence[Any]) -> bytes:
    program = torch.export.export(module.eval().requires_grad_(False), tuple(inputs), strict=False)
    return executorch_lowering.lower({METHOD: program}, {METHOD: partitioners}, {}).pte


def difference(pte: bytes, inputs: Sequence[Tensor]) -> float:
    """The worst over the outputs, as a share of the runtime's largest number."""
    module = portable_lib._load_for_executorch_from_buffer(pte)
    expected = module.run_method(METHOD, list(inputs))
    found = Program(parse(memoryview(pte), "test")).run(METHOD, inputs)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
    return max(
        float((ours - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", [Images, Numbers, Rows])
def test_xnnpack_s_operators_are_the_runtime_s(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    shape = (2, 6, 9, 8) if kind is Images else (2, 4, 6)
    inputs = [torch.randn(shape) for _ in range(1 if kind is Images else 2)]
    pte = lowered(kind(), inputs, [XnnpackPartitioner()])
    nodes = {
        entry.xnode_union.kind.removeprefix("XNN")
        for delegate in parse(memoryview(pte), "test").methods[METHOD].delegates
        for entry in xnn_table(delegate).xnodes
    }
    assert nodes >= set(KINDS[kind].split()), sorted(nodes)
    worst = difference(pte, inputs)
    assert worst <= ROUNDING, worst


@pytest.mark.parametrize("kind", [Numbers, Rows])
def test_portable_operators_are_the_runtime_s(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 6) for _ in range(2)]
    pte = lowered(kind(), inputs, [])
    assert not parse(memoryview(pte), "test").methods[METHOD].delegates
    worst = difference(pte, inputs)
    assert worst <= ROUNDING, worst
