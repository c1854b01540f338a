import dataclasses

import pytest

from fastvlm_export.exporter.config import fastvithd
from fastvlm_export.targets import transformers_js

from .conftest import Small


@pytest.mark.parametrize("resolution", [64, 100, 224, 256, 336, 768, 1000, 1024, 2048])
def test_the_client_counts_as_many_image_tokens_as_the_tower_gives(
    small: Small, resolution: int
) -> None:
    tokens = fastvithd().image_tokens(resolution)
    spec = dataclasses.replace(
        small.spec,
        image_tokens=tokens,
        preprocessing=dataclasses.replace(small.spec.preprocessing, resolution=resolution),
    )
    assert (resolution // transformers_js.patch_size(spec)) ** 2 == tokens


def test_a_model_without_end_tokens_has_none_in_its_files(small: Small) -> None:
    spec = dataclasses.replace(small.spec, eos_token_ids=())
    assert "eos_token_id" not in transformers_js.config(spec, "fp32", {})
    assert "eos_token" not in transformers_js.tokenizer_config(spec)
