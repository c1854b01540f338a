"""The flow of `sensitivity`: measure a recipe layer by layer, and mix precisions for a budget."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import targets
from ..quantize import palettes, recipe_file
from ..quantize.calibration import Calibration, pixels
from ..quantize.calibration import load as load_calibration
from ..quantize.recipe_layers import unused_rules
from ..quantize.recipes import Recipe
from ..quantize.weights import check_groups, layer_names, layer_widths
from ..targets import TargetName
from ..validate import sensitivity_mix as mixing
from ..validate import sensitivity_report as reports
from ..validate.sensitivity import POSITIONS, prompts
from ..validate.sensitivity_budget import Budget, parse_budget
from ..validate.sensitivity_report import Sensitivity
from . import ownership
from .clock import Clock
from .errors import ExportError, raise_together
from .model.fastvlm import FastVLM
from .progress import Progress, Silent
from .reparameterize import reparameterize
from .scratch import ScratchFolder
from .source import SourceRequest, contract, load_source

LARGE = 10**8
"""Parameters above which a prompt takes minutes, so that fewer are asked."""

PROMPTS_OF_LARGE = 2
DEFAULT_OUT = Path("recipe.toml")
PLOTS: Mapping[str, Callable[[Sensitivity], str]] = {".svg": reports.svg, ".html": reports.page}


@dataclass(frozen=True, kw_only=True)
class SensitivityRequest:
    """What `sensitivity` was asked for. None means the checkpoint's own, or what is usual.

    `recipe` is a built-in's name or a path of a TOML file; `prompts` how many calibration images
    are asked about; `out` receives the recipe that `budget` leads to.
    """

    source: SourceRequest
    recipe: str = "int4"
    calibration: Path | None = None
    resolution: int | None = None
    context: int | None = None
    prompts: int | None = None
    budget: str | None = None
    out: Path | None = None
    plot: Path | None = None
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class _Checked:
    recipe: Recipe
    calibration: Calibration
    budget: Budget | None


def sensitivity(request: SensitivityRequest, progress: Progress | None = None) -> Sensitivity:
    """Measure each layer alone; with a budget, write the recipe that meets it at `out`.

    Raises ExportError before any long work when the request itself is wrong.
    """
    clock = Clock(progress or Silent())
    checked = _check(request)
    recipe, budget = checked.recipe, checked.budget
    clock.stage("Load the checkpoint")
    checkpoint = load_source(request.source)
    spec = contract(checkpoint, request.resolution, request.context)
    clock.stage("Reparameterize the tower")
    model = reparameterize(checkpoint.model(), clock.detail).model.eval()
    _check_layers(recipe, model, with_budget=budget is not None)
    shown = pixels(checked.calibration, spec.preprocessing)
    with _threads_for(model):
        clock.stage("Quantize every layer")
        options = mixing.options(
            model, recipe, spec, shown, clock.detail, upgraded=budget is not None
        )
        if budget:
            mixing.check_size(options, budget)
        clock.stage("Let the original answer")
        asked = prompts(model, _some(shown, request.prompts, model), spec, clock.detail)
        clock.stage("Measure each layer alone")
        measured = mixing.measure(options, asked, clock.detail)
        found = Sensitivity(
            source=checkpoint.name,
            recipe=recipe.name,
            prompts=len(asked),
            positions=len(asked) * POSITIONS,
            layers=mixing.layer_losses(options, measured),
            together=measured.together,
        )
        if budget:
            clock.stage("Mix precisions for the budget")
            out = request.out or DEFAULT_OUT
            mixed, made = mixing.mix(options, measured, budget, asked, str(out), clock.detail)
            found = replace(found, mixed=mixed)
            _write(out, recipe_file.write(made), "--out", force=request.force)
    if request.plot:
        plot = PLOTS[request.plot.suffix.lower()](found)
        _write(request.plot, plot, "--plot", force=request.force)
    return found


def _is_large(model: FastVLM) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) > LARGE


@contextmanager
def _threads_for(model: FastVLM) -> Iterator[None]:
    """One thread for a small model: its operators take less time than threads need to meet.

    On a busy machine that is minutes, and results would depend on the number of cores.
    """
    before = torch.get_num_threads()
    if not _is_large(model):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _some(shown: list[Tensor], wanted: int | None, model: FastVLM) -> list[Tensor]:
    """As many images as wanted, spread over all."""
    if wanted is None:
        wanted = PROMPTS_OF_LARGE if _is_large(model) else len(shown)
    count = min(wanted, len(shown))
    return [shown[index * len(shown) // count] for index in range(count)]


def _check(request: SensitivityRequest) -> _Checked:
    """All that is wrong with a request and can be known before work starts, at once."""
    problems: list[ExportError] = []
    recipe, calibration, budget = Recipe(name=""), Calibration(source="", images=()), None
    out = request.out or (DEFAULT_OUT if request.budget else None)
    try:
        recipe = recipe_file.find(request.recipe)
        if not any(precision.bits for precision in recipe.precisions):
            raise ExportError(
                f"Recipe '{recipe.name}' has no integer weights: there is nothing to measure.",
                "Use one that has, such as --recipe int4.",
            )
    except ExportError as error:
        problems.append(error)
    try:
        calibration = load_calibration(request.calibration)
    except ExportError as error:
        problems.append(error)
    try:
        budget = parse_budget(request.budget) if request.budget is not None else None
    except ExportError as error:
        problems.append(error)
    if request.out and request.budget is None:
        problems.append(
            ExportError(
                f"--out {request.out} without --budget: no recipe is written then.",
                "Say what the recipe may lose or take, such as --budget 0.5% or --budget 400MB.",
            )
        )
    for option, path, suffixes in (
        ("--out", out, (recipe_file.SUFFIX,)),
        ("--plot", request.plot, tuple(PLOTS)),
    ):
        if path:
            problems += _path_problems(option, path, suffixes, force=request.force)
            problems += _input_problems(option, path, request)
    raise_together(problems)
    return _Checked(recipe=recipe, calibration=calibration, budget=budget)


def _path_problems(
    option: str, path: Path, suffixes: tuple[str, ...], *, force: bool
) -> list[ExportError]:
    """Why a file can't be written there: known before hours of work, not after."""
    folder = path.absolute().parent
    if path.suffix.lower() not in suffixes:
        kinds = " or ".join(suffixes)
        return [
            ExportError(f"{option} {path} does not end in {kinds}.", f"Name a file with {kinds}.")
        ]
    if not folder.is_dir():
        return [ExportError(f"{option} {path}: there is no folder {folder}.", f"mkdir -p {folder}")]
    if not os.access(folder, os.W_OK):
        return [ExportError(f"{folder} is not writable.", f"Choose another {option}.")]
    if path.is_symlink() or (path.exists() and not path.is_file()):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "device or a pipe"
        return [ExportError(f"{option} {path} is a {kind}.", f"Name a file with {option}.")]
    if path.exists() and not force:
        return [
            ExportError(f"{path} exists.", f"Choose another {option}, or replace it with --force.")
        ]
    return []


def _check_layers(recipe: Recipe, model: FastVLM, *, with_budget: bool) -> None:
    """What can be wrong with a recipe once the layers are known."""
    widths = layer_widths(model.decoder)
    check_groups(palettes.without(recipe), widths)
    found = unused_rules(recipe, layer_names(model))
    found += palettes.problems(recipe, palettes.layer_rows(model))
    hint = "Change the recipe."
    if with_budget:
        # Upgrades give nothing that the target cannot express, so the recipe itself decides.
        target = targets.get(TargetName.COREML if recipe.palettized else TargetName.ONNX)
        found += target.problems(recipe, widths, tied=model.config.decoder.tied)
        hint = "Change the recipe, or leave out --budget: a mixed recipe is for exporting."
    if found:
        raise ExportError("\n".join(found), hint)


def _input_problems(option: str, path: Path, request: SensitivityRequest) -> list[ExportError]:
    """Whether a file that is written is one that is read, or lies among those."""
    read = {"--checkpoint": request.source.checkpoint, "--calibration": request.calibration}
    if request.recipe.lower().endswith(recipe_file.SUFFIX):
        read["--recipe"] = Path(request.recipe)
    inputs = {name: one for name, one in read.items() if one is not None}
    try:
        ownership.check_apart(path, inputs, option)
    except ExportError as error:
        return [error]
    return []


def _write(path: Path, text: str, option: str, *, force: bool) -> None:
    """Write a file whole or not at all; with `force`, in the place of another one.

    What took its place during the run is left alone, and the text is kept under another name.
    """
    try:
        with ScratchFolder(path.absolute().parent) as folder:
            written = folder / path.name
            written.write_text(text, "utf-8")
            if problems := _path_problems(option, path, (path.suffix.lower(),), force=force):
                kept = ownership.free_name(path.with_suffix(""), "new", path.suffix)
                written.rename(kept)
                raise ExportError(
                    f"{problems[0].message} It appeared during the run; the result is at {kept}.",
                    problems[0].hint,
                )
            written.replace(path)
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written: {error.strerror}.", f"Choose another {option}."
        ) from error
