"""The Android runner's options and methods, held against what the bench gives and reads."""

import re
from pathlib import Path
from types import SimpleNamespace

from fastvlm_export.targets.executorch_model import DECODER, EMBEDDING, PROGRAM, VISION, WEIGHTS
from fastvlm_export.validate import devices, runner_stats
from fastvlm_export.validate.latency import Plan

FOLDER = Path(__file__).parents[2] / "examples" / "android"
CODE = re.sub(r"//.*", "", (FOLDER / "fastvlm_runner.cpp").read_text("utf-8"))
README = (FOLDER / "README.md").read_text("utf-8")
OPTIONS = set(re.findall(r'name == "(--[\w-]+)"', CODE))


def test_the_bench_gives_options_that_the_runner_has():
    manifest = SimpleNamespace(image_token_id=9, files={PROGRAM: "", WEIGHTS: ""})
    words = devices._arguments(SimpleNamespace(manifest=manifest), Plan(), 4)
    assert set(words[::2]) == OPTIONS
    assert all(word for word in words[1::2])


def test_the_readme_lists_every_option():
    assert set(re.findall(r"^\| `(--[\w-]+)`", README, re.MULTILINE)) == OPTIONS


def test_it_calls_the_methods_of_the_bundle():
    assert set(re.findall(r'constexpr const char\* k\w+ = "(\w+)"', CODE)) >= {
        VISION,
        EMBEDDING,
        DECODER,
    }


def test_it_prints_what_the_bench_reads():
    printed = set(re.findall(r'number\("(\w+)"', CODE)) | set(re.findall(r'\\"(\w+)\\":', CODE))
    read = {"model_load_start_ms", "model_load_end_ms", "image_encode_end_ms", "prompt_eval_end_ms"}
    assert printed >= set(runner_stats.NEEDED) | read | {"peak_memory_bytes", "threads", "tokens"}
    assert runner_stats.MARK in CODE


def test_its_program_has_the_name_that_the_bench_pushes():
    build = (FOLDER / "CMakeLists.txt").read_text("utf-8")
    assert f"add_executable({devices.RUNNER} " in build
    assert f"build-android/{devices.RUNNER}" in README
    assert "Not run on a phone yet" in README
