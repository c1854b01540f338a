"""What the Core ML packages of a bundle are called and take, and the interface they are run by."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

VISION, EMBEDDING, DECODER = "vision.mlpackage", "embedding.mlpackage", "decoder.mlpackage"
"""Packages of the default layout. Tensors: see `targets.coreml`."""

MAIN, PREFILL, DECODE = "main", "prefill", "decode"
"""Functions: `main` of vision and embedding; prefill (a chunk) and decode (one token)."""

PIXELS, FEATURES = "pixel_values", "image_features"
"""float32 [1,3,R,R] -> float32 [1,N,D]."""
IDS, EMBEDS = "input_ids", "inputs_embeds"
"""int32 [1,S], S from 1 to the context -> float32 [1,S,D]."""
POSITION, LENGTH, LOGITS = "position", "length", "logits"
"""decode: inputs_embeds float32 [1,1,D], position int32 [1] -> logits float32 [1,V].

prefill: inputs_embeds float32 [1,C,D] of which the first `length` (int32 [1]) count, the rest is
padding; position of the first; -> logits of the last that counts.
"""
KEY_CACHE, VALUE_CACHE = "keyCache", "valueCache"
"""States, float16 [layers,1,KV,capacity,d], capacity >= context + C - 1."""
KEY_REST, VALUE_REST = "keyCacheRest", "valueCacheRest"
"""States of a float32 decoder: what float16 cut off, as Core ML's states are float16 only."""

EXPORT_HINT = "Export it again: fastvlm-export --target coreml --out DIR --force"
EXPORT_APP_HINT = f"{EXPORT_HINT} --layout apple-app"
"""What to do about a damaged package, or folder of Apple's app."""


class Model(Protocol):
    """One function of a package, ready to run: `MLModel` on a Mac, the interpreter anywhere.

    A state that one function of a package made serves its other functions, too.
    """

    @property
    def inputs(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of each input that is no state; a flexible size is -1."""
        ...

    def make_state(self) -> Any:
        """Zeros for every state."""
        ...

    def predict(
        self, inputs: Mapping[str, NDArray[Any]], state: Any = None
    ) -> dict[str, NDArray[Any]]:
        """Run once. `state` is changed in place. Raises ExportError where it can't run."""
        ...


class OpenModel(Protocol):
    """Opens a function of a saved package."""

    def __call__(self, package: Path, function: str) -> Model:
        """Raises ExportError for what is damaged, foreign or not there."""
        ...
