"""What is checked of a request before work: each target's recipe and options, all at once."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_export import targets
from fastvlm_export.exporter import checkpoint as checkpoints
from fastvlm_export.exporter import requests
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.requests import ExportRequest
from fastvlm_export.exporter.samples import samples
from fastvlm_export.exporter.source import SourceRequest, contract
from fastvlm_export.exporter.spec import ExportSpec
from fastvlm_export.quantize.recipes import RECIPES, Float, Recipe
from fastvlm_export.targets.base import DEFAULTS, Availability, Options
from fastvlm_export.validate import sessions


class Target:
    """Takes the options that it lists, computes integers beside float16 if told, refuses a name."""

    RUNTIME_PACKAGES = ()

    def __init__(
        self,
        name: str,
        *,
        takes: Mapping[str, tuple[str, ...]] | None = None,
        half: bool = False,
        refuses: str = "",
        run: bool = True,
    ) -> None:
        self.name, self.takes, self.half = name, takes or {}, half
        self.refuses, self.run = refuses, run

    def availability(self) -> Availability:
        return Availability(lower=True, run=self.run, versions={}, remedy=f"install {self.name}")

    def adapt(self, recipe: Recipe, options: Options = DEFAULTS) -> Recipe:
        return replace(recipe, float_format=Float.FP16) if self.half else recipe

    def option_problems(self, options: Options) -> list[str]:
        given = {"layout": options.layout, "deployment_target": options.deployment_target}
        return [
            f"{key} {value}: '{self.name}' has no such choice"
            for key, value in given.items()
            if value and value not in self.takes.get(key, ())
        ]

    def contract_problems(self, spec: ExportSpec, options: Options = DEFAULTS) -> list[str]:
        return [f"'{self.name}' runs nothing"] if options.layout == "own" else []

    def problems(
        self,
        recipe: Recipe,
        layers: Mapping[str, int] | None,
        *,
        tied: bool = False,
        options: Options = DEFAULTS,
    ) -> list[str]:
        if recipe.name != self.refuses:
            return []
        return [f"'{self.name}' has no {recipe.float_format} {recipe.name}"]


PLAIN = Target("plain")
APPLE = Target(
    "apple", takes={"layout": ("app", "own"), "deployment_target": ("iOS18",)}, half=True
)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(*chosen: Target, **values: object) -> requests.Checked:
        found = {target.name: target for target in chosen}
        monkeypatch.setattr(targets, "get", found.__getitem__)
        monkeypatch.setattr(sessions, "SIMULATED", ("apple",))
        request = ExportRequest(
            source=SourceRequest(), out=tmp_path / "out", targets=tuple(found), **values
        )
        return requests.check(request)

    return run


def test_a_recipe_is_adapted_for_each_target_and_equal_ones_are_one_group(check) -> None:
    found = check(PLAIN, APPLE, Target("other"), recipe="int4")
    assert {one.name: one.recipe.float_format for one in found.chosen} == {
        "plain": "fp32",
        "apple": "fp16",
        "other": "fp32",
    }
    names = [[one.name for one in group] for group in found.groups.values()]
    assert names == [["plain", "other"], ["apple"]]
    assert list(found.groups) == [RECIPES["int4"], APPLE.adapt(RECIPES["int4"])]


def test_calibration_is_there_where_any_adapted_recipe_needs_it(check) -> None:
    assert check(PLAIN, recipe="fp32").calibration is None
    assert check(PLAIN, APPLE, recipe="fp32").calibration is not None


def test_problems_are_those_of_the_adapted_recipes(check) -> None:
    picky = [Target("one", refuses="int8"), Target("two", refuses="int8", half=True)]
    with pytest.raises(ExportError) as caught:
        check(PLAIN, *picky, recipe="int8")
    assert caught.value.message.splitlines() == [
        "'one' has no fp32 int8",
        "'two' has no fp16 int8",
    ]


def test_an_option_goes_to_those_who_take_it(check) -> None:
    options = Options(layout="app", deployment_target="iOS18")
    found = {one.name: one.options for one in check(PLAIN, APPLE, options=options).chosen}
    assert found == {"plain": DEFAULTS, "apple": options}
    assert check(PLAIN).chosen[0].options == DEFAULTS


def test_an_option_that_no_target_takes_is_one_error_of_all(check) -> None:
    with pytest.raises(ExportError) as caught:
        check(PLAIN, APPLE, options=Options(layout="app", deployment_target="iOS3"))
    assert caught.value.message.splitlines() == [
        "deployment_target iOS3: 'plain' has no such choice",
        "deployment_target iOS3: 'apple' has no such choice",
    ]
    with pytest.raises(ExportError, match="layout none") as caught:
        check(PLAIN, recipe="int3", options=Options(layout="none"))
    assert "int3" in caught.value.message


def test_options_that_exclude_each_other_are_an_error(check) -> None:
    class Either(Target):
        def option_problems(self, options: Options) -> list[str]:
            both = options.layout and options.deployment_target
            return ["layout and deployment target at once"] if both else []

    with pytest.raises(ExportError, match="at once"):
        check(Either("either"), options=Options(layout="app", deployment_target="iOS18"))


def test_a_target_that_an_interpreter_runs_can_be_proven(check) -> None:
    away = Target("apple", run=False)
    assert check(away).chosen[0].name == "apple"
    with pytest.raises(ExportError, match="'nowhere' can't be used here") as caught:
        check(Target("nowhere", run=False))
    assert caught.value.hint == "install nowhere"


def test_a_model_that_a_client_cannot_run_is_refused_by_its_contract(check) -> None:
    spec = contract(checkpoints.bundled(), None, None)
    requests.check_contract(check(PLAIN), spec)
    with pytest.raises(ExportError, match="'apple' runs nothing"):
        requests.check_contract(check(PLAIN, APPLE, options=Options(layout="own")), spec)


def test_a_context_without_room_for_the_proofs_prompts_is_refused_before_work() -> None:
    images = samples(())
    checkpoint = checkpoints.bundled()
    spec = contract(checkpoint, None, None)
    requests.check_prompts(spec, images)
    with pytest.raises(ExportError, match="the context has 20") as caught:
        requests.check_prompts(replace(spec, context=20), images)
    enough = int(caught.value.hint.split()[2])
    requests.check_prompts(replace(spec, context=enough), images)
    with pytest.raises(ExportError):
        requests.check_prompts(replace(spec, context=enough - 1), images)


def test_an_output_must_be_apart_from_all_that_is_read(tmp_path: Path) -> None:
    """Each input is named, and nothing else is said: everything else is in order."""
    photos, recipe = tmp_path / "out" / "photos", tmp_path / "out" / "mine.toml"
    shutil.copytree(checkpoints.BUNDLED_FOLDER, tmp_path / "out" / "ck")
    shutil.copytree(checkpoints.BUNDLED_FOLDER.parent / "images", photos)
    recipe.write_text('base = "int8"\n')
    request = ExportRequest(
        source=SourceRequest(checkpoint=tmp_path / "out" / "ck"),
        out=tmp_path / "out",
        recipe=str(recipe),
        calibration=photos,
        images=(photos / "red-7786.png",),
        force=True,
    )
    with pytest.raises(ExportError) as caught:
        requests.check(request)
    for name in ("--checkpoint", "--recipe", "--calibration", "--image (no. 1)"):
        assert f"--out {tmp_path / 'out'} holds {name}" in caught.value.message
    requests.check(replace(request, out=tmp_path / "elsewhere"))
    with pytest.raises(ExportError, match="lies in --checkpoint"):
        requests.check(replace(request, out=tmp_path / "out" / "ck" / "new"))


def test_the_bundled_model_is_an_input_too() -> None:
    request = ExportRequest(source=SourceRequest(), out=checkpoints.BUNDLED_FOLDER / "out")
    with pytest.raises(ExportError, match="lies in the bundled model"):
        requests.check(request)


def test_two_points_lead_where_the_system_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a link: to the parent of its target, not of its name."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    assert requests.real_out(tmp_path / "link" / ".." / "out") == tmp_path / "a" / "out"
    assert requests.real_out(tmp_path / "link" / "..") == tmp_path / "a"
    monkeypatch.chdir(tmp_path)
    assert requests.real_out(Path("out")) == Path("out")
