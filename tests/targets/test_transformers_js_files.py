import dataclasses

import pytest

from fastvlm_export.exporter.config import fastvithd
from fastvlm_export.targets import transformers_js

from .conftest import byte_tokenizer, lively_model, make_spec

SPEC = make_spec(lively_model(byte_tokenizer().vocab_size, tied=False))


@pytest.mark.parametrize("resolution", [64, 100, 224, 256, 336, 768, 1000, 1024, 2048])
def test_the_client_counts_as_many_image_tokens_as_the_tower_gives(resolution: int) -> None:
    tokens = fastvithd().image_tokens(resolution)
    spec = dataclasses.replace(
        SPEC,
        image_tokens=tokens,
        preprocessing=dataclasses.replace(SPEC.preprocessing, resolution=resolution),
    )
    assert (resolution // transformers_js.patch_size(spec)) ** 2 == tokens


def test_a_model_without_end_tokens_has_none_in_its_files() -> None:
    spec = dataclasses.replace(SPEC, eos_token_ids=())
    assert "eos_token_id" not in transformers_js.config(spec, "fp32", {})
    assert "eos_token" not in transformers_js.tokenizer_config(spec)
