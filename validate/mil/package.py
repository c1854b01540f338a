"""Open a `.mlpackage` folder: its manifest, its model and, by name and offset, its weights."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from numpy.typing import NDArray
from torch import Tensor

from ...exporter.errors import ExportError
from ...quantize.quiet import quiet_import
from .blobs import BlobFile
from .errors import damaged, foreign
from .numbers import Dtype

_MODEL_PATH = "@model_path/"


class Package:
    """A package whose model has been read. Its functions share the tensors made of its weights.

    `spec` is the Model message. `tensors` keeps what `shared` made, by the bytes it was made of.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model_path = _model_path(path)
        self.spec = _read_spec(self.model_path)
        if self.spec.WhichOneof("Type") != "mlProgram":
            kind = self.spec.WhichOneof("Type") or "no model"
            raise foreign(path, f"holds {kind}, not an ML program")
        self._tensors: dict[Any, Tensor] = {}
        self._blobs: dict[str, BlobFile] = {}

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of its functions."""
        return tuple(sorted(self.spec.mlProgram.functions))

    def read(self, file: str, offset: int, dtype: Dtype, count: int) -> NDArray[Any]:
        """Numbers from one of the package's weight files, as the model names it."""
        if file not in self._blobs:
            if not file.startswith(_MODEL_PATH):
                raise damaged(self.model_path, f"names weights outside the package: {file!r}")
            path = self.model_path.parent / file.removeprefix(_MODEL_PATH)
            self._blobs[file] = BlobFile(_inside(self.path, path, self.model_path))
        return self._blobs[file].read(offset, dtype, count)

    def shared(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """The tensor made of `key`, which names bytes of the package: made once for all."""
        if key not in self._tensors:
            self._tensors[key] = make()
        return self._tensors[key]


# Functions of one package are opened one by one, but a decoder's weights must be held only once.
# The key tells whether files of that name are still the same ones.
_OPEN: WeakValueDictionary[tuple[Any, ...], Package] = WeakValueDictionary()


def open_package(path: Path) -> Package:
    """Read the package, or share the one that another of its functions is open from.

    Raises ExportError for what is no package, or damaged.
    """
    if not path.is_dir():
        what = "is no folder, as a .mlpackage is" if path.exists() else "does not exist"
        raise foreign(path, what)
    key = (path.resolve(), *_stamps(path))
    package = _OPEN.get(key)
    if package is None:
        package = _OPEN[key] = Package(path)
    return package


def _stamps(path: Path) -> list[tuple[str, int, int, int]]:
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        stats = [(str(file), file.stat()) for file in files]
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})") from error
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]


def _model_path(path: Path) -> Path:
    """The model's file, as the manifest names it."""
    manifest = path / "Manifest.json"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise foreign(path, "has no Manifest.json: it is no .mlpackage") from error
    except OSError as error:
        raise damaged(manifest, f"cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise damaged(manifest, f"is no JSON ({error})") from error
    try:
        name = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        model = path / "Data" / name
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(manifest, "does not say where the model is") from error
    return _inside(path, model, manifest)


def _inside(package: Path, path: Path, named_by: Path) -> Path:
    """The path, if it is a file of the package."""
    try:
        resolved = path.resolve()
        if not resolved.is_relative_to(package.resolve()):
            raise damaged(named_by, f"names a file outside the package: {str(path)!r}")
        if not resolved.is_file():
            raise damaged(path, f"is missing, though {named_by.name} names it")
    except (OSError, ValueError, RuntimeError) as error:
        raise damaged(named_by, f"names no possible file: {str(path)!r}") from error
    return path


def _read_spec(path: Path) -> Any:
    try:
        with quiet_import():
            from coremltools.proto import Model_pb2  # noqa: PLC0415
    except ImportError as error:
        raise ExportError(
            "reading Core ML packages needs coremltools", "pip install 'fastvlm-export[coreml]'"
        ) from error
    decode_error = import_module("google.protobuf.message").DecodeError
    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(path.read_bytes())
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})") from error
    except decode_error as error:
        raise damaged(path, f"is no Core ML model ({error})") from error
    return spec
