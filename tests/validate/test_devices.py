"""A bench on a phone, the phone being a folder: only `adb` is ours; runner and shell are real."""

import importlib.util
import io
import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console

from fastvlm_export.exporter import phones as bench_phones
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.phones import PhoneRequest
from fastvlm_export.exporter.running import BenchResult
from fastvlm_export.exporter.tokenizer import read_tokenizer
from fastvlm_export.validate import adb, device_view, devices
from fastvlm_export.validate.latency import Part, Plan

from . import phones
from .reports import latency_result

ANDROID = Path(__file__).parents[2] / "examples" / "android"
LOGS = Path(__file__).parent / "runner_logs"
URL = f"{adb.SCHEME}{phones.SERIAL}"
PLAN = Plan(warmup=1, runs=2, tokens=5)


@pytest.fixture(scope="module")
def content():
    pytest.importorskip("executorch.exir")
    return phones.program()


@pytest.fixture(scope="module")
def bundle(content, tmp_path_factory):
    return phones.write_bundle(tmp_path_factory.mktemp("toy") / "bundle", content)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """examples/android, compiled for this machine against the wheel."""
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    package = importlib.util.find_spec("executorch")
    if package is None or not package.submodule_search_locations:
        pytest.skip("executorch is not installed")
    build = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={package.submodule_search_locations[0]}"
    for command in (
        ["cmake", "-S", ANDROID, "-B", build, prefix, "-DCMAKE_CXX_FLAGS=-Werror"],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "fastvlm_runner"


@pytest.fixture
def phone(tmp_path, monkeypatch):
    """A phone on adb: its root folder."""
    root = phones.plug_in(tmp_path / "phone", tmp_path / "path")
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=":")
    return root


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runners of a few lines of shell, which pass for programs of the phone's ABI."""
    monkeypatch.setattr(devices, "check_runner", lambda runner: "x86_64")

    def write(text):
        path = tmp_path / "runner.sh"
        path.write_text(f"#!/bin/sh\n{text}\n")
        return path

    return write


def shown(found):
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(device_view.render(found))
    return console.export_text()


def calls(phone):
    return (phone / "calls").read_text().splitlines()


def left_behind(phone):
    return sorted(path.name for path in (phone / "tmp").iterdir())


def test_the_compiled_runner_gives_the_tokens_of_pytorch_and_every_time(phone, bundle, runner):
    said = []
    found = devices.run_on(URL, bundle, runner, phones.sample(), PLAN, say=said.append)
    pixels, ids = _question(bundle, phone)
    expected = phones.eager(pixels, ids, PLAN.tokens)
    assert len(set(expected)) > 2, expected
    tokenizer = read_tokenizer(bundle.path)
    assert found.text == tokenizer.decode(expected)
    assert found.first_text == tokenizer.decode(expected[:1])
    assert list(found.parts) == [Part.ENCODE, Part.PREFILL, Part.FIRST_TOKEN]
    assert (found.ttft.n, found.tokens, found.prompt_tokens) == (2, 5, len(ids))
    assert found.peak_memory_bytes > 1e6
    assert found.load.p50 > 0
    assert left_behind(phone) == []
    assert [one.split(",")[0] for one in said if one.startswith("push")] == [
        "push pixels.f32",
        "push prompt.ids",
        "push model.pte",
        "push fastvlm_runner",
    ]


def _question(bundle, folder):
    devices.write_inputs(bundle, phones.sample(), PLAN, folder)
    pixels = np.fromfile(folder / devices.PIXELS, "<f4").reshape(1, 3, 8, 8)
    return pixels, [int(one) for one in (folder / devices.PROMPT).read_text().split()]


def test_its_json_has_the_keys_of_every_bench_and_the_phones_facts(phone, bundle, runner):
    found = devices.run_on("adb://", bundle, runner, phones.sample(), PLAN)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    usual = BenchResult(latency=latency_result()).to_dict()
    assert set(usual) <= set(document)
    assert set(usual["machine"]) == set(document["machine"])
    assert set(usual["subjects"][0]) == set(document["subjects"][0])
    assert document["machine"]["cpu"] == "Paper P1"
    assert document["machine"]["system"] == "Android 16"
    assert document["machine"]["cores"] == int(subprocess.check_output(["nproc"]))
    assert document["device"]["model"] == "Toys Phone 1"
    assert document["device"]["thermal_before"] == document["device"]["thermal_after"] == 0
    assert document["warmup"] == PLAN.warmup
    text = shown(found)
    for word in ("Toys Phone 1", "TTFT", "Encode image", "Decode, tokens/s", "done on the host"):
        assert word in text


def test_a_hot_phone_is_said_to_be_hot(phone, bundle, script):
    phones.say(phone, "dumpsys", "Thermal Status: 2")
    log = LOGS / "fastvlm_runner.log"
    plan = Plan(runs=3)
    found = devices.run_on(URL, bundle, script(f"cat {log}"), phones.sample(), plan)
    assert found.device.hot
    assert "hot and held back" in shown(found)


def test_a_kit_is_all_that_the_runner_needs_and_its_log_gives_the_same_json(
    bundle, runner, tmp_path
):
    kit = devices.write_kit(bundle, phones.sample(), PLAN, tmp_path / "kit")
    assert {path.name for path in kit.files} == {
        "pixels.f32",
        "prompt.ids",
        "question.json",
        "model.pte",
        "tokenizer.json",
    }
    arguments = devices._arguments(bundle, PLAN, None)
    done = subprocess.run([runner, *arguments], cwd=kit.folder, capture_output=True, check=True)
    (tmp_path / "log").write_bytes(done.stderr + done.stdout)
    found = devices.from_log(tmp_path / "log", bundle)
    pixels, ids = _question(bundle, tmp_path)
    expected = phones.eager(pixels, ids, PLAN.tokens)
    assert found.text == read_tokenizer(bundle.path).decode(expected)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["machine"] is None
    assert document["device"] is None
    assert document["warmup"] is None
    with pytest.raises(ExportError, match="is there already"):
        devices.write_kit(bundle, phones.sample(), PLAN, tmp_path / "kit")


@pytest.mark.parametrize(
    ("listed", "url", "message", "hint"),
    [
        ("", "adb://", "No Android device is ready; adb lists: none", "adb devices"),
        ("X\tunauthorized\n", "adb://", "The device X is there, but unauthorized", "allow USB"),
        ("X\toffline\n", "adb://X", "The device X is there, but offline", "adb reconnect"),
        ("X\tno permissions (user)\n", "adb://X", "but no permissions", "udev"),
        ("X\tdevice\n", "adb://Y", r"no device Y; it lists: X \(device\)", "adb devices"),
        ("X\tdevice\nY\tdevice\n", "adb://", "names none of 2 devices: X, Y", "adb://X"),
        ("X\toffline\nY\toffline\n", "adb://", "No Android device is ready", "adb devices"),
    ],
)
def test_a_phone_that_is_not_to_be_had(phone, bundle, script, listed, url, message, hint):
    (phone / "devices").write_text(listed)
    with pytest.raises(ExportError, match=message) as caught:
        devices.run_on(url, bundle, script("exit 0"), phones.sample(), PLAN)
    assert hint in caught.value.hint
    assert calls(phone) == ["devices"]


def test_without_adb_the_error_says_where_it_comes_from(bundle, script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match="needs adb, which is not on the PATH") as caught:
        devices.run_on(URL, bundle, script("exit 0"), phones.sample(), PLAN)
    assert "developer.android.com" in caught.value.hint


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("ios://phone", "--stats LOG"),
        ("ssh://phone", "adb://SERIAL"),
        ("emulator-5554", "adb://SERIAL"),
        ("", "adb://SERIAL"),
    ],
)
def test_other_kinds_of_devices_are_refused_with_what_there_is(bundle, url, hint):
    with pytest.raises(ExportError, match=f"--device {url}: ") as caught:
        devices.run_on(url, bundle, Path("runner"), phones.sample(), PLAN)
    assert hint in caught.value.hint


def elf(kind, machine):
    return b"\x7fELF" + bytes([kind]) + bytes(13) + machine.to_bytes(2, "little")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"#!/bin/sh\n" + b" " * 20, "is no program for Android"),
        (b"", "is no program for Android"),
        (elf(2, 243), r"does not run on \(ELF 243\)"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_runner_that_is_no_program_is_refused_before_anything_is_pushed(
    phone, bundle, tmp_path, head, message
):
    path = tmp_path / "runner"
    if head is not None:
        path.write_bytes(head)
    with pytest.raises(ExportError, match=message) as caught:
        devices.run_on(URL, bundle, path, phones.sample(), PLAN)
    assert "examples/android/README.md" in caught.value.hint
    assert not (phone / "calls").exists()


def test_a_runner_for_another_processor_is_refused_before_anything_is_pushed(
    phone, bundle, tmp_path
):
    (tmp_path / "runner").write_bytes(elf(2, 183))
    with pytest.raises(ExportError, match=r"is built for arm64-v8a; .* runs x86_64, x86"):
        devices.run_on(URL, bundle, tmp_path / "runner", phones.sample(), PLAN)
    assert not any("push" in one for one in calls(phone))


def test_bundles_that_a_phone_does_not_run_are_refused(bundle, content, tmp_path, script):
    for name, changes, message in (
        ("onnx", {"target": "onnx"}, "of target 'onnx'"),
        ("coreml", {"artifact": {"backend": "coreml"}}, "delegated to Core ML"),
        ("small", {"context": 100}, "more than the context's 100"),
    ):
        one = phones.write_bundle(tmp_path / name, content, **changes)
        with pytest.raises(ExportError, match=message):
            devices.run_on(URL, one, script("exit 0"), phones.sample(), PLAN) if name != (
                "small"
            ) else devices.write_kit(one, phones.sample(), PLAN, tmp_path / "kit")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("echo no such operator >&2; exit 2", "exit code 2: no such operator", "validate BUNDLE"),
        ("kill -9 $$", "signal SIGKILL: it said nothing", "--recipe int4"),
        ("kill -ILL $$", "signal SIGILL", "device's own"),
        (
            "echo 'CANNOT LINK EXECUTABLE: libc++_shared.so not found' >&2; exit 1",
            r"libc\+\+_shared.so not found",
            "c++_static",
        ),
        ("echo usage", "without a word about its runs: usage", "examples/android"),
        ("echo 'PyTorchObserver {\"prompt_tokens\":'", "report 1 is cut off", "examples/android"),
        (f"cat {LOGS / 'fastvlm_runner.log'}", "asked for 2 runs and told of 3", "examples"),
    ],
)
def test_a_runner_that_fails_is_one_error_and_leaves_nothing(
    phone, bundle, script, text, message, hint
):
    with pytest.raises(ExportError, match=message) as caught:
        devices.run_on(URL, bundle, script(text), phones.sample(), PLAN)
    assert hint in caught.value.hint
    assert left_behind(phone) == []


def test_a_runner_that_hangs_is_ended_on_the_phone(phone, bundle, script, tmp_path):
    pid = tmp_path / "pid"
    began = time.monotonic()
    with pytest.raises(ExportError, match="had not finished on emulator-5554 after 1 s"):
        devices.run_on(
            URL,
            bundle,
            script(f"echo $$ > {pid}; exec sleep 60"),
            phones.sample(),
            PLAN,
            timeout=1.0,
        )
    assert time.monotonic() - began < 20
    number = int(pid.read_text())
    gone = not psutil.pid_exists(number)
    assert gone or psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    assert left_behind(phone) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("full", "cannot be pushed .* No space left on device"),
        ("gone", "exit code 1: adb: device 'emulator-5554' not found"),
    ],
)
def test_a_phone_that_fails_halfway_is_one_error(phone, bundle, script, fault, message):
    (phone / "fault").write_text(fault)
    with pytest.raises(ExportError, match=message) as caught:
        devices.run_on(URL, bundle, script("exit 0"), phones.sample(), PLAN)
    assert caught.value.hint
    assert calls(phone)[-1] == f"-s {phones.SERIAL} shell rmdir {adb.REMOTE}"
    assert left_behind(phone) == []


def test_what_was_not_pushed_stays_on_the_phone(phone, bundle, script):
    """Before and after: a folder's name does not make its files ours."""
    mine = phone / "tmp" / Path(adb.REMOTE).name / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ExportError):
        devices.run_on(URL, bundle, script("exit 1"), phones.sample(), PLAN)
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]
    assert mine.read_text() == "mine"


def test_a_full_phone_is_found_out_before_anything_is_pushed(phone, bundle, script):
    phones.say(phone, "df", "Filesystem 1K-blocks Used Available Use% Mounted on\nx 9 9 1 99% /")
    with pytest.raises(ExportError, match="has 0 MB free; the bundle and the runner take"):
        devices.run_on(URL, bundle, script("exit 0"), phones.sample(), PLAN)
    assert not any("push" in one for one in calls(phone))


def test_a_phone_that_keeps_silent_about_itself_is_measured_all_the_same(phone, bundle, script):
    for name in phones.ANDROID:
        phones.say(phone, name, "")
    log = LOGS / "fastvlm_runner.log"
    found = devices.run_on(URL, bundle, script(f"cat {log}"), phones.sample(), Plan(runs=3))
    assert (found.device.model, found.device.soc, found.device.thermal_before) == ("", "", None)
    assert found.ttft.n == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": Path("r")}, "--runner: only for --device"),
        ({"threads": 2, "stats": Path("s")}, "--threads: only for --device"),
        ({"device": URL, "stats": Path("s")}, "--device and --stats exclude each other"),
        ({"kit": Path("k"), "stats": Path("s")}, "--stats and --kit exclude each other"),
        (
            {"device": URL, "elsewhere": ("--against", "--compute-units")},
            "--against and --compute-units: .* not with --device",
        ),
        ({"stats": Path("s"), "image": Path("i")}, "--image and --stats"),
        ({"device": "ios://"}, "an iPhone runs no program of ours from outside"),
        ({"device": URL}, "--device needs a runner to push"),
    ],
)
def test_options_that_contradict_each_other_are_an_error_before_any_file_is_read(options, message):
    request = PhoneRequest(bundle=Path("nowhere"), **options)
    assert request.asked
    with pytest.raises(ExportError, match=message) as caught:
        bench_phones.bench(request)
    assert caught.value.hint


def test_a_log_of_a_bench_is_read_by_the_command(bundle, tmp_path):
    request = PhoneRequest(bundle=bundle.path, stats=LOGS / "multimodal_runner.log")
    found = bench_phones.bench(request)
    assert found.prompt_tokens == 116
    assert found.text is None
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(ExportError, match="cannot be read"):
            bench_phones.bench(PhoneRequest(bundle=bundle.path, stats=missing))


def test_an_answer_ends_where_a_client_would_stop(content, tmp_path):
    found = [
        devices.from_log(
            LOGS / "fastvlm_runner.log",
            phones.write_bundle(tmp_path / str(end), content, eos_token_ids=(end,)),
        )
        for end in (190, 191)
    ]
    assert [len(one.text) for one in found] == [0, 17]
    assert found[0].first_text == found[1].first_text != ""


def test_a_log_of_prompts_without_the_bundles_image_is_refused(content, tmp_path):
    one = phones.write_bundle(tmp_path / "large", content, image_tokens=256)
    with pytest.raises(ExportError, match="116 tokens; this bundle's image alone takes 256"):
        devices.from_log(LOGS / "multimodal_runner.log", one)
