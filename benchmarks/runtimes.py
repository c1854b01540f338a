"""Bundles made with one ONNX Runtime, run in every other that is supported. One table.

    python benchmarks/runtimes.py                     the bundled model: fp32, fp16, int8, int4
    python benchmarks/runtimes.py out/mine            bundles of your own
    python benchmarks/runtimes.py --versions 1.24.1 --versions 1.32.0

Each version is installed into a folder of its own, which is put before this environment's packages,
so that all else stays the same. Without bundles the model is exported with the oldest and with the
newest version; where both wrote the same graphs, one set of bundles is run.

What the maker's runtime computes is the reference: pixels, features, logits along the same tokens
and 24 greedy tokens, of every bundled image. A version passes where it keeps the limits that the
export held the bundle to, and where nothing is rounded, those of the comparison without rounding.
Exit code 1 where one does not.
"""

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from fastvlm_export.exporter.bundle import Bundle, open_bundle
from fastvlm_export.exporter.preprocess import preprocess
from fastvlm_export.exporter.prompt import prompt_ids
from fastvlm_export.exporter.samples import samples
from fastvlm_export.exporter.tokenizer import read_tokenizer
from fastvlm_export.exporter.versions import DISTRIBUTION
from fastvlm_export.quantize import recipes
from fastvlm_export.validate import parity
from fastvlm_export.validate.limits import Limits, Statistics, exact_limits
from fastvlm_export.validate.recording import Case, record
from fastvlm_export.validate.sessions import has_exact, open_session

PACKAGE = "onnxruntime"
RECIPES = ("fp32", "fp16", "int8", "int4")
STEPS = 24
COLUMNS = (
    "made with",
    "recipe",
    "run in",
    "features, RMS",
    "logits, RMS",
    "mean KL",
    "tokens",
    "without rounding",
    "",
)

messages = Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Runtimes:
    """Folders under `cache` with one version of ONNX Runtime each."""

    cache: Path

    def folder(self, version: str) -> Path:
        """The version's folder, installed where it is missing; renamed into place when whole."""
        place = self.cache / f"{PACKAGE}-{version}"
        if not place.exists():
            messages.print(f"Installing {PACKAGE} {version}")
            part = place.with_name(f"{place.name}.part-{os.getpid()}")
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            install += ["--target", str(part), f"{PACKAGE}=={version}"]
            subprocess.run(install, check=True)  # noqa: S603
            part.rename(place)
        return place

    def run(self, version: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run Python with that version before its own packages; stdout is kept."""
        paths = [str(self.folder(version)), os.environ.get("PYTHONPATH", "")]
        return subprocess.run(  # noqa: S603
            [sys.executable, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )


@app.command()
def main(
    bundles: Annotated[list[Path] | None, typer.Argument(help="Bundles of target onnx.")] = None,
    versions: Annotated[
        list[str] | None, typer.Option(help="Default: the oldest, and the last of each minor.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where versions and bundles are kept.")] = Path(
        "out/runtimes"
    ),
) -> None:
    """Print one line for each bundle and version."""
    chosen = sorted(versions or supported(), key=Version)
    runtimes = Runtimes(cache.resolve())
    runtimes.cache.mkdir(parents=True, exist_ok=True)
    made = [path.resolve() for path in bundles] if bundles else export_all(runtimes, chosen)
    table = Table(*COLUMNS, title=f"{PACKAGE}: {', '.join(chosen)}")
    failed = 0
    for path in made:
        manifest = open_bundle(path).manifest
        maker, recipe = manifest.versions[PACKAGE], str(manifest.recipe["name"])
        recording = runtimes.cache / f"recording-{os.getpid()}.pickle"
        done = runtimes.run(maker, __file__, "--record", path, recording)
        if done.returncode:
            raise typer.Exit(done.returncode)
        for version in chosen:
            messages.print(f"{recipe}, made with {maker}, in {version}", highlight=False)
            done = runtimes.run(version, __file__, "--compare", path, recording)
            found = json.loads(done.stdout) if done.returncode == 0 else {"error": "did not run"}
            failed += not found.get("passed", False)
            table.add_row(maker, recipe, version, *_cells(found))
        recording.unlink()
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    raise typer.Exit(1 if failed else 0)


def supported() -> list[str]:
    """Of the versions that the index has, those that are run; see `ends`."""
    lines = metadata.requires(DISTRIBUTION) or ()
    needed = next(one for one in map(Requirement, lines) if one.name == PACKAGE)
    command = [sys.executable, "-m", "pip", "index", "versions", PACKAGE]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    lines = shown.stdout.splitlines()
    line = next(line for line in lines if line.startswith("Available versions:"))
    return ends(line.partition(":")[2].split(","), needed.specifier)


def ends(listed: Iterable[str], tested: SpecifierSet) -> list[str]:
    """Of the versions within the range: the oldest, and the last of each minor release."""
    within = sorted(one for one in map(Version, listed) if tested.contains(one, prereleases=False))
    last = [max(group) for _, group in groupby(within, key=lambda one: one.release[:2])]
    return [str(one) for one in dict.fromkeys([*within[:1], *last])]


def export_all(runtimes: Runtimes, versions: list[str]) -> list[Path]:
    """A bundle for each recipe of the oldest and the newest version, once where they are equal."""
    made: dict[tuple[str, ...], Path] = {}
    for version in dict.fromkeys([versions[-1], versions[0]]):
        for recipe in RECIPES:
            out = runtimes.cache / f"made-with-{version}" / recipe
            if not out.exists():
                messages.print(f"Exporting {recipe} with {version}", highlight=False)
                program = "from fastvlm_export.exporter.cli import main; main()"
                options = ["--recipe", recipe, "--out", out, "--runs", 1, "--quiet"]
                done = runtimes.run(version, "-c", program, *options)
                if done.returncode:
                    raise typer.Exit(done.returncode)
            files = open_bundle(out).manifest.files
            graphs = tuple(f"{name} {digest}" for name, digest in sorted(files.items()))
            if graphs in made:
                messages.print(f"{out} holds the same files as {made[graphs]}", highlight=False)
            made.setdefault(graphs, out)
    return list(made.values())


def _cells(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return ["", "", "", "", "", f"[red]{found['error']}"]
    exact = found["exact"]
    return [
        f"{found['features']:.1e}",
        f"{found['logits']:.1e}",
        f"{found['kl']:.1e}",
        f"{found['equal']} of {found['tokens']}",
        "" if exact is None else f"{exact:.1e}",
        "[green]passed" if found["passed"] else f"[red]{found['verdict']}",
    ]


def record_bundle(path: Path, recording: Path) -> None:
    """In the maker's runtime: what the bundle computes, as typed and without rounding."""
    bundle = open_bundle(path)
    cases = _cases(bundle)
    found = {"typed": record(open_session(bundle), cases, STEPS)}
    if has_exact(bundle):
        found["exact"] = record(open_session(bundle, exact=True), cases, STEPS)
    recording.write_bytes(pickle.dumps(found))


def compare_bundle(path: Path, recording: Path) -> None:
    """In another runtime: print how far it is from the recorded one, as JSON."""
    bundle = open_bundle(path)
    cases = _cases(bundle)
    recorded = pickle.loads(recording.read_bytes())  # noqa: S301 - written by `record_bundle`
    report = json.loads((path / "report" / "report.json").read_text("utf-8"))
    limits = _limits(report["parity"]["limits"])
    typed = parity.compare(recorded["typed"], cases, open_session(bundle), limits)
    results, exact = [typed], None
    if "exact" in recorded:
        limits = exact_limits(recipes.recorded(bundle.manifest.recipe))
        session = open_session(bundle, exact=True)
        results.append(parity.compare(recorded["exact"], cases, session, limits))
        exact = max(_values(results[1], "max relative"))
    broken = next((one for one in results if not one.passed), None)
    pairs = [pair for run in typed.free_runs for pair in zip_longest(run.reference, run.candidate)]
    found = {
        "passed": broken is None,
        "verdict": broken.failure if broken else "",
        "features": max(_values(typed, "RMS relative", "image_features")),
        "logits": max(_values(typed, "RMS relative", "teacher_forced")),
        "kl": max(_values(typed, "mean KL", "teacher_forced")),
        "equal": sum(one == other for one, other in pairs),
        "tokens": sum(len(run.reference) for run in typed.free_runs),
        "exact": exact,
    }
    sys.stdout.write(json.dumps(found))


def _cases(bundle: Bundle) -> list[Case]:
    manifest, tokenizer = bundle.manifest, read_tokenizer(bundle.path)
    return [
        Case(
            name=sample.name,
            pixels=preprocess(sample.image, manifest.preprocessing),
            prompt_ids=prompt_ids(
                tokenizer, sample.question, manifest.image_token_id, manifest.image_tokens
            ),
            image_token_id=manifest.image_token_id,
        )
        for sample in samples(())
    ]


def _limits(written: dict[str, Any]) -> Limits:
    """As a report has them: there an infinite limit is null."""
    numbers = {name: math.inf if value is None else value for name, value in written.items()}
    statistics = written["statistics"]
    return Limits(**numbers | {"statistics": Statistics(**statistics) if statistics else None})


def _values(result: parity.ParityResult, name: str, stage: str | None = None) -> list[float]:
    return [
        check.value
        for one in result.measurements
        if stage is None or one.stage == stage
        for check in one.checks
        if check.name.removesuffix(", all") == name
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record_bundle(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--compare"]:
        compare_bundle(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        app()
