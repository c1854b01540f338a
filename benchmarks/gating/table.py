"""The one table of the experiment, and whether it is as it should be."""

from collections.abc import Iterator, Sequence
from typing import Any

from .cell import Results
from .judge import ERROR

GATES = ("contract", "stored", "exact", "typed", "answers", "open")


def false_alarms(results: Sequence[Results]) -> int:
    """Disturbances under which a gate failed."""
    return sum(bool(one["gates"]) for cell in results for one in cell.false_alarms)


def missed(results: Sequence[Results]) -> int:
    """Faults that every gate let pass, or that broke one."""
    return sum(_is_missed(one) for cell in results for one in cell.misses)


def _is_missed(one: dict[str, Any]) -> bool:
    return not one["gates"] or ERROR in one["gates"]


def lines(results: Sequence[Results]) -> Iterator[str]:
    """Markdown: disturbances by target and recipe, faults by target, then what went wrong."""
    if any(cell.false_alarms for cell in results):
        yield "| Target | Recipe | Disturbances | False alarms | Nearest to a limit |"
        yield "|---|---|--:|--:|---|"
        for cell in results:
            if cell.false_alarms:
                yield _alarms(cell)
        yield ""
    if any(cell.misses for cell in results):
        named = " | ".join(GATES)
        yield f"| Target | Faults planted | In so many bundles | Missed | {named} |"
        yield f"|---|--:|--:|--:|{'--:|' * len(GATES)}"
        for target in dict.fromkeys(cell.target for cell in results):
            yield _faults(target, [cell for cell in results if cell.target == target])
        yield ""
    for cell in results:
        for one in cell.false_alarms:
            if one["gates"]:
                yield f"- False alarm, {cell.target} {cell.recipe}, {one['name']}: {one['verdict']}"
        for one in cell.misses:
            if _is_missed(one):
                why = one["verdict"] or one["nearest"]
                yield f"- Missed, {cell.target} {cell.recipe}, {one['name']}: {why}"


def _alarms(cell: Results) -> str:
    failed = sum(bool(one["gates"]) for one in cell.false_alarms)
    worst = max(cell.false_alarms, key=lambda one: float(one["severity"]))
    return (
        f"| {cell.target} | {cell.recipe} | {len(cell.false_alarms)} | {failed} | "
        f"{worst['severity']:.2f} of the limit: {worst['nearest']} ({worst['name']}) |"
    )


def _faults(target: str, cells: Sequence[Results]) -> str:
    found = [one for cell in cells for one in cell.misses]
    names = {one["name"] for one in found}
    caught = [sum(gate in one["gates"] for one in found) for gate in GATES]
    return (
        f"| {target} | {len(names)} | {len(found)} | {sum(map(_is_missed, found))} | "
        f"{' | '.join(map(str, caught))} |"
    )
