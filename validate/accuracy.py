"""Exact answers on the bundled task, through any Session: what an artifact still gets right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..exporter.errors import ExportError
from ..exporter.preprocess import Preprocessing, preprocess
from ..exporter.prompt import prompt_ids
from ..targets.base import Array, Session
from ..targets.generation import PromptInputs, generate
from .digits import Kind, Question

if TYPE_CHECKING:
    from PIL import Image

MAX_NEW_TOKENS = 8  # the longest answer has five tokens: four digits and the end

Progress = Callable[[int, int], None]  # questions answered, questions in all


class Codec(Protocol):
    """What is needed of a tokenizer: text to ids and back."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens parsed, none added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        ...


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many of a number of questions were answered exactly."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """The share in 0..1; NaN where nothing was asked, so that no limit passes it."""
        return self.right / self.total if self.total else float("nan")


@dataclass(frozen=True, kw_only=True)
class AnswerSample:
    """One question with its image, what is right and what the session wrote."""

    image: Image.Image
    kind: Kind
    question: str
    expected: str
    got: str

    @property
    def right(self) -> bool:
        """Whether the answer is exact."""
        return self.got == self.expected


@dataclass(frozen=True, kw_only=True)
class AccuracyReport:
    """Every answer, in the order of the questions."""

    samples: tuple[AnswerSample, ...]

    @property
    def total(self) -> Share:
        """Exact answers to all questions."""
        return _share(self.samples)

    @property
    def kinds(self) -> Mapping[Kind, Share]:
        """Exact answers to each kind of question."""
        return {
            kind: _share([sample for sample in self.samples if sample.kind is kind])
            for kind in Kind
        }

    def agreement(self, other: AccuracyReport) -> Share:
        """How many answers, right or wrong, are the same as another session's.

        Raises ValueError where the two were not asked the same.
        """
        if [_asked(sample) for sample in self.samples] != [_asked(s) for s in other.samples]:
            raise ValueError("the two reports answer different questions")
        pairs = zip(self.samples, other.samples, strict=True)
        return Share(right=sum(a.got == b.got for a, b in pairs), total=len(self.samples))


def evaluate(
    session: Session,
    questions: Sequence[Question],
    *,
    tokenizer: Codec,
    preprocessing: Preprocessing,
    image_token_id: int,
    image_tokens: int,
    eos_token_ids: Sequence[int],
    progress: Progress | None = None,
) -> AccuracyReport:
    """Ask every question greedily; an image shared by questions that follow is encoded once.

    Raises ExportError for an empty list of questions, and where the session refuses its input.
    """
    if not questions:
        raise ExportError("There are no questions to answer.", "Ask at least three.")
    encoded: int | None = None
    features: Array | None = None
    samples: list[AnswerSample] = []
    for number, question in enumerate(questions, start=1):
        if question.image_index != encoded:
            features = session.encode_image(preprocess(question.image, preprocessing))
            encoded = question.image_index
        ids = prompt_ids(tokenizer, question.text, image_token_id, image_tokens)
        written = generate(
            session,
            PromptInputs(input_ids=ids, image_token_id=image_token_id),
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_ids=eos_token_ids,
            image=features,
        )
        samples.append(
            AnswerSample(
                image=question.image,
                kind=question.kind,
                question=question.text,
                expected=question.answer,
                got=tokenizer.decode(written),
            )
        )
        if progress is not None:
            progress(number, len(questions))
    return AccuracyReport(samples=tuple(samples))


def _share(samples: Sequence[AnswerSample]) -> Share:
    return Share(right=sum(sample.right for sample in samples), total=len(samples))


def _asked(sample: AnswerSample) -> tuple[Kind, str, str]:
    return sample.kind, sample.question, sample.expected
