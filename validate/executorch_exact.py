"""An ExecuTorch program computed without any rounding, from the bytes of its file."""

from typing import Any

import numpy as np
import torch

# Not through `portable_lib`: that imports exir and torchao, seconds that nothing here needs.
from executorch.extension.pybindings import _C as runtime  # noqa: N811 - a module

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from ..targets.base import Array, TokenIds, check_context
from ..targets.executorch_model import DECODER, EMBEDDING, VISION
from ..targets.executorch_proof import prove
from .pte import Program


class ExactExecuTorchSession:
    """A bundle's program in our interpreter, with XNNPACK's delegates inside. See `Session`.

    Raises ExportError for a program that is damaged, or beyond the interpreter.
    """

    def __init__(self, bundle: Bundle) -> None:
        backends, operators = runtime._get_registered_backend_names(), runtime._get_operator_names()
        self._program = Program(prove(bundle, backends, operators))
        self.context = bundle.manifest.context
        self.past = 0

    def encode_image(self, pixels: Array) -> Array:
        """Pixels [1,3,R,R] -> [1,N,D]."""
        return self._run(VISION, np.asarray(pixels, np.float32))

    def embed(self, input_ids: TokenIds) -> Array:
        """Token ids [1,S] -> [1,S,D]."""
        return self._run(EMBEDDING, np.asarray(input_ids, np.int64))

    def decode(self, inputs_embeds: Array) -> Array:
        """Embeddings [1,S,D] -> logits of the last position [1,V]."""
        new = inputs_embeds.shape[1]
        if not new:
            raise ExportError("There is nothing to decode.", "Give at least one token.")
        check_context(self.past, new, self.context)
        positions = np.arange(self.past, self.past + new, dtype=np.int64)
        logits = self._run(DECODER, np.asarray(inputs_embeds, np.float32), positions)
        self.past += new
        return logits[:, -1]

    def reset(self) -> None:
        """Start at position 0 again; the cache stays as it is, as it does on a device."""
        self.past = 0

    def _run(self, method: str, *inputs: np.ndarray[Any, Any]) -> Array:
        given = [torch.from_numpy(np.array(one, order="C")) for one in inputs]
        out: Array = self._program.run(method, given)[0].numpy()
        return out
