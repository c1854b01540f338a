"""What a reference computes for a few images and prompts, kept so that its model need not be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..targets.base import Array, Session, TokenIds
from ..targets.generation import splice

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image and one prompt, as one side's contract makes them.

    `pixels` are [1,3,R,R]; `prompt_ids` holds `image_token_id` once per image token.
    """

    name: str
    pixels: Array
    prompt_ids: Sequence[int]
    image_token_id: int

    @property
    def text_ids(self) -> TokenIds:
        """The prompt [1,S] with 0 in place of the image token, whose rows are overwritten anyway.

        That token may lie beyond the embedding table.
        """
        ids: TokenIds = np.asarray(self.prompt_ids, dtype=np.int64)
        return np.where(ids == self.image_token_id, 0, ids)[None]

    def splice(self, text: Array, image: Array) -> Array:
        """The prompt's embeddings [1,S,D] with the image's rows [1,N,D] in their places."""
        return splice(self.prompt_ids, self.image_token_id, text, image)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A reference's run on one case: every stage's output, and greedy tokens t0..tN.

    `features` [1,N,D]; `embeddings` [1,S,D] of the prompt's text; `inputs` are what the decoder was
    fed, the spliced prompt and then each token's embedding; `logits` [1+N,V] are what they led to.
    """

    case: Case
    features: Array
    embeddings: Array
    inputs: tuple[Array, ...]
    tokens: tuple[int, ...]
    logits: Array

    @property
    def steps(self) -> int:
        """N: greedy tokens to compare, and teacher-forced positions after the first."""
        return len(self.tokens) - 1


def one(token: int) -> TokenIds:
    """A single token as the ids [1,1] of a decoding step."""
    return np.array([[token]], dtype=np.int64)


def record(
    reference: Session,
    cases: Sequence[Case],
    steps: int = 24,
    progress: Progress | None = None,
) -> tuple[Recording, ...]:
    """Run the reference on each case; the context must hold the prompt and `steps` more.

    The end token does not stop it: numbers after it are as comparable as before. Outputs are
    copied, since a runtime may reuse its buffers. Errors of the reference are raised.
    """
    say = progress or (lambda _: None)
    recordings = []
    for number, case in enumerate(cases, 1):
        say(f"{case.name}, {number} of {len(cases)}")
        features = np.array(reference.encode_image(case.pixels))
        embeddings = np.array(reference.embed(case.text_ids))
        reference.reset()
        tokens, inputs, rows = [], [case.splice(embeddings, features)], []
        for _ in range(1 + steps):
            rows.append(np.array(reference.decode(inputs[-1]))[0])
            tokens.append(int(rows[-1].argmax()))
            inputs.append(np.array(reference.embed(one(tokens[-1]))))
        recordings.append(
            Recording(
                case=case,
                features=features,
                embeddings=embeddings,
                inputs=tuple(inputs[: 1 + steps]),
                tokens=tuple(tokens),
                logits=np.stack(rows),
            )
        )
    return tuple(recordings)


def along(recording: Recording, session: Session, image: Array) -> Array:
    """Logits [1+N,V] after the session's own prompt and each token of the recorded reference.

    `image` are the session's own features [1,N,D]. It lives on its own embeddings.
    """
    session.reset()
    text = np.array(session.embed(recording.case.text_ids))
    rows = [np.array(session.decode(recording.case.splice(text, image)))]
    for token in recording.tokens[:-1]:
        rows.append(np.array(session.decode(session.embed(one(token)))))
    return np.concatenate(rows)
