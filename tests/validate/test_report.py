import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.validate import formats, page, plots, terminal
from fastvlm_export.validate.contract import Contract, Difference
from fastvlm_export.validate.report import Example, Export, File, Report, check_report

from .fakes import case, compare, tiny_session
from .pages import Page, shown, strict
from .reports import (
    IMAGE,
    accuracy,
    full_report,
    latency_result,
    parity_result,
    quantization_loss,
    record,
    subject,
)

HOSTILE = "<script>alert('x')</script>&\"{{ 7*7 }}[bold]"


@pytest.fixture(scope="module")
def report():
    return full_report()


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


def test_what_else_lies_beside_a_report_stays(report, tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    mine = {"remarks.txt": "mine", ".report.json.1234": "mine", "engines.json": "{}"}
    for name, text in mine.items():
        (folder / name).write_text(text)
    report.write(folder)
    assert {name: (folder / name).read_text() for name in mine} == mine
    assert len(list(folder.iterdir())) == len(mine) + 2


@pytest.mark.parametrize("odd", ["report", "report.json", "report.html"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "file"])
def test_what_no_report_wrote_is_not_replaced_by_one(report, tmp_path, odd, kind):
    folder, other = tmp_path / "report", tmp_path / "other"
    path = folder if odd == "report" else folder / odd
    path.parent.mkdir(exist_ok=True)
    if kind == "file" or (kind == "folder" and odd == "report"):
        if odd != "report":
            pytest.skip("an earlier report")
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
        (path / "mine").write_text("mine")
    else:
        if kind == "link":
            other.write_text("mine")
        path.symlink_to(other)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match=f"{path} cannot be replaced by a report"):
        report.write(folder)
    assert sorted(tmp_path.rglob("*")) == before
    assert not other.exists() or other.read_text() == "mine"


def test_a_report_that_cannot_be_written_is_one_error_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "report").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "report")
    with pytest.raises(ExportError, match="report is not writable") as caught:
        check_report(tmp_path / "report")
    assert "copy the bundle" in caught.value.hint


def test_a_report_that_could_not_be_finished_leaves_the_old_one(report, tmp_path, monkeypatch):
    report.write(tmp_path)
    before = (tmp_path / "report.json").read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ExportError, match="cannot be written: No space left"):
        report.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert (tmp_path / "report.json").read_text() == before


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
        "runtime": "ONNX Runtime",
        "recipes": ["fp32"],
        "versions": {},
        "remedy": remedy,
        "backends": [],
        "untested": [],
    }
    assert terminal.target_notes([row]) == [f"onnx: {remedy}"]
    assert "fp32" in shown(terminal.targets([row]))


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


def test_a_contract_that_is_broken_fails_the_report_and_is_shown_everywhere():
    right = Contract(files=("manifest.json", "config.json"), values=800, differences=())
    wrong = Difference(file="config.json", key="rope_theta", found="10000.0", wanted="1000000.0")
    passed = full_report(contract=right)
    assert passed.passed
    assert "800 values in 2 files" in shown(terminal.render(passed))
    broken = full_report(contract=replace(right, differences=(wrong,)))
    assert not broken.passed
    assert "config.json: rope_theta is 10000.0, not 1000000.0" in broken.verdict
    data = strict(broken.to_json())["contract"]
    assert data["passed"] is False
    assert data["differences"][0]["key"] == "rope_theta"
    assert "rope_theta is 10000.0" in shown(terminal.render(broken))
    for text in ("rope_theta", "10000.0", "1000000.0", 'id="contract"'):
        assert text in broken.to_html()
