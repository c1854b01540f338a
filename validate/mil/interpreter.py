"""Run a function of a package, operation by operation, in PyTorch on the CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...exporter.errors import ExportError
from .errors import EXPORT_AGAIN, damaged
from .interface import Feature, checked_inputs, read_interface
from .node import FAILURES, Ref
from .package import Package, open_package
from .program import Program, Step, compile_function


class Interpreter:
    """A function of a package, as `targets.coreml_model.Model` has it.

    Typed, each result is rounded to the type that the program declares, so that overflow and loss
    of precision show; sums are float32. `exact`, nothing is rounded: all floats are float32,
    quantized values and states keep their fractions, and float16 outputs come as float32.
    """

    def __init__(self, package: Package, function: str, *, exact: bool) -> None:
        self._interface = read_interface(package, function)
        self._program = compile_function(package, function, exact=exact)
        self._exact = exact
        self._where = f"{package.path}, function {function!r}"
        self._is_checked = False
        _check_names(package, function, self._interface.inputs, self._program.inputs)
        _check_names(package, function, self._interface.states, self._program.states)
        _check_names(package, function, self._interface.outputs, self._program.outputs)

    @property
    def inputs(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of each input that is no state; a flexible size is -1."""
        return {name: feature.shape for name, feature in self._interface.inputs.items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what `predict` gives."""
        return tuple(self._interface.outputs)

    def make_state(self) -> dict[str, Tensor]:
        """Zeros for every state, in float32 (whose values are float16 numbers unless exact)."""
        return {
            name: torch.zeros(feature.shape, dtype=self._program.states[name].type.dtype.torch)
            for name, feature in self._interface.states.items()
        }

    def predict(
        self, inputs: Mapping[str, NDArray[Any]], state: Any = None
    ) -> dict[str, NDArray[Any]]:
        """Run once; `state` is changed in place.

        Raises ExportError for inputs or a state that are not as declared, and for an operation
        that cannot compute what it is given.
        """
        checked_inputs(self._where, self._interface.inputs, inputs)
        self._check_state(state)
        slots = list(self._program.slots)
        for name, ref in self._program.inputs.items():
            slots[ref.slot] = torch.from_numpy(np.array(inputs[name])).to(ref.type.dtype.torch)
        for name, ref in self._program.states.items():
            slots[ref.slot] = state[name]
        with torch.inference_mode():
            # The first run checks every shape; later ones repeat its operations.
            _run(self._program, slots, check=not self._is_checked)
            self._is_checked = True
        return {
            name: self._array(slots[self._program.outputs[name].slot], feature)
            for name, feature in self._interface.outputs.items()
        }

    def _array(self, tensor: Tensor | None, feature: Feature) -> NDArray[Any]:
        """A copy: the tensor may be a constant's or a state's."""
        if tensor is None:
            raise ExportError(f"{self._where}: {feature.name!r} was not computed", EXPORT_AGAIN)
        dtype = np.float32 if self._exact and tensor.is_floating_point() else feature.dtype
        return np.array(tensor.numpy(), dtype=dtype, order="C")

    def _check_state(self, state: Any) -> None:
        if not self._program.states:
            return
        found = {}
        if isinstance(state, Mapping):
            found = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)}
        wanted = {name: feature.shape for name, feature in self._interface.states.items()}
        if any(found.get(name) != shape for name, shape in wanted.items()):
            raise ExportError(
                f"{self._where}: needs the states {wanted}, not {found or 'none'}",
                "make them with make_state() of any function of the package",
            )


def open_model(package: Path, function: str, *, exact: bool = False) -> Interpreter:
    """Open a function of a saved `.mlpackage` (see `Interpreter` for `exact`).

    Raises ExportError for what is damaged, foreign, not there or beyond the interpreter.
    """
    with torch.inference_mode():
        return Interpreter(open_package(package), function, exact=exact)


def _check_names(
    package: Package, function: str, declared: Mapping[str, Feature], found: Mapping[str, Ref]
) -> None:
    if set(declared) != set(found):
        raise damaged(
            package.model_path,
            f"describes {sorted(declared)} of function {function!r}, which has {sorted(found)}",
        )
    for name, feature in declared.items():
        shape = found[name].type.shape
        if len(shape) != len(feature.shape) and feature.shape:
            raise damaged(package.model_path, f"describes {name!r} as {feature.shape}, not {shape}")


def _run(program: Program, slots: list[Any], *, check: bool) -> None:
    """Make every step. What PyTorch refuses to compute is the program's or the inputs' fault."""
    step = None
    try:
        for step in program.steps:
            made = step.run(*[slots[slot] for slot in step.operands])
            results = made if isinstance(made, tuple) else (made,)
            if check:
                _check_results(step, results)
            for slot, result, store in zip(step.results, results, step.stores, strict=True):
                slots[slot] = result if store is None else store(result)
            for slot in step.dead:
                slots[slot] = None
    except FAILURES as error:
        if step is None:
            raise
        raise step.node.error(f"cannot be computed: {error}") from error


def _check_results(step: Step, results: tuple[Tensor, ...]) -> None:
    for (name, _), type_, result in zip(step.node.outputs, step.types, results, strict=True):
        if not type_.fits(tuple(result.shape)):
            raise step.node.error(
                f"makes {name!r} of shape {list(result.shape)}, declared {list(type_.shape)}"
            )
