"""The Core ML packages of a bundle as a session, whatever runs them; and Core ML as what does."""

import contextlib
import functools
import hashlib
import json
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from ..exporter.scratch import ScratchFolder
from ..quantize.quiet import quiet_import
from .base import Array, TokenIds, check_context
from .coreml_model import (
    DECODE,
    DECODER,
    EMBEDDING,
    EMBEDS,
    EXPORT_HINT,
    FEATURES,
    IDS,
    LENGTH,
    LOGITS,
    MAIN,
    PIXELS,
    POSITION,
    PREFILL,
    VISION,
    Model,
    OpenModel,
)

COMPUTE_UNITS = ("all", "cpu-and-ne", "cpu-and-gpu", "cpu-only")
"""What Core ML may run on: its `ComputeUnit`s, as they are written on the command line."""
DEFAULT_UNITS = "all"

OLDEST_MACOS = 15
"""The first macOS that has states and functions."""

_INTERFACE: Mapping[tuple[str, str], Mapping[str, int]] = {
    (VISION, MAIN): {PIXELS: 4},
    (EMBEDDING, MAIN): {IDS: 2},
    (DECODER, PREFILL): {EMBEDS: 3, POSITION: 1, LENGTH: 1},
    (DECODER, DECODE): {EMBEDS: 3, POSITION: 1},
}
"""Package and function -> input -> rank."""
_STAMP = re.compile("[0-9a-f]{16}")


class CoreMLSession:
    """vision, embedding and decoder packages, batch 1. See `Session`.

    A prompt goes through `prefill` in chunks of its fixed length C, the last one padded with
    zeros, which the decoder is told not to count; a single token goes through `decode`. All four
    functions are opened at construction, so that opening a session is what loading costs.
    """

    def __init__(self, bundle: Bundle, open_model: OpenModel) -> None:
        self.context = bundle.manifest.context
        models = {key: _opened(bundle, open_model, *key) for key in _INTERFACE}
        self.vision, self.embedding = models[VISION, MAIN], models[EMBEDDING, MAIN]
        self.prefill, self.decode_one = models[DECODER, PREFILL], models[DECODER, DECODE]
        self.chunk = self.prefill.inputs[EMBEDS][1]
        self.past = 0
        self._state = self.prefill.make_state()

    def encode_image(self, pixels: Array) -> Array:
        """Pixels [1,3,R,R] -> [1,N,D]."""
        return _output(self.vision.predict({PIXELS: _float32(pixels)}), FEATURES)

    def embed(self, input_ids: TokenIds) -> Array:
        """Token ids [1,S] -> [1,S,D]."""
        ids = np.ascontiguousarray(input_ids, dtype=np.int32)
        return _output(self.embedding.predict({IDS: ids}), EMBEDS)

    def decode(self, inputs_embeds: Array) -> Array:
        """Embeddings [1,S,D] -> logits of the last position [1,V]."""
        new = inputs_embeds.shape[1]
        if not new:
            raise ExportError("There is nothing to decode.", "Give at least one token.")
        check_context(self.past, new, self.context)
        for start in range(0, new, self.chunk):
            piece = inputs_embeds[:, start : start + self.chunk]
            outputs = self._one(piece) if piece.shape[1] == 1 else self._chunk(piece)
            self.past += piece.shape[1]
        return _output(outputs, LOGITS)

    def _one(self, embeds: Array) -> Mapping[str, NDArray[Any]]:
        inputs = {EMBEDS: _float32(embeds), POSITION: _int32(self.past)}
        return self.decode_one.predict(inputs, self._state)

    def _chunk(self, embeds: Array) -> Mapping[str, NDArray[Any]]:
        length = embeds.shape[1]
        padded = np.zeros((1, self.chunk, embeds.shape[2]), dtype=np.float32)
        padded[:, :length] = embeds
        inputs = {EMBEDS: padded, POSITION: _int32(self.past), LENGTH: _int32(length)}
        return self.prefill.predict(inputs, self._state)

    def reset(self) -> None:
        """Empty the cache: a new state, all zeros."""
        self._state = self.prefill.make_state()
        self.past = 0


def _opened(bundle: Bundle, open_model: OpenModel, package: str, function: str) -> Model:
    """A function of a package that takes what the session will give it."""
    path = bundle.path / package
    if not path.is_dir():
        raise ExportError(f"{bundle.path} has no {package}.", EXPORT_HINT)
    model = open_model(path, function)
    found = {name: len(shape) for name, shape in model.inputs.items()}
    expected = _INTERFACE[package, function]
    if found != expected:
        raise ExportError(
            f"{path}: function '{function}' takes {_ranks(found)}, not {_ranks(expected)}.",
            EXPORT_HINT,
        )
    return model


def _ranks(inputs: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of rank {rank}" for name, rank in sorted(inputs.items())) or "nothing"


def _output(outputs: Mapping[str, NDArray[Any]], name: str) -> Array:
    if name not in outputs:
        raise ExportError(
            f"The package gave {', '.join(sorted(outputs)) or 'nothing'}, not {name}.", EXPORT_HINT
        )
    return np.asarray(outputs[name], dtype=np.float32)


def _float32(array: Array) -> Array:
    return np.ascontiguousarray(array, dtype=np.float32)


def _int32(value: int) -> NDArray[np.int32]:
    return np.array([value], dtype=np.int32)


def open_mlmodel(compute_units: str = DEFAULT_UNITS) -> OpenModel:
    """Open packages in Core ML itself, on these units. Raises ExportError off macOS 15 or later.

    Core ML runs compiled packages. Compiling one is most of what a first start costs, so it is
    done once and kept below `compiled_folder`: a load is warm where that is there, and cold after
    `forget_compiled`. What the system keeps of its own (programs for the Neural Engine) no caller
    can drop.
    """
    if compute_units not in COMPUTE_UNITS:
        raise ExportError(
            f"There are no compute units '{compute_units}'.", f"Use: {', '.join(COMPUTE_UNITS)}."
        )
    check_macos()
    return functools.partial(_CoreMLModel, compute_units=compute_units)


def check_macos() -> None:
    """Raise ExportError where Core ML can't run these packages."""
    system, release = platform.system(), platform.mac_ver()[0]
    if system != "Darwin" or int(release.split(".")[0] or 0) < OLDEST_MACOS:
        here = f"macOS {release}" if system == "Darwin" else system or "an unknown system"
        raise ExportError(
            f"Core ML runs these packages on macOS {OLDEST_MACOS} or later; this is {here}.",
            "Run there, on a copy of the bundle: fastvlm-export bench BUNDLE --compute-units all",
        )


class _CoreMLModel:
    """A function of a package in Core ML: `Model`."""

    def __init__(self, package: Path, function: str, *, compute_units: str) -> None:
        with quiet_import():
            import coremltools  # noqa: PLC0415 - imports torch
        self._name = f"{package}, function '{function}'"
        described = _description(package, function)
        self._inputs = {one.name: _shape(one.type.multiArrayType) for one in described.input}
        try:
            self._model = coremltools.models.CompiledMLModel(
                str(compiled(package, compute_units)),
                compute_units=core_ml_unit(compute_units),
                # A package without a table of functions has one that goes by no name.
                function_name=getattr(described, "name", None),
            )
        except Exception as error:  # whatever Core ML says arrives as RuntimeError or Exception
            raise ExportError(
                f"{self._name} cannot be loaded by Core ML: {error}", EXPORT_HINT
            ) from error

    @property
    def inputs(self) -> Mapping[str, tuple[int, ...]]:
        """From the package's own description; a flexible size is -1."""
        return self._inputs

    def make_state(self) -> Any:
        """An `MLState`; the other functions of the same package take it, too."""
        return self._model.make_state()

    def predict(
        self, inputs: Mapping[str, NDArray[Any]], state: Any = None
    ) -> dict[str, NDArray[Any]]:
        """Run once. Raises ExportError with Core ML's own words where it can't."""
        try:
            found: dict[str, NDArray[Any]] = self._model.predict(dict(inputs), state=state)
        except Exception as error:  # as at loading
            raise ExportError(
                f"{self._name} cannot be run by Core ML: {error}",
                "Try other units: fastvlm-export bench BUNDLE --compute-units cpu-only",
            ) from error
        return found


def core_ml_unit(compute_units: str) -> Any:
    """`cpu-and-ne` -> coremltools' `ComputeUnit.CPU_AND_NE`."""
    with quiet_import():
        from coremltools import ComputeUnit  # noqa: PLC0415 - imports torch
    return ComputeUnit[compute_units.upper().replace("-", "_")]


def _description(package: Path, function: str) -> Any:
    """Inputs and states of a function, as the package's specification has them."""
    with quiet_import():
        from coremltools.models.utils import load_spec  # noqa: PLC0415 - imports torch
    try:
        # By its file: given the package, coremltools writes the package's Manifest.json anew.
        described = load_spec(str(_specification(package))).description
    except Exception as error:  # JSON's, protobuf's and the system's errors share no base
        raise ExportError(
            f"{package} is no Core ML package that can be read: {error!r}", EXPORT_HINT
        ) from error
    functions = {one.name: one for one in described.functions}
    if not functions and function == MAIN:
        return described
    if function not in functions:
        names = ", ".join(functions) or MAIN
        raise ExportError(f"{package} has no function '{function}', but {names}.", EXPORT_HINT)
    return functions[function]


def _specification(package: Path) -> Path:
    """The file that the package's manifest names as its model."""
    manifest = json.loads((package / "Manifest.json").read_text("utf-8"))
    entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    path: Path = package / "Data" / entry["path"]
    if not path.resolve().is_relative_to(package.resolve()):
        raise ValueError(f"{entry['path']} lies outside the package")
    return path


def _shape(array: Any) -> tuple[int, ...]:
    """An `ArrayFeatureType`'s shape; -1 where a size may vary."""
    if array.WhichOneof("ShapeFlexibility") == "shapeRange":
        return tuple(
            one.lowerBound if one.lowerBound == one.upperBound else -1
            for one in array.shapeRange.sizeRanges
        )
    shapes = [tuple(one.shape) for one in array.enumeratedShapes.shapes] or [tuple(array.shape)]
    return tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))


def compiled_folder(package: Path, compute_units: str) -> Path:
    """Where the compiled form of the package at this path is kept: the user's caches.

    Each choice of units has its own: what the system derives from it depends on them, and a cold
    load on some must not make the next one on others cold.
    """
    place = hashlib.sha256(f"{package.resolve()}\n{compute_units}".encode()).hexdigest()[:16]
    return Path.home() / "Library" / "Caches" / "fastvlm-export" / place


def forget_compiled(package: Path, compute_units: str) -> None:
    """Make the next load on these units compile the package again."""
    folder = compiled_folder(package, compute_units)
    _forget(folder)
    with contextlib.suppress(OSError):  # it is not there, or something else is in it
        folder.rmdir()


def _forget(folder: Path, but: str = "") -> None:
    """Remove what `compiled` put into a folder, by its names, and nothing beside it."""
    for path in folder.glob("*/*.mlmodelc"):
        stamp = path.parent
        if _STAMP.fullmatch(stamp.name) and stamp.name != but and not stamp.is_symlink():
            if not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # something else is in it
                stamp.rmdir()


def compiled(package: Path, compute_units: str) -> Path:
    """The package's `.mlmodelc`: compiled now, unless its files are those compiled before.

    Raises what coremltools does where it can't be compiled.
    """
    kept = compiled_folder(package, compute_units)
    path = kept / _stamp(package) / f"{package.stem}.mlmodelc"
    if path.is_dir():
        return path
    kept.parent.mkdir(parents=True, exist_ok=True)
    with quiet_import():
        from coremltools.models.utils import compile_model  # noqa: PLC0415 - imports torch
    with ScratchFolder(kept.parent) as folder:
        made = Path(compile_model(str(package), str(folder / path.name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget(kept, but=path.parent.name)  # of files that are no longer there
        try:
            made.rename(path)  # whole or not at all: a killed run leaves nothing that looks right
        except OSError:
            if not path.is_dir():  # or else another process was faster
                raise
    return path


def _stamp(package: Path) -> str:
    """Changes with any file of the package; reads none of them."""
    files = sorted(path for path in package.rglob("*") if path.is_file())
    facts = [
        (path.relative_to(package).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
