"""Reports of bundles that a reference interpreter ran: what they say of it, and a second gate."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fastvlm_export.validate import parity, terminal
from fastvlm_export.validate.formats import (
    NOISE,
    NOISE_OF_ALL,
    check_limit,
    check_name,
    check_value,
)
from fastvlm_export.validate.limits import FLOAT16
from fastvlm_export.validate.parity import Stage
from fastvlm_export.validate.quantized import EXACT
from fastvlm_export.validate.sessions import NOT_TIMED, Runtime
from fastvlm_export.validate.stored import NOT_COMPARED
from fastvlm_export.validate.stored_types import StoredFunction, StoredWeights

from .fakes import Altered, compare, tiny_session
from .pages import shown, strict, words
from .reports import core_ml_report, full_report, parity_result, quantized_report

NO_DEVICE = "numbers come from the MIL reference interpreter, not from a device"


def test_every_form_says_that_no_device_was_asked_and_how_to_ask_one():
    report = core_ml_report()
    assert report.passed
    assert NO_DEVICE in report.verdict
    assert words(report).count(NO_DEVICE) == 2  # in the verdict, and where the numbers are
    told = shown(terminal.render(report))
    assert NO_DEVICE in told
    for text in (words(report), told):
        assert NOT_TIMED in text
        assert "fastvlm-export bench BUNDLE" in text
    data = strict(report.to_json())
    assert data["runtime"] == {"name": "MIL reference interpreter", "device": False}
    assert data["latency"] is None
    assert data["latency_note"] == NOT_TIMED
    assert NO_DEVICE in data["verdict"]


def test_a_device_s_report_says_nothing_of_the_kind():
    for runtime in (Runtime(name="Core ML", device=True), None):
        report = quantized_report(runtime=runtime)
        assert "device" not in report.verdict
        assert "not measured here" not in words(report) + shown(terminal.render(report))


def test_both_comparisons_are_shown_and_told_apart():
    report = core_ml_report()
    assert "Without rounding, every stage agrees to float32's last bits; nearest:" in report.verdict
    assert EXACT in words(report)
    assert "Export error without rounding" in words(report)
    told = shown(terminal.render(report))
    assert told.index("Export error against the quantized") < told.index("Export error without")
    assert "Neither side rounds here" in told
    data = strict(report.to_json())
    assert data["exact_parity"]["passed"] is True
    assert data["exact_parity"]["limits"]["logits"] == 1e-4
    without = quantized_report()
    assert "without rounding" not in words(without).lower()
    assert strict(without.to_json())["exact_parity"] is None


@pytest.mark.parametrize(
    ("part", "stage"), [("image", "Image features"), ("decode", "First-token logits")]
)
def test_a_fault_in_the_second_comparison_fails_the_report_and_names_the_stage(part, stage):
    fault = compare(Altered(tiny_session(), **{part: lambda x: x * np.float32(1.001)}), steps=4)
    report = core_ml_report(exact=fault)
    assert report.parity.passed
    assert not report.passed
    assert f"Without rounding, the first stage to break: {stage}" in report.verdict
    assert f"First to break: {stage}." in words(report)
    told = shown(terminal.render(report))
    assert "✗ Failed" in told
    assert f"✗ {stage}" in told
    data = strict(report.to_json())
    assert data["passed"] is False
    assert data["exact_parity"]["first_broken"]


def test_answers_are_not_praised_where_the_second_comparison_fails():
    fault = parity_result(lambda x: x * np.float32(1.001))
    assert "answers are" in core_ml_report().verdict
    assert "answers are" not in core_ml_report(exact=fault).verdict


def noisy(psnr):
    """Image features with noise of that many dB below their peak."""

    def add(x):
        noise = np.random.default_rng(1).choice([-1.0, 1.0], x.shape)
        return (x + noise * np.abs(x).max() * 10 ** (-psnr / 20)).astype(np.float32)

    return Altered(tiny_session(), image=add)


@pytest.mark.parametrize(("psnr", "passed"), [(51, True), (49, False)])
def test_features_of_half_precision_need_a_psnr_of_50_db(psnr, passed):
    # The gate itself: what else such noise breaks is left open.
    open_ = replace(FLOAT16.statistics, features_rms=1.0, logits_rms=1.0, mean_kl=9.0, tokens=1.0)
    result = compare(noisy(psnr), limits=replace(FLOAT16, statistics=open_))
    found = {
        c.passed
        for m in result.measurements
        for c in m.checks
        if (m.stage, c.name) == (parity.Stage.IMAGE_FEATURES, NOISE_OF_ALL)
    }
    assert found == {passed}
    report = full_report(parity=result)
    for text in (words(report), shown(terminal.render(report))):
        assert "PSNR" in text
        assert f"{psnr} dB" in text
        assert "≥ 50 dB" in text
        assert NOISE not in text


def test_noise_is_known_as_psnr_and_other_checks_by_their_names():
    assert (check_name(NOISE), check_name("mean KL")) == ("PSNR", "mean KL")
    assert check_value(NOISE, 10**-2.5) == "50 dB"
    assert check_value(NOISE, 0.0) == "∞ dB"
    assert check_value(NOISE, float("nan")) == "none"
    assert check_value("mean KL", 1e-4) == check_limit("mean KL", 1e-4) == "1e-4"
    assert check_limit(NOISE, 1e-4) == "≥ 80 dB"


def stored_weights(**changes):
    one = StoredFunction(
        package="decoder.mlpackage",
        function="prefill",
        stage=Stage.FIRST_TOKEN,
        tensors=3,
        numbers=1234,
        missing=(),
    )
    return StoredWeights(functions=(replace(one, **changes),))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"missing": ("decoder.norm.weight", "a", "b")}, "decoder.norm.weight and 2 more"),
        ({"foreign": ("scaled (mul), y",)}, "has scaled (mul), y besides"),
        ({"tensors": 0}, "No stored weights were compared"),
    ],
)
def test_stored_weights_are_a_gate(changes, said) -> None:
    assert core_ml_report(stored=stored_weights()).passed
    report = core_ml_report(stored=stored_weights(**changes))
    assert not report.passed
    assert said in report.verdict
    assert json.loads(report.to_json())["stored_weights"]["passed"] is False
    for name in (*changes.get("missing", ()), *changes.get("foreign", ())):
        assert name in report.to_html()
    assert said in shown(terminal.render(report))


def test_weights_that_were_not_compared_are_said_to_be_so() -> None:
    report = core_ml_report(stored_note=NOT_COMPARED)
    assert "other instructions" in report.to_html()
    assert json.loads(report.to_json())["stored_note"] == NOT_COMPARED
