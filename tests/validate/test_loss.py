import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastvlm_export.quantize.recipes import LossLimits
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.validate.loss import Answers, QuantizationLoss, measure_loss
from fastvlm_export.validate.recording import record

from .fakes import Altered, case, tiny_model, tiny_session
from .reports import accuracy_report

LIMITS = LossLimits(mean_kl=0.05, accuracy_points=1.0)


def measured(quantized, *, cases=None, steps=5, limits=LIMITS):
    cases = [case("a"), case("b", seed=1)] if cases is None else cases
    return measure_loss(record(tiny_session(), cases, steps), quantized, limits)


def rounded_model(bits):
    """A tiny model with every matrix rounded, each as a whole."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                step = parameter.abs().max() / (2 ** (bits - 1) - 1)
                parameter.copy_(torch.round(parameter / step) * step)
    return EagerSession(model, context=64)


def test_the_same_model_loses_nothing():
    loss = measured(tiny_session())
    assert loss.passed
    assert loss.mean_kl == loss.worst_kl == 0
    assert (loss.same_first.right, loss.same_first.total) == (12, 12)
    assert [c.tokens_before_difference for c in loss.cases] == [6, 6]
    assert loss.features.relative == loss.features.cosine == 0
    assert loss.features.psnr_db == math.inf


def test_fewer_bits_lose_more():
    losses = [measured(rounded_model(bits), limits=None) for bits in (10, 6, 3)]
    assert 0 < losses[0].mean_kl < losses[1].mean_kl < losses[2].mean_kl
    psnr = [loss.features.psnr_db for loss in losses]
    assert psnr == sorted(psnr, reverse=True)
    assert losses[0].same_first.right > losses[2].same_first.right


def test_a_loss_beyond_the_recipe_s_limit_fails_and_one_at_it_passes():
    loss = measured(rounded_model(3))
    at = replace(loss, limits=LossLimits(mean_kl=loss.mean_kl, accuracy_points=0))
    below = replace(loss, limits=LossLimits(mean_kl=loss.mean_kl * 0.999, accuracy_points=0))
    assert at.passed
    assert not below.passed
    assert below.checks[0].name == "mean KL"


def test_it_lives_on_its_own_features_and_embeddings():
    """A fault of either reaches the logits, as it would at a user's."""
    for part in ("image", "embed"):
        loss = measured(Altered(tiny_session(), **{part: lambda x: x * np.float32(0.5)}))
        assert loss.mean_kl > 0
        assert (loss.features.relative > 0) == (part == "image")


def test_tokens_are_counted_up_to_the_first_that_differs():
    class Contrary(Altered):
        """Prefers another token at the third position."""

        def reset(self):
            self.position = 0
            super().reset()

        def decode(self, inputs_embeds):
            logits = super().decode(inputs_embeds)
            self.position += 1
            return -logits if self.position == 3 else logits

    loss = measured(Contrary(tiny_session()), cases=[case()])
    assert loss.cases[0].agrees == (True, True, False, True, True, True)
    assert loss.cases[0].tokens_before_difference == 2
    assert loss.worst_kl == max(loss.cases[0].kl) > loss.mean_kl


def with_nan(x):
    x = x.copy()
    x.flat[-1] = np.nan
    return x


@pytest.mark.parametrize("limits", [LIMITS, None])
@pytest.mark.parametrize(
    ("part", "fault", "said"),
    [
        ("image", with_nan, "image features: 1 of 128 values are NaN"),
        ("image", lambda x: x[..., :-1], "[1, 4, 31]"),
        ("decode", with_nan, "logits: 6 of 534 values are NaN"),
        ("decode", lambda x: x * np.float32("inf"), "logits"),
    ],
)
def test_what_is_not_a_number_fails_whatever_the_limits(part, fault, said, limits):
    loss = measured(Altered(tiny_session(), **{part: fault}), limits=limits)
    assert not loss.passed
    assert said in loss.checks[0].message
    assert "a: " in loss.checks[0].message
    assert math.isnan(loss.mean_kl)


def test_one_broken_image_fails_though_the_others_are_well():
    seen = []

    def second(x):
        seen.append(x)
        return with_nan(x) if len(seen) == 2 else x

    loss = measured(Altered(tiny_session(), image=second))
    assert math.isfinite(loss.mean_kl)
    assert not loss.passed
    assert "b: image features" in loss.checks[0].message


def test_nothing_compared_fails():
    loss = measured(tiny_session(), cases=[])
    assert not loss.passed
    assert "no image was compared" in loss.checks[0].message


def test_without_limits_any_finite_loss_passes():
    loss = measured(rounded_model(2), limits=None)
    assert loss.mean_kl > 0
    assert loss.passed


def answered(original_wrong, quantized_wrong):
    return Answers(
        original=accuracy_report(original_wrong), quantized=accuracy_report(quantized_wrong)
    )


def test_points_lost_are_a_gate_where_answers_were_asked():
    clean = measured(tiny_session())
    assert [c.name for c in clean.checks] == ["mean KL"]
    lost = replace(clean, answers=answered((), (4,)))
    assert lost.answers.points_lost == pytest.approx(100 / 30)
    assert not lost.passed
    assert lost.checks[1].name == "accuracy points lost"
    assert replace(lost, limits=LossLimits(mean_kl=1, accuracy_points=3.4)).passed
    gained = replace(clean, answers=answered((4,), (9,)))  # one lost, one won
    assert gained.answers.points_lost == 0
    assert gained.passed


def test_no_answers_at_all_are_no_pass():
    nothing = Answers(
        original=replace(accuracy_report(), samples=()),
        quantized=replace(accuracy_report(), samples=()),
    )
    loss = replace(measured(tiny_session()), answers=nothing)
    assert math.isnan(nothing.points_lost)
    assert not loss.passed


def test_other_questions_are_the_caller_s_error():
    fewer = replace(accuracy_report(), samples=accuracy_report().samples[:3])
    with pytest.raises(ValueError, match="different questions"):
        Answers(original=fewer, quantized=accuracy_report()).points_lost  # noqa: B018


def test_errors_of_the_quantized_model_are_raised():
    def broken(x):
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        measured(Altered(tiny_session(), decode=broken))


def test_the_dictionary_has_every_gate_and_case():
    data = QuantizationLoss.to_dict(measured(rounded_model(4)))
    assert data["positions"] == 12
    assert len(data["cases"]) == 2
    assert data["checks"][0]["limit"] == 0.05
    assert data["checks"][0]["passed"] == data["passed"]
