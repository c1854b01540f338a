"""What each recipe costs and saves: size, loss, export error, speed, memory. One table.

    python benchmarks/recipes.py                                             the bundled model
    python benchmarks/recipes.py --random fastvlm-0.5b --resolution 1024     sizes and speeds
    python benchmarks/recipes.py --target coreml                             timed on a Mac only
    python benchmarks/recipes.py --target executorch --backend portable

Each recipe is exported and proven by the command itself, in a process of its own; its report gives
size, loss and error. Then the bundles are timed side by side, one after the other in every round,
so that a busy machine slows all of them alike; "x" is how many times as long fp32 takes. Loss is
quantized against original in PyTorch, error is artifact against quantized; "exact" is the worst of
it, in parts of the peak, where neither side rounds (targets with an interpreter).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastvlm_export import targets
from fastvlm_export.exporter import listing
from fastvlm_export.exporter.bundle import open_bundle
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.prompt import prompt_ids
from fastvlm_export.exporter.samples import samples
from fastvlm_export.exporter.tokenizer import read_tokenizer
from fastvlm_export.targets.base import Options
from fastvlm_export.validate import latency
from fastvlm_export.validate.latency import Backend, LatencyResult, Plan
from fastvlm_export.validate.sessions import runs_here

QUESTION = "What are these?"
GATE_FAILED = 1

messages = Console(stderr=True)


def main(
    out: Annotated[Path, typer.Option(help="A folder for one bundle a recipe.")] = Path(
        "out/recipes"
    ),
    random: Annotated[str | None, typer.Option(help="Random weights at full size.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Image side in pixels.")] = None,
    target: Annotated[str, typer.Option(help="What to export to.")] = "onnx",
    backend: Annotated[str | None, typer.Option(help="ExecuTorch only.")] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Default: every built-in that the target takes.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Rounds after warm-up.")] = 10,
    reuse: Annotated[bool, typer.Option("--reuse", help="Time what is there.")] = False,
) -> None:
    """Print one table: a line a recipe."""
    chosen = Options(backend=backend)
    names = recipe or listing.recipes(targets.get(target), chosen)
    options = ["--target", target]
    options += ["--backend", backend] if backend else []
    options += ["--random", random] if random else []
    options += ["--resolution", str(resolution)] if resolution else []
    reports = {name: export(name, out / name, options, reuse) for name in names}
    runtime = runs_here(target, backend)
    timed = None
    if runtime and runtime.device:
        timed = measure({name: Path(path) for name, (path, _) in reports.items()}, runs)
    title = ", ".join(filter(None, (random or "fastvlm-digits", target, backend)))
    table = Table(
        title=f"{title}, {timed.machine.cpu}, {timed.threads} threads" if timed else title
    )
    for column in (*COLUMNS, *(TIMED if timed else ())):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for name, (_, report) in reports.items():
        table.add_row(*_line(name, report), *(_timings(name, timed) if timed else []))
    Console(width=200).print(table)


def export(recipe: str, out: Path, options: list[str], reuse: bool) -> tuple[str, dict[str, Any]]:
    """Where the bundle is, and its report; one that failed its gate, too.

    Raises ExportError where there is none.
    """
    if reuse:
        folder = out if out.exists() else out.with_name(f"{out.name}.failed")
        return str(folder), json.loads((folder / "report" / "report.json").read_text("utf-8"))
    messages.print(f"Exporting {recipe} to {out}")
    command = [sys.executable, "-c", "from fastvlm_export.exporter.cli import main; main()"]
    command += ["--recipe", recipe, "--out", str(out), "--force", "--json", "--runs", "1"]
    command += options
    run = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # noqa: S603
    if run.returncode not in (0, GATE_FAILED):
        raise ExportError(f"The export of {recipe} ended with {run.returncode}.", "See above.")
    bundle = json.loads(run.stdout)["bundles"][0]
    return bundle["path"], bundle["report"]


def measure(paths: dict[str, Path], runs: int) -> LatencyResult:
    """The bundles' times, side by side in every round."""
    subjects = [
        latency.Subject(name=name, backend=Backend.BUNDLE, bundle=path)
        for name, path in paths.items()
    ]
    first = subjects[0].bundle
    manifest = open_bundle(first).manifest
    ids = prompt_ids(
        read_tokenizer(first), QUESTION, manifest.image_token_id, manifest.image_tokens
    )
    plan = Plan(warmup=1, runs=runs, seconds=600.0, loads=1)
    return latency.measure(subjects, samples(())[-1].image, ids, plan, messages.print)


COLUMNS = (
    "recipe",
    "passed",
    "files MB",
    "loss: mean KL",
    "loss: same top-1",
    "answers right",
    "error: features",
    "error: mean KL",
    "exact",
    "peak export MB",
)
TIMED = ("encode ms", "x", "TTFT ms", "x", "tokens/s", "peak run MB")


def _line(name: str, report: dict[str, Any]) -> list[str]:
    loss, accuracy, export = report["quantization_loss"], report["accuracy"], report["export"]
    return [
        name,
        "yes" if report["passed"] else "NO",
        f"{sum(file['bytes'] for file in export['files']) / 1e6:.4g}",
        f"{loss['mean_kl']:.2g}" if loss else "0",
        f"{loss['top1_agreement']:.1%}" if loss else "100.0%",
        f"{accuracy['candidate']['right']}/{accuracy['candidate']['total']}" if accuracy else "-",
        f"{worst(report['parity'], 'RMS relative', 'image_features'):.1e}",
        f"{worst(report['parity'], 'mean KL', 'teacher_forced'):.1e}",
        f"{worst(report['exact_parity'], 'max relative'):.1e}" if report["exact_parity"] else "-",
        f"{export['peak_memory_bytes'] / 1e6:.0f}",
    ]


def _timings(name: str, timed: LatencyResult) -> list[str]:
    subject = next(one for one in timed.subjects if one.name == name)
    first = timed.subjects[0]
    faster = {"encode": 1.0, "ttft": 1.0} if subject is first else timed.ratios(subject)
    encode = subject.timing("encode")
    return [
        f"{encode.p50 * 1e3:.4g}" if encode else "-",
        f"{1 / faster['encode']:.2f}",
        f"{subject.ttft.p50 * 1e3:.4g}",
        f"{1 / faster['ttft']:.2f}",
        f"{subject.tokens_per_second:.3g}",
        f"{subject.peak_memory_bytes / 1e6:.0f}",
    ]


def worst(parity: dict[str, Any], check: str, stage: str | None = None) -> float:
    """The worst value of a parity check over the images and, where none is named, the stages."""
    values = [
        found["value"]
        for measured in parity["measurements"]
        for found in measured["checks"]
        if stage in (None, measured["stage"]) and found["name"] == check
    ]
    return max(float("inf") if value is None else value for value in values)


if __name__ == "__main__":
    typer.run(main)
