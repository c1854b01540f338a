"""Statistics over all images together: against the same numbers computed at once."""

import math

import numpy as np
import pytest

from fastvlm_export.validate import metrics
from fastvlm_export.validate.limits import INTEGER_ACTIVATIONS, Statistics
from fastvlm_export.validate.parity import Scope, Stage
from fastvlm_export.validate.pooled import ALL, Pool

LOOSE = Statistics(features_rms=1.0, features_noise=1.0, logits_rms=1.0, mean_kl=9.0, tokens=1.0)


def arrays(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_images_are_judged_as_if_they_were_one():
    features = [arrays(1, 4, 8, seed=i) * (1 + i) for i in range(3)]
    logits = [arrays(5, 11, seed=10 + i) for i in range(3)]
    pool = Pool()
    for i in range(3):
        pool.add_features(Scope.ISOLATED, features[i], features[i] + arrays(1, 4, 8, seed=20 + i))
        pool.add_logits(Scope.ISOLATED, logits[i], logits[i] + arrays(5, 11, seed=30 + i))
    found = pool.statistics(Scope.ISOLATED)
    theirs, ours = np.concatenate(features), np.concatenate(features)
    ours = ours + np.concatenate([arrays(1, 4, 8, seed=20 + i) for i in range(3)])
    assert found.features_rms == pytest.approx(metrics.relative_rms(theirs, ours), rel=1e-6)
    assert found.features_noise == pytest.approx(metrics.noise(theirs, ours), rel=1e-6)
    theirs = np.concatenate(logits)
    ours = theirs + np.concatenate([arrays(5, 11, seed=30 + i) for i in range(3)])
    assert found.logits_rms == pytest.approx(metrics.relative_rms(theirs, ours), rel=1e-6)
    assert found.mean_kl == pytest.approx(metrics.kl(theirs, ours).mean(), rel=1e-6)
    same = (theirs.argmax(-1) == ours.argmax(-1)).mean()
    assert found.tokens == pytest.approx(1 - same)
    assert 0 < same < 1


def test_nothing_added_is_no_number_and_passes_no_limit():
    found = Pool().statistics(Scope.ISOLATED)
    assert all(map(math.isnan, (found.features_rms, found.logits_rms, found.mean_kl)))
    assert list(Pool().measurements(LOOSE)) == []


def test_one_image_that_gave_nothing_fails_the_statistics_of_all():
    pool = Pool()
    logits = arrays(5, 11, seed=1)
    pool.add_logits(Scope.END_TO_END, logits, logits)
    assert all(m.passed for m in pool.measurements(LOOSE))
    pool.add_flaw(Stage.TEACHER_FORCED, Scope.END_TO_END, "cat.png: the output is missing")
    (judged,) = pool.measurements(LOOSE)
    assert (judged.case, judged.stage, judged.passed) == (ALL, Stage.TEACHER_FORCED, False)
    assert {check.message for check in judged.checks} == {"cat.png: the output is missing"}


def test_a_single_value_decides_nothing_and_a_few_tokens_may_be_others():
    theirs = arrays(100, 50, seed=2)
    ours = theirs.copy()
    ours[7, 3] = theirs[7].max() + 0.1  # one token is another, one logit far off
    assert metrics.relative(theirs, ours) > 0.3
    pool = Pool()
    pool.add_logits(Scope.ISOLATED, theirs, ours)
    assert all(m.passed for m in pool.measurements(INTEGER_ACTIVATIONS.statistics))
    pool.add_logits(Scope.ISOLATED, theirs, np.roll(theirs, 1, axis=0))
    (judged,) = pool.measurements(INTEGER_ACTIVATIONS.statistics)
    assert not any(check.passed for check in judged.checks)
