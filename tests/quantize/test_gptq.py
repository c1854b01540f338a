import pytest
import torch
from torch import Tensor

from fastvlm_export.quantize.gptq import hessian, inverse_factor, quantize_columns
from fastvlm_export.quantize.recipes import Method, Precision
from fastvlm_export.quantize.rounding import Integers, by_rows, limits, quantize_rows

INT4 = Precision(bits=4, group_size=16, method=Method.GPTQ)
CASES = {
    "4 bit, groups of 16": INT4,
    "4 bit, groups of 48": Precision(bits=4, group_size=48, method=Method.GPTQ),
    "4 bit per channel": Precision(bits=4, method=Method.GPTQ),
    "4 bit, zero points": Precision(bits=4, group_size=16, symmetric=False, method=Method.GPTQ),
    "8 bit per channel": Precision(bits=8, method=Method.GPTQ),
}


def correlated(tokens: int, width: int) -> Tensor:
    """Inputs of which a few directions hold most of the power, as a trained model's."""
    torch.manual_seed(1)
    power = torch.arange(1, width + 1) ** -0.7
    return (torch.randn(tokens, width) * power) @ torch.linalg.qr(torch.randn(width, width))[0]


def lost(x: Tensor, weight: Tensor, integers: Integers) -> float:
    """|X (W - W_q)'| / |X W'| in float64."""
    difference = (weight - integers.dequantize()).double()
    return float((x.double() @ difference.T).norm() / (x.double() @ weight.double().T).norm())


def gptq(x: Tensor, weight: Tensor, precision: Precision) -> Integers:
    return quantize_columns(weight, inverse_factor(hessian([x], x.shape[1])), precision)


def test_the_hessian_is_that_of_all_tokens_of_all_sequences() -> None:
    parts = [torch.randn(1, 5, 12), torch.randn(2, 3, 12)]
    rows = torch.cat([part.reshape(-1, 12) for part in parts])
    torch.testing.assert_close(hessian(parts, 12), rows.T @ rows)


@pytest.mark.parametrize("tokens", [400, 20])
def test_the_factor_is_that_of_the_damped_inverse(tokens: int) -> None:
    h = hessian([correlated(tokens, 48)], 48)
    factor = inverse_factor(h).double()
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(48)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor.T @ factor @ damped, torch.eye(48).double(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("precision", CASES.values(), ids=CASES)
@pytest.mark.parametrize("width", [48, 240])
def test_the_output_is_closer_than_with_rounding_to_nearest(
    precision: Precision, width: int
) -> None:
    x = correlated(1000, width)
    weight = torch.randn(64, width)
    nearest = lost(x, weight, quantize_rows(weight, precision))
    ours = lost(x, weight, gptq(x, weight, precision))
    assert ours < 0.7 * nearest, f"{ours:.5f} against {nearest:.5f}"


def test_two_columns_by_hand() -> None:
    """The second column makes up for the first one's error, as far as the inputs are alike."""
    x = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    # The third column sets the scale and depends on nothing.
    weight = torch.tensor([[3.4, 2.4, 7.0], [-3.4, 0.0, 7.0], [3.4, 0.3, 7.0]])
    h = torch.zeros(3, 3)
    h[:2, :2] = x.T @ x
    h[2, 2] = 1.0
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(3)
    got = quantize_columns(weight, inverse_factor(h), Precision(bits=4))
    step = got.scale[:, 0]
    first = (weight[:, 0] / step).round()
    # Column 2 minimizes the quadratic form given column 1's error e: w2 + e h12 / h22.
    second = weight[:, 1] + (weight[:, 0] - first * step) * damped[0, 1] / damped[1, 1]
    assert torch.equal(got.weight[:, 0].float(), first)
    assert torch.equal(got.weight[:, 1].float(), (second / step).round())
    assert not torch.equal(second.div(step).round(), weight[:, 1].div(step).round())


def test_uncorrelated_inputs_leave_rounding_to_nearest() -> None:
    weight = torch.randn(8, 32)
    precision = Precision(bits=4, group_size=16, method=Method.HQQ)
    got = quantize_columns(weight, inverse_factor(torch.eye(32)), precision)
    expected = quantize_rows(weight, precision)
    assert torch.equal(got.weight, expected.weight)
    assert torch.equal(got.scale, expected.scale)


@pytest.mark.parametrize("x", [torch.zeros(4, 32), torch.eye(32)[:3] * 1e-8])
def test_inputs_of_nothing_still_give_good_weights(x: Tensor) -> None:
    weight = torch.randn(8, 32)
    got = gptq(x, weight, INT4)
    assert (weight - got.dequantize()).norm() < 0.12 * weight.norm()


@pytest.mark.parametrize("precision", CASES.values(), ids=CASES)
def test_integers_are_in_range_and_rows_do_not_mix(precision: Precision) -> None:
    x, weight = correlated(300, 96), torch.randn(40, 96) * 5
    factor = inverse_factor(hessian([x], 96))
    whole = quantize_columns(weight, factor, precision)
    low, high = limits(precision)
    assert low <= whole.weight.min() <= whole.weight.max() <= high
    part = quantize_columns(weight[10:20], factor, precision)
    assert (part.weight != whole.weight[10:20]).float().mean() < 0.01  # products of another size


def test_the_reported_error_is_that_of_the_output() -> None:
    x, weight = correlated(300, 96), torch.randn(40, 96)
    h = hessian([x], 96)
    factor = inverse_factor(h)
    integers, error = by_rows(weight, lambda rows: quantize_columns(rows, factor, INT4), h)
    assert error == pytest.approx(lost(x, weight, integers), rel=1e-3)
