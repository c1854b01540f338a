"""The iOS sample can't be compiled here: its file names, keys and calls are held against ours."""

import dataclasses
import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from fastvlm_export.exporter import prompt
from fastvlm_export.targets.executorch_model import PROGRAM
from fastvlm_export.validate import devices
from fastvlm_export.validate.latency import Plan

from ..validate import phones

QUESTION = "What is 2 + 2?"
FOLDER = Path(__file__).parents[2] / "examples" / "ios"
SOURCE = (FOLDER / "Sources" / "FastVLMBench" / "FastVLMBench.swift").read_text("utf-8")
CODE = re.sub(r"//.*", "", SOURCE)
README = (FOLDER / "README.md").read_text("utf-8")
PACKAGE = (FOLDER / "Package.swift").read_text("utf-8")


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """What `bench --kit` writes of a bundle whose program nobody runs."""
    bundle = phones.write_bundle(tmp_path_factory.mktemp("toy") / "bundle", b"a program")
    sample = dataclasses.replace(phones.sample(), question=QUESTION)
    return devices.write_kit(bundle, sample, Plan(tokens=9), tmp_path_factory.mktemp("out") / "kit")


def test_it_opens_the_files_that_a_kit_holds(kit):
    opened = set(re.findall(r'appendingPathComponent\("([\w.]+)"\)', CODE))
    assert opened <= {path.name for path in kit.files}
    assert opened >= {PROGRAM, devices.TOKENIZER, devices.PIXELS, devices.QUESTION}


def test_it_reads_every_key_of_the_question_by_its_type(kit):
    body = re.search(r"struct Question: Decodable \{(.*?)init", CODE, re.S).group(1)
    fields = dict(re.findall(r"let (\w+): (\w+)", body))
    question = json.loads((kit.folder / devices.QUESTION).read_text("utf-8"))
    assert set(fields) == set(question)
    types = {"String": str, "Int": int}
    assert all(isinstance(question[name], types[kind]) for name, kind in fields.items())


def test_the_question_is_the_prompt_that_bundles_are_proven_with(kit):
    question = json.loads((kit.folder / devices.QUESTION).read_text("utf-8"))
    asked = question["before"] + prompt.IMAGE_TOKEN + question["after"]
    assert asked == prompt.qwen_2_prompt(QUESTION)
    # The stock runner counts the token that prefill ends in among the new ones.
    assert question["maximumNewTokens"] == 10
    order = re.findall(r"MultimodalInput\((question\.\w+|Image)", CODE)
    assert order == ["question.before", "Image", "question.after"]


def test_the_pixels_have_the_size_that_it_asks_for(kit):
    assert "3 * side * side * MemoryLayout<Float>.size" in CODE
    assert (kit.folder / devices.PIXELS).stat().st_size == 3 * phones.RESOLUTION**2 * 4


def test_every_run_starts_anew_is_greedy_and_warm_ups_are_not_reported():
    loop = CODE[CODE.index("for number in") :]
    assert loop.index("runner.reset()") < loop.index("runner.generate(")
    for setting in ("$0.temperature = 0\n", "$0.isWarming = number < question.warmup"):
        assert setting in loop


def test_its_targets_are_folders_and_its_readme_tells_how_to_go_on():
    for name in re.findall(r'arget\(\s*name: "([\w-]+)"', PACKAGE):
        assert (FOLDER / "Sources" / name).is_dir(), name
    assert re.search(r"FastVLMBench\.run\(kit:", README)
    for option in ("--kit", "--stats"):
        assert f"bench fastvlm-bundle {option}" in README
    assert "Not compiled yet" in README


def test_it_is_of_the_executorch_that_exports():
    try:
        version = metadata.version("executorch")
    except metadata.PackageNotFoundError:
        pytest.skip("executorch is not installed")
    assert f'"swiftpm-{version}"' in PACKAGE
