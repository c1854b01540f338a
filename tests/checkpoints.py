"""A small checkpoint in Apple's layout, written without any other library."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastvlm_export.exporter.config import DecoderConfig, FastVLMConfig, fastvithd
from fastvlm_export.exporter.random_weights import random_state

VOCAB = 320
PREFIXES = {
    "vision_tower.": "model.vision_tower.vision_tower.model.",
    "projector.": "model.mm_projector.",
    "decoder.lm_head.": "lm_head.",
    "decoder.": "model.",
}


def tiny_config(*, tied: bool = False, train_form: bool = False) -> FastVLMConfig:
    tower = fastvithd(
        widths=(8, 8, 16, 32, 32),
        depths=(1, 1, 1, 1, 1),
        features=64,
        se_width=8,
        head_width=12,
        train_form=train_form,
    )
    decoder = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        max_positions=512,
        tied=tied,
    )
    return FastVLMConfig(tower=tower, decoder=decoder)


def apple_tensors(config: FastVLMConfig, seed: int = 0) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in random_state(config, seed).items():
        old = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        tensors[PREFIXES[old] + name.removeprefix(old)] = tensor
    return tensors


def save_apple(folder: Path, config: FastVLMConfig | None = None, *, shards: int = 1) -> Path:
    """Weights, config.json and tokenizer files as Apple's folders have them."""
    config = config or tiny_config()
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, apple_tensors(config), shards)
    decoder = config.decoder
    values = {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "vocab_size": decoder.vocab_size,
        "hidden_act": "silu",
        "max_position_embeddings": decoder.max_positions,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tied,
        "eos_token_id": VOCAB - 1,
        "mm_hidden_size": config.tower.features,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "mobileclip_l_256",
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 8192,
        "use_sliding_window": False,
        "sliding_window": 512,
        "max_window_layers": 24,
    }
    (folder / "config.json").write_text(json.dumps(values))
    save_tokenizer(folder)
    return folder


def write_weights(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """One file, or several with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_tokenizer(folder: Path, image_token_id: int = 0) -> None:
    """A byte-level vocabulary with the qwen_2 specials, as files without a tokenizer.json.

    With `image_token_id` the ids are dense up to an `<image>` token of that id.
    """
    from tokenizers.pre_tokenizers import ByteLevel  # noqa: PLC0415

    vocab = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocab |= {"he": 256, "ll": 257, "hell": 258}
    added = {"<|endoftext|>": 259, "<|im_start|>": 260, "<|im_end|>": 261}
    if image_token_id:
        added |= {f"<|extra_{i}|>": i for i in range(262, image_token_id)}
        added |= {"<image>": image_token_id}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n", encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
