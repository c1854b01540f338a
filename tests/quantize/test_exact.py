"""Runs without any rounding, against the same integers and scales evaluated by hand in float64."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from fastvlm_export.quantize.recipes import RECIPES, Recipe
from fastvlm_export.quantize.runnable import runnable
from fastvlm_export.targets.base import Array
from fastvlm_export.targets.eager import ProgramSession

from .exactly import float64
from .halves import BRAIN_INT8, INT4, INT8, WEIGHTS, error, quantized, shown, small

CLOSE = 1e-5
RECIPE = [
    RECIPES["fp16"],
    RECIPES["bf16"],
    RECIPES["fp8"],
    BRAIN_INT8,
    INT8,
    INT4,
    WEIGHTS,
    RECIPES["int8"],
]


@pytest.mark.parametrize("recipe", RECIPE, ids=lambda r: f"{r.name}-{r.float_format}")
def test_an_exact_session_computes_the_real_numbers(recipe: Recipe) -> None:
    """Features, embeddings, a prefill and two steps with their cache."""
    _, spec = small()
    programs = quantized(recipe).programs
    sessions = {
        exact: ProgramSession(programs, spec.decoder, spec.context, exact=exact)
        for exact in (True, False)
    }
    generator = np.random.default_rng(0)
    pixels = shown()[0].numpy()
    ids = generator.integers(0, spec.decoder.vocab_size, (1, 7))
    expected = by_hand(programs, torch.from_numpy(pixels), torch.from_numpy(ids))
    found: dict[bool, dict[str, Array]] = {}
    for exact, session in sessions.items():
        features, embeds = session.encode_image(pixels), session.embed(ids)
        prompt = np.concatenate((embeds[:, :2], features, embeds[:, 2:5]), axis=1)
        found[exact] = {
            "features": features,
            "embeds": embeds,
            "prefill": session.decode(prompt),
            "step": session.decode(embeds[:, 5:6]),
            "last": session.decode(embeds[:, 6:7]),
        }
    assert {x.dtype for x in sessions[True].past} == {torch.float32}
    assert sessions[True].past[0].shape[2] == prompt.shape[1] + 2
    for name, value in expected.items():
        off, typed = (error(torch.from_numpy(found[e][name]), value) for e in (True, False))
        print(f"{name}: exact {off:.1e}, typed {typed:.1e}")
        assert off < CLOSE
        assert typed > CLOSE or name == "embeds"  # rows of a table are not computed with


@torch.no_grad()
def by_hand(
    programs: Mapping[str, ExportedProgram], pixels: Tensor, ids: Tensor
) -> dict[str, Tensor]:
    """What the session is asked, in float64."""
    model, spec = small()
    modules = float64(model, programs, spec.context)
    expected = {
        "features": modules["vision"](pixels.double()),
        "embeds": modules["embedding"](ids),
    }
    embeds, config = expected["embeds"], spec.decoder
    prompt = torch.cat((embeds[:, :2], expected["features"], embeds[:, 2:5]), dim=1)
    past = [torch.zeros(1, config.kv_heads, 0, config.head_dim).double()] * (2 * config.layers)
    for name, x in (("prefill", prompt), ("step", embeds[:, 5:6]), ("last", embeds[:, 6:7])):
        mask = torch.ones(1, past[0].shape[2] + x.shape[1], dtype=torch.int64)
        logits, *past = modules["decoder"](x, mask, *past)
        expected[name] = logits[:, -1]
    return expected


def test_exact_runs_leave_fp16s_range() -> None:
    """As a whole they're float32: 1e6 in the cache is no infinity."""
    _, spec = small()
    programs = quantized(RECIPES["fp16"]).programs
    run = runnable(programs["decoder"], exact=True)
    past = [torch.full((1, spec.decoder.kv_heads, 2, spec.decoder.head_dim), 1e6)] * (
        2 * spec.decoder.layers
    )
    x = torch.ones(1, 1, spec.decoder.hidden_size)
    _, *present = run(x, torch.ones(1, 3, dtype=torch.int64), *past)
    assert present[0].dtype is torch.float32
    assert present[0][0, 0, 0, 0] == 1e6


def test_what_is_rounded_beyond_its_range_is_cut_there() -> None:
    programs = quantized(INT8).programs
    pixels = shown()[0]
    model, spec = small()
    module = float64(model, programs, spec.context)["vision"]
    run = runnable(programs["vision"], exact=True)
    for size in (1.0, 30.0):  # thirty times as bright as it was in calibration
        (found,) = run(size * pixels)
        with torch.no_grad():
            off = error(found, module(size * pixels.double()))
        print(f"{off:.1e}")
        assert off < CLOSE
