"""`bench --stats`, `--kit` and `--device` as a user meets them; no program is run."""

import json
from pathlib import Path

import pytest

from ..validate import phones

LOGS = Path(__file__).parents[1] / "validate" / "runner_logs"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return phones.write_bundle(tmp_path_factory.mktemp("toy") / "bundle", b"a program")


def test_a_log_becomes_the_json_of_every_bench(run, bundle):
    log = LOGS / "fastvlm_runner.log"
    done = run("bench", bundle.path, "--stats", log, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    (subject,) = document["subjects"]
    assert subject["tokens_per_second"] > 0
    assert set(subject["parts"]) == {"encode", "prefill", "first_token"}
    assert "TTFT" in run("bench", bundle.path, "--stats", log).out


def test_a_kit_says_what_to_do_with_it(run, bundle, tmp_path):
    done = run("bench", bundle.path, "--kit", tmp_path / "kit")
    assert done.code == 0, done.err
    assert "--stats LOG" in done.out
    assert "model.pte" in done.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "adb://"], "--device needs a runner to push"),
        (["--device", "ios://", "--runner", "r"], "an iPhone runs no program of ours"),
        (["--stats", "log", "--against", "pytorch"], "--against"),
        (["--kit", "k", "--compute-units", "all"], "--compute-units"),
        (["--runner", "r"], "--runner: only for --device"),
        (["--stats", "nowhere.log"], "cannot be read"),
    ],
)
def test_what_cannot_be_is_one_error_with_the_next_step(run, bundle, options, message):
    done = run("bench", bundle.path, *options, "--json")
    assert done.code == 2
    error = json.loads(done.out)["error"]
    assert message in error["message"]
    assert error["hint"]
