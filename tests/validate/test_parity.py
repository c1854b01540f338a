import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.validate import parity
from fastvlm_export.validate.limits import FLOAT32
from fastvlm_export.validate.parity import Scope, Stage
from fastvlm_export.validate.recording import record

from .fakes import (
    IMAGE_TOKEN_ID,
    PROMPT,
    Altered,
    case,
    compare,
    pixels,
    tiny_model,
    tiny_session,
)


def test_equal_sessions_agree_exactly_at_every_stage():
    result = compare(tiny_session(), cases=[case("a"), case("b", seed=1)])
    assert result.passed
    assert result.first_broken is None
    assert {m.stage for m in result.measurements} == set(Stage)
    assert {m.case for m in result.measurements} == {"a", "b"}
    assert all(c.value == 0 for m in result.measurements for c in m.checks)
    greedy = [m for m in result.measurements if m.stage is Stage.GREEDY]
    assert [m.numbers["tokens"] for m in greedy] == [6, 6]


def test_rounding_passes_and_the_verdict_names_the_nearest_number():
    candidate = Altered(tiny_session(), image=lambda x: x * np.float32(1 + 1e-6))
    result = compare(candidate)
    assert result.passed
    assert "Nearest to a limit" in result.verdict


def altered_weight(name):
    model = tiny_model()
    with torch.no_grad():
        parameter = model.get_parameter(name)
        parameter.view(-1)[0] += 0.5
    return EagerSession(model, context=64)


@pytest.mark.parametrize(
    ("weight", "stage"),
    [
        ("vision_tower.network.0.0.convffn.fc1.weight", Stage.IMAGE_FEATURES),
        ("projector.2.bias", Stage.IMAGE_FEATURES),
        ("decoder.layers.1.mlp.down_proj.weight", Stage.FIRST_TOKEN),
    ],
)
def test_one_changed_weight_is_traced_to_its_stage(weight, stage):
    result = compare(altered_weight(weight))
    assert not result.passed
    assert result.first_broken is stage
    assert result.verdict.startswith(f"The first stage to break: {parity.STAGE_NAMES[stage]}")
    assert "noise.png" in result.verdict


def test_one_changed_embedding_is_traced_to_the_embeddings():
    model = tiny_model()
    with torch.no_grad():
        model.decoder.embed_tokens.weight[5, 0] += 1e-3
    assert compare(EagerSession(model, context=64)).first_broken is Stage.EMBEDDINGS


def test_an_isolated_stage_does_not_inherit_the_difference_before_it():
    result = compare(altered_weight("projector.2.bias"))
    scopes = {(m.stage, m.scope): m.passed for m in result.measurements}
    assert scopes[Stage.FIRST_TOKEN, Scope.ISOLATED]
    assert not scopes[Stage.FIRST_TOKEN, Scope.END_TO_END]


def test_swapped_channels_break_preprocessing():
    result = compare(tiny_session(), theirs=[replace(case(), pixels=pixels()[:, ::-1].copy())])
    assert result.first_broken is Stage.PREPROCESS
    levels = result.failures[0][1].value
    assert levels == pytest.approx(round(levels), abs=1e-3)
    end_to_end = [m for m in result.measurements if m.scope is Scope.END_TO_END]
    assert not any(m.passed for m in end_to_end if m.stage is Stage.IMAGE_FEATURES)


def test_one_level_in_one_pixel_is_not_to_the_pixel():
    theirs = pixels()
    theirs[0, 1, 7, 7] += 1 / 255
    result = compare(tiny_session(), theirs=[replace(case(), pixels=theirs)])
    assert result.failures[0][0].stage is Stage.PREPROCESS
    assert result.failures[0][1].value == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("their_prompt", [PROMPT[:-1], [2, *PROMPT[1:]], []])
def test_another_prompt_breaks_preprocessing(their_prompt):
    result = compare(tiny_session(), theirs=[replace(case(), prompt_ids=their_prompt)])
    assert result.first_broken is Stage.PREPROCESS
    assert "prompt tokens differ" in result.verdict


def scaled(x):
    return x * np.float32(1.001)


def with_nan(x):
    x = x.copy()
    x.flat[-1] = np.nan
    return x


def missing(x):
    return None


def narrower(x):
    return x[..., :-1]


def raising(x):
    raise RuntimeError("kernel not found")


@pytest.mark.parametrize("fault", [scaled, with_nan, missing, narrower, raising])
@pytest.mark.parametrize(
    ("output", "stage"),
    [
        ("image", Stage.IMAGE_FEATURES),
        ("embed", Stage.EMBEDDINGS),
        ("decode", Stage.FIRST_TOKEN),
    ],
)
def test_a_faulty_output_fails_its_own_stage(output, stage, fault):
    result = compare(Altered(tiny_session(), **{output: fault}))
    assert not result.passed
    assert result.first_broken is stage


def test_the_message_says_what_was_wrong_with_an_output():
    def message(fault):
        return compare(Altered(tiny_session(), image=fault)).verdict

    assert "1 of 128 values are NaN" in message(with_nan)
    assert "missing" in message(missing)
    assert "[1, 4, 31]" in message(narrower)
    assert "RuntimeError: kernel not found" in message(raising)


class Forgetful(EagerSession):
    """Drops the oldest cache position after the prefill: every later position is one too low."""

    def decode(self, inputs_embeds):
        logits = super().decode(inputs_embeds)
        if inputs_embeds.shape[1] > 1:
            self.past = [x[:, :, 1:] for x in self.past]
        return logits


def test_a_wrong_cache_position_breaks_the_teacher_forced_steps_only():
    result = compare(Forgetful(tiny_model(), context=64))
    assert result.first_broken is Stage.TEACHER_FORCED
    first = [m for m in result.measurements if m.stage is Stage.FIRST_TOKEN]
    assert all(m.passed for m in first)


class Stuck(EagerSession):
    """Never empties its cache."""

    def reset(self):
        pass


def test_a_cache_that_is_not_emptied_fails():
    assert not compare(Stuck(tiny_model(), context=64)).passed


def test_no_case_at_all_fails():
    result = compare(tiny_session(), cases=[])
    assert not result.passed
    assert "no image was compared" in result.verdict


def test_no_step_at_all_fails():
    result = compare(tiny_session(), steps=0)
    assert not result.passed
    assert {m.stage for m, _ in result.failures} == {Stage.TEACHER_FORCED, Stage.GREEDY}


def test_a_result_without_measurements_does_not_pass():
    result = compare(tiny_session())
    assert not replace(result, measurements=()).passed


def test_a_reference_with_nan_fails_rather_than_agreeing():
    broken = Altered(tiny_session(), image=with_nan)
    result = compare(broken, reference=broken)
    assert result.first_broken is Stage.IMAGE_FEATURES
    assert "reference itself" in result.verdict


class Scripted:
    """Answers with given logits whatever it is fed."""

    def __init__(self, rows):
        self.rows, self.position = np.asarray(rows, np.float32), 0

    def encode_image(self, pixels):
        return np.ones((1, 4, 8), np.float32)

    def embed(self, input_ids):
        return np.ones((*input_ids.shape, 8), np.float32)

    def decode(self, inputs_embeds):
        self.position += 1
        return self.rows[[self.position - 1]]

    def reset(self):
        self.position = 0


CLEAR = [10.0, 0.0, 1.0]
CLOSE = [10.0, 9.9999, 1.0]
CLOSE_FLIPPED = [9.9999, 10.0, 1.0]
FLIPPED = [0.0, 10.0, 1.0]


def scripted(theirs, ours, steps=3):
    prompt = replace(case(), prompt_ids=[1, *[IMAGE_TOKEN_ID] * 4])
    return compare(Scripted(ours), reference=Scripted(theirs), cases=[prompt], steps=steps)


def greedy(result):
    return next(m for m in result.measurements if m.stage is Stage.GREEDY)


def test_after_a_tie_both_go_on_with_the_reference_s_token():
    flips = [CLEAR, CLOSE_FLIPPED, CLEAR, CLOSE_FLIPPED]
    result = scripted([CLEAR, CLOSE, CLEAR, CLOSE], flips, steps=3)
    assert greedy(result).passed
    assert greedy(result).numbers == {"tokens": 2, "matching": 2, "ties": 1}
    (tie,) = [t for t in result.ties if t.stage is Stage.GREEDY]
    assert (tie.position, tie.reference_token, tie.candidate_token) == (1, 0, 1)
    assert 0 < tie.margin <= tie.noise
    assert result.free_runs[0].reference == (0, 0, 0)
    assert result.free_runs[0].candidate == (0, 1, 0)


class Listening(Scripted):
    """Remembers the ids that it was asked to embed."""

    def __init__(self, rows):
        super().__init__(rows)
        self.ids = []

    def embed(self, input_ids):
        self.ids.append(input_ids.tolist())
        return super().embed(input_ids)


def test_only_at_a_tie_is_the_candidate_handed_a_token():
    prompt = replace(case(), prompt_ids=[1, *[IMAGE_TOKEN_ID] * 4])
    for row, fed in ((CLOSE, 0), (CLEAR, 1)):
        candidate = Listening([FLIPPED if row is CLEAR else CLOSE_FLIPPED] * 4)
        reference = Scripted([row] * 4)
        compare(candidate, reference=reference, cases=[prompt], steps=3)
        assert candidate.ids[-2:] == [[[fed]], [[fed]]]


def test_a_difference_after_a_tie_still_fails():
    result = scripted([CLOSE, CLEAR, CLEAR, CLEAR], [CLOSE_FLIPPED, CLEAR, FLIPPED, CLEAR])
    assert greedy(result).checks[0].value == 1
    assert greedy(result).numbers == {"tokens": 2, "matching": 1, "ties": 1}


def test_a_close_call_after_a_difference_is_no_tie():
    """From the difference on, the two write other texts."""
    result = scripted([CLEAR, CLOSE, CLOSE, CLEAR], [FLIPPED, CLOSE_FLIPPED, CLOSE, CLEAR])
    assert greedy(result).checks[0].value == 1
    assert greedy(result).numbers["ties"] == 0


def test_a_clear_margin_is_no_tie():
    result = scripted([CLEAR] * 4, [CLEAR, FLIPPED, CLEAR, CLEAR])
    assert not greedy(result).passed
    assert greedy(result).checks[0].value == 1
    assert result.ties == ()
    forced = next(m for m in result.measurements if m.stage is Stage.TEACHER_FORCED)
    assert forced.checks[-1].value == 1


def test_ties_at_every_position_compare_nothing_and_fail():
    result = scripted([CLOSE] * 4, [CLOSE_FLIPPED] * 4)
    assert not greedy(result).passed
    assert "every token is a tie" in greedy(result).checks[0].message
    assert not result.passed


def test_a_token_beyond_the_reference_s_vocabulary_fails_and_says_so():
    wide = [[*CLEAR, 20.0]] * 4
    result = scripted([CLEAR] * 4, wide)
    assert "[1, 4]" in greedy(result).checks[0].message


def test_agreement_on_a_close_call_is_not_a_tie():
    assert scripted([CLOSE] * 4, [CLOSE] * 4).ties == ()


def test_a_prompt_with_the_wrong_number_of_image_tokens_is_the_callers_error():
    wrong = replace(case(), prompt_ids=[1, IMAGE_TOKEN_ID])
    with pytest.raises(ExportError, match="1 image tokens"):
        compare(tiny_session(), cases=[wrong])


def test_the_summary_keeps_the_worst_case_of_each_check():
    cases = [case("good"), case("bad")]
    theirs = [cases[0], replace(cases[1], pixels=pixels()[:, ::-1].copy())]
    result = compare(tiny_session(), cases=cases, theirs=theirs)
    lines = parity.summarize(result)
    assert [line.stage for line in lines] == sorted(
        (line.stage for line in lines), key=list(Stage).index
    )
    check, worst_case = lines[0].worst[Scope.ISOLATED]
    assert (lines[0].stage, worst_case, check.passed) == (Stage.PREPROCESS, "bad", False)
    features = next(line for line in lines if line.stage is Stage.IMAGE_FEATURES)
    assert features.worst[Scope.ISOLATED][0].value == 0
    assert features.overall == features.worst[Scope.END_TO_END]
    assert not features.passed


def test_the_dictionary_has_the_verdict_and_every_number():
    data = compare(Altered(tiny_session(), image=with_nan)).to_dict()
    assert data["passed"] is False
    assert data["first_broken"] == "image_features"
    checks = [c for m in data["measurements"] for c in m["checks"]]
    assert any(math.isnan(c["value"]) and c["message"] for c in checks)


def test_progress_names_each_stage():
    said = []
    recordings = record(tiny_session(), [case()], 2, said.append)
    assert said == ["noise.png, 1 of 1"]
    said.clear()
    parity.compare(recordings, [case()], tiny_session(), FLOAT32, said.append)
    assert [line.split(": ")[1] for line in said] == list(Stage)
