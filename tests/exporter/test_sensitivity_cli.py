"""`fastvlm-export sensitivity` as a user meets it, on the bundled model and two prompts."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastvlm_export.exporter import tuning
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
