import dataclasses

import pytest
import torch

from fastvlm_export.exporter.config import FastVLMConfig, fastvithd, preset
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.model.decoder import CacheBuffersDecoder, CacheInputsDecoder
from fastvlm_export.exporter.model.fastvithd import LayerNormChannel
from fastvlm_export.exporter.model.fastvlm import FastVLM, build


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "projector", "decoder"),
    [
        ("fastvlm-0.5b", 3_557_120, 494_032_768),
        ("fastvlm-1.5b", 7_080_960, 1_543_714_304),
        ("fastvlm-7b", 23_862_272, 7_615_616_512),
    ],
)
def test_presets_have_the_published_parameter_counts(
    name: str, projector: int, decoder: int
) -> None:
    model = build(preset(name))
    assert parameters(model.vision_tower) == 125_073_504
    assert parameters(model.vision_tower) - parameters(model.vision_tower.head) == 122_714_208
    assert parameters(model.projector) == projector
    assert parameters(model.decoder) == decoder


def test_train_form_has_the_published_parameter_count() -> None:
    config = preset("fastvlm-0.5b")
    train = dataclasses.replace(config, tower=dataclasses.replace(config.tower, train_form=True))
    assert parameters(build(train).vision_tower) == 125_234_880


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ExportError, match=r"fastvlm-0\.5b"):
        preset("fastvlm-9b")


@pytest.mark.parametrize(
    ("resolution", "tokens"),
    [
        (224, 16),
        (256, 16),
        (336, 36),
        (512, 64),
        (768, 144),
        (1024, 256),
        (1536, 576),
        (2048, 1024),
    ],
)
def test_image_tokens_round_up(resolution: int, tokens: int) -> None:
    assert fastvithd().image_tokens(resolution) == tokens


@pytest.mark.parametrize("resolution", [64, 100, 224, 256])
def test_features_are_as_many_as_promised(tiny: FastVLM, resolution: int) -> None:
    features = tiny.encode_image(torch.rand(2, 3, resolution, resolution))
    tokens = tiny.config.tower.image_tokens(resolution)
    assert features.shape == (2, tokens, tiny.config.decoder.hidden_size)


def test_both_caches_give_the_logits_of_the_whole_sequence(tiny: FastVLM) -> None:
    x = torch.randn(1, 11, tiny.config.decoder.hidden_size)
    whole = tiny(x)
    inputs = CacheInputsDecoder(tiny.decoder, 32)
    buffers = CacheBuffersDecoder(tiny.decoder, 32)
    config = tiny.config.decoder
    past = [torch.zeros(1, config.kv_heads, 0, config.head_dim)] * (2 * config.layers)
    for start, end in ((0, 6), (6, 9), (9, 10), (10, 11)):
        mask = torch.ones(1, end, dtype=torch.int64)
        logits, *past = inputs(x[:, start:end], mask, *past)
        torch.testing.assert_close(logits, whole[:, end - 1 : end], rtol=1e-4, atol=1e-5)
        logits = buffers(x[:, start:end], torch.arange(start, end))
        torch.testing.assert_close(logits, whole[:, end - 1 : end], rtol=1e-4, atol=1e-5)


def test_a_masked_past_is_not_seen(tiny: FastVLM) -> None:
    decoder = CacheInputsDecoder(tiny.decoder, 32)
    config = tiny.config.decoder
    empty = [torch.zeros(1, config.kv_heads, 0, config.head_dim)] * (2 * config.layers)
    x = torch.randn(1, 4, config.hidden_size)
    changed = x.clone()
    changed[:, 1] += 1
    mask = torch.tensor([[1, 0, 1, 1]])
    torch.testing.assert_close(decoder(x, mask, *empty)[0], decoder(changed, mask, *empty)[0])


def channel_norm(x: torch.Tensor) -> torch.Tensor:
    """The definition, in float64."""
    wide = x.double()
    centred = wide - wide.mean(1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 300.0, 2e4])
def test_channel_norm_is_the_definition_in_float32(scale: float) -> None:
    x = torch.randn(2, 96, 3, 3) * scale
    torch.testing.assert_close(
        LayerNormChannel(96)(x).double(), channel_norm(x), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("scale", [1.0, 300.0, 1e4])
def test_channel_norm_survives_fp16_up_to_its_range(scale: float) -> None:
    x = (torch.randn(1, 1536, 2, 2) * scale).clamp(-6e4, 6e4).half()
    x[0, 7] = 6e4
    x[0, 8] = -6e4
    y = LayerNormChannel(1536).half()(x)
    assert (y.double() - channel_norm(x)).abs().max() <= 2e-3 * channel_norm(x).abs().max()


def test_channel_norm_of_equal_channels_is_zero_in_fp16() -> None:
    x = torch.full((1, 64, 2, 2), 6e4).half()
    assert LayerNormChannel(64).half()(x).abs().max() == 0


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projector_depths(tiny: FastVLM, layers: int) -> None:
    config: FastVLMConfig = dataclasses.replace(tiny.config, projector_layers=layers)
    assert FastVLM(config).eval().encode_image(torch.rand(1, 3, 64, 64)).shape[1] == 1
