"""The weight files of a checkpoint folder: found, verified and mapped into memory.

Tensors are views of memory-mapped files: nothing is read before it is used, nothing is written.
"""

import hashlib
import pickle  # only for the name of its exception: pickles are read with weights_only
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .json_file import is_lfs_pointer, read_json

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors by their names in the files, as stored, and the files that hold them."""

    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def _stays_inside(name: str) -> bool:
    """Whether a file name from an index is relative and never climbs out of its folder."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    anchored = posix.is_absolute() or bool(windows.drive or windows.root)
    return bool(name) and not anchored and ".." not in (*posix.parts, *windows.parts)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """A pickle of tensors, with PyTorch's restricted unpickler: no code in it is ever run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError("it holds something else than tensors by name")
    return content


def _read_file(path: Path, problems: list[str]) -> dict[str, Tensor]:
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return {}
    try:
        if is_lfs_pointer(path):
            problems.append(f"{path.name} is a git-lfs pointer, not the weights: run git lfs pull")
            return {}
        if path.suffix == ".bin":
            return _read_pickle(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        problems.append(f"{path.name} is truncated or damaged: {reason}")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror or error}")
    return {}


def _read_index(folder: Path, name: str, problems: list[str]) -> Weights | None:
    """The tensors that the index names, each from the shard that it names."""
    stated = read_json(folder / name, problems).section("weight_map").values
    shards: dict[str, list[str]] = {}
    for tensor, shard in stated.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            problems.append(f"{name}: '{tensor}' is said to be in {shard!r}, not a file beside it")
        else:
            shards.setdefault(shard, []).append(tensor)
    if not shards:
        problems.append(f"{name} names no weights under weight_map")
    tensors: dict[str, Tensor] = {}
    unlisted: list[str] = []
    for shard, wanted in sorted(shards.items()):
        before = len(problems)
        held = _read_file(folder / shard, problems)
        if len(problems) > before:
            continue
        problems += [f"{name}: '{t}' is not in {shard}" for t in wanted if t not in held]
        tensors |= {t: held[t] for t in wanted if t in held}
        unlisted += [t for t in held if t not in stated]
    notes = [f"{name} leaves out '{t}', which is ignored" for t in unlisted]
    return Weights(
        tensors=tensors,
        files=tuple(folder / shard for shard in sorted(shards) if (folder / shard).is_file()),
        notes=tuple(notes),
    )


def read_weights(folder: Path, problems: list[str]) -> Weights | None:
    """All tensors of a folder, or None with a problem noted where it holds no weights.

    A single file comes before an index, safetensors before pickles, as in transformers.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).exists():
            files = (folder / single,)
            return Weights(tensors=_read_file(files[0], problems), files=files)
        if (folder / index).exists():
            return _read_index(folder, index, problems)
    if any((folder / name).exists() for name in ADAPTER_FILES):
        problems.append("the folder holds a LoRA adapter, not a whole model: merge it first")
        return None
    others = sorted(p.name for suffix in ("safetensors", "bin") for p in folder.glob(f"*.{suffix}"))
    if others:
        problems.append(f"{INDEX_FILES[0]} is missing beside {', '.join(others[:3])}")
    else:
        problems.append(f"no weights: neither {SINGLE_FILES[0]} nor {INDEX_FILES[0]}")
    return None


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of the files, whatever folder they are in."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        with path.open("rb") as file:
            total.update(
                f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return total.hexdigest()
