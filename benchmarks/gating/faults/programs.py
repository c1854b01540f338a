"""Faults in the programs that targets lower: for what no file can be patched to compute."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .base import Alteration, NoPlaceError

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def gelu_by_tanh(*indices: int) -> Alteration:
    """The approximation in the place of some of the tower's, or (no index) of all."""

    @contextmanager
    def altered(programs: "Mapping[str, ExportedProgram]") -> Iterator[None]:
        graph = programs["vision"].graph
        found = [node for node in graph.nodes if "gelu" in str(node.target)]
        if not found:
            raise NoPlaceError("the tower has no GELU")
        chosen = [found[index] for index in indices] or found
        before = [node.kwargs for node in chosen]
        for node in chosen:
            node.kwargs = {**node.kwargs, "approximate": "tanh"}
        try:
            yield
        finally:
            for node, kwargs in zip(chosen, before, strict=True):
                node.kwargs = kwargs

    return altered
