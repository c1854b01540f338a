import numpy as np
import pytest
import torch

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.targets.generation import PromptInputs, Sampling, generate, splice

IMAGE = 500  # beyond the tiny model's embedding table, as Apple's -200 is
NEVER = (-1,)


def inputs() -> PromptInputs:
    pixels = np.random.default_rng(0).random((1, 3, 128, 128), dtype=np.float32)
    return PromptInputs(input_ids=[3, 9, *[IMAGE] * 4, 17], image_token_id=IMAGE, pixels=pixels)


def test_greedy_is_the_argmax_of_the_whole_sequence(tiny: FastVLM) -> None:
    prompt = inputs()
    tokens = generate(EagerSession(tiny, 64), prompt, max_new_tokens=12, eos_token_ids=NEVER)

    assert prompt.pixels is not None
    features = tiny.encode_image(torch.from_numpy(prompt.pixels))
    x = torch.cat(
        (tiny.embed(torch.tensor([[3, 9]])), features, tiny.embed(torch.tensor([[17]]))), 1
    )
    expected = []
    for _ in range(12):
        expected.append(int(tiny(x)[0, -1].argmax()))
        x = torch.cat((x, tiny.embed(torch.tensor([[expected[-1]]]))), 1)
    assert tokens == expected


def test_generation_stops_before_the_end_token_and_starts_afresh(tiny: FastVLM) -> None:
    session = EagerSession(tiny, 64)
    tokens = generate(session, inputs(), max_new_tokens=12, eos_token_ids=NEVER)
    last = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i)
    stopped = generate(session, inputs(), max_new_tokens=12, eos_token_ids=(tokens[last],))
    assert stopped == tokens[:last]


def test_sampling_is_seeded_and_cold_sampling_is_greedy(tiny: FastVLM) -> None:
    session = EagerSession(tiny, 64)

    def run(temperature: float, seed: int, top_p: float = 1.0) -> list[int]:
        return generate(
            session,
            inputs(),
            max_new_tokens=20,
            eos_token_ids=NEVER,
            sampling=Sampling(temperature=temperature, seed=seed, top_p=top_p),
        )

    greedy = generate(session, inputs(), max_new_tokens=20, eos_token_ids=NEVER)
    assert run(1e-4, 0) == greedy
    assert run(5.0, 0, top_p=1e-6) == greedy
    assert run(5.0, 0) == run(5.0, 0)
    assert run(5.0, 0) != run(5.0, 1)


def test_impossible_sampling_is_refused() -> None:
    for temperature, top_p in (
        (0.0, 1.0),
        (-1.0, 1.0),
        (float("nan"), 1.0),
        (1.0, 0.0),
        (1.0, 2.0),
    ):
        with pytest.raises(ExportError, match="temperature"):
            Sampling(temperature=temperature, top_p=top_p)


def test_the_image_must_fill_its_places() -> None:
    text = np.zeros((1, 3, 4), dtype=np.float32)
    with pytest.raises(ExportError, match="1 image tokens, the image 2"):
        splice([1, IMAGE, 2], IMAGE, text, np.zeros((1, 2, 4), dtype=np.float32))


def test_the_context_is_a_limit(tiny: FastVLM) -> None:
    with pytest.raises(ExportError, match="context holds 10"):
        generate(EagerSession(tiny, 10), inputs(), max_new_tokens=12, eos_token_ids=NEVER)


def test_logits_that_are_not_finite_stop_generation(tiny: FastVLM) -> None:
    tiny.decoder.norm.weight[0] = float("nan")
    with pytest.raises(ExportError, match="not finite"):
        generate(EagerSession(tiny, 64), inputs(), max_new_tokens=2, eos_token_ids=NEVER)
