import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from fastvlm_export.validate import formats, page, parity, plots, terminal
from fastvlm_export.validate.report import Example, Export, File, Report

from .fakes import case, compare, tiny_session
from .reports import (
    IMAGE,
    accuracy,
    full_report,
    latency_result,
    parity_result,
    quantization_loss,
    quantized_report,
    record,
    subject,
)

HOSTILE = "<script>alert('x')</script>&\"{{ 7*7 }}[bold]"


@pytest.fixture(scope="module")
def report():
    return full_report()


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


class Page(HTMLParser):
    """Tags, their attributes, and whether they nest."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def test_json_is_strict_and_versioned(report):
    data = strict(report.to_json())
    assert data["schema"] == 1
    assert data["passed"] is True
    assert data["latency"]["ratios"]["PyTorch eager"]["ttft"] == pytest.approx(3.1)
    assert data["export"]["files"][0]["bytes"] == 9_000_000
    assert data["reparameterization"]["folds"][4]["difference"] == pytest.approx(1e-6)
    assert len(data["accuracy"]["answers"]) == 30


def test_numbers_that_are_not_finite_become_null_in_json():
    def with_nan(x):
        return x * np.float32("nan")

    report = full_report(parity=parity_result(with_nan))
    data = strict(report.to_json())
    failed = [c for m in data["parity"]["measurements"] for c in m["checks"] if not c["passed"]]
    assert failed
    assert all(c["value"] is None and c["message"] for c in failed)
    assert "NaN" in failed[0]["message"]


def test_the_page_is_well_formed_and_needs_nothing_else(report):
    text = report.to_html()
    found = Page(text)
    for tag, attributes in found.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"https?://|@import|url\(", text)
    assert sum(tag == "img" for tag, _ in found.tags) == 13
    assert all(attributes.get("alt") for tag, attributes in found.tags if tag == "img")
    assert sum(tag == "svg" for tag, _ in found.tags) == 2


def test_the_page_names_verdict_numbers_and_files(report):
    text = " ".join(Page(report.to_html()).text)
    for expected in (
        "✓ Passed",
        "fastvlm-digits on ONNX",
        "PyTorch eager",
        "3.1x",
        "29 of 30; PyTorch 29",
        "8 of 8",
        "onnx/vision_encoder.onnx",
        "ab" * 32,
        "network.0.4",
        "lm_head.weight is a redundant copy",
    ):
        assert expected in text


def test_strings_from_outside_stay_text():
    report = full_report(
        source=HOSTILE,
        checkpoint={HOSTILE: HOSTILE},
        parity=compare(tiny_session(), cases=[case(HOSTILE)], steps=2),
        examples=(
            Example(
                image=IMAGE, name=HOSTILE, question=HOSTILE, reference=HOSTILE, candidate="other"
            ),
        ),
        latency=latency_result(subject(HOSTILE)),
        quantized=record(calibration_source=HOSTILE, calibration={HOSTILE: "0"}),
        quantization=quantization_loss(),
        export=Export(
            seconds={HOSTILE: 1.0},
            peak_memory_bytes=1,
            files=(File(path=HOSTILE, bytes=1, sha256="0"),),
        ),
    )
    found = Page(report.to_html())
    assert all(tag != "script" for tag, _ in found.tags)
    # Once each: source (title and heading), checkpoint (twice), calibration (twice), file, stage,
    # example, latency.
    assert "".join(found.text).count(HOSTILE) >= 11
    assert HOSTILE in shown(terminal.render(report))


def test_a_failed_gate_is_said_in_every_form():
    report = full_report(parity=parity_result(lambda x: x * np.float32(1.001)))
    assert not report.passed
    assert "First-token logits" in report.verdict
    assert "✗ Failed" in report.to_html()
    assert "First to break: First-token logits" in report.to_html()
    text = shown(terminal.render(report))
    assert "✗ Failed" in text
    assert "digits-1.png" in text


def test_an_answer_that_differs_fails_though_it_may_be_right():
    report = full_report(accuracy=accuracy(candidate_wrong=(), reference_wrong=(4,)))
    assert not report.passed
    assert "answers that differ" in report.verdict
    assert "PyTorch: wrong" in " ".join(Page(report.to_html()).text)


def words(report):
    return " ".join(Page(report.to_html()).text)


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


def test_float32_has_no_quantization_sections(report):
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
    assert "Quantization loss not limited by the recipe: mean KL" in report.verdict
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


def test_nothing_measured_is_not_a_pass():
    report = Report(source="x", target="onnx", recipe="fp32")
    assert not report.passed
    assert strict(report.to_json())["parity"] is None
    Page(report.to_html())
    assert "not measured" in shown(terminal.render(report))


def test_differing_answers_are_shown_first():
    shown_answers = page.answers(accuracy(candidate_wrong=(7, 9), reference_wrong=(9, 11)))
    assert [a.expected for a in shown_answers[:3]] == ["7", "11", "9"]
    assert len(shown_answers) == 12
    assert len({a.question for a in shown_answers}) == len(shown_answers)


def test_written_files_replace_earlier_ones_whole(report, tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.json").write_text("old")
    report.write(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    strict((folder / "report.json").read_text("utf-8"))


def shown(renderable):
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def test_the_latency_table_has_both_backends_and_the_ratio():
    text = shown(terminal.latency(latency_result(subject("PyTorch eager", 3.1))))
    line = next(line for line in text.splitlines() if "TTFT" in line)
    assert re.split(r"  +", line.strip()) == [
        "TTFT",
        "435 ms",
        "464 ms",
        "1.35 s",
        "1.44 s",
        "3.10x",
    ]
    assert "cold: 12.3 MB" in text


def test_remedies_keep_their_brackets():
    remedy = "pip install 'fastvlm-export[onnx]'"
    row = {
        "target": "onnx",
        "lower": False,
        "run": True,
        "recipes": ["fp32"],
        "versions": {},
        "remedy": remedy,
    }
    assert remedy in shown(terminal.targets([row]))


def test_facts_show_nested_values_one_a_line():
    text = shown(terminal.facts({"parameters": {"tower": 5, "head": 6}, "n": 1234567}, "DIR [x]"))
    assert "tower: 5" in text
    assert "1,234,567" in text
    assert "DIR [x]" in text


def test_the_bars_are_as_long_as_the_times():
    svg = plots.ttft(latency_result(subject("slow", 2.0)))
    widths = [
        float(width)
        for width in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="40"', svg)
    ]
    assert sum(widths[4:]) == pytest.approx(2 * sum(widths[:4]), rel=1e-3)


def test_a_missing_number_stands_beyond_every_limit():
    def nothing(x):
        return None

    svg = plots.parity(parity_result(nothing))
    assert "nan" not in svg.lower().replace("nanosecond", "")
    limits = [float(x) for x in re.findall(r'<line x1="([\d.]+)"[^>]*class="limit"', svg)]
    bad = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"[^>]*class="bad', svg)]
    assert bad
    assert max(limits) <= min(bad)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-4, "1e-4"), (9.774e-7, "9.77e-7"), (0.25, "0.25"), (300, "300")],
)
def test_numbers_are_short(value, text):
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.000432, "0.432 ms"), (0.0123, "12.3 ms"), (0.4351, "435 ms"), (7.891, "7.89 s")],
)
def test_durations_are_short(seconds, text):
    assert formats.duration(seconds) == text


def test_nested_values_are_one_line_each():
    value = {"sizes": [{"width": 8, "depth": 2}, {"width": 16, "depth": 1}], "ids": [1, 2], "n": 5}
    assert formats.lines(value) == [
        "sizes: width: 8, depth: 2",
        "sizes: width: 16, depth: 1",
        "ids: 1, 2",
        "n: 5",
    ]


def test_a_busy_machine_is_said():
    calm = latency_result()
    busy = replace(calm, machine=replace(calm.machine, load=3.5, cores=2))
    calm = replace(calm, machine=replace(calm.machine, load=0.1, cores=2))
    assert "The machine was busy: 3.5" in shown(terminal.latency(busy))
    assert "The machine was busy: 3.5" in full_report(latency=busy).to_html()
    assert "busy" not in shown(terminal.latency(calm))


def test_sizes_and_shares():
    assert [formats.size(n) for n in (812, 1_234_567, 2.5e9)] == ["812 B", "1.23 MB", "2.5 GB"]
    assert formats.share(2999, 3000) == "99.9 % (2999 of 3000)"
    assert formats.share(3, 3) == "100 % (3 of 3)"


def test_round_ticks():
    assert plots.ticks(1.35) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2])
