"""What the comparison of a bundle's stored numbers found: see `stored`."""

from dataclasses import asdict, dataclass

from .parity_types import STAGE_NAMES, Stage


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
