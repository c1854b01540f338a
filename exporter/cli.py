"""The command line: parse, call, print. No logic, and nothing heavy imported until it is used."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .console import messages, with_progress
from .errors import ExportError
from .options import (
    AsJson,
    Backend,
    BundlePath,
    Calibration,
    Checkpoint,
    ComputeCapability,
    ComputeUnits,
    DeploymentTarget,
    Device,
    ExternalWeights,
    Images,
    Kit,
    Layout,
    Positions,
    Quiet,
    Random,
    Recipe,
    Resolution,
    Runner,
    Runs,
    Seed,
    Stats,
    Threads,
    capabilities,
)
from .signals import end_on_signals

if TYPE_CHECKING:
    from .pipeline import Outcome
    from .source import SourceRequest

EXIT_GATE, EXIT_BAD_INPUT = 1, 2

app = typer.Typer(
    name="fastvlm-export",
    help="Export FastVLM from PyTorch to an edge runtime, and prove that its numbers survived.",
    invoke_without_command=True,
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
)

_results = Console()


def _print_json(document: object) -> None:
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def _finish(outcomes: "list[Outcome]", *, as_json: bool, quiet: bool) -> None:
    """Print what was found; exit with 1 where a gate failed."""
    from ..validate import terminal  # noqa: PLC0415 - imports NumPy

    passed = all(outcome.passed for outcome in outcomes)
    if as_json:
        _print_json(
            {
                "passed": passed,
                "bundles": [
                    {"path": str(outcome.path), "report": outcome.report.to_dict()}
                    for outcome in outcomes
                ],
            }
        )
    for outcome in outcomes:
        if not (as_json or quiet):
            _results.print(terminal.render(outcome.report))
        if not as_json:
            _results.print(f"Bundle  {outcome.path}", soft_wrap=True)
            _results.print(f"Report  {outcome.path / 'report' / 'report.html'}", soft_wrap=True)
    if not passed:
        raise typer.Exit(EXIT_GATE)


def _source(checkpoint: Path | None, random: str | None, seed: int) -> "SourceRequest":
    from .source import SourceRequest  # noqa: PLC0415 - imports torch

    return SourceRequest(checkpoint=checkpoint, random=random, seed=seed)


@app.callback()
def export(
    context: typer.Context,
    checkpoint: Checkpoint = None,
    target: Annotated[
        list[str] | None, typer.Option(help="What to export to; repeat for more.")
    ] = None,
    recipe: Recipe = "fp32",
    calibration: Calibration = None,
    resolution: Resolution = None,
    max_positions: Positions = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("fastvlm-bundle"),
    image: Images = None,
    random: Random = None,
    seed: Seed = 0,
    runs: Runs = 5,
    layout: Layout = None,
    deployment_target: DeploymentTarget = None,
    backend: Backend = None,
    external_weights: ExternalWeights = None,
    compute_capability: ComputeCapability = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier bundle.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Export, prove and publish. Without --checkpoint or --random: the bundled small model."""
    if context.invoked_subcommand is not None:
        _refuse_stray_options(context)
        return
    from ..targets.base import Options  # noqa: PLC0415 - imports NumPy
    from ..validate.latency import Plan  # noqa: PLC0415 - imports NumPy
    from . import pipeline  # noqa: PLC0415 - imports torch

    if checkpoint is None and random is None and not quiet:
        messages.print("No --checkpoint: exporting the bundled small model, fastvlm-digits.")
    targets = tuple(dict.fromkeys(target or ["onnx"]))
    if not quiet:
        _warn_of_untested(targets)
    request = pipeline.ExportRequest(
        source=_source(checkpoint, random, seed),
        out=out,
        targets=targets,
        recipe=recipe,
        calibration=calibration,
        resolution=resolution,
        context=max_positions,
        images=tuple(image or ()),
        force=force,
        plan=Plan(runs=runs, least_runs=min(runs, 3), loads=1),
        options=Options(
            layout=layout,
            deployment_target=deployment_target,
            backend=backend,
            external_weights=external_weights or None,
            compute_capabilities=capabilities(compute_capability),
        ),
    )
    outcomes = with_progress(quiet, lambda bars: pipeline.export(request, bars))
    _finish(outcomes, as_json=as_json, quiet=quiet)


def _warn_of_untested(targets: tuple[str, ...]) -> None:
    """One line where a version that takes part in the export was not tested."""
    from .versions import untested  # noqa: PLC0415 - reads the installed packages' metadata

    if found := untested(targets):
        listed = ", ".join(f"{one.package} {one.installed} ({one.tested})" for one in found)
        messages.print(
            f"Warning: versions outside the tested range: {listed}. See: fastvlm-export targets",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _refuse_stray_options(context: typer.Context) -> None:
    """Options of the bare command before a subcommand would be lost without a word."""
    given = [
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    if given:
        command = context.invoked_subcommand
        raise ExportError(
            f"{', '.join(sorted(given))}: given before '{command}', where it has no effect.",
            f"Put options after the command: fastvlm-export {command} ... "
            f"(see fastvlm-export {command} --help).",
        )


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.")],
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is, and everything that is wrong with it."""
    from ..validate import terminal  # noqa: PLC0415 - imports NumPy
    from . import doctor  # noqa: PLC0415 - imports torch

    found = doctor.inspect(folder)
    if as_json:
        _print_json(found.to_dict())
    else:
        _results.print(terminal.facts(found.summary(), title=str(folder)))


@app.command()
def validate(
    bundle: BundlePath,
    checkpoint: Checkpoint = None,
    random: Random = None,
    seed: Seed = 0,
    calibration: Calibration = None,
    image: Images = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove a bundle against the checkpoint that it was made from, and write its report anew."""
    from . import pipeline  # noqa: PLC0415 - imports torch

    source = _source(checkpoint, random, seed) if checkpoint or random else None
    outcome = with_progress(
        quiet,
        lambda bars: pipeline.validate(
            bundle, source, calibration, tuple(image or ()), progress=bars
        ),
    )
    _finish([outcome], as_json=as_json, quiet=quiet)


@app.command()
def build(
    bundle: BundlePath,
    backend: Annotated[
        str | None, typer.Option(help="tensorrt-rtx or tensorrt; default: the bundle's own.")
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option(metavar="LIST", help="GPUs; default: the bundle's own.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Build the engines of a TensorRT bundle anew, for this machine's GPU or for others."""
    from ..validate import tensorrt_view  # noqa: PLC0415 - imports NumPy
    from ..validate.formats import plain  # noqa: PLC0415 - likewise
    from . import building  # noqa: PLC0415 - likewise

    request = building.BuildRequest(
        bundle=bundle, backend=backend, compute_capabilities=capabilities(compute_capability)
    )
    built = with_progress(quiet, lambda bars: building.build(request, bars))
    if as_json:
        engines = plain(built.to_dict())
        _print_json({"passed": built.passed, "path": str(bundle), "engines": engines})
    elif not quiet:
        _results.print(tensorrt_view.terminal(built))
        _results.print(f"Prove it: fastvlm-export validate {bundle}", soft_wrap=True)
    if not built.passed:
        raise typer.Exit(EXIT_GATE)


@app.command()
def bench(
    bundle: BundlePath,
    checkpoint: Checkpoint = None,
    random: Random = None,
    seed: Seed = 0,
    image: Annotated[Path | None, typer.Option(help="The image; default: a bundled one.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Time this beside it and print the ratio: pytorch.")
    ] = None,
    compute_units: ComputeUnits = None,
    runs: Runs = 10,
    device: Device = None,
    runner: Runner = None,
    threads: Threads = None,
    stats: Stats = None,
    kit: Kit = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time to first token, part by part, decode speed and peak memory of a bundle."""
    from ..validate import device_view, placement_view, terminal  # noqa: PLC0415 - imports NumPy
    from ..validate.latency import Plan  # noqa: PLC0415 - imports NumPy
    from . import phones, running  # noqa: PLC0415 - imports torch

    plan = Plan(runs=runs, least_runs=min(runs, 5))
    elsewhere = {"--against": bool(against), "--compute-units": bool(compute_units)}
    elsewhere |= {"--checkpoint": bool(checkpoint), "--random": bool(random)}
    phone = phones.PhoneRequest(
        bundle=bundle,
        device=device,
        runner=runner,
        threads=threads,
        stats=stats,
        kit=kit,
        image=image,
        plan=plan,
        elsewhere=tuple(name for name, given in elsewhere.items() if given),
    )
    if phone.asked:
        there = with_progress(quiet, lambda bars: phones.bench(phone, bars))
        if as_json:
            _print_json(there.to_dict())
        elif not quiet:
            _results.print(device_view.render(there))
        return
    request = running.BenchRequest(
        bundle=bundle,
        source=_source(checkpoint, random, seed) if checkpoint or random else None,
        image=image,
        against=against,
        plan=plan,
        compute_units=tuple(compute_units or ()),
    )
    found = with_progress(quiet, lambda bars: running.bench(request, bars))
    if as_json:
        _print_json(found.to_dict())
    elif not quiet:
        _results.print(terminal.latency(found.latency))
        if found.placements:
            _results.print(placement_view.placement(found.placements))


@app.command()
def generate(
    bundle: BundlePath,
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[Path | None, typer.Option(help="The image that it is about.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Answer a question about an image with a bundle."""
    from . import running  # noqa: PLC0415 - imports torch

    question = running.Question(
        bundle=bundle,
        prompt=prompt,
        image=image,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    answer = running.ask(question)
    if as_json:
        _print_json({"text": answer.text, "token_ids": answer.token_ids})
    else:
        _results.print(answer.text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def sensitivity(
    checkpoint: Checkpoint = None,
    random: Random = None,
    seed: Seed = 0,
    recipe: Recipe = "int4",
    calibration: Calibration = None,
    resolution: Resolution = None,
    max_positions: Positions = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Ask about so many of the calibration images.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Mix precisions to lose or take no more: 0.5% or 400MB.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The recipe for --budget [recipe.toml].")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the layers: .svg or .html.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace earlier files.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what each layer's quantization costs, and mix precisions for a budget."""
    from ..validate import sensitivity_report as reports  # noqa: PLC0415 - imports Jinja
    from . import tuning  # noqa: PLC0415 - imports torch

    request = tuning.SensitivityRequest(
        source=_source(checkpoint, random, seed),
        recipe=recipe,
        calibration=calibration,
        resolution=resolution,
        context=max_positions,
        prompts=prompts,
        budget=budget,
        out=out,
        plot=plot,
        force=force,
    )
    found = with_progress(quiet, lambda bars: tuning.sensitivity(request, bars))
    if as_json:
        _print_json(found.to_dict())
    elif not quiet:
        _results.print(reports.terminal(found))
    for path in (found.mixed.path if found.mixed else None, plot):
        if path and not as_json:
            _results.print(f"Wrote  {path}", soft_wrap=True)


@app.command("targets")
def list_targets(as_json: AsJson = False) -> None:
    """List the targets: what each can do here, and which recipes it takes."""
    from ..validate import terminal  # noqa: PLC0415 - imports NumPy
    from . import listing  # noqa: PLC0415 - likewise

    rows = listing.rows()
    if as_json:
        _print_json(rows)
    else:
        _results.print(terminal.targets(rows))
        for note in terminal.target_notes(rows):
            _results.print(note, markup=False, highlight=False, soft_wrap=True)


@end_on_signals()
def main() -> None:
    """Run the command line: the one place where expected errors are caught."""
    try:
        app()
    except ExportError as error:
        if "--json" in sys.argv[1:]:
            _print_json({"error": {"message": error.message, "hint": error.hint}})
        messages.print("[bold red]Error[/]", end=" ")
        messages.print(error.message, markup=False, highlight=False, soft_wrap=True)
        if error.hint:
            messages.print(error.hint, markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_BAD_INPUT)
