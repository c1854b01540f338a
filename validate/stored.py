"""Every stored number of a bundle, held against the quantized programs: all but target onnx's.

What a model answers cannot show every weight: no prompt may use an embedding's row, and one integer
of a hundred million moves nothing by more than roundings do. So each constant tensor that a program
reads has to be in its package, number by number: weights, integers, scales, zero points, lookup
indices and tables, biases, rotary tables, the static ranges of activations. A package is here what
a manifest names: one of Core ML's, an ExecuTorch file with its functions, the methods, or an ONNX
graph that a TensorRT engine is built from.

It is looked up by its numbers, as packages keep no names and hold equal tensors once; of tensors
that are equal, as many are to be there as there are readers. The other way round a package has no
float, no small integer that its program has not, so that nothing is scaled or shifted in between;
what lowering adds to average or to select by a product (1/n, -1, 0 and 1) is known.

So this does not show a tensor that one layer reads in the place of another's, another operator on
the same numbers, or other shapes, axes and positions: those change what is computed, and are
parity's to show.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..exporter.bundle import VALIDATE_HINT, Bundle
from ..exporter.errors import ExportError
from ..targets import TargetName
from .parity_types import STAGE_NAMES, Stage

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ..targets.coreml_stored import Stored
    from .mil.contents import Fingerprint


NOT_COMPARED = (
    "The stored weights were not compared number by number: the bundle was made by other versions "
    "or on a processor with other instructions, where last bits differ. Its files are those that "
    "were exported: they have the hashes of its manifest."
)


@dataclass(frozen=True, kw_only=True)
class StoredFunction:
    """One function of a package: what its program has, what of that it lacks, what it has besides.

    `stage` is the first that reads it; `numbers` is how many are in the `tensors`. `missing` names
    tensors as the program does; where several are equal and one is not there, all of them.
    `foreign` are constants that the program has not, as the package names them.
    """

    package: str
    function: str
    stage: Stage
    tensors: int
    numbers: int
    missing: tuple[str, ...]
    foreign: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True where something was compared and both have the same."""
        return self.tensors > 0 and not self.missing and not self.foreign


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """All functions of a bundle, in the order in which answering a question runs them."""

    functions: tuple[StoredFunction, ...]

    @property
    def passed(self) -> bool:
        """True where there are functions and each holds what its program has."""
        return bool(self.functions) and all(one.passed for one in self.functions)

    @property
    def first_broken(self) -> Stage | None:
        """The first stage that reads other numbers than its program."""
        return next((one.stage for one in self.functions if not one.passed), None)

    @property
    def verdict(self) -> str:
        """One sentence: which tensor of which package is not the program's, or that all are."""
        broken = [one for one in self.functions if not one.passed]
        if not self.functions or any(not one.tensors for one in broken):
            return "No stored weights were compared."
        if broken:
            return (
                f"Stored numbers that are not the program's, first in stage "
                f"{STAGE_NAMES[broken[0].stage]}: {_difference(broken[0])}."
            )
        numbers = {(one.package, one.tensors, one.numbers) for one in self.functions}
        tensors = sum(count for _, count, _ in numbers)
        return f"All {tensors} stored tensors are the program's, number by number."

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "first_broken": self.first_broken,
            "functions": [asdict(one) | {"passed": one.passed} for one in self.functions],
        }


def _difference(found: StoredFunction) -> str:
    lacks = bool(found.missing)
    names = found.missing if lacks else found.foreign
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    what = f"does not hold {names[0]}{more}" if lacks else f"has {names[0]}{more} besides"
    return f"{found.package} ({found.function}) {what}"


def has_stored(bundle: Bundle) -> bool:
    """Whether a bundle's weights can be compared: those that its runtime keeps as numbers."""
    from . import executorch_stored  # noqa: PLC0415 - it imports this module

    if bundle.manifest.target == TargetName.EXECUTORCH:
        return executorch_stored.can_compare(bundle)
    return bundle.manifest.target in (TargetName.COREML, TargetName.TENSORRT)


def compare_stored(bundle: Bundle, programs: "Mapping[str, ExportedProgram]") -> StoredWeights:
    """Look every constant of the programs up in the bundle's packages.

    One tensor is in memory at a time, beside the programs. Raises ExportError for packages that
    are missing, foreign or damaged.
    """
    from . import executorch_stored, tensorrt_stored  # noqa: PLC0415 - they import this module

    if bundle.manifest.target == TargetName.EXECUTORCH:
        return StoredWeights(functions=tuple(executorch_stored.compare(bundle, programs)))
    if bundle.manifest.target == TargetName.TENSORRT:
        return StoredWeights(functions=tuple(tensorrt_stored.compare(bundle, programs)))
    return StoredWeights(functions=tuple(_compare_coreml(bundle, programs)))


def _compare_coreml(
    bundle: Bundle, programs: "Mapping[str, ExportedProgram]"
) -> Iterator[StoredFunction]:
    """Core ML's functions; in the layout of Apple's app that is the tower alone: what MLX reads is
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
