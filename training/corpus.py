"""What the bundled model reads: its tokenizer, its prompts, and batches of text and images."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

from fastvlm_export.exporter.prompt import IMAGE_TOKEN, SYSTEM, qwen_2_prompt
from fastvlm_export.exporter.tokenizer import QWEN2_PIECES
from fastvlm_export.validate import digits
from fastvlm_export.validate.digits import Kind, Scene

DESCRIBE = "Describe the image."
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT_VOCABULARY = 384  # 256 bytes and 128 merges: every word of the task becomes one token
EMBEDDING_ROWS = 448  # padded as released checkpoints are: rows past the last token mean nothing
IGNORED = -100  # labels that carry no loss

# One turn per message; a system message is added where the conversation has none, and an image
# in a message's content becomes `<image>` and a line end, as the qwen_2 prompt wants it.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def prompt_parts(question: str) -> tuple[str, str]:
    """Return the qwen_2 prompt before and after `<image>`."""
    before, after = qwen_2_prompt(question).split(IMAGE_TOKEN)
    return before, after


def build_tokenizer() -> Tokenizer:
    """Train the byte-level BPE on the task's own sentences; the same on every run."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return tokenizer


def _sentences() -> Iterator[str]:
    roles = f"system\n{SYSTEM}", "user\n", "assistant\n"
    for colour in digits.COLOURS:
        for count in range(1, digits.MAX_DIGITS + 1):
            number = "0123456789"[:count]
            scene = Scene(pixels=np.zeros(0, np.uint8), colour=colour, digits=number, centres=())
            yield from (*roles, *digits.QUESTIONS.values(), DESCRIBE, scene.caption(), colour)


def tokenizer_config(model_max_length: int) -> str:
    """Return tokenizer_config.json, with the chat template that writes the qwen_2 prompt."""
    content = {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[2],
        "errors": "replace",
        "model_max_length": model_max_length,
        "pad_token": SPECIAL[0],
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return json.dumps(content, indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class Images:
    """A batch of canvases: scenes and their pixels [B,3,H,W] in 0..1, channels last in memory."""

    scenes: list[Scene]
    pixels: Tensor


def draw(rng: random.Random, count: int, *, height: int, width: int, longest: int) -> Images:
    """Draw `count` augmented canvases of one to `longest` training digits."""
    scans = digits.training_scans()
    augmentation = digits.Augmentation()
    scenes = [
        digits.compose(
            rng,
            rng.sample(scans, rng.randint(1, longest)),
            height=height,
            width=width,
            augmentation=augmentation,
        )
        for _ in range(count)
    ]
    return images(scenes)


def images(scenes: list[Scene]) -> Images:
    """Stack canvases of one size."""
    stacked = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
    return Images(scenes=scenes, pixels=stacked.permute(0, 3, 1, 2).float() / 255)


class Writer:
    """Turns questions and answers into token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = self.ids(SPECIAL[2])

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens in it are parsed."""
        encoded: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return encoded

    def turn(self, question: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        """Ids before the image, ids from the image to the answer, ids of the answer and its end."""
        before, after = prompt_parts(question)
        return self.ids(before), self.ids(after), self.ids(answer) + self.end


def question_and_answer(scene: Scene, kind: Kind | None) -> tuple[str, str]:
    """Return the question of a kind and its answer; None asks for the caption."""
    if kind is None:
        return DESCRIBE, scene.caption()
    return digits.QUESTIONS[kind], scene.answer(kind)


def imagine(rng: random.Random) -> Scene:
    """Invent the facts of a scene without drawing it, for training on text alone."""
    number = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, digits.MAX_DIGITS)))
    colour = rng.choice(tuple(digits.COLOURS))
    return Scene(pixels=np.zeros(0, np.uint8), colour=colour, digits=number, centres=())


def pad(rows: Sequence[list[int]], value: int) -> Tensor:
    """Stack rows of ids into [B, longest], padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def write_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(tokenizer_config(model_max_length))
