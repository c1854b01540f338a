import json
import os
import platform
import resource
import subprocess
import sys
import textwrap
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from tokenizers import Tokenizer, models

from fastvlm_export.exporter import checkpoint, memory, prompt
from fastvlm_export.exporter.bundle import SCHEMA, Manifest, Source
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy, preprocess
from fastvlm_export.targets import coreml_session
from fastvlm_export.targets.coreml_session import COMPUTE_UNITS
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.targets.generation import PromptInputs, generate
from fastvlm_export.validate import digits, latency, latency_process, latency_worker, machine
from fastvlm_export.validate.latency import Backend, Part, Plan, Subject, Timing

IMAGE_TOKEN_ID = 9
PROMPT = [1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 2]
QUICK = Plan(warmup=0, runs=3, least_runs=1, tokens=4, loads=0)

# A target that answers at once: the worker is the real one, its runtime is not.
RUNTIME = """
import sys, time, types
import numpy as np
from fastvlm_export import targets
from fastvlm_export.targets.base import Availability
from fastvlm_export.validate import latency_worker

class Session:
    def encode_image(self, pixels):
        assert pixels.shape == (1, 3, 32, 32), pixels.shape
        print("a library talks on stdout")
        {fault}
        return np.ones((1, 2, 4), np.float32)
    def embed(self, ids):
        assert ids.max() < 9
        return np.zeros((*ids.shape, 4), np.float32)
    def decode(self, embeds):
        self.length += embeds.shape[1]
        return np.eye(8, dtype=np.float32)[[3]]
    def reset(self):
        self.length = 0

def open_bundle(bundle):
    {load}
    return Session()

available = Availability(lower=True, run=True, versions={{"toy": "1.0"}})
targets.get = lambda name: types.SimpleNamespace(
    open=open_bundle, availability=lambda: available, RUNTIME_PACKAGES=()
)
latency_worker.main()
"""


def write_manifest(folder, **changes):
    values = {
        "schema": SCHEMA,
        "source": Source(name="toy", layout="random", sha256="0" * 64),
        "target": "toy",
        "recipe": {"name": "fp32"},
        "quantization": {},
        "resolution": 32,
        "context": 64,
        "image_tokens": 2,
        "preprocessing": Preprocessing(strategy=Strategy.PAD, resolution=32),
        "prompt_template": "qwen_2",
        "image_token": "<image>",
        "image_token_id": IMAGE_TOKEN_ID,
        "eos_token_ids": (0,),
        "model": {},
        "graphs": {},
        "versions": {},
        "files": {path.name: "" for path in folder.iterdir()},
    }
    (folder / "manifest.json").write_text(Manifest(**(values | changes)).to_json())


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(bytes(1000))
    Tokenizer(models.WordLevel({f"word{i}": i for i in range(9)}, "word0")).save(
        str(folder / "tokenizer.json")
    )
    write_manifest(folder)
    return folder


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """Make workers run RUNTIME with the given statements in it."""

    def install(*, fault="pass", load="pass"):
        text = textwrap.dedent(RUNTIME).format(fault=fault, load=load)
        (tmp_path / "toy_worker.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(latency_process, "WORKER", "toy_worker")

    return install


IMAGE = Image.new("RGB", (40, 30), "red")


def subject(bundle, name="toy"):
    return Subject(name=name, backend=Backend.BUNDLE, bundle=bundle)


def test_every_part_is_timed_as_often_as_asked(bundle, runtime):
    runtime()
    plan = Plan(warmup=1, runs=3, least_runs=1, tokens=4, loads=2)
    result = latency.measure([subject(bundle)], IMAGE, PROMPT, plan)
    ours = result.subjects[0]
    assert set(ours.parts) == set(Part)
    assert [timing.n for timing in ours.parts.values()] == [3] * len(Part)
    assert (ours.ttft.n, ours.decode.n) == (3, 3)
    assert (ours.load_cold.n, ours.load_warm.n) == (2, 2)
    assert result.prompt_tokens == 4


def test_the_parts_add_up_to_ttft(bundle, runtime):
    runtime(fault="time.sleep(0.05)")
    ours = latency.measure([subject(bundle)], IMAGE, PROMPT, QUICK).subjects[0]
    for run, total in enumerate(ours.ttft.seconds):
        parts = [ours.parts[part].seconds[run] for part in Part]
        assert sum(parts) == pytest.approx(total, abs=1e-6)
    assert ours.parts[Part.ENCODE].p50 >= 0.05


def test_the_first_token_is_turned_into_text(bundle, runtime):
    runtime()
    ours = latency.measure([subject(bundle)], IMAGE, PROMPT, QUICK).subjects[0]
    assert ours.first_text == "word3"
    assert ours.setting == "fp32; toy 1.0"
    assert ours.tokens_per_second == pytest.approx(4 / ours.decode.p50)


def test_peak_memory_is_the_workers_own(bundle, runtime):
    held = np.ones(10_000_000, np.float64)  # 80 MB that the worker must not be charged with
    runtime()
    small = latency.measure([subject(bundle)], IMAGE, PROMPT, QUICK).subjects[0]
    runtime(load="global kept; kept = np.ones(8_000_000)")
    large = latency.measure([subject(bundle)], IMAGE, PROMPT, QUICK).subjects[0]
    grown = large.peak_memory_bytes - small.peak_memory_bytes
    assert 50e6 < grown < 80e6
    assert small.peak_memory_bytes < machine.peak_memory()
    assert held.sum() == 10_000_000


def test_two_subjects_give_a_ratio_for_every_part(bundle, runtime):
    runtime()
    result = latency.measure([subject(bundle, "a"), subject(bundle, "b")], IMAGE, PROMPT, QUICK)
    ratios = result.ratios(result.subjects[1])
    assert set(ratios) == {*(part.value for part in Part), "ttft", "decode"}
    assert result.to_dict()["ratios"] == {"b": ratios}


def timing(*seconds):
    return Timing(seconds=seconds)


def test_ratios_are_medians_over_pairs_of_rounds():
    def one(name, seconds):
        return latency.SubjectResult(
            name=name,
            backend=Backend.BUNDLE,
            setting="",
            load_cold=None,
            load_warm=timing(seconds[0]),
            load_note="",
            parts={part: timing(*seconds) for part in Part},
            ttft=timing(*seconds),
            decode=timing(*seconds),
            tokens=8,
            first_text="",
            peak_memory_bytes=1,
        )

    # The second round was slow for both: the pairs still say 3.
    result = latency.LatencyResult(
        subjects=(one("ours", (1.0, 10.0, 1.0)), one("peer", (3.0, 30.0, 3.5))),
        machine=machine.describe(),
        threads=2,
        prompt_tokens=4,
        warmup=1,
    )
    ratios = result.ratios(result.subjects[1])
    assert ratios["ttft"] == 3.0
    assert ratios["load_warm"] == 3.0
    assert "load_cold" not in ratios


@pytest.fixture
def digits_bundle(tmp_path):
    """The bundled model's contract without its artifact."""
    model = checkpoint.bundled()
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(model.tokenizer.to_json(), "utf-8")
    write_manifest(
        folder,
        resolution=model.resolution,
        context=128,
        image_tokens=model.config.tower.image_tokens(model.resolution),
        preprocessing=model.preprocessing,
        image_token_id=model.image_token_id,
    )
    return folder


def test_pytorch_is_timed_on_the_same_contract(digits_bundle):
    model = checkpoint.bundled()
    scene = digits.held_out_scenes(1, seed=3)[0]
    tokens = model.config.tower.image_tokens(model.resolution)
    question = digits.QUESTIONS[digits.Kind.COLOUR]
    ids = prompt.prompt_ids(model.tokenizer, question, model.image_token_id, tokens)
    peer = Subject(
        name="pytorch", backend=Backend.PYTORCH, bundle=digits_bundle, checkpoint="bundled"
    )
    plan = Plan(warmup=0, runs=1, least_runs=1, tokens=1, loads=1)
    image = Image.fromarray(scene.pixels)
    found = latency.measure([peer], image, ids, plan).subjects[0]
    session = EagerSession(model.model(), 128)
    pixels = preprocess(image, model.preprocessing)
    inputs = PromptInputs(input_ids=ids, image_token_id=model.image_token_id, pixels=pixels)
    expected = generate(session, inputs, max_new_tokens=1, eos_token_ids=())
    assert found.first_text == model.tokenizer.decode(expected)
    assert "reparameterized" in found.setting
    assert (found.load_cold.n, found.load_warm.n) == (1, 1)
    assert "disk" in found.load_note or "cold" in found.load_note


def test_percentiles_are_of_all_runs():
    seconds = timing(*(float(i) for i in range(101)))
    assert (seconds.p50, seconds.p95, seconds.n) == (50.0, 95.0, 101)


def test_rounds_alternate_between_the_subjects(bundle, runtime):
    runtime()
    said = []
    plan = Plan(warmup=0, runs=2, least_runs=1, tokens=1, loads=0)
    latency.measure([subject(bundle, "a"), subject(bundle, "b")], IMAGE, PROMPT, plan, said.append)
    assert [line[0] for line in said if "run" in line] == ["a", "b", "a", "b"]


def test_time_runs_out_only_after_the_least_number_of_runs(bundle, runtime):
    runtime()
    plan = Plan(warmup=0, runs=50, least_runs=2, seconds=0.0, tokens=1, loads=0)
    assert latency.measure([subject(bundle)], IMAGE, PROMPT, plan).subjects[0].ttft.n == 2


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        ({"fault": "raise ValueError('no such kernel')"}, "ValueError: no such kernel"),
        ({"load": "import os; os.kill(os.getpid(), 9)"}, "killed by signal 9"),
        ({"load": "sys.exit(3)"}, "exit code 3"),
        (
            {
                "load": "from fastvlm_export.exporter.errors import ExportError; "
                "raise ExportError('no weights', 'make some')"
            },
            "toy: no weights",
        ),
    ],
)
def test_a_failing_worker_is_one_error_with_its_reason(bundle, runtime, statements, message):
    runtime(**statements)
    with pytest.raises(ExportError, match=message) as caught:
        latency.measure([subject(bundle)], IMAGE, PROMPT, QUICK)
    assert caught.value.hint


def test_no_worker_is_left_behind_by_a_failure(bundle, runtime, tmp_path):
    pids = tmp_path / "pids"
    runtime(
        load=f"import os; open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')",
        fault="raise ValueError",
    )
    with pytest.raises(ExportError):
        latency.measure([subject(bundle)], IMAGE, PROMPT, QUICK)
    started = [int(pid) for pid in pids.read_text().split()]
    assert started
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_plan_without_runs_is_refused():
    with pytest.raises(ExportError, match="at least one run"):
        Plan(runs=0)


def test_nothing_to_time_is_refused():
    with pytest.raises(ExportError, match="nothing to time"):
        latency.measure([], IMAGE, PROMPT, QUICK)


def test_a_cold_number_says_whether_the_disk_was_read():
    assert latency_worker._note(True, 1000, 1000).startswith("cold:")
    assert latency_worker._note(True, 1000, 0).startswith("perhaps not cold")
    assert latency_worker._note(False, 1000, 1000).startswith("not cold")


def test_a_system_that_cannot_drop_files_says_so(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert not latency_worker.drop_from_page_cache([tmp_path])


@pytest.fixture
def packages(bundle, monkeypatch, tmp_path):
    """A Core ML bundle's worker, and the compute units that sessions were opened with."""
    (bundle / "vision.mlpackage").mkdir()
    write_manifest(bundle, target="coreml", files={"weights.bin": ""})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    opened = []

    def open_session(bundle, *, compute_units=None):
        opened.append(compute_units)
        return object()

    monkeypatch.setattr(latency_worker, "open_session", open_session)

    def worker(units):
        subject = Subject(name="coreml", backend=Backend.BUNDLE, bundle=bundle, compute_units=units)
        image = bundle / "image.png"
        return latency_worker.Worker(latency._job(subject, image, PROMPT, QUICK, 1))

    return worker, opened


@pytest.mark.parametrize("units", ["cpu-and-ne", ""])
def test_a_cold_load_compiles_packages_anew_on_its_own_units_only(bundle, packages, units):
    worker, opened = packages
    package = bundle / "vision.mlpackage"
    kept = {one: coreml_session.compiled_folder(package, one) for one in COMPUTE_UNITS}
    for folder in kept.values():
        folder.mkdir(parents=True)
    warm = worker(units).load(cold=False, keep=False)
    assert all(folder.exists() for folder in kept.values())
    cold = worker(units).load(cold=True, keep=True)
    assert [one for one, folder in kept.items() if not folder.exists()] == [units or "all"]
    assert opened == [units or None] * 2
    assert cold["note"].startswith("cold: compiled anew")
    assert warm["note"] == ""
    assert warm["setting"].endswith(", compute units cpu-and-ne") == bool(units)


class NoProc:
    """A file system without /proc, as a Mac's."""

    def __init__(self, path):
        self.path = Path("/nowhere", path.lstrip("/"))

    def __getattr__(self, name):
        return getattr(self.path, name)


@pytest.fixture
def a_mac(monkeypatch):
    monkeypatch.setattr(machine, "Path", NoProc)
    monkeypatch.setattr(memory, "Path", NoProc)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(psutil.Process, "io_counters")


def test_a_mac_is_described_by_its_release_and_chip(a_mac, monkeypatch):
    said = types.SimpleNamespace(stdout="Apple M4\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    described = machine.describe()
    assert (described.system, described.cpu) == ("macOS 15.1 (arm64)", "Apple M4")
    assert described.cores >= 1


def test_a_mac_without_sysctl_is_described_all_the_same(a_mac, monkeypatch):
    def run(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", run)
    assert machine.describe().cpu == "arm"


def test_a_mac_has_neither_proc_nor_a_page_cache_to_drop(a_mac, tmp_path):
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert machine.peak_memory() >= usage  # bytes there, not kilobytes
    assert machine.peak_memory() < 1024 * usage
    assert not machine.reset_peak_memory()
    assert not latency_worker.drop_from_page_cache([tmp_path])
    assert latency_worker.bytes_read() == 0


def test_the_machine_is_described_in_json():
    described = machine.describe()
    assert json.loads(json.dumps(asdict(described)))["cores"] >= 1
    assert described.cpu
    assert {"numpy", "coremltools"} <= set(described.packages)


def test_the_onnx_session_and_the_worker_leave_pytorch_out():
    code = (
        "import fastvlm_export.targets.onnx_session, fastvlm_export.validate.latency_worker, sys; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
