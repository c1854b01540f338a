"""Checkpoints of head sizes that no kernel is made for, to every target: transformers' own answer.

The library builds, saves and runs the model; its greedy tokens are compared with the artifact's.
"""

from pathlib import Path

import pytest

from fastvlm_export import targets
from fastvlm_export.exporter import pipeline
from fastvlm_export.exporter.bundle import open_bundle
from fastvlm_export.exporter.source import SourceRequest
from fastvlm_export.targets.generation import PromptInputs, generate
from fastvlm_export.validate.sessions import open_session

from .. import oracles

RESOLUTION, NEW_TOKENS = 128, 24
SIZES = {
    20: {"hidden": 160, "heads": 8, "kv_heads": 1, "tied": True},
    24: {"hidden": 96, "heads": 4, "kv_heads": 2},
    40: {"hidden": 160, "heads": 4, "kv_heads": 4},
}
"""By head size."""


@pytest.mark.parametrize(
    ("head_dim", "names"),
    [
        (20, ("onnx", "coreml", "executorch", "tensorrt")),
        (24, ("onnx", "tensorrt")),
        (40, ("onnx", "coreml")),
        pytest.param(24, ("coreml", "executorch"), marks=pytest.mark.slow),
        pytest.param(40, ("executorch", "tensorrt"), marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_transformers(
    head_dim: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    for name in names:
        found = targets.get(name).availability()
        if not found.lower:
            pytest.skip(found.remedy)
    oracle = oracles.build(
        oracles.Sizes(
            layers=(1, 1, 1, 1, 1),
            widths=(16, 16, 32, 64, 64),
            ratios=(2, 2, 2, 2, 2),
            inner=96,
            decoder_layers=2,
            **SIZES[head_dim],
        ),
        seed=7,
        inference_form=True,
    )
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    oracles.save_huggingface(oracle, checkpoint, resolution=RESOLUTION)
    outcomes = pipeline.export(
        pipeline.ExportRequest(
            source=SourceRequest(checkpoint=checkpoint), out=out, targets=names, steps=4
        )
    )

    pixels, ids = oracles.question(oracle, RESOLUTION, seed=3)
    wanted = oracles.greedy(oracle, pixels, ids, NEW_TOKENS)
    assert len(set(wanted)) > 8, "the answer should not be one token over and over"
    inputs = PromptInputs(
        input_ids=ids[0].tolist(), image_token_id=oracles.IMAGE_TOKEN_ID, pixels=pixels.numpy()
    )
    for name, outcome in zip(names, outcomes, strict=True):
        assert outcome.passed, (name, outcome.report.verdict)
        session = open_session(open_bundle(outcome.path))
        found = generate(session, inputs, max_new_tokens=NEW_TOKENS, eos_token_ids=())
        assert found == wanted, name
