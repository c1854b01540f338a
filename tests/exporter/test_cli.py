"""The command line as a user meets it. One export of the bundled model serves most tests."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm_export.exporter import running
from fastvlm_export.exporter.bundle import files_of
from fastvlm_export.exporter.checkpoint import BUNDLED_FOLDER
from fastvlm_export.validate import proof
from fastvlm_export.validate.latency import LatencyResult, Plan

from .. import shared
from .commands import Run, bad, command

SAMPLE = BUNDLED_FOLDER.parent / "images" / "red-7786.png"


@pytest.fixture(scope="module")
def exported(onnx_fp32: Path) -> tuple[Path, dict[str, Any]]:
    """The bundle, and what the command printed."""
    return onnx_fp32, shared.said(onnx_fp32)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the proof is not the point: the export `exported` asked all, and was timed."""
    monkeypatch.setattr(proof, "QUESTIONS", 6)
    monkeypatch.setattr(proof, "STEPS", 8)
    monkeypatch.setattr(proof, "time_bundle", lambda *_: None)


@pytest.fixture
def bundle(exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[0], tmp_path / "bundle"))


def test_help_answers_without_torch() -> None:
    program = (
        "import sys; from fastvlm_export.exporter.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'onnx', 'numpy') if m in sys.modules])"
    )
    for arguments in (["--help"], ["bench", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
        )
        assert "Usage" in done.stdout
        assert done.stdout.strip().endswith("[]")


def test_the_export_says_all_it_found_as_json(exported: tuple[Path, dict[str, Any]]) -> None:
    out, said = exported
    assert said["passed"] is True
    (one,) = said["bundles"]
    assert one["path"] == str(out)
    report = one["report"]
    assert report["parity"]["passed"]
    assert report["latency"]["subjects"][0]["ttft"]["p50"] > 0
    right = report["accuracy"]["candidate"]
    assert right["total"] >= 300
    assert right["right"] >= 0.95 * right["total"]
    assert report == json.loads((out / "report" / "report.json").read_text())
    assert "<html" in (out / "report" / "report.html").read_text()


def test_nothing_of_this_machine_is_in_the_bundle(exported: tuple[Path, dict[str, Any]]) -> None:
    out, _ = exported
    for path in out.rglob("*"):
        if path.is_file() and "report" not in path.parts:
            content = path.read_bytes()
            assert str(Path.home()).encode() not in content
            assert str(BUNDLED_FOLDER.parent).encode() not in content
            assert str(out).encode() not in content


def test_the_same_export_gives_the_same_bytes(
    exported: tuple[Path, dict[str, Any]], tmp_path: Path, run: Run, few: None
) -> None:
    copy = shutil.copytree(BUNDLED_FOLDER, tmp_path / "some-name")
    before = files_of(copy)
    result = run("--checkpoint", copy, "--out", tmp_path / "again", "--runs", 1, "--quiet")
    assert result.code == 0
    assert files_of(tmp_path / "again") == files_of(exported[0])
    assert files_of(copy) == before  # the input was not written
    # The same files lie under another name, and are known again: accuracy is measured.
    report = json.loads((tmp_path / "again" / "report" / "report.json").read_text())
    assert report["accuracy"]["passed"]


def test_generate_reads_the_number(bundle: Path, run: Run) -> None:
    result = run("generate", bundle, "--image", SAMPLE, "--prompt", "Read the number.", "--json")
    assert result.code == 0
    assert json.loads(result.out)["text"] == "7786"
    sampled = run(
        "generate", bundle, "--image", SAMPLE, "--prompt", "Read the number.", "--temperature", 0.1
    )
    assert sampled.out == "7786\n"


def test_bench_against_pytorch_prints_a_ratio_for_each_part(
    bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each load would be a process of its own: the export has timed some.
    def time_bundle(bundle: Any, sample: Any, plan: Plan, *more: Any) -> LatencyResult:
        return proof.time_bundle(bundle, sample, replace(plan, warmup=0, loads=0), *more)

    monkeypatch.setattr(running, "time_bundle", time_bundle)
    result = run("bench", bundle, "--against", "pytorch", "--runs", 2, "--json")
    assert result.code == 0
    ratios = json.loads(result.out)["ratios"]["pytorch"]
    assert {"encode", "prefill", "ttft", "decode"} <= ratios.keys()
    assert all(value > 0 for value in ratios.values())


def test_validate_proves_a_bundle_again_with_the_users_image(
    bundle: Path, tmp_path: Path, run: Run, few: None
) -> None:
    picture = tmp_path / "wide.jpg"
    Image.effect_noise((300, 90), 80).convert("RGB").save(picture)
    result = run("validate", bundle, "--image", picture, "--json")
    assert result.code == 0
    report = json.loads(result.out)["bundles"][0]["report"]
    assert "wide.jpg" in {m["case"] for m in report["parity"]["measurements"]}


def test_a_bundle_of_other_weights_fails_the_gate(bundle: Path, run: Run, few: None) -> None:
    """One bias changed, and the manifest made to agree: hashes hold, numbers do not."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    path = bundle / "onnx" / "vision_encoder.onnx"
    model = onnx.load(path)
    bias = next(t for t in model.graph.initializer if len(t.dims) == 1 and t.dims[0] == 512)
    values = onnx.numpy_helper.to_array(bias).copy()
    values[0] += 1
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = files_of(bundle)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    result = run("validate", bundle, "--json")
    assert result.code == 1
    report = json.loads(result.out)["bundles"][0]["report"]
    assert report["parity"]["first_broken"] == "image_features"


def test_targets_and_inspect_speak_json(run: Run) -> None:
    rows = {row["target"]: row for row in json.loads(run("targets", "--json").out)}
    built_in = ["fp32", "fp16", "int8", "int4"]
    assert rows["onnx"]["recipes"] == built_in
    assert rows["onnx"]["runtime"] == "ONNX Runtime"
    assert rows["coreml"]["recipes"] == [*built_in, "lut4", "lut6"]
    if not rows["coreml"]["run"] and rows["coreml"]["lower"]:
        assert rows["coreml"]["runtime"] == "MIL reference interpreter"
    facts = json.loads(run("inspect", BUNDLED_FOLDER, "--json").out)
    assert (facts["tower_form"], facts["resolution"], facts["image_tokens"]) == ("train", 256, 16)
    assert facts["tied"] is True
    assert run("inspect", BUNDLED_FOLDER).code == 0
    assert "onnx" in run("targets").out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--target", "onxx"], "onnx"),
        (["--recipe", "fp23"], "fp32"),
        (["--checkpoint", "/does/not/exist"], "/does/not/exist"),
        (["--random", "fastvlm-9b"], "fastvlm-0.5b"),
        (["--checkpoint", "a", "--random", "fastvlm-0.5b"], "contradict"),
        (["--resolution", "63"], "64"),
        (["--context", "20"], "112"),
        (["--context", "99999"], "2048"),
        (["--image", "/no/such.png"], "such.png"),
        (["--layout", "apple-app"], "--layout apple-app"),
        (["--target", "coreml", "--layout", "mine"], "--layout mine"),
        (["--target", "coreml", "--deployment-target", "iOS9"], "--deployment-target iOS9"),
    ],
)
def test_a_wrong_request_is_one_clear_error(
    arguments: list[str], word: str, tmp_path: Path, run: Run
) -> None:
    bad(run(*arguments, "--out", tmp_path / "out", "--quiet"), word)
    assert not list(tmp_path.iterdir())


def test_everything_wrong_with_a_request_is_said_at_once(tmp_path: Path, run: Run) -> None:
    (tmp_path / "kept.txt").write_text("x")
    result = run(
        "--target", "tflite", "--recipe", "int3", "--image", "none.png", "--out", tmp_path, "-q"
    )
    bad(result, "tflite", "int3", "none.png", "not empty")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('base = "int4"\n[decoder]\ngroup_sise = 32', ["decoder.group_sise", "group_size"]),
        ('base = "int4"\n[decoder]\ngroup_size = -32', ["decoder.group_size", "-32"]),
        ('base = "int4"\n[decoder]\ngroup_size = 256', ["256", "128", "q_proj"]),
        ('base = "int4"\n[decoder]\ngroup_size = 48', ["decoder.group_size", "48", "onnx"]),
        ('base = "int8"\nfloat = "fp16"', ["fp16", "onnx"]),
        ('base = "int8"\n[head]\nbits = 4', ["head"]),
        ('base = "int4"\n[[layers]]\npattern = "decoder.layers.9.*"\nbits = 8', ["layers.9"]),
        ("[decoder\nbits = 4", ["mine.toml", "line 1"]),
    ],
    ids=["typo", "negative", "does not divide", "block", "half", "tied", "no layer", "not TOML"],
)
def test_a_wrong_recipe_is_one_error(tmp_path: Path, text: str, said: list[str], run: Run) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(text, "utf-8")
    bad(run("--recipe", recipe, "--out", tmp_path / "out", "--quiet"), *said)
    assert os.listdir(tmp_path) == ["mine.toml"]  # noqa: PTH208 - names are compared


def test_a_missing_calibration_folder_is_one_error(tmp_path: Path, run: Run) -> None:
    arguments = ("--recipe", "int8", "--out", tmp_path / "out", "--quiet")
    bad(run(*arguments, "--calibration", tmp_path / "photos"), "photos", "--calibration")
    assert not list(tmp_path.iterdir())


def test_a_damaged_recipe_in_a_manifest_is_refused(bundle: Path, run: Run) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["recipe"]["decoder"] = {"bits": "four"}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    bad(run("validate", bundle), "recipe")


def test_an_error_is_json_too(run: Run) -> None:
    result = run("--recipe", "fp23", "--json")
    assert result.code == 2
    said = json.loads(result.out)["error"]
    assert "fp23" in said["message"]
    assert said["hint"]


def test_an_existing_folder_needs_force(bundle: Path, run: Run) -> None:
    before = files_of(bundle)
    bad(run("--out", bundle, "--quiet"), "--force")
    assert files_of(bundle) == before


def test_options_before_a_subcommand_are_not_lost(bundle: Path, run: Run) -> None:
    bad(run("--resolution", 512, "validate", bundle), "resolution")


@pytest.mark.parametrize(
    "file", ["onnx/decoder_model_merged.onnx", "manifest.json", "tokenizer.json"]
)
def test_a_truncated_bundle_is_refused(bundle: Path, file: str, run: Run) -> None:
    content = (bundle / file).read_bytes()
    (bundle / file).write_bytes(content[: len(content) // 2])
    for name, more in (("validate", ()), ("bench", ()), ("generate", ("--prompt", "Hm?"))):
        bad(run(name, bundle, *more), file)


def test_a_truncated_graph_that_its_hash_vouches_for_is_refused(bundle: Path, run: Run) -> None:
    path = bundle / "onnx" / "vision_encoder.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = files_of(bundle)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    bad(run("generate", bundle, "--prompt", "Hm?"), "vision_encoder.onnx")


def test_validate_needs_the_checkpoint_that_it_was_made_from(
    bundle: Path, tmp_path: Path, run: Run, few: None
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["source"] |= {"layout": "apple", "name": "mine"}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    bad(run("validate", bundle), "--checkpoint")
    other = shutil.copytree(BUNDLED_FOLDER, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    bad(run("validate", bundle, "--checkpoint", other), "mine", "--checkpoint")
    assert run("validate", bundle, "--checkpoint", BUNDLED_FOLDER, "--quiet").code == 0


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("delay", [1.0, 6.0])
def test_an_interrupted_export_leaves_the_old_bundle(
    bundle: Path, signal_: signal.Signals, delay: float
) -> None:
    before = files_of(bundle)
    child = subprocess.Popen(
        command("--out", bundle, "--force", "--quiet"), stderr=subprocess.PIPE, text=True
    )
    time.sleep(delay)
    child.send_signal(signal_)
    _, err = child.communicate()
    if signal_ is not signal.SIGKILL and delay > 5:
        assert child.returncode == 128 + signal_
        assert "Traceback" not in err
        assert os.listdir(bundle.parent) == ["bundle"]  # noqa: PTH208 - names are compared
    assert files_of(bundle) == before
