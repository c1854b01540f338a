"""Faults in what clients read beside the numbers, on every target."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastvlm_export.exporter.bundle import MANIFEST

from .base import Fault, NoPlaceError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
HALVES = [0.5, 0.5, 0.5]
BGR_MEAN = [0.406, 0.456, 0.485]

VALUES: tuple[tuple[str, str, str, Any], ...] = (
    ("pad colour: another mean", MANIFEST, "preprocessing.mean", BGR_MEAN),
    ("another standard deviation", MANIFEST, "preprocessing.std", HALVES),
    ("crop instead of pad", MANIFEST, "preprocessing.strategy", "crop"),
    ("another resampling", MANIFEST, "preprocessing.resampling", "bilinear"),
    ("another prompt template", MANIFEST, "prompt_template", "plain"),
    ("another image token", MANIFEST, "image_token_id", 7),
    ("one image token less", MANIFEST, "image_tokens", 15),
    ("no end token", MANIFEST, "eos_token_ids", []),
    ("half the context", MANIFEST, "context", 512),
    ("client: another theta", CONFIG, "rope_theta", 1e4),
    ("client: another epsilon", CONFIG, "rms_norm_eps", 1e-5),
    ("client: another image token", CONFIG, "image_token_index", 7),
    ("client: another context", CONFIG, "max_position_embeddings", 512),
    ("client: another mean", PREPROCESSOR, "image_mean", HALVES),
    ("client: another standard deviation", PREPROCESSOR, "image_std", HALVES),
    ("client: another rescale", PREPROCESSOR, "rescale_factor", 1 / 256),
    ("client: bilinear", PREPROCESSOR, "resample", 2),
    ("client: no crop", PREPROCESSOR, "do_center_crop", False),
    ("client: another end token", "generation_config.json", "eos_token_id", 5),
    ("client: another patch size", "processor_config.json", "patch_size", 32),
    ("client: another chat template", TOKENIZER_CONFIG, "chat_template", "{{ messages }}"),
)
"""Fault, file, key, wrong value."""


def faults() -> Iterator[Fault]:
    """One for each value, and two in the tokenizer itself."""
    for name, file, key, value in VALUES:
        yield Fault(name=name, plant=_json(file, _set(key, value)))
    yield Fault(name="client: two tokens swapped", plant=_json(TOKENIZER, _swap_tokens))
    yield Fault(name="client: a merge is missing", plant=_json(TOKENIZER, _drop_merge))


def _json(file: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        content = json.loads((folder / file).read_text("utf-8"))
        change(content)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / file).write_text(text, "utf-8")

    return plant


def _set(key: str, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        *outer, last = key.split(".")
        for name in outer:
            content = content[name]
        if last not in content:
            raise NoPlaceError(f"there is no {key}")
        content[last] = value

    return change


def _swap_tokens(content: Any) -> None:
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[70:72]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def _drop_merge(content: Any) -> None:
    if not content["model"]["merges"]:
        raise NoPlaceError("the tokenizer has no merges")
    del content["model"]["merges"][-1]
