"""PyTorch itself as a Session: the reference that every artifact is held against."""

from collections.abc import Mapping

import numpy as np
import torch
from torch.export import ExportedProgram

from ..exporter.config import DecoderConfig
from ..exporter.model.decoder import CacheInputsDecoder
from ..exporter.model.fastvlm import FastVLM
from ..quantize.runnable import runnable
from .base import Array, TokenIds, check_context


class EagerSession:
    """A FastVLM in float32 on the CPU, with its own cache. See `Session`."""

    def __init__(self, model: FastVLM, context: int, *, channels_last: bool = False) -> None:
        self.model = model.eval()
        self.context = context
        self.channels_last = channels_last
        if channels_last:
            model.vision_tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.decoder = CacheInputsDecoder(model.decoder, context).eval()
        config = model.config.decoder
        self.empty = [
            torch.zeros(1, config.kv_heads, 0, config.head_dim) for _ in range(2 * config.layers)
        ]
        self.past = self.empty

    @torch.inference_mode()
    def encode_image(self, pixels: Array) -> Array:
        """Pixels [1,3,R,R] -> [1,N,D]."""
        tensor = torch.from_numpy(pixels)
        if self.channels_last:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return np.ascontiguousarray(self.model.encode_image(tensor).numpy())

    @torch.inference_mode()
    def embed(self, input_ids: TokenIds) -> Array:
        """Token ids [1,S] -> [1,S,D]."""
        out: Array = self.model.embed(torch.from_numpy(input_ids)).numpy()
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


class ProgramSession:
    """Exported programs run by PyTorch on the CPU: what a quantized artifact is held to.

    `programs` are `graphs.build`'s, with their interface: float32 but for a cache that may be
    float16. See `Session`.
    """

    def __init__(
        self, programs: Mapping[str, ExportedProgram], config: DecoderConfig, context: int
    ) -> None:
        self.context = context
        self.vision, self.embedding, self.decoder = (
            runnable(programs[name]) for name in ("vision", "embedding", "decoder")
        )
        past = next(
            node.meta["val"]
            for node in programs["decoder"].graph.nodes
            if node.name == programs["decoder"].graph_signature.user_inputs[2]
        )
        self.empty = [
            torch.zeros(1, config.kv_heads, 0, config.head_dim, dtype=past.dtype)
            for _ in range(2 * config.layers)
        ]
        self.past = self.empty

    def encode_image(self, pixels: Array) -> Array:
        """Pixels [1,3,R,R] -> [1,N,D]."""
        return np.ascontiguousarray(self.vision(torch.from_numpy(pixels))[0].numpy())

    def embed(self, input_ids: TokenIds) -> Array:
        """Token ids [1,S] -> [1,S,D]."""
        out: Array = self.embedding(torch.from_numpy(input_ids))[0].numpy()
        return out

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
