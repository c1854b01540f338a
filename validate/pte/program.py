"""Run the methods of a program, step by step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...exporter.errors import ExportError
from ...targets.executorch_file import Call, Delegate, Method, PteFile
from ...targets.executorch_model import EXPORT_HINT
from ...targets.executorch_xnn import XNNPACK
from .errors import FAILURES, RefusedError, refused
from .kernels import Step, compile_call
from .memory import Memory
from .xnn import XnnDelegate


class Program:
    """The methods of a file by name. A method's buffers keep their numbers between its calls.

    Raises ExportError for what is damaged or beyond the interpreter, and so does `run`.
    """

    def __init__(self, file: PteFile) -> None:
        self._source = file.source
        with torch.inference_mode():
            self._methods = {
                name: _Method(method, f"{file.source}, method '{name}'")
                for name, method in file.methods.items()
            }

    def run(self, method: str, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Inputs of a method -> copies of its outputs."""
        if method not in self._methods:
            raise ExportError(f"{self._source} has no method '{method}'.", EXPORT_HINT)
        with torch.inference_mode():
            return self._methods[method].run(inputs)


class _Method:
    def __init__(self, method: Method, where: str) -> None:
        self._where = where
        self._inputs, self._outputs = method.ends
        try:
            if method.control:
                raise RefusedError(f"it has the instructions {', '.join(set(method.control))}")
            self._memory = Memory(method)
        except FAILURES as error:
            raise refused(where, error) from error
        self._steps = [
            self._step(number, step, method.steps) for number, step in enumerate(method.steps)
        ]

    def _step(self, number: int, step: Call | Delegate, steps: Sequence[Any]) -> tuple[str, Step]:
        name = step.operator if isinstance(step, Call) else step.backend
        where = f"{self._where}, step {number} of {len(steps)} ({name})"
        if isinstance(step, Delegate) and step.backend == XNNPACK:
            return where, _delegated(XnnDelegate(step, where), step.indices)
        try:
            if isinstance(step, Delegate):
                raise RefusedError("no such backend is known")
            return where, compile_call(step)
        except FAILURES as error:
            raise refused(where, error) from error

    def run(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        if len(inputs) != len(self._inputs):
            raise refused(self._where, f"it takes {len(self._inputs)} inputs, not {len(inputs)}")
        for index, given in zip(self._inputs, inputs, strict=True):
            self._do(f"{self._where}, input {index},", _written(index, given))
        for where, step in self._steps:
            self._do(where, step)
        found = [self._memory.read(index) for index in self._outputs]
        return tuple(one.clone() if isinstance(one, Tensor) else one for one in found)

    def _do(self, where: str, step: Step) -> None:
        try:
            step(self._memory)
        except FAILURES as error:
            raise refused(where, error) from error


def _written(index: int, given: Tensor) -> Step:
    return lambda memory: memory.write(index, given)


def _delegated(delegate: XnnDelegate, indices: Sequence[int]) -> Step:
    """Arguments go in and out as they lie in memory: their axes in that order."""

    def run(memory: Memory) -> None:
        arguments = []
        for index in indices:
            order = memory.tensor(index).dim_order
            found = memory.read(index)
            arguments.append(found.permute(order) if order else found)
        for number, result in delegate(arguments).items():
            order = memory.tensor(indices[number]).dim_order
            axes = [order.index(axis) for axis in range(len(order))]
            memory.write(indices[number], result.permute(axes) if order else result)

    return run
