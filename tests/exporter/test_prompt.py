import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.prompt import prompt_ids, qwen_2_prompt


class Letters:
    """Encodes each character as its code point."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_the_prompt_is_llavas_qwen_2() -> None:
    assert qwen_2_prompt("What are these?") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat are these?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_image_stands_between_the_texts() -> None:
    ids = prompt_ids(Letters(), "Hm?", -7, 5)
    start = ids.index(-7)
    text = "".join(map(chr, ids[:start])) + "<image>" + "".join(map(chr, ids[start + 5 :]))
    assert ids[start : start + 5] == [-7] * 5
    assert text == qwen_2_prompt("Hm?")


def test_without_an_image_the_prompt_is_text() -> None:
    assert "".join(map(chr, prompt_ids(Letters(), "Hm?", -7, 0))) == qwen_2_prompt(
        "Hm?", image=False
    )


def test_an_image_placeholder_in_the_question_is_refused() -> None:
    with pytest.raises(ExportError, match="<image>"):
        prompt_ids(Letters(), "see <image>", -7, 5)
