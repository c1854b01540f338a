"""MIL functions -> `.mlpackage` on disk, the same bytes for the same program."""

import gc
import json
import tempfile
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..quantize.quiet import quiet_import
from .coreml_lowering import Var
from .coreml_model import MAIN

with quiet_import():
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - its name everywhere
    from coremltools.converters.mil.mil import Function, Program, get_new_symbol, types
    from coremltools.converters.mil.mil.passes import pass_pipeline
    from coremltools.proto import Model_pb2

PASSES = (
    "common::noop_elimination",
    "common::const_elimination",
    "common::cast_optimization",
    "common::const_deduplication",
    "common::dead_code_elimination",
    "common::dedup_op_and_var_names",
)
"""Nothing that computes otherwise: the program has been lowered as it shall run."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """An input of a function: float32 or int32. `longest` is of an axis of any size.

    Where several inputs of a function have one, it is the same size.
    """

    shape: tuple[int, ...]
    integer: bool = False
    longest: int | None = None
    axis: int = -1

    def sized(self, size: Any) -> tuple[Any, ...]:
        """The shape with `size` for the axis of any size, if there is one."""
        if self.longest is None:
            return self.shape
        axis = self.axis % len(self.shape)
        return (*self.shape[:axis], size, *self.shape[axis + 1 :])


@dataclass(frozen=True, kw_only=True)
class FunctionSpec:
    """What a function takes; `body` gets its values by name and returns the output."""

    inputs: Mapping[str, Input]
    output: str
    body: Callable[[Mapping[str, Var]], Var]
    states: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def save(functions: Mapping[str, FunctionSpec], target: str, path: Path) -> None:
    """Build the functions and write them as one package; several share equal weights.

    `target` names one of coremltools' deployment targets. The first function is the default.
    """
    with (
        _fast_collections(),
        tempfile.TemporaryDirectory(prefix="fastvlm-coreml-", dir=path.parent) as folder,
    ):
        if list(functions) == [MAIN]:
            _convert(functions[MAIN], target).save(str(path))
        else:
            joined = ct.utils.MultiFunctionDescriptor()
            for name, spec in functions.items():
                part = str(Path(folder) / f"{name}.mlpackage")
                _convert(spec, target).save(part)
                joined.add_function(part, MAIN, name)
            joined.default_function_name = next(iter(functions))
            with _quiet():
                ct.utils.save_multifunction(joined, str(path))
    _settle(path)


def _convert(spec: FunctionSpec, target: str) -> Any:
    system = getattr(ct.target, target)
    program = Program()
    with Function(_placeholders(spec), opset_version=system) as function:
        out = spec.body(function.inputs)
        out.name = spec.output
        function.set_outputs([out])
    program.add_function(MAIN, function)
    with _quiet():
        return ct.convert(
            program,
            convert_to="mlprogram",
            inputs=_flexible(spec),
            minimum_deployment_target=system,
            compute_precision=ct.precision.FLOAT32,  # the types are the program's own
            pass_pipeline=ct.PassPipeline(list(PASSES), "fastvlm"),
            skip_model_load=True,
        )


def _placeholders(spec: FunctionSpec) -> "OrderedDict[str, Any]":
    found = OrderedDict()
    size = get_new_symbol()
    for name, given in spec.inputs.items():
        dtype = types.int32 if given.integer else types.fp32
        found[name] = mb.placeholder(given.sized(size), dtype=dtype)
    for name, shape in spec.states.items():
        found[name] = mb.state_tensor_placeholder(shape, dtype=types.fp16)
    return found


def _flexible(spec: FunctionSpec) -> Sequence[Any] | None:
    longest = {given.longest for given in spec.inputs.values() if given.longest is not None}
    if not longest:
        return None
    size = ct.RangeDim(1, min(longest), default=1)
    return [
        ct.TensorType(name=name, shape=given.sized(size)) for name, given in spec.inputs.items()
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of single passes, which would break ours."""
    bars = pass_pipeline.tqdm
    pass_pipeline.tqdm = partial(bars, disable=True)
    try:
        with quiet_import():
            yield
    finally:
        pass_pipeline.tqdm = bars


@contextmanager
def _fast_collections() -> Iterator[None]:
    """coremltools collects garbage after each conversion: only what has come up since, here.

    All that torch and coremltools import takes longer to look through than a small graph to write.
    """
    ours = gc.get_freeze_count() == 0  # what others have frozen stays so
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def _settle(package: Path) -> None:
    """Leave nothing in a package that depends on when it was made: dates, random identifiers."""
    data = package / "Data"
    names: dict[str, str] = {}
    manifest_path = package / "Manifest.json"
    manifest = json.loads(manifest_path.read_text("utf-8"))
    for identifier, entry in manifest["itemInfoEntries"].items():
        names[identifier] = str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"]))
        path = data / entry["path"]
        if path.suffix == ".mlmodel":
            model = Model_pb2.Model.FromString(path.read_bytes())
            model.description.metadata.userDefined.pop(
                "com.github.apple.coremltools.conversion_date", None
            )
            path.write_bytes(model.SerializeToString(deterministic=True))
    settled = {
        **manifest,
        "itemInfoEntries": {
            names[old]: entry for old, entry in manifest["itemInfoEntries"].items()
        },
        "rootModelIdentifier": names[manifest["rootModelIdentifier"]],
    }
    manifest_path.write_text(json.dumps(settled, indent=4, sort_keys=True) + "\n", "utf-8")
