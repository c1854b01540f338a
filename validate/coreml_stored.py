"""Every stored number of Core ML's packages, held against the quantized programs: see `stored`."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..exporter.bundle import VALIDATE_HINT, Bundle
from ..exporter.errors import ExportError
from .parity_types import Stage
from .stored_types import StoredFunction

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ..targets.coreml_stored import Stored
    from .mil.contents import Fingerprint


def compare(bundle: Bundle, programs: "Mapping[str, ExportedProgram]") -> Iterator[StoredFunction]:
    """Each function; in the layout of Apple's app that is the tower alone: what MLX reads is
    opened, and compared, as the numbers it is.
    """
    for one in _expected(bundle, programs):
        yield from compare_package(bundle.path / one.package, one)


def compare_package(path: Path, one: "Expected") -> Iterator[StoredFunction]:
    """Each function of a saved package, against what it must hold."""
    from .mil.contents import Contents, fingerprint, is_weight  # noqa: PLC0415 - imports coremltools

    contents = Contents(path)
    wanted = []
    for tensor in one.tensors:
        numbers = tensor.numbers()
        wanted.append((tensor, fingerprint(numbers), numbers.size))
        del numbers
    needed: Counter[Fingerprint] = Counter()
    for tensor, print_, _ in wanted:
        needed[print_] += tensor.reads
    known = {*needed, *_fingerprints(one.scalars)}
    for function, stage in one.functions.items():
        have = contents.reads(function)
        lacking = {print_ for print_, reads in needed.items() if have[print_] < reads}
        foreign = [print_ for print_ in have if is_weight(print_) and print_ not in known]
        needing = [(tensor, p, size) for tensor, p, size in wanted if tensor.reads]
        yield StoredFunction(
            package=one.package,
            function=function,
            stage=stage,
            tensors=len(needing),
            numbers=sum(size for *_, size in needing),
            missing=tuple(tensor.name for tensor, p, _ in needing if p in lacking),
            foreign=tuple(sorted(contents.names[print_] for print_ in foreign)),
        )


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a package must hold; `functions` -> the stage that each is first read in."""

    package: str
    functions: Mapping[str, Stage]
    tensors: "tuple[Stored, ...]"
    scalars: frozenset[float]


def _expected(bundle: Bundle, programs: "Mapping[str, ExportedProgram]") -> Iterator[Expected]:
    from ..targets import apple_app, coreml_decoder, coreml_graphs  # noqa: PLC0415 - as above
    from ..targets import coreml_model as names  # noqa: PLC0415
    from ..targets.coreml_stored import stored  # noqa: PLC0415
    from ..targets.program_constants import scalars  # noqa: PLC0415

    vision, artifact = programs["vision"], bundle.manifest.artifact
    is_app = artifact.get("layout") == apple_app.LAYOUT
    until = coreml_graphs.unprojected(vision) if is_app else None
    yield Expected(
        package=apple_app.PACKAGE if is_app else names.VISION,
        functions={names.MAIN: Stage.IMAGE_FEATURES},
        tensors=stored(vision, until=until),
        scalars=scalars(vision, until=until),
    )
    if is_app:
        return
    yield Expected(
        package=names.EMBEDDING,
        functions={names.MAIN: Stage.EMBEDDINGS},
        tensors=stored(programs["embedding"]),
        scalars=scalars(programs["embedding"]),
    )
    capacity = artifact.get("capacity")
    if not isinstance(capacity, int) or capacity < bundle.manifest.context:
        raise ExportError(
            f"{bundle.path}: the manifest gives the cache {capacity!r} positions.", VALIDATE_HINT
        )
    yield Expected(
        package=names.DECODER,
        functions={names.PREFILL: Stage.FIRST_TOKEN, names.DECODE: Stage.TEACHER_FORCED},
        tensors=stored(programs["decoder"], capacity=capacity),
        scalars=scalars(programs["decoder"]) | {coreml_decoder.HIDDEN},
    )


def _fingerprints(numbers: frozenset[float]) -> "Iterator[Fingerprint]":
    """Of single numbers, in both types that a package may have them in."""
    from .mil.contents import fingerprint  # noqa: PLC0415 - imports coremltools

    with np.errstate(over="ignore"):
        for number in numbers:
            yield from (fingerprint(np.array(number, kind)) for kind in (np.float16, np.float32))
