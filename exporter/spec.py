"""What a target needs to know about the model beside its graphs. Plain data."""

from dataclasses import dataclass

from .config import DecoderConfig
from .preprocess import Preprocessing
from .tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """The contract that an artifact is written to.

    `context` is the most positions that the cache holds, `image_tokens` the rows of the image
    features, `features` their width before projection (Apple's `mm_hidden_size`).
    """

    decoder: DecoderConfig
    features: int
    projector_layers: int
    context: int
    image_tokens: int
    preprocessing: Preprocessing
    tokenizer: Tokenizer
    image_token_id: int
    eos_token_ids: tuple[int, ...]
