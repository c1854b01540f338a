"""What an ONNX graph of TensorRT's must hold of a program: every constant that is read.

Said from the program alone, so that a saved file can be held against it. Constants are stored as
they are, but for

- a matrix [N,K], which may lie transposed: torch.onnx does that to small ones;
- what is made of constants alone (a norm's weight with more axes, in another type): what comes of
  it, or what it is made of;
- a weight's scales: in the type of the weight that they make;
- static activations: their scale, a number in the type that is rounded or made.

Not stored are zero points of weights, which are zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram
from torch.fx import Node

from ..exporter.errors import ExportError
from ..quantize.ranges import DEQUANTIZE_TENSOR, DEQUANTIZE_WEIGHT, FP8_LINEAR, QUANTIZE
from .onnx_numbers import Fingerprint, fingerprint, fingerprint_of
from .program_constants import Constants, live_nodes, scalars
from .tensorrt_attention import HIDDEN
from .tensorrt_plan import HINT

SCALED = "aten.scaled_dot_product_attention.default"
ATTENTION = "fastvlm.cached_attention.default"
HEADS = 8
"""Where attention says its number of heads."""

_INPUT_SCALE = 4
"""Where an fp8 layer has the scale of its activations."""

_FLOATS = ("float32", "float16", "bfloat16", "float8_e4m3fn")
_SMALL_INTEGERS = ("int8", "uint8", "int4")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor that a file must hold in one of `forms`; `needed`: False where it changes nothing.

    `size` is how many numbers it has.
    """

    name: str
    forms: Callable[[], Iterator[Fingerprint]]
    size: int
    needed: bool


@dataclass(frozen=True, kw_only=True)
class Expected:
    """All that a graph's file must hold, and the single numbers that it may."""

    tensors: tuple[Stored, ...]
    scalars: frozenset[float]


def expected(program: ExportedProgram) -> Expected:
    """All that the program's first output is computed from.

    Raises RuntimeError where that leaves out a constant that some operator reads.
    """
    constants = Constants(program)
    live = live_nodes(program)
    found: dict[str, Stored] = {}
    numbers = set(scalars(program)) | {HIDDEN}
    for node in program.graph.nodes:
        if node not in live or node.op != "call_function" or node in constants:
            continue
        for one in _read_by(node, constants):
            if one.name not in found or one.needed:
                found[one.name] = one
        numbers |= set(_of_attention(node))
    constants.refuse_forgotten(live)
    return Expected(tensors=tuple(found.values()), scalars=frozenset(numbers))


def _of_attention(node: Node) -> Iterator[float]:
    """What attention multiplies scores by, where no operator names it."""
    if str(node.target) in (SCALED, ATTENTION):
        width = node.all_input_nodes[0].meta["val"].shape[-1]
        heads: Any = node.args[HEADS] if str(node.target) == ATTENTION else 1
        yield (width // heads) ** -0.5


def _read_by(node: Node, constants: Constants) -> Iterator[Stored]:
    """What one operator reads that is computed at run time."""
    kind = str(node.target)
    arguments: tuple[Any, ...] = node.args
    if kind in (QUANTIZE, DEQUANTIZE_TENSOR):
        real = arguments[0] if kind == QUANTIZE else node
        yield _scale_of(node, float(arguments[1]), real.meta["val"].dtype)
    elif kind == FP8_LINEAR:
        scale = float(arguments[_INPUT_SCALE])
        yield _scale_of(node, scale, arguments[0].meta["val"].dtype)
    for source in (n for n in node.all_input_nodes if n in constants):
        if str(source.target) == DEQUANTIZE_WEIGHT:
            weight, scale_node, zeros = source.all_input_nodes[:3]
            if constants.value(zeros).any():
                raise RuntimeError(f"{source}: TensorRT's weights have no zero points")
            constants.accounted.update(constants.leaves(zeros))
            dtype = source.meta["val"].dtype
            yield _stored(weight, constants, weight.meta["val"].dtype)
            yield _stored(scale_node, constants, dtype)
        else:
            dtype = source.meta["val"].dtype
            neutral = constants.changes_nothing(node, source, dtype)
            yield _stored(source, constants, dtype, needed=not neutral)


def _scale_of(node: Node, scale: float, dtype: torch.dtype) -> Stored:
    def forms() -> Iterator[Fingerprint]:
        yield fingerprint_of(torch.tensor(scale, dtype=dtype))

    return Stored(name=f"{node.name}'s scale", forms=forms, size=1, needed=True)


def _stored(
    source: Node, constants: Constants, dtype: torch.dtype, *, needed: bool = True
) -> Stored:
    """A constant in that type, or what it is made of."""
    names = constants.leaves(source)
    constants.accounted.update(names)

    def forms() -> Iterator[Fingerprint]:
        value = constants.value(source)
        for one in (value.to(dtype), value):
            yield fingerprint_of(one)
            if one.dim() == 2:
                yield fingerprint_of(one.T)
        for node, name in constants.names.items():
            if name == names[0]:
                yield fingerprint_of(constants.values[node])

    made = "" if source in constants.values else f" ({source.name})"
    size = int(np.prod(source.meta["val"].shape))
    return Stored(name=f"{names[0]}{made}", forms=forms, size=size, needed=needed)


class Contents:
    """The numbers of an ONNX file, one tensor in memory at a time. `names` are what it calls them.

    Raises ExportError for a file that is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.names: dict[Fingerprint, str] = {}
        self._weights: set[Fingerprint] = set()
        self._single: dict[Fingerprint, float] = {}
        try:
            for name, value in sorted(ir.load(path).graph.initializers.items()):
                if value.const_value is not None:
                    self._add(name, value.const_value.numpy())
        except Exception as error:  # of protobuf, of onnx_ir and of the file system
            raise ExportError(f"{path} can't be read: {error}", HINT) from error

    def _add(self, name: str, array: NDArray[Any]) -> None:
        kind = str(array.dtype)
        if kind not in (*_FLOATS, *_SMALL_INTEGERS):
            return  # shapes and places
        found = fingerprint(array)
        self.names.setdefault(found, name)
        if array.size == 1:
            self._single[found] = float(array.reshape(-1)[0])
        else:
            self._weights.add(found)

    def foreign(self, known: set[Fingerprint], numbers: frozenset[float]) -> list[str]:
        """What is neither of a program's tensors nor one of its single numbers, by name."""
        with np.errstate(over="ignore"):
            rounded = {float(cast(n)) for n in numbers for cast in (np.float32, np.float16, _bf16)}
        odd = [one for one in self._weights if one not in known]
        odd += [
            one
            for one, number in self._single.items()
            if one not in known and number not in rounded
        ]
        return sorted(self.names[one] for one in odd)


def _bf16(number: float) -> float:
    return float(torch.tensor(number).bfloat16())
