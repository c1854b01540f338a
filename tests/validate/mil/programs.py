"""Small MIL programs, saved as packages and run by the interpreter."""

import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.validate.mil import Interpreter, open_model

with quiet_import():
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - its usual name
    from coremltools.converters.mil.mil import get_new_symbol, types

# coremltools collects garbage at each conversion: everything imported so far stays.
gc.freeze()

__all__ = ["ct", "get_new_symbol", "mb", "normal", "run", "save", "types"]

Array = NDArray[Any]
_TYPES = {
    "float16": types.fp16,
    "float32": types.fp32,
    "int32": types.int32,
    "bool": types.bool,
}
_count = itertools.count()


def save(
    folder: Path,
    build: Callable[..., Any],
    inputs: Mapping[str, Array],
    *,
    states: Mapping[str, Sequence[int]] | None = None,
    target: Any = ct.target.iOS18,
) -> Path:
    """`build(**inputs, **states)` as a package, with each operation as it is written."""
    specs = [
        mb.TensorSpec(array.shape, dtype=_TYPES[array.dtype.name]) for array in inputs.values()
    ]
    for shape in (states or {}).values():
        specs.append(mb.StateTensorSpec(tuple(shape), dtype=types.fp16))
    # mb.program reads the names of the inputs off the function.
    names = ", ".join([*inputs, *(states or {})])
    function = eval(f"lambda {names}: build({names})", {"build": build})  # noqa: S307
    program = mb.program(input_specs=specs, opset_version=target)(function)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    path = folder / f"{next(_count)}.mlpackage"
    model.save(str(path))
    return path


def run(
    folder: Path,
    build: Callable[..., Any],
    inputs: Mapping[str, Array],
    *,
    exact: bool = False,
    target: Any = ct.target.iOS18,
) -> list[Array]:
    """The outputs of a program, in order."""
    model: Interpreter = open_model(save(folder, build, inputs, target=target), "main", exact=exact)
    return list(model.predict(inputs).values())


def normal(*shape: int, seed: int = 0) -> Array:
    """float32, of numbers that float16 has."""
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return drawn.astype(np.float16).astype(np.float32)
