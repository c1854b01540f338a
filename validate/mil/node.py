"""One operation of a program while it is compiled, and the kernel it is compiled to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from ...exporter.errors import ExportError
from .errors import EXPORT_AGAIN
from .numbers import range_of
from .package import Package
from .values import Constant, Type

FAILURES = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What is raised for parameters that make no sense: a file's fault, not a bug's."""


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A tensor that an operation takes: the slot it lies in while the program runs.

    `constant` where it is the same in every run.
    """

    slot: int
    name: str
    type: Type
    constant: Constant | None = None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a run calls: `run(*tensors of operands)` gives a tensor, or a tuple of several.

    With `rounds` the results are yet to be rounded to the output's type, and are new tensors;
    with `views` a result may share the memory of the first operand. `in_place` does the same as
    `run`, but overwrites the first operand.
    """

    run: Callable[..., Any]
    operands: tuple[Ref, ...]
    rounds: bool = True
    views: bool = False
    in_place: Callable[..., Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """An operation with its kernel and the tensors that it makes."""

    node: "Node"
    kernel: Kernel
    results: tuple[Ref, ...]


class Node:
    """An operation: its parameters by name, its outputs' types, and whether to be `exact`.

    `opset` is the version of MIL's operations: 8 is iOS 18's.

    Every accessor raises ExportError that names the operation where a parameter is missing or
    of the wrong kind.
    """

    def __init__(
        self,
        kind: str,
        place: str,
        inputs: Mapping[str, Sequence[Ref | str]],
        outputs: Sequence[tuple[str, Type]],
        *,
        exact: bool,
        opset: int,
        package: Package,
    ) -> None:
        self.kind = kind
        self.opset = opset
        self.package = package
        self.exact = exact
        self.outputs = outputs
        self._place = place
        self._inputs = inputs

    @property
    def name(self) -> str:
        """The name of its first output."""
        return self.outputs[0][0] if self.outputs else ""

    @property
    def type(self) -> Type:
        """The type of its first output."""
        if not self.outputs:
            raise self.error("has no output")
        return self.outputs[0][1]

    def error(self, what: str) -> ExportError:
        """An error that says which operation of which function `what` is about."""
        return ExportError(f"{self._place}: {self.kind} {self.name!r} {what}", EXPORT_AGAIN)

    @contextmanager
    def blamed(self, what: str) -> Iterator[None]:
        """What Python and PyTorch refuse within is this operation's fault, and is said so."""
        try:
            yield
        except FAILURES as error:
            raise self.error(f"{what}: {error}") from error

    def has(self, parameter: str) -> bool:
        """Whether the parameter is given."""
        return bool(self._inputs.get(parameter))

    def refs(self, parameter: str) -> tuple[Ref, ...]:
        """The tensors of a parameter that takes any number of them."""
        found = self._inputs.get(parameter, ())
        refs = tuple(ref for ref in found if isinstance(ref, Ref))
        if not refs or len(refs) != len(found):
            raise self.error(f"has no tensor {parameter!r}")
        return refs

    def ref(self, parameter: str) -> Ref:
        """The tensor of a parameter."""
        refs = self.refs(parameter)
        if len(refs) != 1:
            raise self.error(f"has {len(refs)} tensors {parameter!r}, not one")
        return refs[0]

    def is_constant(self, parameter: str) -> bool:
        """Whether the parameter is the same in every run (or missing)."""
        return not self.has(parameter) or self.ref(parameter).constant is not None

    def constant(self, parameter: str) -> Constant:
        """The constant that a parameter must be."""
        constant = self.ref(parameter).constant
        if constant is None:
            raise self.error(f"needs {parameter!r} to be a constant")
        return constant

    def array(self, parameter: str) -> NDArray[Any]:
        """A constant's numbers as stored."""
        return self.constant(parameter).array()

    def numbers(self, parameter: str, default: Sequence[int] | None = None) -> list[int]:
        """A constant vector of integers, or of truth values."""
        if not self.has(parameter) and default is not None:
            return list(default)
        return [int(number) for number in self.array(parameter).reshape(-1).tolist()]

    def scalars(self, parameter: str) -> list[int]:
        """Any number of constant scalars of integers, or of truth values."""
        constants = [ref.constant for ref in self.refs(parameter)]
        if any(constant is None or constant.type.shape for constant in constants):
            raise self.error(f"needs constant scalars for {parameter!r}")
        return [int(constant.array().item()) for constant in constants if constant is not None]

    def number(self, parameter: str, default: float | None = None) -> Any:
        """A constant scalar: an int, a float or a bool."""
        if not self.has(parameter) and default is not None:
            return default
        array = self.array(parameter)
        if array.size != 1:
            raise self.error(f"needs one number for {parameter!r}, not {array.size}")
        return array.reshape(-1)[0].item()

    def text(self, parameter: str, default: str | None = None) -> str:
        """A constant string."""
        found = self._inputs.get(parameter, ())
        if not found and default is not None:
            return default
        if len(found) != 1 or not isinstance(found[0], str):
            raise self.error(f"needs a string for {parameter!r}")
        return found[0]

    def kernel(
        self,
        run: Callable[..., Any],
        *parameters: str,
        rounds: bool = True,
        views: bool = False,
    ) -> Kernel:
        """A kernel on the tensors of these parameters, in this order."""
        operands = tuple(ref for parameter in parameters for ref in self.refs(parameter))
        return Kernel(run=run, operands=operands, rounds=rounds, views=views)

    def is_float(self, parameter: str) -> bool:
        """Whether a parameter's tensor is of a float type."""
        return self.ref(parameter).type.dtype.is_float


def wrapper(type_: Type) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Brings an integer result to its declared type: wraps around, as the type's own sums do."""
    held, dtype = type_.dtype.torch, type_.dtype
    if dtype.name in ("uint16", "uint32", "uint4", "int4"):
        low, high = range_of(dtype)
        return lambda x: ((x.to(torch.int64) - low) % (high - low + 1) + low).to(held)
    return lambda x: x if x.dtype == held else x.to(held)
