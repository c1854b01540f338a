"""Everything of target tensorrt that needs an NVIDIA GPU, on this one: one command, one table.

    python benchmarks/tensorrt_gpu.py                                              the bundled model
    python benchmarks/tensorrt_gpu.py --random fastvlm-0.5b --resolution 1024      full size
    python benchmarks/tensorrt_gpu.py --backend tensorrt

For each recipe engines are built for this GPU and proven on it by the command itself; then all are
timed side by side. The table is Markdown for the README, under the GPU's name. "On the GPU" is by
CUDA events around the engine alone, the rest of a time is copying and waiting. Exit code 1 where a
recipe failed, or where there is no GPU that engines can run on.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from recipes import export, measure, worst
from rich.console import Console

from fastvlm_export import targets
from fastvlm_export.exporter import listing
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import TargetName, tensorrt, tensorrt_device, tensorrt_package
from fastvlm_export.targets.base import Options
from fastvlm_export.targets.tensorrt_device import Gpu
from fastvlm_export.targets.tensorrt_package import Backend
from fastvlm_export.validate.latency import LatencyResult, SubjectResult

HEADINGS = (
    "recipe",
    "passed",
    "engines",
    "error: features",
    "error: mean KL",
    "answers right",
    "encode, on the GPU",
    "prefill, on the GPU",
    "TTFT",
    "tokens/s",
    "ms a token, on the GPU",
)

messages = Console(stderr=True)


def main(
    out: Annotated[Path, typer.Option(help="A folder for one bundle a recipe.")] = Path(
        "out/tensorrt-gpu"
    ),
    random: Annotated[str | None, typer.Option(help="Random weights at full size.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Image side in pixels.")] = None,
    context: Annotated[int | None, typer.Option(help="Positions of the cache.")] = None,
    backend: Annotated[Backend | None, typer.Option(help="Default: what is installed.")] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Default: every built-in that this GPU computes.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Rounds after warm-up.")] = 20,
    reuse: Annotated[bool, typer.Option("--reuse", help="Time what is there.")] = False,
) -> None:
    """Build, prove and time each recipe; print one table."""
    try:
        gpu, options = machine(backend)
        names = recipe or listing.recipes(targets.get(TargetName.TENSORRT), options)
        command = ["--target", "tensorrt", "--backend", str(options.backend)]
        if options.compute_capabilities:
            command += ["--compute-capability", ",".join(options.compute_capabilities)]
        given = {"--random": random, "--resolution": resolution, "--context": context}
        command += [str(part) for pair in given.items() if pair[1] is not None for part in pair]
        found, failed = exports(names, out, command, reuse)
        if not found:
            raise ExportError("No recipe could be exported.", "See above.")
        timed = measure({name: Path(path) for name, (path, _) in found.items()}, runs)
    except ExportError as error:
        messages.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error
    reports = {name: report for name, (_, report) in found.items()}
    print(table(title(gpu, options, random, resolution), reports, timed, failed))
    if failed or not all(report["passed"] for report in reports.values()):
        raise typer.Exit(1)


def machine(backend: Backend | None) -> tuple[Gpu, Options]:
    """The GPU of this machine and how to export for it; raises ExportError where none can run."""
    chosen = tensorrt_package.backend_of(Options(backend=backend))
    tensorrt_package.load(chosen)
    problem = tensorrt_device.driver_problem(chosen, tensorrt_package.version(chosen))
    gpu = tensorrt_device.find_gpu()
    if problem or gpu is None:
        raise ExportError(problem or "No GPU was found.")
    if not tensorrt.has_cuda():
        raise ExportError(f"{tensorrt.CUDA} not found.", tensorrt.REMEDY)
    rtx = chosen is Backend.RTX
    options = Options(backend=chosen, compute_capabilities=(gpu.capability,) if rtx else None)
    if problems := tensorrt.option_problems(options):
        raise ExportError("\n".join(problems), f"{gpu.name} may need --backend {Backend.TENSORRT}.")
    return gpu, options


def exports(
    names: list[str], out: Path, command: list[str], reuse: bool
) -> tuple[dict[str, tuple[str, dict[str, Any]]], list[str]]:
    """Recipe -> its bundle and report; and a line for each that could not be exported."""
    found, failed = {}, []
    for name in names:
        try:
            found[name] = export(name, out / name, command, reuse)
        except ExportError as error:  # the others are worth their time
            failed.append(f"{name}: {error.message}")
    return found, failed


def title(gpu: Gpu, options: Options, random: str | None, resolution: int | None) -> str:
    """What was measured, and on what."""
    backend = Backend(str(options.backend))
    package = f"{tensorrt_package.NAMES[backend]} {tensorrt_package.version(backend)}"
    model = random or "fastvlm-digits"
    size = f", {resolution} px" if resolution else ""
    driver = f"driver of CUDA {tensorrt_device.spelled(gpu.driver)}"
    return f"{model}{size}, {gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB), {package}, {driver}"


def table(
    heading: str,
    reports: Mapping[str, Mapping[str, Any]],
    timed: LatencyResult,
    failed: list[str],
) -> str:
    """A Markdown table with a line a recipe; times are medians, in ms unless they say otherwise."""
    subjects = {one.name: one for one in timed.subjects}
    rows = [cells(name, report, subjects[name]) for name, report in reports.items()]
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([f"{heading}; {timed.prompt_tokens} prompt tokens:", "", text, *failed])


def cells(name: str, report: Mapping[str, Any], subject: SubjectResult) -> list[str]:
    """One recipe's line: what its report proved on the GPU, and its times."""
    answers = report["accuracy"]
    engines = [
        file["bytes"] for file in report["export"]["files"] if file["path"].endswith(".engine")
    ]
    on_device = {part: timing.p50 * 1e3 for part, timing in subject.on_device.items()}
    encode, prefill = subject.timing("encode"), subject.timing("prefill")
    device = report["runtime"]["device"]
    return [
        f"`{name}`",
        ("yes" if report["passed"] else "NO") if device else "not on the GPU",
        f"{sum(engines) / 1e6:.4g} MB",
        f"{worst(report['parity'], 'RMS relative', 'image_features'):.1e}",
        f"{worst(report['parity'], 'mean KL', 'teacher_forced'):.1e}",
        f"{answers['candidate']['right']} of {answers['candidate']['total']}" if answers else "-",
        f"{encode.p50 * 1e3:.4g}, {on_device['encode']:.4g}" if encode else "-",
        f"{prefill.p50 * 1e3:.4g}, {on_device['prefill']:.4g}" if prefill else "-",
        f"{subject.ttft.p50 * 1e3:.4g}",
        f"{subject.tokens_per_second:.4g}",
        f"{1e3 / subject.tokens_per_second:.4g}, {on_device['decode'] / subject.tokens:.4g}",
    ]


if __name__ == "__main__":
    sys.exit(typer.run(main))
