"""What the loader finds out about sound checkpoints."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm_export.exporter import checkpoint as checkpoints_module
from fastvlm_export.exporter.checkpoint import load
from fastvlm_export.exporter.config import preset
from fastvlm_export.exporter.doctor import describe, inspect
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.model.fastvlm import build
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.exporter.random_weights import random_state
from fastvlm_export.exporter.tensor_names import Layout

from .. import checkpoints

torch.set_num_threads(1)


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_apple(tmp_path_factory.mktemp("apple"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_sizes_come_from_the_tensors(saved: Path) -> None:
    checkpoint = load(saved)
    assert checkpoint.config == checkpoints.tiny_config()
    assert checkpoint.layout is Layout.APPLE
    assert (checkpoint.resolution, checkpoint.context) == (256, 512)
    assert checkpoint.preprocessing == Preprocessing(strategy=Strategy.PAD, resolution=256)
    assert checkpoint.image_token_id == checkpoint.tokenizer.vocab_size == 262
    assert checkpoint.eos_token_ids == (319, 261)
    assert checkpoint.dtype == "float32"


def test_the_model_holds_the_stored_numbers(saved: Path) -> None:
    model = load(saved).model()
    stored = random_state(checkpoints.tiny_config(), 0)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor.item() == 0
        else:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, stored[name])
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_train_form(tmp_path: Path) -> None:
    config = checkpoints.tiny_config(train_form=True, tied=True)
    assert load(checkpoints.save_apple(tmp_path, config)).config == config


def test_mixed_types_and_counters(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    half = {k: v.bfloat16() if "layers" in k else v for k, v in tensors.items()}
    half["model.norm.weight"] = half["model.norm.weight"].half()
    half["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    bn = "model.vision_tower.vision_tower.model.network.0.0.convffn.conv.bn.num_batches_tracked"
    half[bn] = torch.tensor(5)
    save_file(half, folder / "model.safetensors")
    checkpoint = load(folder)
    assert checkpoint.dtype == "float32, bfloat16, float16"
    assert checkpoint.model()(torch.ones(1, 2, 32)).dtype == torch.float32


@pytest.mark.parametrize("flag", [True, False])
def test_redundant_head(flag: bool, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    edit(folder / "config.json", tie_word_embeddings=flag)
    checkpoint = load(folder)
    assert checkpoint.config.decoder.tied
    assert "decoder.lm_head.weight" not in checkpoint.state
    assert "redundant copy" in checkpoint.notes[0] and len(checkpoint.notes) == (1 if flag else 2)


def test_untied_head_against_the_flag(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)
    checkpoint = load(folder)
    assert not checkpoint.config.decoder.tied
    assert "differs from embed_tokens" in checkpoint.notes[0]


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp3x_gelu", 3)])
def test_projectors(kind: str, layers: int, tmp_path: Path) -> None:
    config = dataclasses.replace(checkpoints.tiny_config(), projector_layers=layers)
    checkpoints.save_apple(tmp_path, config)
    edit(tmp_path / "config.json", mm_projector_type=kind)
    if kind == "mlp1x_gelu":
        tensors = load_file(tmp_path / "model.safetensors")
        for leaf in ("weight", "bias"):
            tensors[f"model.mm_projector.0.{leaf}"] = tensors.pop(f"model.mm_projector.{leaf}")
        save_file(tensors, tmp_path / "model.safetensors")
    assert load(tmp_path).config == config


@pytest.mark.parametrize("ratio", [None, "square"])
def test_llava_crops_unless_told_to_pad(ratio: str | None, folder: Path) -> None:
    edit(folder / "config.json", image_aspect_ratio=ratio)
    assert load(folder).preprocessing.strategy is Strategy.CROP


def test_generation_config_ends_answers(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[261, 259])
    assert load(folder).eos_token_ids == (261, 259)


def test_nothing_that_ends_an_answer_is_noted(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=...)
    (folder / "added_tokens.json").unlink()
    checkpoint = load(folder)
    assert checkpoint.eos_token_ids == ()
    assert "nothing ends an answer" in checkpoint.notes[-1]


def test_absent_settings_are_the_librarys_defaults(folder: Path) -> None:
    gone = ("rope_theta", "rms_norm_eps", "max_position_embeddings", "model_type")
    edit(folder / "config.json", **dict.fromkeys(gone, ...))
    checkpoint = load(folder)
    decoder = checkpoint.config.decoder
    assert (decoder.rope_theta, decoder.rms_norm_eps) == (10000.0, 1e-6)
    assert checkpoint.context == 8192
    assert "rope_theta is missing" in checkpoint.notes[0]


def test_rope_theta_in_its_newer_place(folder: Path) -> None:
    new = {"rope_type": "default", "rope_theta": 5e5}
    edit(folder / "config.json", rope_theta=..., rope_parameters=new)
    assert load(folder).config.decoder.rope_theta == 5e5


def test_pickled_weights(folder: Path) -> None:
    expected = load(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    checkpoint = load(folder)
    assert checkpoint.config == expected.config
    assert all(torch.equal(x, expected.state[name]) for name, x in checkpoint.state.items())


def test_hash_covers_content_and_not_the_place(folder: Path) -> None:
    first = load(folder).sha256
    moved = folder.rename(folder.parent / "elsewhere")
    assert load(moved).sha256 == first
    edit(moved / "config.json", unused=1)
    assert load(moved).sha256 != first


def test_inspection(saved: Path) -> None:
    found = inspect(saved).to_dict()
    json.dumps(found)
    model = build(checkpoints.tiny_config())
    parameters: Any = found["parameters"]
    assert parameters["total"] == sum(p.numel() for p in model.parameters())
    assert (found["layout"], found["tower_form"]) == ("apple", "inference")
    assert (found["image_tokens"], found["padding_rows"]) == (16, 58)
    assert found["projector"] == "mlp2x_gelu"


def test_bundled() -> None:
    checkpoint = checkpoints_module.bundled()
    assert checkpoint.layout is Layout.BUNDLED
    assert checkpoint.config.tower.train_form
    assert checkpoint.image_token_id < checkpoint.config.decoder.vocab_size
    assert 1e6 < describe(checkpoint).parameters["total"] < 1e7


def test_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints_module, "preset", lambda name: checkpoints.tiny_config())
    first, again, other = (checkpoints_module.random("tiny", seed) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 != other.sha256
    assert (first.layout, first.name, first.resolution) == (Layout.RANDOM, "tiny", 1024)
    for name, tensor in first.state.items():
        assert torch.equal(tensor, again.state[name])
        assert not torch.equal(tensor, other.state[name])
    pixels = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        model = first.model()
        features = model.encode_image(pixels)
        logits = model(features)
    assert 0.02 < features.std() < 10
    assert 1 < logits.std() < 10


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("fastvlm-0.5b", 494_032_768 + 3_557_120 + 125_073_504),
        ("fastvlm-1.5b", 1_543_714_304 + 7_080_960 + 125_073_504),
        ("fastvlm-7b", 7_615_616_512 + 23_862_272 + 125_073_504),
    ],
)
def test_presets_have_the_released_sizes(name: str, total: int) -> None:
    assert sum(p.numel() for p in build(preset(name)).parameters()) == total


def test_unknown_preset() -> None:
    with pytest.raises(ExportError, match="no model named"):
        checkpoints_module.random("fastvlm-9b", 0)
