"""What `fastvlm-export` was asked for, and everything that can be wrong with it before any work."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import targets
from ..quantize import palettes, recipe_file
from ..quantize.apply import needs_calibration
from ..quantize.calibration import Calibration
from ..quantize.calibration import load as load_calibration
from ..quantize.recipe_layers import unused_rules
from ..quantize.recipes import Recipe
from ..quantize.weights import layer_names, layer_widths
from ..targets.base import DEFAULTS, Options, Target
from ..validate.latency import Plan
from ..validate.sessions import can_run
from . import ownership
from .checkpoint import BUNDLED_FOLDER
from .config import FastVLMConfig
from .errors import ExportError, raise_together
from .model.fastvlm import FastVLM, build
from .prompt import prompt_ids
from .samples import Sample, samples
from .source import SourceRequest
from .spec import ExportSpec


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What `fastvlm-export` was asked for. None means the checkpoint's own.

    `recipe` is a built-in's name or a path of a TOML file, `calibration` a folder of images,
    `steps` how many greedy tokens are compared on each image.
    """

    source: SourceRequest
    out: Path
    targets: tuple[str, ...] = (targets.TargetName.ONNX,)
    recipe: str = "fp32"
    calibration: Path | None = None
    resolution: int | None = None
    context: int | None = None
    images: tuple[Path, ...] = ()
    force: bool = False
    plan: Plan | None = None
    steps: int | None = None
    options: Options = DEFAULTS


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """One target of a request, the recipe as it computes it, and the options that it takes."""

    name: str
    target: Target
    recipe: Recipe
    options: Options


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A request in which nothing was found wrong. `calibration` is None where nothing needs it."""

    chosen: tuple[Chosen, ...]
    calibration: Calibration | None

    @property
    def groups(self) -> dict[Recipe, list[Chosen]]:
        """Targets that compute the same numbers: one quantized model is the reference of each."""
        return {
            recipe: [one for one in self.chosen if one.recipe == recipe]
            for recipe in dict.fromkeys(one.recipe for one in self.chosen)
        }


def check(request: ExportRequest) -> Checked:
    """All that is wrong with a request and can be known before work starts, as one ExportError."""
    problems: list[ExportError] = []
    found: dict[str, Target] = {}
    recipe, calibration = Recipe(name=""), None
    options: dict[str, Options] = {}

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except ExportError as error:
            problems.append(error)

    def choose(name: str) -> None:
        target = targets.get(name)
        availability = target.availability()
        if not (availability.lower and can_run(name)):
            raise ExportError(f"Target '{name}' can't be used here.", availability.remedy)
        found[name] = target

    def read_recipe() -> None:
        nonlocal recipe
        recipe = recipe_file.find(request.recipe)

    def read_calibration() -> None:
        nonlocal calibration
        adapted = [one.recipe for one in chosen] or [recipe]
        if request.calibration or any(map(needs_calibration, adapted)):
            calibration = load_calibration(request.calibration)

    attempt(read_recipe)
    for name in request.targets:
        attempt(lambda name=name: choose(name))  # type: ignore[misc]
    attempt(lambda: options.update(_shared(request.options, found)))
    chosen = tuple(
        Chosen(
            name=name,
            target=target,
            recipe=target.adapt(recipe, options.get(name, DEFAULTS)),
            options=options.get(name, DEFAULTS),
        )
        for name, target in found.items()
    )
    attempt(lambda: _refuse(chosen))
    attempt(read_calibration)
    attempt(lambda: ownership.check_out(real_out(request.out), force=request.force))
    attempt(lambda: ownership.check_apart(real_out(request.out), inputs(request)))
    attempt(lambda: samples(request.images))
    raise_together(problems)
    return Checked(chosen=chosen, calibration=calibration)


def real_out(out: Path) -> Path:
    """An output as a path without "..", which leads where the system goes, through links."""
    if ".." not in out.parts:
        return out
    if out.name == "..":
        return Path(os.path.realpath(out))
    return Path(os.path.realpath(out.parent)) / out.name


def inputs(request: ExportRequest) -> dict[str, Path]:
    """Everything of the user's that an export reads, each by the option that names it."""
    found = {f"--image (no. {number})": path for number, path in enumerate(request.images, 1)}
    if request.source.checkpoint is not None:
        found["--checkpoint"] = request.source.checkpoint
    elif request.source.random is None:
        found["the bundled model"] = BUNDLED_FOLDER
    if request.calibration is not None:
        found["--calibration"] = request.calibration
    if request.recipe.lower().endswith(recipe_file.SUFFIX):
        found["--recipe"] = Path(request.recipe)
    return found


def check_layers(checked: Checked, config: FastVLMConfig) -> None:
    """Raise ExportError where the recipe doesn't fit the layers of a model of these sizes.

    Those are the layers after reparameterization, of which a recipe speaks.
    """
    folded = replace(config, tower=replace(config.tower, train_form=False))
    _refuse(checked.chosen, build(folded))


def check_contract(checked: Checked, spec: ExportSpec) -> None:
    """Raise ExportError where a chosen client could not run a model of this contract."""
    found = [
        line for one in checked.chosen for line in one.target.contract_problems(spec, one.options)
    ]
    if found:
        raise ExportError(
            "\n".join(found),
            "Change what is named (--resolution takes any multiple of 64), or leave --layout out.",
        )


def check_prompts(spec: ExportSpec, images: Sequence[Sample]) -> None:
    """Raise ExportError where the context has no room for a prompt of the proof and one token."""
    longest = max(
        len(prompt_ids(spec.tokenizer, one.question, spec.image_token_id, spec.image_tokens))
        for one in images
    )
    if longest >= spec.context:
        raise ExportError(
            f"The longest prompt of the proof takes {longest} positions, the context has "
            f"{spec.context}.",
            f"Use --context {longest + 1} or more, or a smaller --resolution.",
        )


def _shared(options: Options, chosen: Mapping[str, Target]) -> dict[str, Options]:
    """The options that each target takes. One that no target takes is an ExportError."""
    taken: dict[str, Options] = dict.fromkeys(chosen, DEFAULTS)
    problems: list[str] = []
    for field in dataclasses.fields(Options):
        value = getattr(options, field.name)
        if value is None:
            continue
        refused = []
        for name, target in chosen.items():
            # Tried on top of what it has taken: an option may need or exclude another.
            tried = replace(taken[name], **{field.name: value})
            if found := target.option_problems(tried):
                refused += found
            else:
                taken[name] = tried
        if all(getattr(one, field.name) is None for one in taken.values()):
            problems += refused
    if problems:
        raise ExportError(
            "\n".join(dict.fromkeys(problems)),
            "Change or leave out the option, or add a target that takes it: "
            "`fastvlm-export targets` lists them.",
        )
    return taken


def _refuse(chosen: Sequence[Chosen], model: FastVLM | None = None) -> None:
    """Raise ExportError with all that the targets can't express of their recipes.

    With a model, also groups that don't divide a layer, tables that don't, and rules that match
    none.
    """
    widths, tied = None, False
    found: list[str] = []
    if model is not None:
        widths, tied = layer_widths(model.decoder), model.config.decoder.tied
        for one in chosen:
            found += unused_rules(one.recipe, layer_names(model))
            found += palettes.problems(one.recipe, palettes.layer_rows(model))
    for one in chosen:
        found += one.target.problems(one.recipe, widths, tied=tied, options=one.options)
    if found:
        raise ExportError(
            "\n".join(dict.fromkeys(found)),
            "Change the recipe, or the target: `fastvlm-export targets` shows who takes which.",
        )
