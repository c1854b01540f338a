import math
import re

import numpy as np
import pytest

from fastvlm_export.validate import metrics
from fastvlm_export.validate.checks import Check, missing


def test_a_value_at_its_limit_passes_and_one_above_does_not():
    assert Check(name="x", value=1e-4, limit=1e-4).passed
    assert not Check(name="x", value=1.01e-4, limit=1e-4).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails_whatever_the_limit(value):
    check = Check(name="x", value=value, limit=math.inf)
    assert not check.passed
    assert check.severity == math.inf


def test_a_missing_number_fails_and_says_why():
    check = missing("max relative", 1.0, "the output is missing")
    assert not check.passed
    assert str(check) == "max relative: the output is missing"


def test_a_check_prints_the_number_and_the_limit():
    assert str(Check(name="worst KL", value=0.5, limit=1e-5)) == "worst KL 0.5 > 1e-05"


def test_severity_orders_checks_of_different_scales():
    far = Check(name="a", value=3e-4, limit=1e-4)
    near = Check(name="b", value=5.0, limit=10.0)
    exact = Check(name="c", value=0.0, limit=0.0)
    assert far.severity > near.severity > exact.severity == 0.0


def test_metrics_on_numbers_known_by_hand():
    reference = np.array([[3.0, 4.0]], np.float32)
    assert metrics.max_abs(reference, reference + 1) == 1
    assert metrics.relative(reference, reference * 1.5) == 0.5
    assert metrics.relative_rms(reference, reference + 1) == pytest.approx(2**0.5 / 5)
    assert metrics.cosine_distance(reference, reference * 7) < 1e-15
    assert metrics.cosine_distance(reference, np.array([[-4.0, 3.0]])) == pytest.approx(1.0)
    assert metrics.psnr(reference, reference) == math.inf
    assert metrics.psnr(reference, reference + 0.04) == pytest.approx(40.0, abs=1e-4)


def test_kl_of_two_coins():
    fair, loaded = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert metrics.kl(fair, loaded + 100) == pytest.approx([expected])
    assert metrics.kl(fair, fair) == [0.0]


def test_a_zero_reference_matches_only_zero():
    zero = np.zeros((1, 3))
    assert metrics.relative(zero, zero) == 0
    assert metrics.relative(zero, zero + 1e-9) == math.inf
    assert metrics.relative_rms(zero, zero) == 0
    assert metrics.relative_rms(zero, zero + 1e-9) == math.inf


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (None, "missing"),
        (np.zeros((2, 3)), r"\[2, 3\]"),
        (np.array([[0.0, np.nan, np.inf]]), "2 of 3 values"),
    ],
)
def test_flaws_are_named(candidate, reason):
    assert re.search(reason, metrics.flaw(np.zeros((1, 3)), candidate))


def test_empty_or_broken_references_are_flaws_too():
    assert "nothing was compared" in metrics.flaw(np.zeros((0, 3)), np.zeros((0, 3)))
    assert "reference itself" in metrics.flaw(np.array([np.nan]), np.array([1.0]))
