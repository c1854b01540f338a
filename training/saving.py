"""Writing the trained model as Apple's FastVLM checkpoints are: LLaVA layout, train form, bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import corpus
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from fastvlm_export.exporter.config import FastVLMConfig
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.validate.digits import RESOLUTION

CONTEXT = 1024
_PREFIXES = {
    "vision_tower.": "model.vision_tower.vision_tower.model.",
    "projector.": "model.mm_projector.",
    "decoder.": "model.",
}


def apple_name(name: str) -> str:
    """Rename a parameter of FastVLM to the key it has in Apple's checkpoints."""
    for ours, theirs in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def write_checkpoint(model: FastVLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, weights, generation settings and tokenizer to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        apple_name(name): (value.bfloat16() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    begin, _, end = tokenizer.encode("".join(corpus.SPECIAL)).ids
    _write_json(folder / "config.json", config_json(model.config, begin=begin, end=end))
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": begin,
            "do_sample": False,
            "eos_token_id": [end, begin],
            "max_new_tokens": 32,
            "pad_token_id": begin,
        },
    )
    corpus.write_tokenizer(tokenizer, folder, CONTEXT)


def read_weights(model: FastVLM, folder: Path) -> None:
    """Load what `write_checkpoint` stored into a model of the same sizes, as float32."""
    stored = load_file(folder / "model.safetensors")
    state = {
        name: stored[apple_name(name)].to(value.dtype) for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)


def config_json(config: FastVLMConfig, *, begin: int, end: int) -> dict[str, Any]:
    """Describe the model with the keys of Apple's config.json."""
    decoder = config.decoder
    kind = "linear" if config.projector_layers == 1 else f"mlp{config.projector_layers}x_gelu"
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": begin,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": decoder.intermediate_size,
        "max_position_embeddings": decoder.max_positions,
        "mm_hidden_size": config.tower.features,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": kind,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{RESOLUTION}",
        "model_type": "llava_qwen2",
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.layers,
        "num_key_value_heads": decoder.kv_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tied,
        "tokenizer_model_max_length": CONTEXT,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": decoder.vocab_size,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
