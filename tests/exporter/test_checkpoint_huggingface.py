"""config.json and the image processor of Hugging Face's layout; no library needed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fastvlm_export.exporter.checkpoint import load
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.exporter.tensor_names import Layout

from .. import checkpoints

IMAGE_TOKEN_ID = 300
PROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 256, "width": 256},
    "do_center_crop": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
}


def timm_name(name: str) -> str:
    """Apple's name of a tensor of the tiny model (inference form) as fast_vlm's."""
    stages = {0: "stages.0.blocks", 1: "stages.1.downsample", 2: "stages.1.blocks"}
    stages |= {3: "stages.2.downsample", 4: "stages.2.blocks", 5: "stages.3.downsample"}
    stages |= {6: "stages.3.pos_emb", 7: "stages.3.blocks", 8: "stages.4.downsample"}
    stages |= {9: "stages.4.pos_emb", 10: "stages.4.blocks"}
    name = re.sub(r"network\.(\d+)\.", lambda m: stages[int(m[1])] + ".", name)
    name = re.sub(r"(layer_scale(_\d)?)$", r"\1.gamma", name)
    for old, new in (
        ("vision_tower.vision_tower.model.", "vision_tower.timm_model."),
        ("mm_projector.0.", "multi_modal_projector.linear_1."),
        ("mm_projector.2.", "multi_modal_projector.linear_2."),
        ("model.layers.", "model.language_model.layers."),
        ("model.norm.", "model.language_model.norm."),
        ("model.embed_tokens.", "model.language_model.embed_tokens."),
        ("patch_embed.", "stem."),
        ("conv_exp.", "final_conv."),
        ("lkb_reparam.", "reparam_conv."),
        ("convffn.", "mlp."),
        ("se.reduce.", "se.fc1."),
        ("se.expand.", "se.fc2."),
    ):
        name = name.replace(old, new)
    return name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoints.save_apple(tmp_path_factory.mktemp("huggingface"))
    tensors = load_file(folder / "model.safetensors")
    tensors = {timm_name(k): v for k, v in tensors.items() if not k.endswith("head.proj")}
    save_file(tensors, folder / "model.safetensors")
    apple = json.loads((folder / "config.json").read_text())
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_theta")
    config = {
        "model_type": "fast_vlm",
        "image_token_index": IMAGE_TOKEN_ID,
        "image_seq_length": 4,
        "text_config": {"model_type": "qwen2", **{key: apple[key] for key in kept}},
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "hidden_size": 64,
            "model_args": {
                "inference_mode": True,
                "layers": [1, 1, 1, 1, 1],
                "embed_dims": [8, 8, 16, 32, 32],
            },
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    checkpoints.save_tokenizer(folder, IMAGE_TOKEN_ID)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change(path: Path, keys: str, value: object) -> None:
    """Set "a.b.c" in a JSON file."""
    values = json.loads(path.read_text())
    *parents, last = keys.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    path.write_text(json.dumps(values))


def problems(folder: Path) -> str:
    with pytest.raises(ExportError) as raised:
        load(folder)
    return raised.value.message


def test_it_loads(saved: Path) -> None:
    checkpoint = load(saved)
    assert checkpoint.layout is Layout.HUGGINGFACE
    assert checkpoint.config.tower.stages == checkpoints.tiny_config().tower.stages
    assert checkpoint.config.tower.head_width == 0
    assert checkpoint.image_token_id == IMAGE_TOKEN_ID
    assert checkpoint.notes == ()
    assert checkpoint.preprocessing == Preprocessing(
        strategy=Strategy.CROP, resolution=256, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5)
    )


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        ("vision_config.model_args.layers", [2, 1, 1, 1, 1], "layers is [2, 1, 1, 1, 1], but"),
        ("vision_config.model_args.embed_dims", [8] * 5, "embed_dims is [8, 8, 8, 8, 8], but"),
        ("vision_config.model_args.embed_dims", "x", 'embed_dims is "x"'),
        ("vision_config.model_args.mlp_ratios", [1] * 5, "mlp_ratios is [1, 1, 1, 1, 1], but"),
        ("vision_config.model_args.mlp_ratios", [1], "mlp_ratios is [1], but"),
        ("vision_config.model_args.cls_ratio", 3, "cls_ratio is 3, but"),
        ("vision_config.model_args.lkc_use_act", False, "lkc_use_act is false"),
        ("vision_config.model_args.stem_use_scale_branch", True, "stem_use_scale_branch is true"),
        ("vision_config.model_args.se_downsamples", [True] * 5, "se_downsamples is [true"),
        ("vision_config.model_args.token_mixers", ["repmixer"] * 5, "token_mixers is"),
        ("vision_config.model_args.down_stride", 4, "down_stride is 4"),
        ("vision_config.model_args.act_layer", "relu", "act_layer is not an argument known"),
        ("vision_config.model_args", [1], "model_args is [1], not an object"),
        ("vision_config.architecture", "vit_base", 'architecture is "vit_base"'),
        ("vision_config.hidden_size", 65, "hidden_size is 65"),
        ("vision_config", 3, "vision_config is 3, not an object"),
        ("text_config.model_type", "llama", 'model_type is "llama"'),
        ("text_config.num_hidden_layers", 3, "num_hidden_layers is 3"),
        ("text_config.layer_types", 3, "layer_types is 3"),
        ("text_config", None, "num_attention_heads is missing"),
        ("vision_feature_select_strategy", "default", "vision_feature_select_strategy is"),
        ("vision_feature_layer", -2, "vision_feature_layer is -2"),
        ("projector_hidden_act", "relu", 'projector_hidden_act is "relu"'),
        ("image_token_index", 299, "image_token_index is 299, not the tokenizer's id of <image>"),
        ("image_token_index", 320, "image_token_index is 320, not below"),
        ("model_type", "llava", 'model_type is "llava"'),
    ],
)
def test_config_is_cross_checked(keys: str, value: object, words: str, folder: Path) -> None:
    change(folder / "config.json", keys, value)
    assert words in problems(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", {"height": 128, "width": 64}),
        ("size", {"shortest_edge": 128}),
        ("size", {}),
        ("size", "x"),
        ("crop_size", {"height": 1, "width": -1}),
        ("resample", 2),
        ("do_rescale", False),
        ("rescale_factor", 0.5),
        ("image_mean", [0.0]),
        ("image_mean", "x"),
        ("image_std", [0.0, 1.0, 1.0]),
        ("do_center_crop", False),
        ("do_resize", False),
    ],
)
def test_image_processor_that_cannot_be_followed(key: str, value: object, folder: Path) -> None:
    change(folder / "preprocessor_config.json", key, value)
    assert key in problems(folder)


@pytest.mark.parametrize(
    ("settings", "strategy", "resolution"),
    [
        (PROCESSOR | {"do_pad": True, "do_center_crop": False}, Strategy.PAD, 256),
        ({"size": {"height": 128, "width": 128}, "do_center_crop": False}, Strategy.STRETCH, 128),
        ({"size": 192, "crop_size": 192}, Strategy.CROP, 192),
    ],
)
def test_strategies(
    settings: dict[str, Any], strategy: Strategy, resolution: int, folder: Path
) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    found = load(folder).preprocessing
    assert (found.strategy, found.resolution) == (strategy, resolution)


def test_newer_processor_file_comes_first(folder: Path) -> None:
    nested = PROCESSOR | {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    assert load(folder).resolution == 64


def test_without_a_processor_the_resolution_follows_from_the_tokens(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    checkpoint = load(folder)
    assert checkpoint.resolution == 128
    assert checkpoint.preprocessing.strategy is Strategy.CROP
    assert any("no image processor" in note for note in checkpoint.notes)


def test_wrong_form_flag_is_noted(folder: Path) -> None:
    change(folder / "config.json", "vision_config.model_args.inference_mode", False)
    assert "stored in inference form" in load(folder).notes[0]


def test_projector_without_biases(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for index in (1, 2):
        del tensors[f"model.multi_modal_projector.linear_{index}.bias"]
    save_file(tensors, folder / "model.safetensors")
    assert "projector.0.bias [32] is missing" in problems(folder)
    change(folder / "config.json", "multimodal_projector_bias", False)
    assert not load(folder).state["projector.2.bias"].any()
