"""ExportedProgram -> MIL function, one node at a time, each value in the type that was traced.

coremltools' own PyTorch frontend is made for float32 programs: it reads a Python number beside a
float16 tensor as float32 and widens all that follows, so what `quantize.half` keeps in float32, and
what not, would be lost; it also knows neither int32 constants to dequantize nor our operators.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..quantize.quiet import quiet_import
from ..quantize.ranges import lifted

with quiet_import():
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - its name everywhere
    from coremltools.converters.mil.mil import types

Var = Any
"""A coremltools `Var`: a tensor of the function that is being built."""

Translation = Callable[["Translator", Node], Any]
"""Writes one node; returns its Var, a tuple of them, or None where nobody reads it."""

LAST = torch.iinfo(torch.int64).max


class Translator:
    """One program inside an open MIL function.

    `inputs` are the function's values for the program's user inputs, by position; None for one that
    no translation reads. `translations` maps an operator's name to how it is written.
    """

    def __init__(
        self,
        program: ExportedProgram,
        inputs: list[Var | None],
        translations: Mapping[str, Translation],
    ) -> None:
        self.program = program
        self.translations = translations
        self.values: dict[Node, Any] = {}
        # Constants come first, then the user's inputs.
        tensors = lifted(program)
        places = [node for node in program.graph.nodes if node.op == "placeholder"]
        self.constants = {n: t.detach() for n, t in zip(places, tensors, strict=False)}
        self.values.update(zip(places[len(tensors) :], inputs, strict=True))

    def run(self, until: Node | None = None) -> Var:
        """Write every node as far as `until`; returns its value, else the first output."""
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._written(node)
            if until is not None and node is until:
                return self.values[until]
            if node.op == "output":
                return self.var(node.args[0][0])
        raise RuntimeError("the program has no output")

    def _written(self, node: Node) -> Any:
        name = str(node.target)
        if name not in self.translations:
            raise NotImplementedError(f"{name} ({node.name}) is not translated to Core ML")
        source = node.args[0] if node.args else None
        if isinstance(source, Node) and source in self.values and self.values[source] is None:
            return None  # made of nothing but what no translation reads
        value = self.translations[name](self, node)
        traced = node.meta.get("val")
        if isinstance(traced, Tensor) and traced.is_floating_point() and value is not None:
            wanted = mil_type(traced.dtype)
            if value.dtype != wanted:
                raise RuntimeError(f"{node.name} became {value.dtype}, not {wanted}")
        return value

    def var(self, value: Any, dtype: torch.dtype | None = None) -> Var:
        """The Var of a node, or a number as a constant of that type; cast where types differ."""
        if not isinstance(value, Node):
            return np.array(value, numpy_type(dtype or torch.float32))[()]
        if value not in self.values:
            self.values[value] = mb.const(val=numpy(self.constants[value]), name=value.name)
        found = self.values[value]
        if dtype is not None and found.dtype != mil_type(dtype):
            found = mb.cast(x=found, dtype=types.builtin_to_string(mil_type(dtype)))
        return found

    def tensor(self, value: Any) -> Tensor:
        """A constant's numbers."""
        if not isinstance(value, Node) or value not in self.constants:
            raise NotImplementedError(f"{value} is computed at run time, not stored")
        return self.constants[value]

    def is_constant(self, value: Any) -> bool:
        """Whether a node's numbers are stored."""
        return isinstance(value, Node) and value in self.constants


def traced_type(node: Node) -> torch.dtype:
    """The type that a node's value was traced in."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


_NUMPY: Mapping[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int32,
    torch.int32: np.int32,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


def numpy_type(dtype: torch.dtype) -> Any:
    """NumPy's type for a PyTorch type as Core ML stores it: int64 becomes int32."""
    return _NUMPY[dtype]


def mil_type(dtype: torch.dtype) -> Any:
    """MIL's type for a PyTorch type."""
    return types.numpy_type_to_builtin_type(numpy_type(dtype))


def numpy(tensor: Tensor) -> NDArray[Any]:
    """A tensor's numbers in the type that Core ML stores them in; float memory is shared."""
    array: NDArray[Any] = tensor.contiguous().numpy()
    return array.astype(numpy_type(tensor.dtype), copy=False)
