"""Every stored number of an ExecuTorch file, held against the quantized programs: see `stored`."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from ..targets.executorch_model import (
    DECODER,
    EMBEDDING,
    EXPORT_HINT,
    METHODS,
    PROGRAM,
    VISION,
    WEIGHTS,
    Backend,
)
from .parity_types import Stage
from .stored_types import StoredFunction

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ..targets.executorch_contents import Contents
    from ..targets.executorch_stored import Expected, Fingerprint, Stored

STAGES = {
    VISION: Stage.IMAGE_FEATURES,
    EMBEDDING: Stage.EMBEDDINGS,
    DECODER: Stage.FIRST_TOKEN,
}
READABLE = (Backend.XNNPACK, Backend.PORTABLE, Backend.COREML)
"""Backends whose files keep numbers as they are; others compile them to forms of their own."""


def can_compare(bundle: Bundle) -> bool:
    """Whether the bundle's backend leaves its numbers readable."""
    return bundle.manifest.artifact.get("backend") in READABLE


def compare(bundle: Bundle, programs: "Mapping[str, ExportedProgram]") -> Iterator[StoredFunction]:
    """Each method, in the order in which answering a question runs them.

    Raises ExportError for files that are missing, foreign or damaged.
    """
    if bundle.manifest.artifact.get("backend") == Backend.COREML:
        from . import executorch_coreml  # noqa: PLC0415 - imports coremltools

        yield from executorch_coreml.compare(bundle, programs)
        return
    from ..targets.executorch_contents import Contents  # noqa: PLC0415 - these import executorch
    from ..targets.executorch_file import read  # noqa: PLC0415
    from ..targets.executorch_stored import expected  # noqa: PLC0415

    weights = bundle.path / WEIGHTS
    file = read(bundle.path / PROGRAM, weights if weights.exists() else None)
    for graph, name in METHODS.items():
        if name not in file.methods:
            raise ExportError(f"{file.source} has no method '{name}'.", EXPORT_HINT)
        yield _method(name, expected(programs[graph]), Contents(file.methods[name]))


def _method(name: str, wanted: "Expected", contents: "Contents") -> StoredFunction:
    from ..targets.executorch_stored import fingerprint  # noqa: PLC0415 - imports torch

    needed: Counter[Fingerprint] = Counter()
    held: list[tuple[Stored, tuple[Fingerprint, ...]]] = []
    for tensor in wanted.tensors:
        form = None
        for candidate in tensor.forms():
            prints = tuple(map(fingerprint, candidate))
            form = form or prints
            if all(one in contents.reads for one in prints):
                form = prints
                break
        held.append((tensor, form or ()))
        for one in form or ():
            needed[one] += tensor.reads
    ranges = Counter(wanted.ranges.values())
    missing = [
        tensor.name
        for tensor, form in held
        if tensor.reads and any(contents.reads[one] < needed[one] for one in form)
    ]
    missing += [
        f"{node}'s scale and zero point"
        for node, one in wanted.ranges.items()
        if contents.ranges[one] < ranges[one]
    ]
    foreign = contents.foreign(set(needed), wanted.scalars)
    foreign += [
        f"a static range of scale {one.scale:g} and zero point {one.zero_point}"
        for one in contents.ranges
        if one not in ranges
    ]
    read = [tensor for tensor in wanted.tensors if tensor.reads]
    return StoredFunction(
        package=PROGRAM,
        function=name,
        stage=STAGES[name],
        tensors=len(read),
        numbers=sum(tensor.size for tensor in read),
        missing=tuple(missing),
        foreign=tuple(foreign),
    )
