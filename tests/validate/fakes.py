"""Small random FastVLMs as sessions, and sessions with one planted fault."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fastvlm_export.exporter.config import DecoderConfig, FastVLMConfig, fastvithd
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.targets.base import Array, Session, TokenIds
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.validate import parity
from fastvlm_export.validate.limits import FLOAT32, Limits
from fastvlm_export.validate.parity import ParityResult
from fastvlm_export.validate.recording import Case, record

torch.set_num_threads(1)  # models this small only lose by sharing the cores

IMAGE_TOKEN_ID = 90
PROMPT = [3, 1, 4, *[IMAGE_TOKEN_ID] * 4, 1, 5, 9]
RESOLUTION = 128


def tiny_model(seed: int = 0) -> FastVLM:
    tower = fastvithd(
        widths=(8, 8, 16, 32, 32),
        depths=(1, 1, 1, 1, 1),
        features=32,
        se_width=8,
        head_width=0,
    )
    decoder = DecoderConfig(
        vocab_size=89,
        hidden_size=32,
        intermediate_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
    )
    torch.manual_seed(seed)
    model = FastVLM(FastVLMConfig(tower=tower, decoder=decoder, projector_layers=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(0.5)
            elif parameter.dim() > 1:  # gain enough that what one layer sees reaches the end
                fan_in = parameter[0].numel()
                parameter.normal_(std=2 / fan_in**0.5)
    return model.eval()


def tiny_session(seed: int = 0) -> EagerSession:
    return EagerSession(tiny_model(seed), context=64)


def pixels(seed: int = 0) -> Array:
    values = np.random.default_rng(seed).integers(0, 256, (1, 3, RESOLUTION, RESOLUTION))
    return (values / 255).astype(np.float32)


def case(name: str = "noise.png", *, seed: int = 0) -> Case:
    return Case(name=name, pixels=pixels(seed), prompt_ids=PROMPT, image_token_id=IMAGE_TOKEN_ID)


def compare(
    candidate: Session,
    *,
    reference: Session | None = None,
    cases: Sequence[Case] | None = None,
    theirs: Sequence[Case] | None = None,
    steps: int = 6,
    limits: Limits = FLOAT32,
) -> ParityResult:
    """Record the reference on `cases` and compare; `theirs` is the candidate's view of them."""
    cases = [case()] if cases is None else cases
    recordings = record(reference or tiny_session(), cases, steps)
    return parity.compare(recordings, theirs or cases, candidate, limits)


class Altered:
    """A session whose outputs pass through functions."""

    def __init__(
        self,
        session: Session,
        *,
        image: Callable[[Array], Array] = lambda x: x,
        embed: Callable[[Array], Array] = lambda x: x,
        decode: Callable[[Array], Array] = lambda x: x,
    ) -> None:
        self.session, self.image, self.text, self.logits = session, image, embed, decode

    def encode_image(self, pixels: Array) -> Array:
        return self.image(self.session.encode_image(pixels))

    def embed(self, input_ids: TokenIds) -> Array:
        return self.text(self.session.embed(input_ids))

    def decode(self, inputs_embeds: Array) -> Array:
        return self.logits(self.session.decode(inputs_embeds))

    def reset(self) -> None:
        self.session.reset()
