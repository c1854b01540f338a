"""Every stored number of a Core ML bundle, held against the quantized programs.

What a model answers cannot show every weight: no prompt may use an embedding's row, and one integer
of a hundred million moves nothing by more than roundings do. So each constant tensor that a program
reads has to be in its package, number by number: weights, integers, scales, zero points, lookup
indices and tables, biases, rotary tables, the static ranges of activations.

It is looked up by its numbers, as packages keep no names and hold equal tensors once; of tensors
that are equal, as many are to be there as there are readers. So this does not show a tensor that
one layer reads in the place of another's, nor what the lowering adds of its own (an epsilon, a
shape, the mask), nor an operation that is not the program's: those change what is computed, and
are parity's to show.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..exporter.bundle import VALIDATE_HINT, Bundle
from ..exporter.errors import ExportError
from ..targets import TargetName
from .parity_types import STAGE_NAMES, Stage

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ..targets.coreml_stored import Stored
    from .mil.contents import Fingerprint


@dataclass(frozen=True, kw_only=True)
class StoredFunction:
    """One function of a package: what its program has, and what of that it does not hold.

    `stage` is the first that reads it; `numbers` is how many are in the `tensors`. `missing` names
    tensors as the program does; where several are equal and one is not there, all of them.
    """

    package: str
    function: str
    stage: Stage
    tensors: int
    numbers: int
    missing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True where something was compared and everything was found."""
        return self.tensors > 0 and not self.missing


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
            first = broken[0]
            count = len(first.missing)
            more = f", and {count - 1} more" if count > 1 else ""
            return (
                f"Stored weights that are not the program's, first in stage "
                f"{STAGE_NAMES[first.stage]}: {first.package} ({first.function}) does not hold "
                f"{first.missing[0]}{more}."
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


def has_stored(bundle: Bundle) -> bool:
    """Whether a bundle's weights can be compared: those of Core ML packages, on any system."""
    return bundle.manifest.target == TargetName.COREML


def compare_stored(bundle: Bundle, programs: "Mapping[str, ExportedProgram]") -> StoredWeights:
    """Look every constant of the programs up in the bundle's packages.

    One tensor is in memory at a time, beside the programs. Raises ExportError for packages that
    are missing, foreign or damaged. In the layout of Apple's app that is the tower alone: what MLX
    reads is opened, and compared, as the numbers it is.
    """
    from .mil.contents import Contents, fingerprint  # noqa: PLC0415 - imports coremltools

    found = []
    for package, tensors, functions in _expected(bundle, programs):
        contents = Contents(bundle.path / package)
        wanted = []
        for tensor in tensors:
            numbers = tensor.numbers()
            wanted.append((tensor, fingerprint(numbers), numbers.size))
            del numbers
        needed: Counter[Fingerprint] = Counter()
        for tensor, print_, _ in wanted:
            needed[print_] += tensor.reads
        for function, stage in functions.items():
            have = contents.reads(function)
            lacking = {print_ for print_, reads in needed.items() if have[print_] < reads}
            found.append(
                StoredFunction(
                    package=package,
                    function=function,
                    stage=stage,
                    tensors=len(wanted),
                    numbers=sum(size for _, _, size in wanted),
                    missing=tuple(t.name for t, print_, _ in wanted if print_ in lacking),
                )
            )
    return StoredWeights(functions=tuple(found))


def _expected(
    bundle: Bundle, programs: "Mapping[str, ExportedProgram]"
) -> Iterator[tuple[str, "tuple[Stored, ...]", Mapping[str, Stage]]]:
    """Each package, what it must hold, and the stage that each of its functions is read in."""
    from ..targets import apple_app, coreml_graphs, coreml_model  # noqa: PLC0415 - as above
    from ..targets.coreml_stored import stored  # noqa: PLC0415

    vision, artifact = programs["vision"], bundle.manifest.artifact
    features = {coreml_model.MAIN: Stage.IMAGE_FEATURES}
    if artifact.get("layout") == apple_app.LAYOUT:
        tower = stored(vision, until=coreml_graphs.unprojected(vision))
        yield apple_app.PACKAGE, tower, features
        return
    yield coreml_model.VISION, stored(vision), features
    embeddings = {coreml_model.MAIN: Stage.EMBEDDINGS}
    yield coreml_model.EMBEDDING, stored(programs["embedding"]), embeddings
    capacity = artifact.get("capacity")
    if not isinstance(capacity, int) or capacity < bundle.manifest.context:
        raise ExportError(
            f"{bundle.path}: the manifest gives the cache {capacity!r} positions.", VALIDATE_HINT
        )
    decoder = stored(programs["decoder"], capacity=capacity)
    steps = {coreml_model.PREFILL: Stage.FIRST_TOKEN, coreml_model.DECODE: Stage.TEACHER_FORCED}
    yield coreml_model.DECODER, decoder, steps
