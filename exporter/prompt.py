"""The `qwen_2` conversation of LLaVA, as text and as token ids."""

from typing import Protocol

from .errors import ExportError

TEMPLATE = "qwen_2"
IMAGE_TOKEN = "<image>"  # noqa: S105 - a placeholder in the prompt, not a secret
SYSTEM = "You are a helpful assistant."


class Encoder(Protocol):
    """What a prompt needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens parsed, none added."""
        ...


def qwen_2_prompt(question: str, *, image: bool = True) -> str:
    """The prompt for one question, with the image's place before it."""
    place = f"{IMAGE_TOKEN}\n" if image else ""
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{place}{question}<|im_end|>\n"
        f"<|im_start|>assistant\n"
    )


def prompt_ids(
    tokenizer: Encoder, question: str, image_token_id: int, image_tokens: int
) -> list[int]:
    """Token ids of the prompt, the image as `image_tokens` copies of `image_token_id`.

    The texts before and after the image are encoded apart, as LLaVA does. With no image tokens
    the prompt is text alone.
    """
    if IMAGE_TOKEN in question:
        raise ExportError(
            f"The question contains {IMAGE_TOKEN}; the image's place is put in by the prompt.",
            f"Leave {IMAGE_TOKEN} out of --prompt.",
        )
    if not image_tokens:
        return tokenizer.encode(qwen_2_prompt(question, image=False))
    before, after = qwen_2_prompt(question).split(IMAGE_TOKEN)
    return [
        *tokenizer.encode(before),
        *[image_token_id] * image_tokens,
        *tokenizer.encode(after),
    ]
