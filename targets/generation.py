"""Prompt to tokens on any Session: splice the image in, prefill, decode one token at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..exporter.errors import ExportError
from .base import Array, Session


@dataclass(frozen=True, kw_only=True)
class PromptInputs:
    """`input_ids` holds one `image_token_id` for each row of the image's features."""

    input_ids: Sequence[int]
    image_token_id: int
    pixels: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draw from softmax(logits / temperature), cut to the smallest set of mass `top_p`."""

    temperature: float = 0.2
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise ExportError(
                f"Sampling needs temperature > 0 and 0 < top_p <= 1, not {self.temperature} "
                f"and {self.top_p}.",
                "Use --temperature 0 for greedy decoding.",
            )


def splice(input_ids: Sequence[int], image_token_id: int, text: Array, image: Array) -> Array:
    """Text embeddings [1,S,D] with the image's rows [1,N,D] where the image token stands."""
    places = np.flatnonzero(np.asarray(input_ids) == image_token_id)
    if len(places) != image.shape[1]:
        raise ExportError(
            f"The prompt has {len(places)} image tokens, the image {image.shape[1]} feature rows.",
            "Build the prompt with the bundle's own image_tokens.",
        )
    embeds = text.copy()
    embeds[:, places] = image
    return embeds


def prompt_embeds(session: Session, inputs: PromptInputs, image: Array | None = None) -> Array:
    """Embeddings of the whole prompt [1,S,D]. `image` skips encoding when features are at hand."""
    ids = np.asarray(inputs.input_ids, dtype=np.int64)
    # The image token may lie beyond the embedding table: its rows are overwritten anyway.
    text = session.embed(np.where(ids == inputs.image_token_id, 0, ids)[None])
    if image is None:
        if inputs.pixels is None:
            return text
        image = session.encode_image(inputs.pixels)
    return splice(inputs.input_ids, inputs.image_token_id, text, image)


def stream(
    session: Session,
    inputs: PromptInputs,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    sampling: Sampling | None = None,
    image: Array | None = None,
) -> Iterator[int]:
    """New tokens one by one, greedy unless `sampling` is given; the end token is not among them."""
    session.reset()
    random = np.random.default_rng(sampling.seed if sampling else 0)
    embeds = prompt_embeds(session, inputs, image)
    for index in range(max_new_tokens):
        logits = session.decode(embeds)[0]
        if not np.isfinite(logits).all():
            raise ExportError(
                f"Logits of new token {index} are not finite.",
                "Run `fastvlm-export validate` on the bundle to see which stage broke.",
            )
        token = _draw(logits, sampling, random) if sampling else int(logits.argmax())
        if token in eos_token_ids:
            return
        yield token
        embeds = session.embed(np.array([[token]], dtype=np.int64))


def generate(
    session: Session,
    inputs: PromptInputs,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    sampling: Sampling | None = None,
    image: Array | None = None,
) -> list[int]:
    """The tokens of `stream` as a list."""
    return list(
        stream(
            session,
            inputs,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            sampling=sampling,
            image=image,
        )
    )


def _draw(logits: Array, sampling: Sampling, random: np.random.Generator) -> int:
    scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    weights = np.exp(scaled)
    weights /= weights.sum()
    order = np.argsort(-weights, kind="stable")
    # The token that crosses top_p is still in.
    kept = order[: int(np.searchsorted(np.cumsum(weights[order]), sampling.top_p)) + 1]
    return int(random.choice(kept, p=weights[kept] / weights[kept].sum()))
