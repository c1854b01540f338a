"""What a function takes and gives, from a package's description: names, shapes, number types."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...exporter.errors import ExportError
from .errors import damaged, foreign
from .package import Package

# The numbers are those of FeatureTypes.proto's ArrayDataType.
_DTYPES: dict[int, type[np.generic]] = {
    65568: np.float32,
    65552: np.float16,
    65600: np.float64,
    131104: np.int32,
    131080: np.int8,
}


@dataclass(frozen=True, kw_only=True)
class Feature:
    """An input, output or state: its type, and the least and greatest size of each dimension.

    `choices` are the shapes there are where they are counted out; a greatest size of -1 is none.
    """

    name: str
    dtype: type[np.generic]
    low: tuple[int, ...]
    high: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """A flexible size is -1."""
        return tuple(
            low if low == high else -1 for low, high in zip(self.low, self.high, strict=True)
        )

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of that shape may be given."""
        if self.choices:
            return shape in self.choices
        return len(shape) == len(self.low) and all(
            low <= size and high in (-1, max(size, high))
            for low, size, high in zip(self.low, shape, self.high, strict=True)
        )

    def __str__(self) -> str:
        if self.choices:
            return f"{np.dtype(self.dtype).name} of " + " or ".join(map(str, self.choices))
        sizes = [
            str(low) if low == high else f"{low}..{'' if high < 0 else high}"
            for low, high in zip(self.low, self.high, strict=True)
        ]
        return f"{np.dtype(self.dtype).name} [{', '.join(sizes)}]"


@dataclass(frozen=True, kw_only=True)
class Interface:
    """The features of one function, by name and in the package's order."""

    inputs: Mapping[str, Feature]
    outputs: Mapping[str, Feature]
    states: Mapping[str, Feature]


def read_interface(package: Package, function: str) -> Interface:
    """Raises ExportError for inputs that are no arrays, such as images."""
    description = package.spec.description
    for candidate in description.functions:
        if candidate.name == function:
            description = candidate
            break
    return Interface(
        inputs={feature.name: _feature(package, feature) for feature in description.input},
        outputs={feature.name: _feature(package, feature) for feature in description.output},
        states={feature.name: _feature(package, feature) for feature in description.state},
    )


def _feature(package: Package, message: Any) -> Feature:
    kind = message.type.WhichOneof("Type")
    if kind == "stateType":
        array = message.type.stateType.arrayType
    elif kind == "multiArrayType":
        array = message.type.multiArrayType
    else:
        raise foreign(package.path, f"has {message.name!r} of {kind}, which is no array")
    if array.dataType not in _DTYPES:
        raise damaged(package.model_path, f"has {message.name!r} of an unknown number type")
    low = high = tuple(int(size) for size in array.shape)
    choices: tuple[tuple[int, ...], ...] = ()
    flexible = array.WhichOneof("ShapeFlexibility")
    if flexible == "shapeRange":
        low = tuple(int(size.lowerBound) for size in array.shapeRange.sizeRanges)
        high = tuple(int(size.upperBound) for size in array.shapeRange.sizeRanges)
    elif flexible == "enumeratedShapes":
        choices = tuple(tuple(map(int, s.shape)) for s in array.enumeratedShapes.shapes)
        if not choices or len({len(shape) for shape in choices}) > 1:
            raise damaged(package.model_path, f"has {message.name!r} of shapes of several ranks")
        low = tuple(map(min, zip(*choices, strict=True)))
        high = tuple(map(max, zip(*choices, strict=True)))
    return Feature(
        name=message.name, dtype=_DTYPES[array.dataType], low=low, high=high, choices=choices
    )


def checked_inputs(
    where: str, features: Mapping[str, Feature], inputs: Mapping[str, NDArray[Any]]
) -> None:
    """Raises one ExportError that names everything wrong with the inputs."""
    problems = [f"{name} is missing" for name in features if name not in inputs]
    problems += [f"{name} is no input" for name in inputs if name not in features]
    for name, array in inputs.items():
        feature = features.get(name)
        if feature is None:
            continue
        if not isinstance(array, np.ndarray):
            problems.append(f"{name} is {type(array).__name__}, not an array: it takes {feature}")
        elif array.dtype != feature.dtype or not feature.takes(array.shape):
            problems.append(f"{name} is {array.dtype} {list(array.shape)}, but it takes {feature}")
    if problems:
        takes = "; ".join(f"{name}: {feature}" for name, feature in features.items()) or "nothing"
        raise ExportError(f"{where}: {', '.join(problems)}", f"it takes {takes}")
