"""Placement read from real programs: FLOPs against PyTorch's own counter, limits that break."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("executorch")

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastvlm_export.exporter.bundle import Bundle
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets.executorch_model import DECODER, EMBEDDING, PROGRAM, VISION
from fastvlm_export.validate import delegation_view
from fastvlm_export.validate.delegation import Delegation, delegation

LONGEST = 24


class Tower(nn.Module):
    """A strided, a grouped and a depthwise convolution, attention, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 1),
        )
        self.out = nn.Linear(16, 12)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.convs(pixels).reshape(1, 16, 64).transpose(1, 2)
        weights = torch.softmax(torch.bmm(tokens, tokens.transpose(1, 2)), -1)
        return cast("torch.Tensor", self.out(torch.bmm(weights, tokens)))


class Split(nn.Module):
    """Two linear layers with what XNNPACK doesn't take between them; the length is dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.second(torch.cumsum(self.first(embeds), 1)))


def product_flops(module: nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return int(counter.get_total_flops())


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {VISION: Tower(), EMBEDDING: nn.Embedding(20, 12), DECODER: Split()}
    return {name: module.eval().requires_grad_(False) for name, module in found.items()}


@pytest.fixture(scope="module")
def folder(modules: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One program for XNNPACK, and beside it the same one for no backend."""
    inputs: dict[str, tuple[torch.Tensor, ...]] = {
        VISION: (torch.rand(1, 3, 16, 16),),
        EMBEDDING: (torch.tensor([[3, 4]]),),
        DECODER: (torch.rand(1, 5, 12),),
    }
    dynamic = {DECODER: ({1: torch.export.Dim("S", min=1, max=LONGEST)},)}
    exported = {
        name: torch.export.export(
            module, inputs[name], dynamic_shapes=dynamic.get(name), strict=False
        )
        for name, module in modules.items()
    }
    out = tmp_path_factory.mktemp("programs")
    for backend, partitioner in (("xnnpack", [XnnpackPartitioner()]), ("portable", [])):
        lowered = to_edge_transform_and_lower(dict(exported), partitioner=partitioner)
        (out / backend).mkdir()
        (out / backend / PROGRAM).write_bytes(lowered.to_executorch().buffer)
    return out


def read(folder: Path, backend: str, claimed: str | None = None) -> Delegation:
    manifest = SimpleNamespace(
        artifact={"backend": claimed or backend}, files={PROGRAM: ""}, context=LONGEST
    )
    return delegation(Bundle(path=folder / backend, manifest=cast("Any", manifest)))


def products(found: Delegation, method: int) -> int:
    kinds = ("Conv2d", "DepthwiseConv2d", "FullyConnected", "BatchMatrixMultiply")
    return sum(one.flops for one in found.methods[method].inside if one.kind in kinds)


def test_a_whole_method_is_one_delegate_with_pytorchs_flops(
    folder: Path, modules: dict[str, nn.Module]
) -> None:
    vision = read(folder, "xnnpack").methods[0]
    assert vision.delegates == ("XnnpackBackend",)
    assert vision.passed
    assert vision.share_of_flops == 1.0
    wanted = product_flops(modules[VISION], torch.rand(1, 3, 16, 16))
    assert products(read(folder, "xnnpack"), 0) == wanted
    kinds = {one.kind: one for one in vision.inside}
    assert kinds["DepthwiseConv2d"].flops == 2 * 8 * 64 * 9
    assert kinds["Softmax"].flops == 64 * 64
    assert kinds["StaticReshape"].nodes >= 1
    assert kinds["StaticReshape"].flops == 0


def test_a_split_method_fails_and_names_what_splits_it(
    folder: Path, modules: dict[str, nn.Module]
) -> None:
    found = read(folder, "xnnpack")
    decoder = found.methods[2]
    assert decoder.delegates == ("XnnpackBackend",) * 2
    assert {one.kind for one in decoder.outside} >= {"aten::cumsum.out"}
    assert not decoder.passed
    assert not found.passed
    assert "text_decoder: delegates 2 (limit 1), split by aten::cumsum.out" in found.verdict
    # The length is not known: it is taken at its bound, inside and outside.
    wanted = product_flops(modules[DECODER], torch.rand(1, LONGEST, 12))
    assert products(found, 2) == wanted
    assert decoder.flops_outside == LONGEST * 12
    assert any("cumsum" in names for _, names in delegation_view.details(found))


def test_a_table_needs_no_backend(folder: Path) -> None:
    embedding = read(folder, "xnnpack").methods[1]
    assert embedding.delegates == ()
    assert embedding.checks == ()
    assert delegation_view.rows(read(folder, "xnnpack"))[1].passed is None


def test_without_a_backend_there_is_no_limit_and_the_same_work(
    folder: Path, modules: dict[str, nn.Module]
) -> None:
    found = read(folder, "portable")
    assert found.passed
    assert not found.limited
    assert "no limit" in found.verdict
    outside = {one.kind: one.flops for one in found.methods[0].outside}
    counted = sum(
        flops for kind, flops in outside.items() if any(one in kind for one in ("conv", "mm"))
    )
    assert counted == product_flops(modules[VISION], torch.rand(1, 3, 16, 16))


def test_a_program_that_hands_nothing_over_breaks_the_limits_of_its_backend(folder: Path) -> None:
    found = read(folder, "portable", claimed="xnnpack")
    assert not found.passed
    assert "vision_encoder: nothing is handed over to XnnpackBackend" in found.verdict
    vision = read(folder, "xnnpack").methods[0]
    assert not replace(vision, expected="CoreMLBackend").passed  # handed over to another one


def test_what_is_no_backend_and_no_program_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="names the backend 'qnn'"):
        read(folder, "xnnpack", claimed="qnn")
    with pytest.raises(ExportError, match="XnnpackBackend, the manifest's backend is portable"):
        read(folder, "xnnpack", claimed="portable")
    (tmp_path / "xnnpack").mkdir()
    (tmp_path / "xnnpack" / PROGRAM).write_bytes(b"no program")
    with pytest.raises(ExportError, match="not an ExecuTorch program"):
        read(tmp_path, "xnnpack")
