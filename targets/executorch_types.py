"""What a parsed ExecuTorch program is made of: methods, their steps and tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..exporter.errors import ExportError
from .executorch_model import EXPORT_HINT

Numbers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of a method. `sizes` are the largest where `dynamic`; `dtype` is NumPy's name.

    `data` is what the file holds for it: a constant's numbers, or a buffer's first ones. `place`
    is where the runtime keeps it: the number of a planned memory, from 0, and an offset in bytes.
    """

    dtype: str
    sizes: Numbers
    dim_order: Numbers
    dynamic: bool
    name: str = ""
    data: memoryview | None = field(default=None, repr=False)
    place: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def shape(self) -> str:
        """`float32[1,3,256,256]`, and `<=` before the sizes that are only bounds."""
        bound = "<=" if self.dynamic else ""
        return f"{self.dtype}[{','.join(f'{bound}{size}' for size in self.sizes)}]"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operator that is run outside of any delegate: its arguments, the outputs behind them.

    An argument is a Tensor, a number, a text, None, or a tuple of these. `indices` are their
    numbers among the method's `values`.
    """

    operator: str
    args: tuple[Any, ...]
    indices: Numbers = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Delegate:
    """A part of a method that a backend runs; `tensors` are its inputs, then its outputs.

    `indices` are their numbers among the method's `values`.
    """

    backend: str
    tensors: tuple[Any, ...]
    compile_specs: Mapping[str, bytes]
    processed: memoryview = field(repr=False)
    file: "PteFile" = field(repr=False, compare=False)
    indices: Numbers = field(default=(), repr=False, compare=False)

    def payload(self) -> bytes:
        """What the backend's compiler wrote."""
        return bytes(self.processed)

    @property
    def processed_bytes(self) -> int:
        """Size of the payload; its named data are not in it."""
        return len(self.processed)


@dataclass(frozen=True, kw_only=True)
class Method:
    """An entry point: `inputs` and `outputs` are Tensors, or numbers where they are fixed.

    `steps` are its calls and delegates in the order that they run in.
    """

    name: str
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    steps: tuple[Call | Delegate, ...]
    constants: tuple[Tensor, ...]
    """Tensors whose numbers the file holds and nothing writes."""
    buffers: tuple[Tensor, ...]
    """Tensors that keep their numbers from run to run: the cache."""
    planned_bytes: Numbers
    """Memory that the runtime sets aside for its other tensors."""
    values: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    """Everything that its steps read and write, by number."""
    lists: Mapping[int, Numbers] = field(default_factory=dict, repr=False, compare=False)
    """The numbers of what those lists hold that name other values; -1: nothing."""
    ends: tuple[Numbers, Numbers] = field(default=((), ()), repr=False, compare=False)
    """The numbers of its inputs and outputs."""
    control: tuple[str, ...] = ()
    """Instructions that compute nothing: jumps, moves."""

    @property
    def calls(self) -> tuple[Call, ...]:
        """The operators that no backend runs, in order."""
        return tuple(step for step in self.steps if isinstance(step, Call))

    @property
    def kernels(self) -> tuple[str, ...]:
        """Their names, `aten::add.out`."""
        return tuple(call.operator for call in self.calls)

    @property
    def delegates(self) -> tuple[Delegate, ...]:
        """The parts that backends run, in order."""
        return tuple(step for step in self.steps if isinstance(step, Delegate))


class Segment(NamedTuple):
    """A range of bytes behind the program; `offset` counts from the first segment's place."""

    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class PteFile:
    """An opened program. Its views stay valid as long as any of them is kept."""

    source: str
    methods: Mapping[str, Method]
    """The methods that compute something."""
    constant_methods: Mapping[str, tuple[Any, ...]]
    """Methods without inputs -> the values that they always return."""
    named: Mapping[str, memoryview] = field(repr=False)
    """Key -> bytes: what delegates, and tensors outside of the program, look up by name."""
    segments: tuple[Segment, ...] = field(repr=False)
    program_bytes: int
    total_bytes: int

    def named_data(self, key: str) -> memoryview:
        """The bytes of a key, in the program or in the weight file. Raises ExportError."""
        try:
            return self.named[key]
        except KeyError:
            raise ExportError(f"{self.source} has no data named '{key}'.", EXPORT_HINT) from None

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that its delegates need, each once."""
        found = (one.backend for method in self.methods.values() for one in method.delegates)
        return tuple(dict.fromkeys(found))
