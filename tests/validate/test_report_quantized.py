"""Quantization loss and export error in a report: shown apart, each with its own verdict."""

import re
from dataclasses import replace

import numpy as np

from fastvlm_export.validate import page, parity, terminal
from fastvlm_export.validate.report import Example

from .pages import Page, shown, strict, words
from .reports import (
    IMAGE,
    accuracy,
    full_report,
    parity_result,
    quantization_loss,
    quantized_report,
)


def test_export_error_and_quantization_loss_are_sections_of_their_own():
    report = quantized_report()
    assert report.passed
    text = words(report)
    assert "Quantization loss: quantized against original" in text
    assert "Export error: artifact against the quantized reference" in text
    told = shown(terminal.render(report))
    assert told.index("Quantization loss") < told.index(
        "Export error against the quantized reference"
    )
    assert "accuracy points lost" in told
    data = strict(report.to_json())
    assert data["quantization_loss"]["checks"][0]["limit"] == 0.5
    assert data["parity"]["limits"]["features_rms"] == 1e-4


def test_float32_has_no_quantization_sections():
    report = full_report()
    assert "Export error: artifact against PyTorch" in words(report)
    assert "uantization" not in words(report)
    assert "Quantization" not in shown(terminal.render(report))
    data = strict(report.to_json())
    assert data["quantization_loss"] is data["quantized"] is data["accuracy"]["original"] is None


def test_the_recipe_and_what_it_did_are_shown():
    text = words(quantized_report())
    for expected in (
        "4-bit weights in groups of 32, symmetric, rtn; dynamic 8-bit activations",
        "8-bit weights per channel, symmetric, rtn; static 8-bit activations",
        "decoder.layers.*.mlp.up_proj",
        "decoder.lm_head",
        "bundled images: flower.jpg",
        "3 decoder layers with integer weights",
        "3 operators stay in float32",
        "stage.3",
    ):
        assert expected in text
    data = strict(quantized_report().to_json())["quantized"]
    assert data["recipe"]["decoder"]["group_size"] == 32
    assert len(data["layers"]) == len(data["float32_operators"]["vision"]) == 3
    assert data["calibration"]["images"] == {"flower.jpg": "ab" * 32}


def test_too_much_loss_fails_though_the_export_is_exact():
    lossy = quantization_loss(lambda x: x * np.float32(-1))
    report = quantized_report(quantization=lossy)
    assert report.parity.passed
    assert not report.passed
    assert "Quantization loss beyond its limits: mean KL" in report.verdict
    assert "✗" in words(report)
    assert "✗ Failed" in shown(terminal.render(report))


def test_an_exact_recipe_does_not_excuse_the_export():
    broken = parity_result(lambda x: x * np.float32(1.001))
    report = quantized_report(parity=broken)
    assert report.quantization.passed
    assert not report.passed


def test_a_loss_that_is_no_number_fails_in_every_form():
    nan = quantization_loss(lambda x: x * np.float32("nan"))
    for limits in (nan.limits, None):
        report = quantized_report(quantization=replace(nan, limits=limits))
        assert not report.passed
        assert "values are NaN" in report.verdict
        assert "values are NaN" in words(report)
        assert "values are NaN" in shown(terminal.render(report))
        assert strict(report.to_json())["quantization_loss"]["mean_kl"] is None


def test_a_loss_that_was_not_measured_is_no_pass():
    report = quantized_report(quantization=None)
    assert not report.passed
    assert "What quantization costs was not measured." in report.verdict
    Page(report.to_html())


def test_a_recipe_without_limits_says_so():
    report = quantized_report(quantization=quantization_loss(limits=None))
    assert report.passed
    assert "Quantization loss without a limit: mean KL" in report.verdict
    assert "inf" not in report.verdict
    assert strict(report.to_json())["quantization_loss"]["checks"][0]["limit"] is None


def test_answers_have_three_sides_and_a_share_that_may_differ():
    few = accuracy(
        candidate_wrong=(3, 5), reference_wrong=(3,), original_wrong=(7,), limit=1.5 / 30
    )
    report = quantized_report(accuracy=few)
    assert report.passed
    assert "1 of 30 answers differ from quantized PyTorch's (limit 1.5)." in report.verdict
    head = next(line for line in shown(terminal.render(report)).splitlines() if "Question" in line)
    assert re.split(r"  +", head.strip()) == ["Question", "ONNX", "quantized PyTorch", "PyTorch"]
    cards = page.answers(few)
    assert [card.expected for card in cards[:3]] == ["5", "3", "7"]
    assert (cards[2].reference, cards[2].original) == ("7", "wrong")
    assert len({card.question for card in cards}) == 12
    assert "before quantization: wrong" in words(report)
    assert not replace(few, limit=0.9 / 30).check.passed


def test_no_answer_at_all_does_not_agree():
    nothing = replace(accuracy().candidate, samples=())
    empty = replace(accuracy(), candidate=nothing, reference=nothing, limit=1.0)
    assert not empty.check.passed


def test_ties_are_counted_and_the_first_are_listed():
    result = parity_result()
    tie = parity.Tie(
        case="digits-1.png",
        stage=parity.Stage.GREEDY,
        scope=parity.Scope.END_TO_END,
        position=1,
        reference_token=5,
        candidate_token=6,
        margin=1e-4,
        noise=2e-4,
    )
    measurements = [
        replace(m, numbers={"tokens": 1, "matching": 1, "ties": 3})
        if m.stage is parity.Stage.GREEDY
        else m
        for m in result.measurements
    ]
    result = replace(result, ties=(tie,) * 25, measurements=tuple(measurements))
    example = Example(image=IMAGE, name="digits-1.png", question="?", reference="7", candidate="1")
    text = words(full_report(parity=result, examples=(example,)))
    assert text.count("Tie on digits-1.png") == page.SHOWN_TIES
    assert "15 more ties are listed" in text
    assert "2 of 2" in text
    assert "6 ties left out" in text
    assert "3 ties within rounding; after each" in text
