"""What each layer's quantization costs alone: how many of the answer's tokens it would change.

The loss of a change is the mean total variation distance of next-token probabilities, sum|p - q|/2,
in 0..1: the share of sampled tokens that differ, where both sides sample with the same luck. It is
taken along the original's own greedy answers to calibration prompts, float32 against float32 with
some layers replaced.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..exporter.errors import ExportError
from ..exporter.model.decoder import Layer
from ..exporter.model.fastvlm import FastVLM
from ..exporter.prompt import prompt_ids
from ..exporter.spec import ExportSpec
from ..quantize.apply import ANSWER_TOKENS, decoder_inputs
from ..quantize.recipes import EMBEDDING, HEAD
from ..quantize.simulate import simulated, substituted

Say = Callable[[str], None]
Change = Mapping[str, nn.Module]
"""Layer name -> the module that takes its place."""

POSITIONS = ANSWER_TOKENS + 1
"""Compared in each prompt: its last position and those of the answer's tokens."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """An image [1,3,R,R], and the ids [1,S] of a question about it and the original's answer.

    `places` [S] says where the image's rows go; the ids there are 0.
    """

    pixels: Tensor
    ids: Tensor
    places: Tensor


def prompts(model: FastVLM, shown: Sequence[Tensor], spec: ExportSpec, say: Say) -> list[Prompt]:
    """What `decoder_inputs` asks about each image, as ids, so that the embedding can be changed."""
    looked_up: list[Tensor] = []
    watch = model.decoder.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: looked_up.append(inputs[0])
    )
    with watch:
        decoder_inputs(model, shown, spec, say)
    # Every question has the same text before its image.
    start = prompt_ids(spec.tokenizer, "", spec.image_token_id, spec.image_tokens).index(
        spec.image_token_id
    )
    found = []
    for index, pixels in enumerate(shown):
        ids = torch.cat(looked_up[index * POSITIONS : (index + 1) * POSITIONS], dim=1)
        places = torch.zeros(ids.shape[1], dtype=torch.bool)
        places[start : start + spec.image_tokens] = True
        found.append(Prompt(pixels=pixels, ids=ids, places=places))
    return found


class _LastPositions(nn.Module):
    """The final norm, of the compared positions alone: the head is large."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x[:, -POSITIONS:])
        return out


class _Cut:
    """A model that can be run from any of its blocks on.

    The blocks, numbered from 0: those of the tower, the projector, the embedding, the decoder's
    layers, the head.
    """

    def __init__(self, model: FastVLM) -> None:
        self.model = model
        self.tower = list(_tower_blocks(model))
        self.layers = model.decoder.layers
        self.projector = len(self.tower)
        self.embedding = self.projector + 1
        names = {id(module): name for name, module in model.named_modules()}
        self.names = [
            *(names[id(block)] for block in self.tower),
            "projector",
            EMBEDDING,
            *(names[id(layer)] for layer in self.layers),
            HEAD,
        ]

    def block_of(self, layer: str) -> int:
        """The block that holds a layer."""
        inside = [
            index
            for index, name in enumerate(self.names)
            if layer == name or layer.startswith(f"{name}.")
        ]
        return inside[0]

    def features(self, block: int, entering: Tensor) -> Tensor:
        """Image features [1,N,D], from what enters a block of the tower or the projector."""
        with substituted(self.model, {"vision_tower": nn.Sequential(*self.tower[block:])}):
            return self.model.encode_image(entering)

    def embeds(self, prompt: Prompt, features: Tensor) -> Tensor:
        """inputs_embeds [1,S,D]."""
        x = self.model.embed(prompt.ids).clone()
        x[:, prompt.places] = features
        return x

    def probabilities(self, block: int, entering: Tensor) -> Tensor:
        """Of the next token, float64 [P,V], from what enters a decoder layer or the head."""
        decoder = self.model.decoder
        behind = {
            "layers": self.layers[block - self.embedding - 1 :],
            "norm": _LastPositions(decoder.norm),
        }
        with substituted(decoder, behind):
            out: Tensor = decoder(entering)[0].double().softmax(-1)
            return out


def _tower_blocks(model: FastVLM) -> Iterable[nn.Module]:
    yield from model.vision_tower.patch_embed
    for part in model.vision_tower.network:
        yield from part if isinstance(part, nn.Sequential) else (part,)
    yield model.vision_tower.conv_exp


class _Original:
    """One prompt through the original: what entered each block, and what came out."""

    def __init__(self, cut: _Cut, prompt: Prompt) -> None:
        self.cut, self.prompt = cut, prompt
        self.entering: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.entering.append(inputs[0])

        decoder = cut.model.decoder
        # A layer's first module, because `Decoder.run` does not call the layer itself.
        first = [layer.input_layernorm for layer in cut.layers if isinstance(layer, Layer)]
        with ExitStack() as watching:
            for module in (*cut.tower, *first, decoder.norm):
                watching.enter_context(module.register_forward_pre_hook(keep))
            vision = cut.model.vision_tower.register_forward_hook(
                lambda _, __, out: self.entering.append(out)
            )
            watching.enter_context(vision)
            self.features = cut.model.encode_image(prompt.pixels)
            self.entering.append(self.features)  # enters where the embedding is looked up
            logits = decoder(cut.embeds(prompt, self.features))
        self.probabilities = logits[0, -POSITIONS:].double().softmax(-1)
        if not self.probabilities.isfinite().all():
            raise ExportError(
                "The original model's own outputs hold NaN or infinity: there is nothing to "
                "compare with.",
                "Run `fastvlm-export inspect` on the checkpoint: its weights may be damaged.",
            )

    def loss(self, change: Change) -> float:
        """Summed over the positions; only the blocks from the first changed one on are run."""
        cut = self.cut
        block = min(map(cut.block_of, change))
        x = self.entering[block]
        with simulated(cut.model, change):
            if block <= cut.projector:
                x = cut.features(block, x)
            if block <= cut.embedding:
                block, x = cut.embedding + 1, cut.embeds(self.prompt, x)
            found = cut.probabilities(block, x)
        distance = (found - self.probabilities).abs().sum(-1) / 2
        # NaN is no distribution at all: as far away as can be.
        return float(distance.nan_to_num(nan=1.0).sum())


@torch.no_grad()
def losses(
    model: FastVLM, asked: Sequence[Prompt], changes: Sequence[Change], say: Say
) -> list[float]:
    """The loss of each change made alone, 0..1, over all prompts. The model is as before after it.

    Prompts come one after the other, because what enters every block of a large tower is kept.
    """
    cut = _Cut(model)
    totals = [0.0] * len(changes)
    for number, prompt in enumerate(asked, 1):
        original = _Original(cut, prompt)
        for index, change in enumerate(changes):
            say(f"layer {index + 1} of {len(changes)}, prompt {number} of {len(asked)}")
            if change:
                totals[index] += original.loss(change)
    return [total / (POSITIONS * len(asked)) for total in totals]
