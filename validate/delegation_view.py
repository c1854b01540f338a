"""The placement of an ExecuTorch program in words and as tables, for the page and a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..targets.executorch_model import Backend
from .delegation import BACKEND_NAMES, Delegation, MethodDelegation, Work, percent

SHOWN = 6
"""Kinds of operators that are named, of those that compute and of those that only move numbers."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method. `passed` is None where it has no limit."""

    method: str
    delegates: str
    operators: str
    flops: str
    passed: bool | None


def rows(found: Delegation) -> list[Row]:
    """A row for each method: delegates, operators in them of all, their share of the FLOPs."""
    return [
        Row(
            method=one.method,
            delegates=_delegates(one, found.backend),
            operators=f"{one.nodes_inside:,} of {one.nodes_inside + one.nodes_outside:,}",
            flops=percent(one.share_of_flops),
            passed=None if one.expected is None else one.passed,
        )
        for one in found.methods
    ]


def _delegates(one: MethodDelegation, backend: str) -> str:
    """Their number, and their backends' names where they are not the bundle's."""
    others = {name for name in one.delegates if name != BACKEND_NAMES.get(Backend(backend))}
    names = f" ({', '.join(sorted(others))})" if others else ""
    return f"{len(one.delegates)}{names}"


def details(found: Delegation) -> Iterator[tuple[str, str]]:
    """(what, names with counts) of each method: what costs most inside, what is left outside."""
    for one in found.methods:
        for place, works in (("inside", one.inside), ("outside", one.outside)):
            total = sum(work.flops for work in works)
            parts = (
                _listed([work for work in works if work.flops], total),
                _listed([work for work in works if not work.flops], total),
            )
            if works:
                yield f"{one.method}, {place}", "; without FLOPs: ".join(filter(None, parts))


def _listed(works: Sequence[Work], total: int) -> str:
    shown = ", ".join(_named(one, total) for one in works[:SHOWN])
    more = f", {len(works) - SHOWN} more kinds" if len(works) > SHOWN else ""
    return shown + more


def _named(one: Work, total: int) -> str:
    cost = f" {percent(one.flops / total)}" if one.flops else ""
    return f"{one.nodes} {one.kind}{cost}"


def terminal(found: Delegation) -> Group:
    """The table, and below it what is inside and outside of the delegates."""
    title = f"Placement on backend '{found.backend}': operators and FLOPs in delegates"
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("Method", no_wrap=True)
    for name in ("Delegates", "Operators", "FLOPs"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows(found):
        table.add_row(row.method, row.delegates, row.operators, row.flops, _sign(row.passed))
    notes: list[RenderableType] = [
        Text(f"{what}: {names}", "dim") for what, names in details(found)
    ]
    if not found.passed or not found.limited:
        notes.append(Text(found.verdict, "yellow" if found.passed else "red"))
    return Group(table, *notes)


def _sign(passed: bool | None) -> Text:
    if passed is None:
        return Text("no limit", "dim")
    return Text("✓", "green") if passed else Text("✗", "bold red")
