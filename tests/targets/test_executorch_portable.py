"""A whole model without a backend, its weights in a file of their own; tokenizers too large."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("executorch", reason="needs executorch")

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.quantize.apply import quantize
from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import executorch, executorch_pack
from fastvlm_export.targets.base import Options
from fastvlm_export.targets.eager import ProgramSession
from fastvlm_export.targets.executorch_file import read
from fastvlm_export.targets.executorch_model import DECODER, METHODS, PROGRAM, WEIGHTS
from fastvlm_export.targets.executorch_session import ExecuTorchSession
from fastvlm_export.validate.delegation import delegation

from .conftest import RESOLUTION, byte_tokenizer, lively_model, make_spec, worst

SMALLEST = 256  # bytes: vectors of weights go apart, too, and caches would


def test_a_tokenizer_larger_than_the_logits_is_refused() -> None:
    """The runner's sampler reads as many logits as the tokenizer has ids."""
    words = byte_tokenizer().vocab_size
    found = [
        executorch.contract_problems(make_spec(lively_model(words - fewer, tied=True)))
        for fewer in (1, 0)
    ]
    [line] = found[0]
    assert f"ids up to {words - 1}, the logits are {words - 1} wide" in line
    assert found[1] == []


def test_each_method_finds_its_own_numbers_in_the_weight_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime looks weights up by name, those of all methods in one table."""
    monkeypatch.setattr(executorch_pack, "SMALLEST_EXTERNAL", SMALLEST)
    vocabulary = byte_tokenizer().vocab_size  # the image's id is beyond the table
    model = lively_model(vocabulary, tied=True, depths=(1, 1, 1, 1, 1), layers=1)
    spec, recipe = make_spec(model), RECIPES["fp32"]
    options = Options(backend="portable", external_weights=True)
    assert executorch.option_problems(options) == []
    folded = reparameterize(model).model
    programs = quantize(folded, recipe, spec, None, lambda _: None).programs
    artifact = executorch.lower(programs, spec, recipe, tmp_path, options)
    said = {
        "resolution": RESOLUTION,
        "image_tokens": spec.image_tokens,
        "context": spec.context,
        "artifact": artifact.details,
        "files": dict.fromkeys((PROGRAM, WEIGHTS), ""),
    }
    bundle: Any = SimpleNamespace(path=tmp_path, manifest=SimpleNamespace(**said))

    floats = sum(one.numel() * 4 for one in folded.parameters())
    assert (tmp_path / PROGRAM).stat().st_size < floats / 4
    assert floats / 2 < (tmp_path / WEIGHTS).stat().st_size < floats * 1.5
    file = read(tmp_path / PROGRAM, tmp_path / WEIGHTS)
    assert set(file.methods) == set(METHODS.values())
    assert not any(method.delegates for method in file.methods.values())
    assert len(file.methods[DECODER].buffers) == 2
    assert delegation(bundle).passed

    ours, reference = (
        ExecuTorchSession(bundle),
        ProgramSession(programs, spec.decoder, spec.context),
    )
    draw = np.random.default_rng(0)
    pixels = draw.random((1, 3, RESOLUTION, RESOLUTION), dtype=np.float32)
    features = ours.encode_image(pixels)
    assert worst(features, reference.encode_image(pixels)) < 1e-5
    ids = np.arange(vocabulary)[None, ::9]
    words = ours.embed(ids)
    assert np.array_equal(words, reference.embed(ids))
    image = np.array([[spec.image_token_id]])
    assert np.array_equal(ours.embed(image), reference.embed(image))
    for embeds in (np.concatenate((features, words), 1), words[:, :1], words[:, 1:4]):
        assert worst(ours.decode(embeds), reference.decode(embeds)) < 1e-5

    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ExportError, match=r"has no model\.ptd"):
        ExecuTorchSession(bundle)
