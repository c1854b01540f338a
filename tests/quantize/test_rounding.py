import pytest
import torch
from torch import Tensor

from fastvlm_export.quantize import rounding
from fastvlm_export.quantize.gptq import hessian, inverse_factor, quantize_columns
from fastvlm_export.quantize.recipes import Method, Precision, ScaleFormat
from fastvlm_export.quantize.rounding import by_rows, quantize_rows

INT8 = Precision(bits=8)
INT4 = Precision(bits=4, group_size=4)
SHAPES = [(bits, group) for bits in (3, 4, 8) for group in (16, None)]


def test_8_bit_channels_by_hand() -> None:
    weight = torch.tensor([[12.7, -0.3, 6.35, 0.0], [-254.0, 1.0, 3.1, 253.0]])
    got = quantize_rows(weight, INT8)
    assert got.weight.tolist() == [
        [127, -3, 64, 0],
        [-127, 0, 2, 126],
    ]  # 63.5 and 0.5: half to even
    torch.testing.assert_close(got.scale, torch.tensor([[0.1], [2.0]]))
    assert got.zero_point is None
    assert (got.weight.dtype, got.scale.dtype) == (torch.int8, torch.float32)


def test_4_bit_groups_by_hand() -> None:
    """The side that needs the larger step decides: -8 or 7 of them."""
    weight = torch.tensor([[-16.0, 7.0, 3.2, 0.0, 1.4, -1.4, 0.5, 0.1]])
    got = quantize_rows(weight, INT4)
    torch.testing.assert_close(got.scale, torch.tensor([[2.0, 0.2]]))
    assert got.weight.tolist() == [[-8, 4, 2, 0, 7, -7, 2, 0]]


def test_zero_points_by_hand() -> None:
    weight = torch.tensor([[0.0, 15.0, 5.0, 7.4], [-15.0, 0.0, -5.0, -7.4]])
    got = quantize_rows(weight, Precision(bits=4, symmetric=False))
    assert got.zero_point is not None
    assert (got.zero_point.dtype, got.zero_point.tolist()) == (torch.int8, [[-8], [7]])
    assert got.weight.tolist() == [[-8, 7, -3, -1], [-8, 7, 2, 0]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), SHAPES)
@pytest.mark.parametrize("width", [48, 80])
def test_no_weight_moves_by_more_than_half_a_step(
    bits: int, group: int | None, symmetric: bool, width: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, width) * torch.logspace(-6, 3, 24)[:, None]
    got = quantize_rows(weight, Precision(bits=bits, group_size=group, symmetric=symmetric))
    steps = got.scale.repeat_interleave(width // got.scale.shape[1], dim=1)
    # A zero point is rounded, too: with it, the ends of the range may be cut by half a step more.
    worst = ((weight - got.dequantize()).abs() / steps).max()
    assert worst <= (0.5001 if symmetric else 1.0001), f"{worst} steps"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), SHAPES)
def test_hqq_is_never_worse_in_any_group(bits: int, group: int | None, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(torch.tensor(3.0)).sample((64, 96))
    errors = []
    for method in (Method.RTN, Method.HQQ):
        precision = Precision(bits=bits, group_size=group, symmetric=symmetric, method=method)
        difference = weight - quantize_rows(weight, precision).dequantize()
        errors.append(difference.reshape(64, -1, group or 96).square().sum(-1))
    assert (errors[1] <= errors[0] * 1.0001).all()
    assert errors[1].sum() < 0.995 * errors[0].sum()


def test_hqq_gains_most_where_a_tail_sets_the_scale() -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(torch.tensor(3.0)).sample((64, 512))
    nearest, searched = (
        by_rows(weight, lambda rows, p=precision: quantize_rows(rows, p))[1]
        for precision in (Precision(bits=4), Precision(bits=4, method=Method.HQQ))
    )
    assert searched < 0.85 * nearest, f"{searched} against {nearest}"


@pytest.mark.parametrize("method", [Method.RTN, Method.HQQ])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 1e30])
def test_groups_of_one_value(value: float, symmetric: bool, method: Method) -> None:
    weight = torch.full((2, 32), value)
    precision = Precision(bits=4, group_size=16, symmetric=symmetric, method=method)
    got = quantize_rows(weight, precision)
    assert got.scale.isfinite().all()
    assert (got.scale > 0).all()
    torch.testing.assert_close(got.dequantize(), weight, rtol=1e-5, atol=0)


def test_rows_in_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 64)

    def quantize(rows: Tensor) -> rounding.Integers:
        assert len(rows) <= 5
        return quantize_rows(rows, Precision(bits=4, group_size=32, symmetric=False))

    whole = quantize_rows(weight, Precision(bits=4, group_size=32, symmetric=False))
    monkeypatch.setattr(rounding, "CHUNK", 5 * 64)
    got, error = by_rows(weight, quantize)
    assert torch.equal(got.weight, whole.weight)
    assert torch.equal(got.scale, whole.scale)
    assert got.zero_point is not None
    assert whole.zero_point is not None
    assert torch.equal(got.zero_point, whole.zero_point)
    expected = (weight - whole.dequantize()).norm() / weight.norm()
    assert error == pytest.approx(float(expected), rel=1e-4)


def test_a_float_precision_has_no_integers() -> None:
    with pytest.raises(ValueError, match="no integers"):
        quantize_rows(torch.randn(2, 4), Precision())


@pytest.mark.parametrize("method", [Method.RTN, Method.HQQ, Method.GPTQ])
def test_integers_are_chosen_for_the_scales_that_are_stored(method: Method) -> None:
    """Beside bfloat16 scales, the nearest to each weight: none moves by more than half a step."""
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    precision = Precision(bits=4, group_size=32, method=method, scale_format=ScaleFormat.BF16)
    if method is Method.GPTQ:
        # Inputs that have nothing to do with each other: no column makes up for another.
        got = quantize_columns(weight, inverse_factor(hessian([torch.eye(64)], 64)), precision)
    else:
        got = quantize_rows(weight, precision)
    assert torch.equal(got.scale, got.scale.bfloat16().float())
    assert not torch.equal(got.scale, quantize_rows(weight, Precision(bits=4, group_size=32)).scale)
    nearest = (weight / got.scale.repeat_interleave(32, dim=1)).round().clamp(-8, 7)
    off = got.weight - nearest  # a weight halfway between two may go to either
    assert (off == 0).float().mean() > 0.999
