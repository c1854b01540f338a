import json
import math
from collections.abc import Sequence

import jinja2
import numpy as np
import pytest
import torch

from fastvlm_export.exporter import checkpoint
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.exporter.prompt import qwen_2_prompt
from fastvlm_export.targets.base import Array, TokenIds
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.validate import accuracy, digits
from fastvlm_export.validate.accuracy import AccuracyReport
from fastvlm_export.validate.digits import Kind, Question

END = 0
IMAGE_TOKEN_ID = 300
IMAGE_TOKENS = 16


class Bytes:
    """One token per character; 0 is the end."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)


class Scripted:
    """A session that writes given answers, whatever it is shown."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = iter(answers)
        self.encoded = 0
        self.rest: list[int] = []

    def encode_image(self, pixels: Array) -> Array:
        assert pixels.shape == (1, 3, digits.RESOLUTION, digits.RESOLUTION)
        self.encoded += 1
        return np.zeros((1, IMAGE_TOKENS, 4), np.float32)

    def embed(self, input_ids: TokenIds) -> Array:
        return np.zeros((*input_ids.shape, 4), np.float32)

    def decode(self, inputs_embeds: Array) -> Array:
        logits = np.zeros((1, 256), np.float32)
        logits[0, self.rest.pop(0)] = 1
        return logits

    def reset(self) -> None:
        self.rest = [*map(ord, next(self.answers)), END]


def ask(answers: Sequence[str], questions: Sequence[Question]) -> tuple[AccuracyReport, Scripted]:
    session = Scripted(answers)
    report = accuracy.evaluate(
        session,
        questions,
        tokenizer=Bytes(),
        preprocessing=Preprocessing(strategy=Strategy.PAD, resolution=digits.RESOLUTION),
        image_token_id=IMAGE_TOKEN_ID,
        image_tokens=IMAGE_TOKENS,
        eos_token_ids=(END,),
    )
    return report, session


def test_right_answers_count_and_each_image_is_encoded_once() -> None:
    questions = digits.evaluation_set(30)
    report, session = ask([question.answer for question in questions], questions)
    assert (report.total.right, report.total.total) == (30, 30)
    assert all(share.value == 1 for share in report.kinds.values())
    assert session.encoded == 10


def test_wrong_answers_are_shown_under_their_kind() -> None:
    questions = digits.evaluation_set(9)
    answers = [q.answer + " " if q.kind is Kind.NUMBER else q.answer for q in questions]
    report, _ = ask(answers, questions)
    assert report.kinds[Kind.NUMBER].right == 0
    assert report.kinds[Kind.COUNT].value == report.kinds[Kind.COLOUR].value == 1
    wrong = [sample for sample in report.samples if not sample.right]
    assert [sample.got for sample in wrong] == [f"{sample.expected} " for sample in wrong]


def test_agreement_counts_equal_answers_right_or_wrong() -> None:
    questions = digits.evaluation_set(3)
    first, _ = ask(["1", "x", "red"], questions)
    second, _ = ask(["2", "x", "red"], questions)
    assert first.agreement(second).right == 2
    other, _ = ask(["1"] * 6, digits.evaluation_set(6))
    with pytest.raises(ValueError, match="different questions"):
        first.agreement(other)


def test_no_questions_never_pass() -> None:
    with pytest.raises(ExportError, match="no questions"):
        ask([], [])
    assert math.isnan(AccuracyReport(samples=()).total.value)


def test_progress_is_told_of_every_question() -> None:
    questions = digits.evaluation_set(6)
    heard: list[tuple[int, int]] = []
    accuracy.evaluate(
        Scripted([question.answer for question in questions]),
        questions,
        tokenizer=Bytes(),
        preprocessing=Preprocessing(strategy=Strategy.PAD, resolution=digits.RESOLUTION),
        image_token_id=IMAGE_TOKEN_ID,
        image_tokens=IMAGE_TOKENS,
        eos_token_ids=(END,),
        progress=lambda done, total: heard.append((done, total)),
    )
    assert heard == [(i, 6) for i in range(1, 7)]


def test_the_bundled_model_answers_held_out_questions() -> None:
    """The promise of the bundle: 95 % exact over 300 questions, from the checkpoint as stored."""
    torch.set_num_threads(1)  # a model this small only loses by sharing the cores
    bundled = checkpoint.bundled()
    report = accuracy.evaluate(
        EagerSession(bundled.model(), bundled.context, channels_last=True),
        digits.evaluation_set(300),
        tokenizer=bundled.tokenizer,
        preprocessing=bundled.preprocessing,
        image_token_id=bundled.image_token_id,
        image_tokens=bundled.config.tower.image_tokens(bundled.resolution),
        eos_token_ids=bundled.eos_token_ids,
    )
    assert report.total.value >= 0.95
    assert min(share.value for share in report.kinds.values()) >= 0.93


def test_the_bundled_folder_is_small_and_in_train_form() -> None:
    folder = checkpoint.BUNDLED_FOLDER
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    bundled = checkpoint.bundled()
    assert bundled.dtype == "bfloat16"
    assert bundled.config.tower.train_form
    assert bundled.tokenizer.vocab_size < bundled.config.decoder.vocab_size  # padded, as released


@pytest.mark.parametrize("as_parts", [False, True])
def test_the_bundled_chat_template_writes_the_prompt(as_parts: bool) -> None:
    config = json.loads((checkpoint.BUNDLED_FOLDER / "tokenizer_config.json").read_text())
    question = digits.QUESTIONS[Kind.NUMBER]
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    message = {"role": "user", "content": parts if as_parts else f"<image>\n{question}"}
    template = jinja2.Template(config["chat_template"])
    assert template.render(messages=[message], add_generation_prompt=True) == qwen_2_prompt(
        question
    )
