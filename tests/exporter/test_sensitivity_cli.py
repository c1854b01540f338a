"""`fastvlm-export sensitivity` as a user meets it, on the bundled model and two prompts."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from fastvlm_export.exporter import tuning
from fastvlm_export.exporter.checkpoint import BUNDLED_FOLDER
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.source import SourceRequest
from fastvlm_export.quantize import recipe_file
from fastvlm_export.quantize.recipes import EMBEDDING, HEAD
from fastvlm_export.targets import coreml
from fastvlm_export.validate.sensitivity import POSITIONS

from .commands import Run


def test_without_a_budget_it_prints_the_layers_and_writes_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("sensitivity", "--prompts", 2, "--recipe", "int8")
    assert done.code == 0, done.err
    assert f"under int8, {2 * POSITIONS} positions of 2 prompts" in done.out
    assert "vision_tower.patch_embed.2" in done.out
    assert "and 37 more layers" in done.out
    assert "Measure each layer alone" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_budget_writes_a_recipe_and_json_lists_every_layer(run: Run, tmp_path: Path) -> None:
    out, plot = tmp_path / "mixed.toml", tmp_path / "layers.html"
    arguments = ("sensitivity", "--prompts", 2, "--budget", "0.3%", "--out", out, "--plot", plot)
    done = run(*arguments, "--json", "--quiet")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    layers = found["layers"]
    assert len(layers) == 57
    assert {EMBEDDING, HEAD} < {layer["layer"] for layer in layers}
    assert [layer["loss"] for layer in layers] == sorted(
        (layer["loss"] for layer in layers), reverse=True
    )
    assert sum(layer["share"] for layer in layers) == pytest.approx(1)
    mixed = found["mixed"]
    assert mixed["measured"] <= 0.003 < found["together"]
    assert mixed["recipe_size"] < mixed["size"] < mixed["float_size"]
    recipe = recipe_file.find(str(out))
    assert recipe.name == mixed["name"] == "int4-0.3pct"
    assert {layer: recipe.precision(layer).bits for layer in mixed["upgraded"]} == mixed["upgraded"]
    assert "<svg" in plot.read_text("utf-8")
    # Neither file is overwritten unasked.
    again = run(*arguments)
    assert again.code == 2
    assert "mixed.toml exists" in again.err
    assert "layers.html exists" in again.err
    assert "--force" in again.err


@pytest.mark.parametrize("budget", ["abc", "-1%", "0.5", "nan%"])
def test_a_budget_that_is_none_is_one_error(run: Run, budget: str) -> None:
    done = run("sensitivity", f"--budget={budget}")
    assert done.code == 2
    assert f"--budget {budget} is neither a loss nor a size" in done.err
    assert "such as --budget 0.5%" in done.err


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (("--budget", "1%", "--out", "no/r.toml"), "there is no folder", "mkdir -p"),
        (("--budget", "1%", "--out", "r.txt"), "does not end in .toml", "Name a file"),
        (("--plot", "p.png"), "does not end in .svg or .html", "Name a file"),
        (("--out", "r.toml"), "without --budget", "--budget 400MB"),
        (("--recipe", "fp32"), "has no integer weights", "--recipe int4"),
        (("--recipe", "fp16"), "has no integer weights", "--recipe int4"),
        (("--recipe", "itn4"), "Did you mean 'int4'?", "TOML"),
        (("--calibration", "missing"), "no calibration folder", "--calibration"),
        (("--budget", "1MB"), "take 2.51 MB, more than --budget allows", "larger --budget"),
    ],
)
def test_bad_requests_are_one_error_each(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
    remedy: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("sensitivity", "--prompts", 1, "--quiet", *arguments)
    assert done.code == 2
    assert message in done.err
    assert remedy in done.err
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_is_said_at_once(run: Run) -> None:
    done = run("sensitivity", "--budget", "x", "--recipe", "y", "--plot", "z", "--json")
    assert done.code == 2
    error = json.loads(done.out)["error"]
    for part in ("--budget x", "'y'", "--plot z"):
        assert part in error["message"]


def test_a_mixed_recipe_that_onnx_cannot_express_is_refused_before_work(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    # The tied table would have to be stored twice.
    path.write_text('base = "int4"\nname = "own"\n[embedding]\nkeep = true\n', "utf-8")
    request = tuning.SensitivityRequest(
        source=SourceRequest(), recipe=str(path), budget="1%", out=tmp_path / "r.toml"
    )
    with pytest.raises(tuning.ExportError, match=r"embedding\.bits") as error:
        tuning.sensitivity(request)
    assert "leave out --budget" in error.value.hint
    # Misspelt layers are found before work, too, with a budget or without.
    path.write_text(
        'base = "int4"\nname = "own"\n[[layers]]\npattern = "decoder.layers.9.*"\nkeep = true\n'
    )
    with pytest.raises(tuning.ExportError, match="matches no layer"):
        tuning.sensitivity(dataclasses.replace(request, budget=None, out=None))


def test_lookup_tables_are_mixed_for_the_target_that_has_them(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "mixed.toml"
    arguments = ("sensitivity", "--recipe", "lut6", "--prompts", 1, "--budget", "0.5%")
    done = run(*arguments, "--out", out)
    assert done.code == 0, done.err
    mixed = recipe_file.find(str(out))
    assert mixed.palettized
    assert coreml.problems(mixed, None) == []


def test_force_replaces_a_file_and_nothing_else(run: Run, tmp_path: Path) -> None:
    """Known before any work: a link, whatever it points at, and a folder are none."""
    target, pipe = tmp_path / "target.toml", tmp_path / "pipe.toml"
    target.write_text("mine")
    for name, to in (("link.toml", target), ("loose.toml", tmp_path / "nothing")):
        (tmp_path / name).symlink_to(to)
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(pipe)
    kinds = {
        "link": "a link",
        "loose": "a link",
        "folder": "a folder",
        "pipe": "a device or a pipe",
    }
    for name, kind in kinds.items():
        done = run("sensitivity", "--budget", "1%", "--out", tmp_path / f"{name}.toml", "--force")
        assert done.code == 2
        assert f"is {kind}." in done.err.replace("\n", " ")
    assert target.read_text() == "mine"


def test_an_input_is_never_written_over(run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[weights]\nbits = 4\n")
    photos = tmp_path / "photos"
    shutil.copytree(BUNDLED_FOLDER.parent / "images", photos)
    linked = tmp_path / "linked"
    linked.symlink_to(photos)
    arguments = ("sensitivity", "--budget", "1%", "--force")
    for more, words in (
        (("--recipe", recipe, "--out", recipe), f"--out {recipe} is --recipe"),
        (("--calibration", photos, "--out", photos / "r.toml"), "lies in --calibration"),
        (("--calibration", linked, "--plot", photos / "p.svg"), "lies in --calibration"),
        (("--checkpoint", BUNDLED_FOLDER, "--out", BUNDLED_FOLDER / "r.toml"), "--checkpoint"),
    ):
        done = run(*arguments, *more)
        assert done.code == 2
        assert words in done.err
        assert "which is only read" in done.err
    assert recipe.read_text() == "[weights]\nbits = 4\n"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_appears_while_it_measures_is_left_alone(
    tmp_path: Path, kind: str, force: bool
) -> None:
    out, target = tmp_path / "r.toml", tmp_path / "target"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
    else:
        target.write_text("mine")
        out.symlink_to(target)
    if kind == "file" and force:
        tuning._write(out, "measured", "--out", force=True)
        assert out.read_text() == "measured"
        assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]
        return
    with pytest.raises(ExportError, match=r"appeared during the run.* is at .*r\.new\.toml"):
        tuning._write(out, "measured", "--out", force=force)
    assert (tmp_path / "r.new.toml").read_text() == "measured"
    assert out.is_dir() if kind == "folder" else out.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == (3 if kind == "link" else 2)
