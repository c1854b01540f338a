"""The ExecuTorch program of a bundle in ExecuTorch's own runtime, on the CPU."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

# Not through `portable_lib`: that imports exir and torchao, seconds that nothing here needs.
from executorch.extension.pybindings import _C as runtime  # noqa: N811 - a module

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from .base import Array, TokenIds, available_cores, check_context
from .executorch_model import DECODER, EMBEDDING, EXPORT_HINT, VISION
from .executorch_proof import files_of, prove

_METHODS = (VISION, EMBEDDING, DECODER)


class ExecuTorchSession:
    """The methods `vision_encoder`, `token_embedding`, `text_decoder`, batch 1. See `Session`.

    The cache is inside the program; the session counts how much of it is filled. All methods are
    loaded at construction, so that opening a session is what loading costs.
    """

    def __init__(self, bundle: Bundle) -> None:
        backends, operators = runtime._get_registered_backend_names(), runtime._get_operator_names()
        prove(bundle, backends, operators)
        self.context = bundle.manifest.context
        self.past = 0
        self.program, weights = files_of(bundle)
        with _stderr_kept() as said:
            use_cores(available_cores())
            try:
                self._loaded = runtime._load_program(
                    str(self.program), data_path=str(weights) if weights else None
                )
                self._methods = {name: self._loaded.load_method(name) for name in _METHODS}
            except RuntimeError as error:
                raise self._failure("loaded", error, said()) from error

    def encode_image(self, pixels: Array) -> Array:
        """Pixels [1,3,R,R] -> [1,N,D]."""
        return self._run(VISION, [torch.from_numpy(_contiguous(pixels, np.float32))])

    def embed(self, input_ids: TokenIds) -> Array:
        """Token ids [1,S] -> [1,S,D]."""
        return self._run(EMBEDDING, [torch.from_numpy(_contiguous(input_ids, np.int64))])

    def decode(self, inputs_embeds: Array) -> Array:
        """Embeddings [1,S,D] -> logits of the last position [1,V]."""
        new = inputs_embeds.shape[1]
        check_context(self.past, new, self.context)
        embeds = torch.from_numpy(_contiguous(inputs_embeds, np.float32))
        positions = torch.arange(self.past, self.past + new)
        logits = self._run(DECODER, [embeds, positions])
        self.past += new
        return logits[:, -1]

    def reset(self) -> None:
        """Empty the cache: no position reads what was written at a later one."""
        self.past = 0

    def _run(self, method: str, inputs: Sequence[torch.Tensor]) -> Array:
        try:
            out: Array = self._methods[method].call(inputs)[0].numpy()
        except RuntimeError as error:
            raise self._failure(f"run ('{method}')", error, "") from error
        return out

    def _failure(self, what: str, error: Exception, said: str) -> ExportError:
        reason = said.strip().splitlines()[-1:] or [str(error)]
        return ExportError(
            f"{self.program} cannot be {what} by ExecuTorch: {reason[0]}", EXPORT_HINT
        )


def _contiguous(array: np.ndarray[Any, Any], dtype: type) -> np.ndarray[Any, Any]:
    """As the runtime reads it; writable, as torch wants it, without a copy where it is so."""
    found: np.ndarray[Any, Any] = np.ascontiguousarray(array, dtype=dtype)
    return found if found.flags.writeable else found.copy()


def use_cores(cores: int) -> None:
    """Give the runtime's threads that many cores; nothing may be running in it."""
    if runtime._threadpool_get_thread_count() != cores:
        runtime._unsafe_reset_threadpool(cores)


@contextlib.contextmanager
def _stderr_kept() -> Iterator[Any]:
    """Keep what C++ writes to the process's stderr; calling what this gives reads it."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
