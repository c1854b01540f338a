"""Limits without rounding: what float32's last bits make of a model, and of a fault in it."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from fastvlm_export.exporter import graphs
from fastvlm_export.quantize.runnable import results_moved, runnable
from fastvlm_export.targets.eager import EagerSession, ProgramSession
from fastvlm_export.validate import exact_floor, parity
from fastvlm_export.validate.limits import EXACT, FLOAT32
from fastvlm_export.validate.recording import record

from .fakes import IMAGE_TOKEN_ID, RESOLUTION, Altered, case, tiny_model

CONTEXT = 64


@pytest.fixture(scope="module")
def exact():
    built = graphs.build(
        tiny_model(), resolution=RESOLUTION, context=CONTEXT, image_token_id=IMAGE_TOKEN_ID
    )
    programs = {name: graphs.export_program(graph) for name, graph in built.items()}
    return ProgramSession(programs, tiny_model().config.decoder, CONTEXT, exact=True)


@pytest.fixture(scope="module")
def recordings(exact):
    return record(exact, [case()], 4)


def test_limits_are_those_of_last_bits(exact, recordings):
    found = exact_floor.measured(EXACT, recordings, exact)
    for name in ("features", "features_rms", "features_noise", "logits", "logits_rms"):
        assert exact_floor.LEAST <= getattr(found, name) < 1e-4
    assert found.features_rms > 3e-7
    assert (found.embeddings, found.tokens, found.mean_kl) == (0.0, 0.0, EXACT.mean_kl)
    assert found == exact_floor.measured(EXACT, recordings, exact)  # seeded


def test_other_kernels_pass_and_a_small_fault_does_not(exact, recordings):
    limits = exact_floor.measured(EXACT, recordings, exact)
    cases = [case()]
    eager = EagerSession(tiny_model(), CONTEXT, channels_last=True)  # sums in another order
    result = parity.compare(recordings, cases, eager, limits)
    assert result.passed, result.verdict
    assert result.worst[1].value > 0
    faulty = 3 * max(limits.features, limits.features_rms)
    for part in ("image", "decode"):
        scale = np.float32(1 + max(faulty, 3 * limits.logits))
        wrong = Altered(eager, **{part: lambda x, scale=scale: x * scale})
        assert not parity.compare(recordings, cases, wrong, limits).passed


def test_only_what_is_computed_moves():
    class Looked(torch.nn.Module):
        def forward(self, x):
            return x.reshape(2, 8).transpose(0, 1), x + 1

    run = runnable(torch.export.export(Looked(), (torch.arange(16.0),)), exact=True)
    with results_moved(lambda x: x * 2):
        looked, computed = run(torch.arange(16.0))
    assert torch.equal(looked, torch.arange(16.0).reshape(2, 8).T)
    assert torch.equal(computed, 2 * (torch.arange(16.0) + 1))
    assert torch.equal(run(torch.arange(16.0))[1], torch.arange(16.0) + 1)


def test_bundles_of_other_machines_keep_the_fixed_limits():
    found = EXACT.looser(FLOAT32)
    numbers = {name: value for name, value in asdict(found).items() if name != "statistics"}
    assert numbers == {name: getattr(FLOAT32, name) for name in numbers}
    assert FLOAT32.looser(EXACT) == FLOAT32
