"""Damaged and foolish checkpoint folders: one clear error each, and all problems in it."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm_export.exporter.checkpoint import load
from fastvlm_export.exporter.errors import ExportError

from .. import checkpoints

TOWER = "model.vision_tower.vision_tower.model."
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def apple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_apple(tmp_path_factory.mktemp("apple"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_apple(tmp_path_factory.mktemp("sharded"), shards=2)


@pytest.fixture
def copy(apple: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(apple, tmp_path / "copy"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


def problems(folder: Path) -> str:
    """The message of the one ExportError, and nothing in the folder has changed."""
    before = fingerprint(folder)
    with pytest.raises(ExportError) as raised:
        load(folder)
    assert fingerprint(folder) == before
    assert raised.value.hint
    return raised.value.message


def fingerprint(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else ()
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def test_the_untouched_folder_loads(apple: Path, sharded: Path) -> None:
    assert load(apple).notes == ()
    assert load(sharded).notes == ()


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    assert "There is no checkpoint folder" in problems(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is empty" in problems(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    assert "is a file" in problems(tmp_path / "file")


def test_truncated_shard(shards: Path) -> None:
    content = (shards / SHARD).read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100, 7, 0):
        (shards / SHARD).write_bytes(content[:length])
        assert f"{SHARD} is truncated or damaged" in problems(shards)


def test_missing_shard(shards: Path) -> None:
    (shards / SHARD).unlink()
    assert f"{SHARD} is missing" in problems(shards)


def test_missing_index(shards: Path) -> None:
    (shards / "model.safetensors.index.json").unlink()
    assert f"model.safetensors.index.json is missing beside {SHARD}" in problems(shards)


@pytest.mark.parametrize(
    "place", ["../other.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "..\\x", "", 3, None]
)
def test_index_that_leaves_the_folder(place: object, shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = place
    index.write_text(json.dumps(values))
    assert "not a file beside it" in problems(shards)


def test_index_that_names_a_tensor_its_shard_lacks(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.extra"] = SHARD
    index.write_text(json.dumps(values))
    assert f"'model.norm.extra' is not in {SHARD}" in problems(shards)


@pytest.mark.parametrize("content", ['{"weight_map": 3}', '{"weight_map": {}}', "[]", "{", ""])
def test_broken_index(content: str, shards: Path) -> None:
    (shards / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in problems(shards)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_git_lfs_pointer(name: str, copy: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (copy / name).write_text(pointer)
    assert f"{name} is a git-lfs pointer" in problems(copy)


def test_lora_adapter(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    (copy / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in problems(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "no weights" in problems(copy)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "3", '"x"', "null", '{"a": NaN}', "\x00", "[" * 100000, '{"a":1e}']
)
def test_corrupt_config(content: str, copy: Path) -> None:
    (copy / "config.json").write_text(content)
    assert "config.json" in problems(copy)


def test_missing_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert "config.json cannot be read" in problems(copy)


@pytest.mark.parametrize("value", [[], {}, "x", -1, 0, 1.5, 10**40, True, [1], {"a": 1}])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
        "mm_hidden_size",
        "mm_vision_tower",
        "eos_token_id",
        "tie_word_embeddings",
        "tokenizer_model_max_length",
        "rope_scaling",
        "image_aspect_ratio",
        "mm_projector_type",
        "hidden_act",
        "model_type",
    ],
)
def test_wrong_types_never_crash(key: str, value: object, copy: Path) -> None:
    edit(copy / "config.json", **{key: value})
    try:
        load(copy)
    except ExportError as error:
        assert key in error.message or key in ("num_attention_heads", "rope_scaling")
    else:
        # Values that are right, or say nothing.
        fine = {"rope_scaling": ({},), "eos_token_id": (0, [], [1])}
        fine |= {"rms_norm_eps": (1.5,), "rope_theta": (1.5,)}
        fine |= {"max_position_embeddings": (), "tie_word_embeddings": (True,)}
        fine |= {"image_aspect_ratio": ("x",)}
        assert value in fine.get(key, ())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 9}, "num_hidden_layers is 9, but the number of layers is 2"),
        ({"hidden_size": 9}, "hidden_size is 9"),
        ({"intermediate_size": 9}, "intermediate_size is 9"),
        ({"vocab_size": 9}, "vocab_size is 9"),
        ({"num_attention_heads": 7}, "num_attention_heads is 7"),
        ({"num_attention_heads": ...}, "num_attention_heads is missing"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ({"head_dim": 6}, "num_attention_heads is 4"),
        ({"mm_hidden_size": 9}, "mm_hidden_size is 9"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is linear, but its layers are 2"),
        ({"mm_projector_type": "mlp2x_relu"}, 'mm_projector_type is "mlp2x_relu"'),
        ({"model_type": "llava_llama"}, 'model_type is "llava_llama"'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled RoPE"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "scaled RoPE"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is 1e+06, but 5"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mm_vision_tower": "openai/clip"}, 'mm_vision_tower is "openai/clip"'),
        ({"mm_vision_tower": ...}, "mm_vision_tower is missing"),
        ({"image_aspect_ratio": "anyres_max_9"}, 'image_aspect_ratio is "anyres_max_9"'),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is true"),
        ({"s2": True}, "s2 is true"),
        ({"image_token_index": 10**6}, "image_token_index is 1000000"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000"),
    ],
)
def test_config_that_contradicts_or_asks_for_more(
    changes: dict[str, Any], words: str, copy: Path
) -> None:
    edit(copy / "config.json", **changes)
    assert words in problems(copy)


def test_all_problems_come_at_once(copy: Path) -> None:
    edit(copy / "config.json", hidden_act="gelu", vocab_size=9, mm_vision_tower=3)
    change_tensors(copy, lambda t: t.pop("model.norm.weight"))
    (copy / "merges.txt").unlink()
    found = problems(copy)
    for words in ("hidden_act", "vocab_size", "mm_vision_tower", "decoder.norm", "no tokenizer"):
        assert words in found


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.gate_proj.weight",
        "model.mm_projector.2.bias",
        "model.mm_projector.0.weight",
        f"{TOWER}patch_embed.1.reparam_conv.weight",
        f"{TOWER}network.0.0.layer_scale",
        f"{TOWER}network.7.0.norm.weight",
        f"{TOWER}network.7.0.convffn.conv.bn.running_mean",
        f"{TOWER}conv_exp.reparam_conv.bias",
        f"{TOWER}conv_exp.se.reduce.bias",
        f"{TOWER}network.5.proj.0.lkb_reparam.weight",
        f"{TOWER}network.6.reparam_conv.bias",
    ],
)
def test_missing_tensor(name: str, copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.pop(name))
    assert name.rsplit(".", 2)[-2] in problems(copy)


@pytest.mark.parametrize("part", ["conv_exp.reparam_conv", "conv_exp.se.reduce"])
def test_missing_part_of_conv_exp(part: str, copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.pop(f"{TOWER}{part}.weight"))
    assert "conv_exp has no" in problems(copy)


def test_missing_layer(copy: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            del tensors[name]

    change_tensors(copy, drop)
    assert "decoder layers: number 0 is missing" in problems(copy)


def test_missing_tower(copy: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(TOWER)]:
            del tensors[name]

    change_tensors(copy, drop)
    assert "no FastViTHD tower" in problems(copy)


def test_unknown_tensors(copy: Path) -> None:
    extra = {
        "model.surprise": torch.ones(1),
        "model.layers.0.self_attn.q_norm.weight": torch.ones(8),
        f"{TOWER}network.0.999999999.convffn.fc1.weight": torch.ones(8, 8, 1, 1),
    }
    change_tensors(copy, lambda tensors: tensors.update(extra))
    found = problems(copy)
    assert "model.surprise has no place" in found
    assert "blocks of the tower's network.0: number 1 is missing" in found


def test_unknown_tensor_in_a_known_layer(copy: Path) -> None:
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    change_tensors(copy, lambda tensors: tensors.update(extra))
    assert "decoder.layers.0.self_attn.q_norm.weight has no place" in problems(copy)


def test_half_folded_tower(copy: Path) -> None:
    extra = {f"{TOWER}patch_embed.0.rbr_conv.0.conv.weight": torch.ones(8, 3, 3, 3)}
    change_tensors(copy, lambda tensors: tensors.update(extra))
    assert "half folded" in problems(copy)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5)])
@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.mm_projector.0.bias",
        f"{TOWER}network.0.0.convffn.fc1.weight",
        f"{TOWER}network.7.0.token_mixer.qkv.weight",
        f"{TOWER}conv_exp.se.reduce.weight",
        f"{TOWER}head.proj",
    ],
)
def test_wrong_shape(name: str, shape: tuple[int, ...], copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.update({name: torch.ones(shape)}))
    assert problems(copy)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value: float, copy: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value

    change_tensors(copy, spoil)
    assert "decoder.layers.1.mlp.up_proj.weight holds NaN or infinite" in problems(copy)


def test_negative_variance(copy: Path) -> None:
    name = f"{TOWER}network.0.0.convffn.conv.bn.running_var"
    change_tensors(copy, lambda tensors: tensors[name].sub_(9))
    assert "variances below zero" in problems(copy)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_quantized_weights(dtype: torch.dtype, copy: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(copy, lambda t: t.update({name: t[name].to(dtype)}))
    assert "can be exported, not quantized ones" in problems(copy)


def test_untied_head_is_not_made_up(copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight is missing" in problems(copy)
    edit(copy / "config.json", tie_word_embeddings=True)
    assert load(copy).config.decoder.tied


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_tokenizer(name: str, copy: Path) -> None:
    (copy / name).unlink()
    assert "no tokenizer" in problems(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"version": "1.0"}'])
def test_corrupt_tokenizer(content: str, copy: Path) -> None:
    (copy / "tokenizer.json").write_text(content)
    assert "tokenizer" in problems(copy)


def test_tokenizer_larger_than_the_embedding(copy: Path) -> None:
    edit(copy / "added_tokens.json", **{f"<{i}>": i for i in range(262, 400)})
    assert "the tokenizer has 400 ids, the embedding only 320" in problems(copy)


def test_tokenizer_whose_ids_have_a_gap(copy: Path) -> None:
    edit(copy / "added_tokens.json", **{"<gap>": 300})
    assert "gives '<gap>' the id 262, not 300" in problems(copy)


def test_pickle_with_code_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"x": print}, copy / "pytorch_model.bin")
    assert "pytorch_model.bin is truncated or damaged" in problems(copy)


def test_the_name_of_the_folder_is_free(copy: Path) -> None:
    moved = copy.rename(copy.parent / "ünamed folder (1)")
    assert load(moved).sha256 == load(moved).sha256
