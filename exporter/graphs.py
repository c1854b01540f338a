"""FastVLM as the three graphs that every client expects: vision, embedding, decoder."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .config import DecoderConfig
from .model.decoder import CacheInputsDecoder
from .model.fastvlm import FastVLM

# Example sizes for tracing; all differ, and none is 0 or 1, which torch.export would specialize.
BATCH, NEW, PAST = 2, 3, 5


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One traceable piece of FastVLM.

    `inputs` are example tensors in the order of the module's arguments, `outputs` the names of
    what it returns, `dynamic` input name -> axis -> the size's name.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]


class _Vision(nn.Module):
    def __init__(self, model: FastVLM) -> None:
        super().__init__()
        self.vision_tower, self.projector = model.vision_tower, model.projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.vision_tower(pixel_values).flatten(2).transpose(1, 2)
        out: Tensor = self.projector(features)
        return out


class _Embedding(nn.Module):
    def __init__(self, model: FastVLM, image_token_id: int) -> None:
        super().__init__()
        self.embed_tokens = model.decoder.embed_tokens
        # Clients look the image token up before they overwrite its rows, so any row serves it.
        rows = model.config.decoder.vocab_size
        self.last_row = rows - 1 if image_token_id >= rows else None

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.last_row is not None:
            input_ids = input_ids.clamp(max=self.last_row)
        out: Tensor = self.embed_tokens(input_ids)
        return out


def cache_names(config: DecoderConfig, prefix: str) -> tuple[str, ...]:
    """`prefix.0.key`, `prefix.0.value`, `prefix.1.key`, ..."""
    return tuple(f"{prefix}.{i}.{part}" for i in range(config.layers) for part in ("key", "value"))


def build(
    model: FastVLM, *, resolution: int, context: int, image_token_id: int
) -> dict[str, Graph]:
    """The graphs of a reparameterized model, the cache as inputs and outputs.

    vision: pixel_values [B,3,R,R] -> image_features [B,N,D]; embedding: input_ids [B,S] ->
    inputs_embeds [B,S,D]; decoder: see `CacheInputsDecoder`, at most `context` positions.
    """
    vision = Graph(
        name="vision",
        module=_Vision(model).eval(),
        inputs={"pixel_values": torch.zeros(BATCH, 3, resolution, resolution)},
        outputs=("image_features",),
        dynamic={"pixel_values": {0: "batch_size"}},
    )
    embedding = Graph(
        name="embedding",
        module=_Embedding(model, image_token_id).eval(),
        inputs={"input_ids": torch.zeros(BATCH, NEW, dtype=torch.int64)},
        outputs=("inputs_embeds",),
        dynamic={"input_ids": {0: "batch_size", 1: "sequence_length"}},
    )
    return {g.name: g for g in (vision, embedding, _decoder(model, context))}


def _decoder(model: FastVLM, context: int) -> Graph:
    config = model.config.decoder
    past = cache_names(config, "past_key_values")
    inputs = {
        "inputs_embeds": torch.zeros(BATCH, NEW, config.hidden_size),
        "attention_mask": torch.ones(BATCH, PAST + NEW, dtype=torch.int64),
    }
    dynamic = {
        "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
    }
    for name in past:
        inputs[name] = torch.zeros(BATCH, config.kv_heads, PAST, config.head_dim)
        dynamic[name] = {0: "batch_size", 2: "past_sequence_length"}
    return Graph(
        name="decoder",
        module=CacheInputsDecoder(model.decoder, context).eval(),
        inputs=inputs,
        outputs=("logits", *cache_names(config, "present")),
        dynamic=dynamic,
    )


def traced_inputs(program: ExportedProgram) -> list[Tensor]:
    """Shapes and types of a program's own inputs, in order; there are no numbers in them."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return [values[str(name)] for name in program.graph_signature.user_inputs]


def export_program(graph: Graph) -> ExportedProgram:
    """Trace with torch.export; sizes of one name are one symbol."""
    symbols = {name: Dim(name) for axes in graph.dynamic.values() for name in axes.values()}
    shapes = [
        {axis: symbols[name] for axis, name in graph.dynamic.get(key, {}).items()}
        for key in graph.inputs
    ]
    named = 2 if isinstance(graph.module, CacheInputsDecoder) else len(shapes)
    dynamic = (*shapes[:named], tuple(shapes[named:])) if len(shapes) > named else tuple(shapes)
    with torch.no_grad():
        return torch.export.export(
            graph.module, tuple(graph.inputs.values()), dynamic_shapes=dynamic
        )
