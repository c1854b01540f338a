"""The session's bookkeeping, on packages that coremltools wrote, in the reference interpreter."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets.coreml_model import (
    DECODE,
    DECODER,
    EMBEDDING,
    EMBEDS,
    FEATURES,
    IDS,
    LENGTH,
    MAIN,
    PIXELS,
    POSITION,
    PREFILL,
    VISION,
)
from fastvlm_export.targets.coreml_session import CoreMLSession
from fastvlm_export.validate.mil import open_model

from . import coreml_packages as toy


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return toy.write_bundle(tmp_path_factory.mktemp("coreml") / "bundle")


@dataclasses.dataclass
class Call:
    package: str
    function: str
    inputs: dict
    has_state: bool


class Recorded:
    """An opened function whose calls are kept."""

    def __init__(self, calls, package, function):
        self.model = open_model(package, function)
        self.calls, self.key = calls, (package.name, function)
        self.inputs, self.make_state = self.model.inputs, self.model.make_state

    def predict(self, inputs, state=None):
        self.calls.append(Call(*self.key, dict(inputs), state is not None))
        return self.model.predict(inputs, state)


@pytest.fixture
def calls():
    return []


@pytest.fixture
def session(bundle, calls):
    return CoreMLSession(bundle, lambda package, function: Recorded(calls, package, function))


def embeds(length, seed=0):
    """Multiples of 1/8, which the float16 cache holds as they are."""
    values = np.random.default_rng(seed).integers(-8, 9, (1, length, toy.D)) / 8
    return values.astype(np.float32)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(1, toy.CONTEXT), min_size=1), seed=st.integers(0, 99))
def test_however_a_sequence_is_cut_the_answer_is_that_of_the_whole(session, cuts, seed):
    whole = embeds(toy.CONTEXT, seed)
    session.reset()
    past = 0
    for length in cuts:
        if past + length > toy.CONTEXT:
            break
        logits = session.decode(whole[:, past : past + length])
        past += length
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, toy.logits_of(whole[:, :past]), rtol=1e-5, atol=1e-4)


def test_a_prompt_is_cut_into_chunks_and_the_last_is_padded_with_zeros(session, calls):
    prompt = embeds(2 * toy.CHUNK + 2)
    session.decode(prompt)
    assert [(call.function, call.has_state) for call in calls] == [(PREFILL, True)] * 3
    assert [call.inputs[POSITION].tolist() for call in calls] == [[0], [4], [8]]
    assert [call.inputs[LENGTH].tolist() for call in calls] == [[4], [4], [2]]
    last = calls[-1].inputs[EMBEDS]
    np.testing.assert_array_equal(last[:, :2], prompt[:, -2:])
    assert last.shape == (1, toy.CHUNK, toy.D)
    assert not last[:, 2:].any()


def test_a_single_token_goes_to_decode_where_the_prompt_ended(session, calls):
    session.decode(embeds(3))
    session.decode(embeds(1))
    session.decode(embeds(1))
    assert [call.function for call in calls] == [PREFILL, DECODE, DECODE]
    assert [call.inputs[POSITION].tolist() for call in calls] == [[0], [3], [4]]
    assert LENGTH not in calls[-1].inputs


def test_a_chunk_of_one_token_needs_no_padding(session, calls):
    session.decode(embeds(toy.CHUNK + 1))
    assert [call.function for call in calls] == [PREFILL, DECODE]


def test_every_array_is_of_the_declared_type_and_contiguous(session, calls):
    session.encode_image(np.asfortranarray(np.ones((1, 3, toy.R, toy.R), np.float64)))
    session.embed(np.array([[0, 1, 2]], np.int64))
    session.decode(embeds(6)[:, ::2])
    types = {PIXELS: np.float32, IDS: np.int32, EMBEDS: np.float32}
    types |= {POSITION: np.int32, LENGTH: np.int32}
    given = {name: array for call in calls for name, array in call.inputs.items()}
    assert {name: array.dtype for name, array in given.items()} == types
    assert all(array.flags.c_contiguous for array in given.values())


def test_vision_and_embedding_give_what_their_packages_compute(session):
    pixels = np.random.default_rng(0).random((1, 3, toy.R, toy.R), np.float32)
    np.testing.assert_allclose(
        session.encode_image(pixels), toy.vision_of(pixels), rtol=1e-5, atol=1e-6
    )
    for ids in ([[4]], [[0, 3, 3, 1]]):
        np.testing.assert_array_equal(session.embed(np.array(ids)), toy.TABLE[np.array(ids)])


def test_the_context_can_be_filled_and_not_overrun(session):
    whole = embeds(toy.CONTEXT)
    logits = session.decode(whole)
    np.testing.assert_allclose(logits, toy.logits_of(whole), rtol=1e-5, atol=1e-4)
    with pytest.raises(ExportError, match="13 are taken and 1 more"):
        session.decode(embeds(1))


def test_nothing_to_decode_is_refused(session):
    with pytest.raises(ExportError, match="nothing to decode"):
        session.decode(embeds(0))


def test_reset_forgets_what_was_decoded(session, calls):
    first = session.decode(embeds(5))
    session.decode(embeds(5, seed=1))
    session.reset()
    np.testing.assert_array_equal(session.decode(embeds(5)), first)


def test_all_functions_are_open_once_the_session_is(bundle):
    opened = []

    def opener(package, function):
        opened.append((package.name, function))
        return open_model(package, function)

    session = CoreMLSession(bundle, opener)
    session.decode(session.embed(np.array([[1, 2]])))
    assert sorted(opened) == sorted(
        [(VISION, MAIN), (EMBEDDING, MAIN), (DECODER, PREFILL), (DECODER, DECODE)]
    )


def test_a_missing_package_is_named(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    shutil.rmtree(folder / EMBEDDING)
    with pytest.raises(ExportError, match=f"has no {EMBEDDING}") as caught:
        CoreMLSession(SimpleNamespace(path=folder, manifest=bundle.manifest), open_model)
    assert "--target coreml" in caught.value.hint


def test_a_package_with_other_inputs_is_refused(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    shutil.rmtree(folder / VISION)
    shutil.copytree(folder / EMBEDDING, folder / VISION)
    with pytest.raises(ExportError, match=f"takes {IDS} of rank 2, not {PIXELS} of rank 4"):
        CoreMLSession(SimpleNamespace(path=folder, manifest=bundle.manifest), open_model)


def test_an_output_of_another_name_is_refused(session, monkeypatch):
    monkeypatch.setattr(session.vision.model, "predict", lambda *_: {"features": np.ones(1)})
    with pytest.raises(ExportError, match=f"gave features, not {FEATURES}"):
        session.encode_image(np.ones((1, 3, toy.R, toy.R), np.float32))
