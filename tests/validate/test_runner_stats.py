"""Reading what runners print. The logs are real ones: see runner_logs/README.md."""

import json
from pathlib import Path

import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.validate import device_latency
from fastvlm_export.validate.latency import Part
from fastvlm_export.validate.runner_stats import MARK, NEEDED, UNIT, parse

LOGS = Path(__file__).parent / "runner_logs"
REPORT = {
    "prompt_tokens": 6,
    "generated_tokens": 4,
    "model_load_start_ms": 100,
    "model_load_end_ms": 350,
    "inference_start_ms": 400,
    "inference_end_ms": 700,
    "prompt_eval_end_ms": 500,
    "first_token_ms": 500,
    "aggregate_sampling_time_ms": 1,
    UNIT: 1000,
}


def line(**changes):
    values = {key: value for key, value in (REPORT | changes).items() if value is not None}
    return f"{MARK} {json.dumps(values, separators=(',', ':'))}\n"


def log(name):
    return (LOGS / name).read_text("utf-8")


def test_the_stock_runners_log_gives_what_it_prints_as_text():
    text = log("multimodal_runner.log")
    stats = parse(text)
    said = [float(one) for one in _column(text, "Time to first generated token:")]
    assert [run.ttft for run in stats.runs] == pytest.approx(said)
    evaluated = [float(one) for one in _column(text, "Generated 16 tokens:")]
    assert [run.decode for run in stats.runs] == pytest.approx(evaluated)
    assert (stats.prompt_tokens, stats.generated_tokens) == (116, 16)
    first = stats.runs[0]
    assert first.load == pytest.approx(0.067)
    # It can't tell the parts apart, and says nothing about memory, threads or ids.
    assert (first.encode, first.prefill, first.first_token) == (None, None, None)
    assert (first.peak_memory_bytes, first.threads, first.tokens) == (None, None, ())


def _column(text, label):
    return [row.split(label)[1].split()[0] for row in text.splitlines() if label in row]


def test_our_runners_parts_add_up_to_its_ttft():
    stats = parse(log("fastvlm_runner.log"))
    assert len(stats.runs) == 3
    for run in stats.runs:
        assert run.encode > run.prefill > run.first_token >= 0
        assert run.encode + run.prefill + run.first_token == pytest.approx(run.ttft, abs=1e-9)
        assert len(run.tokens) == stats.generated_tokens + 1
        assert run.peak_memory_bytes > 80e6
        assert run.threads is None  # the wheel has no header to ask with


def test_both_runners_agree_on_one_program():
    stock, ours = parse(log("multimodal_runner.log")), parse(log("fastvlm_runner.log"))
    assert stock.prompt_tokens == ours.prompt_tokens
    assert stock.generated_tokens == ours.generated_tokens
    assert ours.runs[0].ttft == pytest.approx(stock.runs[0].ttft, rel=0.2)


def test_a_report_is_found_behind_generated_text_and_log_prefixes():
    noise = f"the {MARK} prints {{braces}}\n11-21 20:00:01.000 I/app: an answer {line()}{{"
    (run,) = parse(noise).runs
    assert run.ttft == pytest.approx(0.1)
    assert run.decode == pytest.approx(0.2)
    assert run.load == pytest.approx(0.25)


def test_the_unit_is_the_reports_own():
    (run,) = parse(line(**{UNIT: 1_000_000})).runs
    assert run.ttft == pytest.approx(1e-4)


def test_rates_that_json_cannot_say_do_not_spoil_a_report():
    text = line().replace(f"{MARK} {{", f'{MARK} {{"decode_token_per_sec":inf,"x":-nan,')
    assert len(parse(text).runs) == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"generated_tokens": 0}, "decode"),
        ({"inference_end_ms": 500}, "decode"),
        ({"model_load_start_ms": 0, "model_load_end_ms": 0}, "load_warm"),
        ({"model_load_start_ms": 350}, "load_warm"),
        ({"model_load_end_ms": None}, "load_warm"),
        ({"peak_memory_bytes": 0}, "peak_memory_bytes"),
    ],
)
def test_what_a_report_does_not_tell_is_none_and_named(changes, name):
    stats = parse(line(**changes))
    found = device_latency.result(stats, setting="", load_note="")
    assert name in found.not_measured
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    subject = document["subjects"][0]
    assert subject[name] is None
    assert (subject["tokens_per_second"] is None) == (name == "decode")
    assert subject["ttft"]["p50"] == pytest.approx(0.1)


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("value", [None, -1, 0.5, True, "6"])
def test_a_needed_number_that_is_none_is_named(name, value):
    with pytest.raises(ExportError, match=rf"report 2 says .* for {name}") as caught:
        parse(line() + line(**{name: value}))
    assert "examples/android/README.md" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no line with PyTorchObserver"),
        ("Segmentation fault\n", "there is no line with PyTorchObserver"),
        (line()[:-20], "report 1 is cut off"),
        (line() + line()[:40], "report 2 is cut off"),
        (line(first_token_ms=0), "report 1 has times out of order"),
        (line(inference_end_ms=450), "report 1 has times out of order"),
        (line(inference_start_ms=0), "report 1 has times out of order"),
        (line() + line(prompt_tokens=7), "its runs differ in prompt_tokens: 6, 7"),
        (line() + line(generated_tokens=5), "its runs differ in generated_tokens: 4, 5"),
        (line(**{UNIT: 0}), f"report 1 says 0 for {UNIT}"),
    ],
)
def test_output_that_is_no_measurement_is_refused(text, message):
    with pytest.raises(ExportError, match=message):
        parse(text)


def test_all_problems_are_said_at_once():
    with pytest.raises(ExportError) as caught:
        parse(line(prompt_tokens=None, first_token_ms=0) + line(inference_end_ms=1))
    assert len(caught.value.message.splitlines()) == 2


def test_ids_that_are_none_are_left_out():
    for tokens in ("7", [1, "2"], [1, -2], [2**40], [True]):
        assert parse(line(tokens=tokens)).runs[0].tokens == ()
    assert parse(line(tokens=[3, 1])).runs[0].tokens == (3, 1)


def test_our_runs_become_parts_of_the_same_names_as_every_bench():
    found = device_latency.result(parse(log("fastvlm_runner.log")), setting="x", load_note="y")
    assert list(found.parts) == [Part.ENCODE, Part.PREFILL, Part.FIRST_TOKEN]
    assert found.ttft.n == 3
    assert found.tokens_per_second == pytest.approx(16 / found.decode.p50)
    assert found.not_measured["preprocess"]
