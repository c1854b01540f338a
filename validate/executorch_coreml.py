"""ExecuTorch programs for Core ML, run without ExecuTorch's runtime, which has Core ML on Apple's
systems alone: what the program says is done, and our MIL interpreter computes its packages.

As on a device, a delegate gets its inputs in the order that its metadata names them, integers of
64 bits as 32, and its states live as long as the program: a new conversation starts at position 0
and must not see what an earlier one left.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.export import ExportedProgram

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from ..exporter.scratch import ScratchFolder
from ..targets import coreml_decoder, executorch_file
from ..targets.base import Array, TokenIds, check_context
from ..targets.coreml_model import MAIN
from ..targets.coreml_stored import stored
from ..targets.executorch_coreml_payload import BACKEND, METADATA, PACKAGE, unpack
from ..targets.executorch_file import Delegate, Method
from ..targets.executorch_model import (
    DECODER,
    EMBEDDING,
    EXPORT_HINT,
    METHODS,
    PROGRAM,
    VISION,
    WEIGHTS,
)
from ..targets.program_constants import scalars
from .coreml_stored import Expected, compare_package
from .mil import Interpreter, open_model
from .parity_types import Stage
from .stored_types import StoredFunction

_ARGUMENTS = {VISION: 1, EMBEDDING: 1, DECODER: 2}
_STAGES = {
    VISION: Stage.IMAGE_FEATURES,
    EMBEDDING: Stage.EMBEDDINGS,
    DECODER: Stage.FIRST_TOKEN,
}


class CoreMLPackages:
    """The packages in a bundle's program, unpacked for as long as this object lives.

    `paths` and `metadata` are by method. Raises ExportError for a program that is damaged, lacks a
    method, or leaves anything to ExecuTorch's own kernels or another backend.
    """

    def __init__(self, bundle: Bundle) -> None:
        program, weights = bundle.path / PROGRAM, bundle.path / WEIGHTS
        file = executorch_file.read(program, weights if weights.is_file() else None)
        self._folder = ScratchFolder()
        self.paths: dict[str, Path] = {}
        self.metadata: dict[str, Mapping[str, Any]] = {}
        for name, arguments in _ARGUMENTS.items():
            if name not in file.methods:
                raise ExportError(f"{program} has no method '{name}'.", EXPORT_HINT)
            where = f"{program}, method '{name}',"
            delegate = _only_delegate(file.methods[name], arguments, where)
            folder = self._folder.path / name
            folder.mkdir()
            unpack(delegate.processed, folder, where)
            self.paths[name] = folder / PACKAGE
            self.metadata[name] = _metadata(folder / METADATA, where)


class CoreMLDelegateSession:
    """A bundle's program in the MIL reference interpreter. See `Session`.

    `exact`: nothing is rounded; see `Interpreter`.
    """

    def __init__(self, bundle: Bundle, *, exact: bool = False) -> None:
        self.context = bundle.manifest.context
        self._packages = CoreMLPackages(bundle)  # the interpreter reads its files when it likes
        self._methods = {name: _Delegated(self._packages, name, exact) for name in _ARGUMENTS}
        self.past = 0

    def encode_image(self, pixels: Array) -> Array:
        """Pixels [1,3,R,R] -> [1,N,D]."""
        return self._methods[VISION](pixels)

    def embed(self, input_ids: TokenIds) -> Array:
        """Token ids [1,S] -> [1,S,D]."""
        return self._methods[EMBEDDING](input_ids)

    def decode(self, inputs_embeds: Array) -> Array:
        """Embeddings [1,S,D] -> logits of the last position [1,V]."""
        new = inputs_embeds.shape[1]
        if not new:
            raise ExportError("There is nothing to decode.", "Give at least one token.")
        check_context(self.past, new, self.context)
        positions = np.arange(self.past, self.past + new, dtype=np.int64)
        logits = self._methods[DECODER](inputs_embeds, positions)
        self.past += new
        return logits[:, -1]

    def reset(self) -> None:
        """Start at position 0 again; the states stay as they are, as they do on a device."""
        self.past = 0


def compare(bundle: Bundle, programs: Mapping[str, ExportedProgram]) -> Iterator[StoredFunction]:
    """The packages' numbers against the programs', method by method: see `stored`."""
    packages = CoreMLPackages(bundle)
    # What `coreml_decoder` adds to the scores of keys that a row must not see.
    own = {DECODER: frozenset({coreml_decoder.HIDDEN})}
    for graph, method in METHODS.items():
        program = programs[graph]
        expected = Expected(
            package=PROGRAM,
            functions={MAIN: _STAGES[method]},
            tensors=stored(program, capacity=bundle.manifest.context if method == DECODER else 0),
            scalars=scalars(program) | own.get(method, frozenset()),
        )
        for found in compare_package(packages.paths[method], expected):
            yield replace(found, function=method)


class _Delegated:
    """One method: its package's only function, called as the delegate calls it."""

    def __init__(self, packages: CoreMLPackages, name: str, exact: bool) -> None:
        self._model: Interpreter = open_model(packages.paths[name], MAIN, exact=exact)
        self._inputs: Sequence[str] = packages.metadata[name]["inputNames"]
        [self._output] = packages.metadata[name]["outputNames"]
        described = (set(self._model.inputs), set(self._model.outputs))
        if described != (set(self._inputs), {self._output}):
            raise ExportError(
                f"{packages.paths[name]}: {METADATA} names {', '.join(self._inputs)} -> "
                f"{self._output}, the package others.",
                EXPORT_HINT,
            )
        self._state = self._model.make_state()

    def __call__(self, *inputs: NDArray[Any]) -> Array:
        given = {
            name: array.astype(np.int32) if array.dtype == np.int64 else np.ascontiguousarray(array)
            for name, array in zip(self._inputs, inputs, strict=True)
        }
        return np.asarray(self._model.predict(given, self._state)[self._output], np.float32)


def _only_delegate(method: Method, arguments: int, where: str) -> Delegate:
    """The one step of a method: the delegate that takes its inputs, in order, to its output."""
    others = [*method.kernels, *(d.backend for d in method.delegates if d.backend != BACKEND)]
    if others:
        raise ExportError(
            f"{where} runs {', '.join(dict.fromkeys(others))} besides Core ML: only programs that "
            "are Core ML's whole can be run here.",
            EXPORT_HINT,
        )
    if len(method.delegates) != 1 or len(method.inputs) != arguments or len(method.outputs) != 1:
        raise ExportError(
            f"{where} has {len(method.inputs)} inputs, {len(method.delegates)} delegates and "
            f"{len(method.outputs)} outputs, not {arguments}, 1 and 1.",
            EXPORT_HINT,
        )
    [delegate] = method.delegates
    values = (*method.inputs, *method.outputs)
    if len(values) != len(delegate.tensors) or any(
        one is not other for one, other in zip(values, delegate.tensors, strict=True)
    ):
        raise ExportError(f"{where} gives its delegate other values than its own.", EXPORT_HINT)
    return delegate


def _metadata(path: Path, where: str) -> Mapping[str, Any]:
    """`inputNames` and `outputNames`, lists of names, the latter of one."""
    try:
        found: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
        names = [*found["inputNames"], *found["outputNames"]]
        sound = len(found["outputNames"]) == 1 and all(isinstance(name, str) for name in names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(f"{where} is damaged: {METADATA}: {error!r}.", EXPORT_HINT) from error
    if not sound:
        raise ExportError(f"{where} is damaged: {METADATA} names {names}.", EXPORT_HINT)
    return found


__all__ = ["CoreMLDelegateSession", "CoreMLPackages", "compare"]
