"""PyTorch itself as a Session: the reference that every artifact is held against."""

from collections.abc import Mapping

import numpy as np
import torch
from torch.export import ExportedProgram

from ..exporter.config import DecoderConfig
from ..exporter.graphs import traced_inputs
from ..exporter.model.decoder import CacheInputsDecoder
from ..exporter.model.fastvlm import FastVLM
from ..quantize.runnable import Runnable, runnable
from .base import Array, TokenIds, check_context


class TorchSession:
    """The three graphs as functions in PyTorch, and the cache between them. See `Session`."""

    def __init__(
        self,
        functions: Mapping[str, Runnable],
        config: DecoderConfig,
        context: int,
        cache_type: torch.dtype = torch.float32,
    ) -> None:
        self.context = context
        self.vision, self.embedding = functions["vision"], functions["embedding"]
        self.decoder = functions["decoder"]
        self.empty = [
            torch.zeros(1, config.kv_heads, 0, config.head_dim, dtype=cache_type)
            for _ in range(2 * config.layers)
        ]
        self.past = self.empty

    @torch.inference_mode()
    def encode_image(self, pixels: Array) -> Array:
        """Pixels [1,3,R,R] -> [1,N,D]."""
        return np.ascontiguousarray(self.vision(torch.from_numpy(pixels))[0].numpy())

    @torch.inference_mode()
    def embed(self, input_ids: TokenIds) -> Array:
        """Token ids [1,S] -> [1,S,D]."""
        out: Array = self.embedding(torch.from_numpy(input_ids))[0].numpy()
        return out

    @torch.inference_mode()
    def decode(self, inputs_embeds: Array) -> Array:
        """Embeddings [1,S,D] -> logits of the last position [1,V]."""
        past, new = self.past[0].shape[2], inputs_embeds.shape[1]
        check_context(past, new, self.context)
        mask = torch.ones(1, past + new, dtype=torch.int64)
        logits, *self.past = self.decoder(torch.from_numpy(inputs_embeds), mask, *self.past)
        out: Array = logits[:, -1].numpy()
        return out

    def reset(self) -> None:
        """Empty the cache."""
        self.past = self.empty


class EagerSession(TorchSession):
    """A FastVLM in float32 on the CPU."""

    def __init__(self, model: FastVLM, context: int, *, channels_last: bool = False) -> None:
        model.eval()
        layout = torch.contiguous_format
        if channels_last:
            layout = torch.channels_last
            model.vision_tower.to(memory_format=layout)  # type: ignore[call-overload]
        functions: dict[str, Runnable] = {
            "vision": lambda pixels: (model.encode_image(pixels.contiguous(memory_format=layout)),),
            "embedding": lambda ids: (model.embed(ids),),
            "decoder": CacheInputsDecoder(model.decoder, context).eval(),
        }
        super().__init__(functions, model.config.decoder, context)


class ProgramSession(TorchSession):
    """Exported programs, run by PyTorch: what a quantized artifact is held to.

    `programs` are `graphs.build`'s, with their interface: float32 but for a cache that may be
    float16. With `exact` nothing is rounded anywhere, and the cache is float32: see `runnable`.
    """

    def __init__(
        self,
        programs: Mapping[str, ExportedProgram],
        config: DecoderConfig,
        context: int,
        *,
        exact: bool = False,
    ) -> None:
        first_key = traced_inputs(programs["decoder"])[2]
        cache_type = torch.float32 if exact else first_key.dtype
        functions = {name: runnable(program, exact=exact) for name, program in programs.items()}
        super().__init__(functions, config, context, cache_type)
