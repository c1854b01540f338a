import sys

import pytest
import torch

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.reparameterize import reparameterize


def test_the_fold_changes_structure_but_no_number(tiny: FastVLM) -> None:
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    result = reparameterize(tiny)

    assert all(fold.difference <= fold.limit for fold in result.folds)
    assert result.difference <= 1e-5
    for resolution in (96, 224):
        pixels = torch.rand(2, 3, resolution, resolution)
        expected, got = tiny.encode_image(pixels), result.model.encode_image(pixels)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()

    left = [type(module).__name__ for module in result.model.vision_tower.modules()]
    assert "BatchNorm2d" not in left
    assert "Head" not in left
    names = list(result.model.vision_tower.state_dict())
    assert not [n for n in names if "rbr_" in n or "layer_scale" in n or "small_conv" in n]
    after = tiny.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_branch_is_counted(tiny: FastVLM) -> None:
    folds = {fold.block: fold for fold in reparameterize(tiny).folds}
    # mixer 3 -> 1, and x, mixer, norm -> 1; BatchNorms: 3 + norm's 1 + ConvFFN's 1.
    assert (folds["network.0.0"].branches, folds["network.0.0"].batch_norms) == (4, 5)
    assert folds["network.0.0"].layer_scales == 2
    assert folds["network.1"].branches == 2  # 7x7 with 3x3, 1x1 with identity
    assert folds["conv_exp"].branches == 1  # widths differ: no identity
    assert len(folds) == 3 + 7 + 4 + 2 + 1  # stem, blocks, downsamplings, encodings, conv_exp


def test_released_form_loses_its_batch_norms_and_layer_scales(tiny_released: FastVLM) -> None:
    result = reparameterize(tiny_released)
    assert sum(fold.branches for fold in result.folds) == 0
    assert sum(fold.batch_norms for fold in result.folds) == 7
    assert result.difference <= 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_statistic_is_refused(tiny: FastVLM, value: float) -> None:
    norm = tiny.vision_tower.get_submodule("network.2.1.convffn.conv.bn")
    norm.running_mean[3] = value
    with pytest.raises(ExportError, match=r"Reparameterization changes .*network\.2\.1"):
        reparameterize(tiny)


def test_a_wrong_fold_is_refused(tiny: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[reparameterize.__module__]

    def forgets_eps(bn: torch.nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
        scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + 0.01)
        return scale, bn.bias.double() - bn.running_mean.double() * scale

    monkeypatch.setattr(module, "_batch_norm", forgets_eps)
    with pytest.raises(ExportError, match="blocks, most of all"):
        reparameterize(tiny)
