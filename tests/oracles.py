"""Small FastVLMs of transformers and timm with random weights, saved in every layout.

They are what the loader is held against: the libraries compute, we must agree. The renaming to
Apple's layout is written here a second time, from the other end, so that a slip in the loader's
own renaming cannot hide.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import checkpoints
from .checkpoints import VOCAB

IMAGE_TOKEN_ID = 300
LAYERS, WIDTHS, RATIOS = (1, 3, 2, 1, 2), (8, 24, 48, 96, 192), (2, 3, 4, 1, 3)


def libraries() -> Any:
    """The transformers module, once torchvision can be imported beside a CPU-only PyTorch."""
    register = torch.library.register_fake

    def skip_torchvision(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *args, **kwargs)

    torch.library.register_fake = skip_torchvision
    try:
        pytest.importorskip("torchvision", reason="torchvision is not installed")
        pytest.importorskip("timm", reason="timm is not installed")
        return pytest.importorskip("transformers", reason="transformers is not installed")
    finally:
        torch.library.register_fake = register


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of one small model; odd on purpose."""

    layers: tuple[int, ...] = LAYERS
    widths: tuple[int, ...] = WIDTHS
    ratios: tuple[float, ...] = RATIOS
    cls_ratio: float = 2.0
    hidden: int = 40
    inner: int = 72
    decoder_layers: int = 3
    heads: int = 5
    kv_heads: int = 1
    tied: bool = False
    rope_theta: float = 54321.0
    eps: float = 1e-5

    @property
    def features(self) -> int:
        return int(self.widths[-1] * self.cls_ratio)


def build(sizes: Sizes, seed: int, *, inference_form: bool = False) -> Any:
    """A transformers FastVlmForConditionalGeneration whose every number is random."""
    transformers = libraries()
    torch.manual_seed(seed)
    vision = transformers.TimmWrapperConfig(
        architecture="fastvit_mci3",
        do_pooling=True,
        global_pool="avg",
        hidden_size=sizes.features,
        model_args={
            "layers": list(sizes.layers),
            "embed_dims": list(sizes.widths),
            "mlp_ratios": list(sizes.ratios),
            "cls_ratio": sizes.cls_ratio,
            "inference_mode": False,
        },
    )
    text = transformers.Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.decoder_layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=sizes.eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        tie_word_embeddings=sizes.tied,
        eos_token_id=VOCAB - 1,
    )
    config = transformers.FastVlmConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        tie_word_embeddings=sizes.tied,
    )
    model = transformers.FastVlmForConditionalGeneration(config).eval()
    randomize(model)
    if inference_form:
        from timm.utils import reparameterize_model  # noqa: PLC0415

        tower = model.model.vision_tower
        tower.timm_model = reparameterize_model(tower.timm_model).eval()
        config.vision_config.model_args["inference_mode"] = True
    return model


@torch.no_grad()
def question(model: Any, resolution: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random pixels [1,3,R,R], and ids [1,S]: text, the image's tokens, text."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.rand(1, 3, resolution, resolution, generator=random)
    features = model.model.get_image_features(pixels).pooler_output
    text = torch.randint(0, 250, (1, 21), generator=random)
    place = torch.full((1, features.shape[1]), IMAGE_TOKEN_ID)
    return pixels, torch.cat((text[:, :9], place, text[:, 9:]), dim=1)


def greedy(model: Any, pixels: Tensor, ids: Tensor, count: int) -> list[int]:
    """The library's own greedy answer of that many tokens, whatever token would end it."""
    out: list[int] = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )[0, ids.shape[1] :].tolist()
    return out


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Random statistics, scales, biases and norms, so that no branch is the identity by chance."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.2, 0.8)
        elif parameter.dim() == 1 and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() == 1:
            parameter.normal_(0, 0.2)
        else:
            fan_in = parameter[0].numel()
            parameter.normal_(0, 1.2 / fan_in**0.5)


def save_huggingface(model: Any, folder: Path, *, resolution: int) -> Path:
    """The library's own save_pretrained, an image processor and a tokenizer."""
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": resolution},
        "crop_size": {"height": resolution, "width": resolution},
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    checkpoints.save_tokenizer(folder, IMAGE_TOKEN_ID)
    return folder


def apple_names(state: dict[str, Tensor], layers: tuple[int, ...]) -> dict[str, Tensor]:
    """transformers' tensors under Apple's names, FastViTHD's module numbers written out."""
    numbers = {(0, "blocks"): 0}
    for stage, first in ((1, 1), (2, 3), (3, 5), (4, 8)):
        parts = ("downsample", "pos_emb", "blocks") if stage > 2 else ("downsample", "blocks")
        numbers |= {(stage, part): first + i for i, part in enumerate(parts)}
    assert len(layers) == 5
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = name.removeprefix("model.")
        if key.startswith("language_model."):
            key = "model." + key.removeprefix("language_model.")
        elif key.startswith("multi_modal_projector.linear_"):
            number, _, rest = key.removeprefix("multi_modal_projector.linear_").partition(".")
            key = f"model.mm_projector.{2 * (int(number) - 1)}.{rest}"
        elif key.startswith("vision_tower.timm_model."):
            key = "model.vision_tower.vision_tower.model." + _apple_tower_name(
                key.removeprefix("vision_tower.timm_model."), numbers
            )
        out[key] = tensor.clone()
    return out


def _apple_tower_name(name: str, numbers: dict[tuple[int, str], int]) -> str:
    if name.startswith("stages."):
        _, stage, part, rest = name.split(".", 3)
        if part == "downsample":
            rest = rest.replace("proj.0.reparam_conv", "proj.0.lkb_reparam")
        name = f"network.{numbers[int(stage), part]}.{rest}"
    name = name.replace("stem.", "patch_embed.").replace("final_conv.", "conv_exp.")
    for timm, apple in (
        ("conv_kxk", "rbr_conv"),
        ("conv_scale", "rbr_scale"),
        ("identity", "rbr_skip"),
        ("large_conv", "lkb_origin"),
        (".mlp.", ".convffn."),
        (".pos_enc.", ".pe."),
        ("se.fc1", "se.reduce"),
        ("se.fc2", "se.expand"),
        ("layer_scale.gamma", "layer_scale"),
        ("layer_scale_1.gamma", "layer_scale_1"),
        ("layer_scale_2.gamma", "layer_scale_2"),
    ):
        name = name.replace(timm, apple)
    return name


def save_apple(
    model: Any,
    sizes: Sizes,
    folder: Path,
    *,
    resolution: int,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The same model as Apple stores it: LLaVA's names and config.json, no tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = apple_names(model.state_dict(), sizes.layers)
    tensors["model.vision_tower.vision_tower.model.head.proj"] = torch.randn(sizes.features, 12)
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    checkpoints.write_weights(folder, tensors, shards)
    config = {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.decoder_layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": sizes.eps,
        "rope_theta": sizes.rope_theta,
        "tie_word_embeddings": sizes.tied,
        "eos_token_id": VOCAB - 1,
        "mm_hidden_size": sizes.features,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{resolution}",
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 8192,
        "use_sliding_window": False,
        "sliding_window": 512,
        "max_window_layers": 24,
    }
    (folder / "config.json").write_text(json.dumps(config))
    checkpoints.save_tokenizer(folder)
    return folder
