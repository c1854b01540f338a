"""The loader against transformers and timm: same weights in, same numbers out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlm_export.exporter.checkpoint import Checkpoint, load
from fastvlm_export.exporter.preprocess import preprocess
from fastvlm_export.exporter.prompt import qwen_2_prompt
from fastvlm_export.exporter.tensor_names import Layout
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.targets.generation import PromptInputs, generate

from .. import checkpoints, oracles

torch.set_num_threads(1)  # models this small only lose by sharing the cores

LIMIT = 1e-4  # of the largest number of the library's own output
NEW_TOKENS = 24
RESOLUTIONS = (192, 320, 200)
ODD = oracles.Sizes()
OTHER = oracles.Sizes(
    layers=(2, 1, 1, 2, 1),
    widths=(16, 16, 32, 64, 64),
    ratios=(3, 1, 2.5, 2, 1),
    cls_ratio=1.0,  # as many features as channels: conv_exp has an identity branch
    hidden=48,
    heads=6,
    kv_heads=3,
    tied=True,
    rope_theta=1e6,
    eps=1e-6,
)


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def assert_agrees(checkpoint: Checkpoint, oracle: Any, seed: int) -> None:
    model = checkpoint.model()
    for resolution in RESOLUTIONS:
        pixels, ids = oracles.question(oracle, resolution, seed + resolution)
        features = oracle.model.get_image_features(pixels).pooler_output

        ours = model.encode_image(pixels)
        error = worst(ours, features)
        assert error <= LIMIT, f"image_features at {resolution}: {error:.1e} > {LIMIT}"
        before, behind = ids[:, :9], ids[:, 9 + features.shape[1] :]
        embeds = torch.cat((model.embed(before), ours, model.embed(behind)), dim=1)
        logits = oracle(input_ids=ids, pixel_values=pixels).logits
        error = worst(model(embeds), logits)
        assert error <= LIMIT, f"logits at {resolution}: {error:.1e} > {LIMIT}"

        wanted = oracles.greedy(oracle, pixels, ids, NEW_TOKENS)
        inputs = PromptInputs(
            input_ids=ids[0].tolist(),
            image_token_id=oracles.IMAGE_TOKEN_ID,
            pixels=pixels.numpy(),
        )
        session = EagerSession(model, checkpoint.context)
        found = generate(session, inputs, max_new_tokens=NEW_TOKENS, eos_token_ids=())
        assert found == wanted and len(found) == NEW_TOKENS
        assert len(set(found)) > 3, "the answer should not be one token over and over"


@pytest.mark.parametrize("inference_form", [False, True], ids=["train", "inference"])
@pytest.mark.parametrize("sizes", [ODD, OTHER], ids=["odd", "other"])
@pytest.mark.parametrize("layout", [Layout.APPLE, Layout.HUGGINGFACE])
def test_agrees_with_the_library(
    layout: Layout, sizes: oracles.Sizes, inference_form: bool, tmp_path: Path
) -> None:
    oracle = oracles.build(sizes, seed=7, inference_form=inference_form)
    if layout is Layout.APPLE:
        shards = 2 if inference_form else 1
        oracles.save_apple(oracle, sizes, tmp_path, resolution=192, shards=shards)
    else:
        oracles.save_huggingface(oracle, tmp_path, resolution=192)
    checkpoint = load(tmp_path)

    assert checkpoint.layout is layout
    assert checkpoint.config.tower.train_form is not inference_form
    assert tuple(s.depth for s in checkpoint.config.tower.stages) == sizes.layers
    assert tuple(s.width for s in checkpoint.config.tower.stages) == sizes.widths
    assert checkpoint.config.decoder.tied is sizes.tied
    assert_agrees(checkpoint, oracle, seed=11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_those_of_the_library(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    oracles.save_huggingface(oracles.build(ODD, seed=3).to(dtype), tmp_path, resolution=192)
    checkpoint = load(tmp_path)
    assert checkpoint.dtype == str(dtype).removeprefix("torch.")
    # Read again, because the cast rounded the frequencies of RoPE too, which are not stored.
    library = oracles.libraries().FastVlmForConditionalGeneration
    oracle = library.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_agrees(checkpoint, oracle, seed=5)


def test_the_older_names_of_hugging_face_load(tmp_path: Path) -> None:
    oracle = oracles.build(ODD, seed=5)
    oracles.save_huggingface(oracle, tmp_path, resolution=192)
    tensors = {}
    for name, tensor in oracle.state_dict().items():
        old = name.removeprefix("model.")
        if old.startswith("language_model."):
            old = old.replace("language_model.", "language_model.model.", 1)
        elif old.startswith("lm_head."):
            old = f"language_model.{old}"
        tensors[old] = tensor.clone()
    checkpoints.write_weights(tmp_path, tensors, shards=3)
    (tmp_path / "model.safetensors").unlink()
    assert_agrees(load(tmp_path), oracle, seed=2)


def test_a_folder_saved_by_the_librarys_own_processor(tmp_path: Path) -> None:
    """Many shards, processor_config.json and tokenizer.json, as transformers 5 writes them."""
    transformers = oracles.libraries()
    from transformers.models.clip.image_processing_pil_clip import (  # noqa: PLC0415
        CLIPImageProcessorPil,
    )

    sizes = {"size": {"shortest_edge": 192}, "crop_size": {"height": 192, "width": 192}}
    normal = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    images = CLIPImageProcessorPil(**sizes, **normal)
    checkpoints.save_tokenizer(tmp_path, oracles.IMAGE_TOKEN_ID)
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
    folder = tmp_path / "saved"
    oracles.build(OTHER, seed=7).save_pretrained(folder, max_shard_size="200KB")
    transformers.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=64
    ).save_pretrained(folder)

    checkpoint = load(folder)
    assert checkpoint.notes == () and (folder / "model.safetensors.index.json").exists()
    assert checkpoint.image_token_id == oracles.IMAGE_TOKEN_ID
    text = qwen_2_prompt("How many? It's 42\n\n äöü 中文", image=True)
    assert checkpoint.tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    for size in ((333, 211), (100, 301), (192, 192)):
        noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        pixels = images(image, return_tensors="np")["pixel_values"]
        assert np.abs(preprocess(image, checkpoint.preprocessing) - pixels).max() < 1e-6


@pytest.mark.slow
@torch.no_grad()
def test_fastvithd_is_timms_at_its_real_size(tmp_path: Path) -> None:
    oracles.libraries()
    import timm  # noqa: PLC0415

    from fastvlm_export.exporter.checkpoint_sizes import tower_config  # noqa: PLC0415
    from fastvlm_export.exporter.config import fastvithd  # noqa: PLC0415
    from fastvlm_export.exporter.model.fastvithd import FastViTHD  # noqa: PLC0415
    from fastvlm_export.exporter.tensor_names import rename  # noqa: PLC0415

    torch.manual_seed(0)
    oracle = timm.create_model("fastvit_mci3", num_classes=0).eval()
    oracles.randomize(oracle)
    state = {f"vision_tower.timm_model.{k}": v for k, v in oracle.state_dict().items()}
    names, unknown = rename(state, Layout.HUGGINGFACE)
    assert not unknown
    problems: list[str] = []
    config = tower_config({new: tuple(state[k].shape) for k, new in names.items()}, problems)
    assert config == fastvithd(head_width=0, train_form=True), problems
    tower = FastViTHD(config).eval()
    tower.load_state_dict(
        {new.removeprefix("vision_tower."): state[k] for k, new in names.items()}, strict=False
    )
    for resolution in (256, 200):
        pixels = torch.rand(1, 3, resolution, resolution)
        error = worst(tower(pixels), oracle.forward_features(pixels))
        assert error <= LIMIT, f"features at {resolution}: {error:.1e} > {LIMIT}"
