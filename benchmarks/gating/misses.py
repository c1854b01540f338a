"""Planted faults before the gates: which gate sees each, and which fault none of them sees."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from .cells import Prepared
from .faults import contract
from .faults.base import Fault, NoPlaceError, planted
from .judge import Finding, sharp_gates, timed


def faults_of(target: str) -> list[Fault]:
    """All of a target: its own, and those in what every client reads."""
    own = import_module(f".faults.{target}", __package__)
    return [*own.faults(), *contract.faults()]


def shared_out(faults: Sequence[Fault], recipes: Sequence[str]) -> dict[str, list[Fault]]:
    """Recipe -> the faults that are planted under it.

    Core faults under each that they are for, others under one of those in turn.
    """
    found: dict[str, list[Fault]] = {recipe: [] for recipe in recipes}
    for number, fault in enumerate(faults):
        fit = [one for one in recipes if not fault.recipes or one in fault.recipes]
        chosen = fit if fault.core else fit[number % len(fit) :][:1] if fit else []
        for recipe in chosen:
            found[recipe].append(fault)
    return found


def findings(cell: Prepared, faults: Sequence[Fault]) -> Iterator[Finding | str]:
    """A finding for each fault, or the name of one that has no place in the artifact."""
    for fault in faults:
        folder = Path(tempfile.mkdtemp(prefix="gates-"))
        try:
            bundle = planted(cell.bundle, cell.reference, folder / "bundle", fault)
            yield timed(fault.name, partial(sharp_gates, cell.baseline, bundle, cell.images))
        except NoPlaceError:
            yield fault.name
        finally:
            shutil.rmtree(folder)
