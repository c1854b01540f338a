"""Do gates fail for a reason, and never by chance? Disturbances and planted faults, in one table.

    python benchmarks/gates.py                                    every target and recipe
    python benchmarks/gates.py --target onnx --recipe int8 --only misses

*False alarms*: the bundled model's bundles are proven again under changes that do not matter
(threads, optimizations, the order of images, other images, inputs moved by one ulp, other
calibration): no gate may fail. *Misses*: one fault at a time is planted into a bundle, and its
hashes are made right: a gate has to fail. Gates run in the order contract, stored numbers, without
rounding, as typed, answers, and the first to fail is counted.

Findings are kept in --work as they come, and a run that was stopped goes on where it was. Exit
code 1 where there is a false alarm or a miss.
"""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

# Before any worker imports torch: models this small only lose by sharing the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from gating.cell import FALSE_ALARMS, MISSES, Job, Results, load, run
from gating.cells import RECIPES, Effort
from gating.table import false_alarms, lines, missed


def main(
    target: Annotated[list[str] | None, typer.Option(help="Of these targets only.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Under these recipes only.")] = None,
    only: Annotated[str | None, typer.Option(help=f"{FALSE_ALARMS} or {MISSES}.")] = None,
    disturbances: Annotated[int | None, typer.Option(help="At most so many in a cell.")] = None,
    questions: Annotated[int, typer.Option(help="Of the bundled task, in each proof.")] = 60,
    steps: Annotated[int, typer.Option(help="Greedy tokens on each image.")] = 16,
    jobs: Annotated[int, typer.Option(help="Cells at a time, one core each.")] = 2,
    python: Annotated[
        list[Path] | None, typer.Option(help="An interpreter with other runtime versions.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Bundles and findings are kept here.")] = Path(
        "out/gates"
    ),
    out: Annotated[Path | None, typer.Option(help="Write the table here, JSON beside it.")] = None,
) -> None:
    """Run what no earlier run has, and print the table."""
    kinds = (FALSE_ALARMS, MISSES) if only is None else (only,)
    if only not in (None, FALSE_ALARMS, MISSES):
        raise typer.BadParameter(f"--only takes {FALSE_ALARMS} or {MISSES}")
    if unknown := set(target or ()) - set(RECIPES):
        raise typer.BadParameter(f"there is no target {', '.join(unknown)}")
    asked = [
        Job(
            target=one,
            recipe=name,
            work=work.absolute(),
            kinds=kinds,
            most=disturbances,
            effort=Effort(steps=steps, questions=questions),
            pythons=tuple(python or ()),
        )
        for one in target or RECIPES
        for name in RECIPES[one]
        if not recipe or name in recipe
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(run, job) for job in asked]
        broken = [
            f"{job.target} {job.recipe}: {error!r}"
            for job, future in zip(asked, futures, strict=True)
            if (error := future.exception())
        ]
    results: list[Results] = [load(job) for job in asked]
    text = "\n".join([*lines(results), *(f"- Not run to the end, {one}" for one in broken)])
    print(text)
    if out:
        out.write_text(text + "\n", "utf-8")
        content = json.dumps([vars(one) for one in results], indent=1)
        out.with_suffix(".json").write_text(content + "\n", "utf-8")
    if broken or false_alarms(results) or missed(results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
