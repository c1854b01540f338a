"""The decoder's configuration: sizes from its tensors, the rest from config.json, cross-checked.

Defaults of absent keys are those of transformers' Qwen2Config, because that is how the library
that wrote the checkpoint would read it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .checkpoint_sizes import DecoderShape
from .config import DecoderConfig
from .json_file import Section

DEFAULT_ROPE_THETA = 10000.0
DEFAULT_RMS_NORM_EPS = 1e-6
DEFAULT_MAX_POSITIONS = 32768
SCALED_ROPE = "scaled RoPE is not supported"
NOT_SUPPORTED = "the decoder computes nothing else"


def decoder_config(
    text: Section, shape: DecoderShape, tied: bool, notes: list[str]
) -> DecoderConfig | None:
    """The Qwen2 decoder that `text` (config.json, or its text_config) and the tensors describe.

    With problems noted it still gives what sizes it can, so that the tensors can be compared too.
    """
    text.agree("num_hidden_layers", shape.layers, "the number of layers is")
    text.agree("hidden_size", shape.hidden_size, "the embedding's width is")
    text.agree("intermediate_size", shape.intermediate_size, "the feed-forward width is")
    text.agree("vocab_size", shape.vocab_size, "the rows of the embedding are")
    head_dim = _head_dim(text, shape)
    max_positions = text.integer("max_position_embeddings") or DEFAULT_MAX_POSITIONS
    theta = _rope_theta(text, notes)
    eps = text.number("rms_norm_eps") or DEFAULT_RMS_NORM_EPS
    _refuse_other_arithmetic(text, shape.layers, max_positions)
    if head_dim is None:
        return None
    return DecoderConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        layers=shape.layers,
        heads=shape.query_width // head_dim,
        kv_heads=shape.key_width // head_dim,
        head_dim=head_dim,
        rope_theta=theta,
        rms_norm_eps=eps,
        max_positions=max_positions,
        tied=tied,
    )


def _head_dim(text: Section, shape: DecoderShape) -> int | None:
    """The width of an attention head; its count cannot be seen in the tensors, so both must fit."""
    heads = text.integer("num_attention_heads")
    head_dim = text.integer("head_dim")
    if heads is None:
        text.problems.append(f"{text.where}: num_attention_heads is missing")
        return None
    if head_dim is None:
        head_dim = shape.hidden_size // heads
    if head_dim < 2 or head_dim % 2 or heads * head_dim != shape.query_width:
        text.problems.append(
            f"{text.where}: num_attention_heads is {heads}, which does not divide the queries' "
            f"width {shape.query_width} into heads of {head_dim}"
        )
        return None
    kv_heads, rest = divmod(shape.key_width, head_dim)
    if rest or not kv_heads or heads % kv_heads:
        text.problems.append(
            f"the keys' width {shape.key_width} does not fit {heads} heads of {head_dim}"
        )
        return None
    text.agree("num_key_value_heads", kv_heads, "the number of key and value heads is")
    return head_dim


def _rope_theta(text: Section, notes: list[str]) -> float:
    """RoPE's base, wherever this version of the library keeps it; anything but plain RoPE fails."""
    nested = text.section("rope_parameters")
    for section in (text.section("rope_scaling"), nested):
        for key in ("rope_type", "type"):
            section.only(key, ("default",), SCALED_ROPE)
        section.only("partial_rotary_factor", (1.0,), NOT_SUPPORTED)
        unknown = set(section.values) - {"rope_type", "type", "partial_rotary_factor", "rope_theta"}
        section.problems += [f"{section.where}: {key}: {SCALED_ROPE}" for key in sorted(unknown)]
    text.only("partial_rotary_factor", (1.0,), NOT_SUPPORTED)
    plain, inner = text.number("rope_theta"), nested.number("rope_theta")
    if plain is not None and inner is not None and plain != inner:
        text.problems.append(
            f"{text.where}: rope_theta is {plain:g}, but {inner:g} in rope_parameters"
        )
    theta = inner if plain is None else plain
    if theta is None:
        notes.append(f"{text.where}: rope_theta is missing, so it is Qwen2's default 10000")
        return DEFAULT_ROPE_THETA
    return theta


def _refuse_other_arithmetic(text: Section, layers: int, max_positions: int) -> None:
    """Problems for settings that change the sums in a way that this decoder does not follow."""
    text.only("hidden_act", ("silu", "swish"), NOT_SUPPORTED)
    if "quantization_config" in text:
        text.problems.append(
            f"{text.where}: quantization_config is there: export from the weights before "
            "quantization"
        )
    kinds = text.values.get("layer_types")
    slides = isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds)
    if kinds is not None and (
        not isinstance(kinds, list) or any(not isinstance(kind, str) for kind in kinds)
    ):
        text.complain("layer_types", "a list of strings")
    first = text.integer("max_window_layers", low=0)
    if kinds is None and (first if first is not None else 28) < layers:
        slides = True
    window = text.integer("sliding_window", low=0)
    window = 4096 if window is None else window
    if text.flag("use_sliding_window") and slides and window < max_positions:
        text.problems.append(
            f"{text.where}: use_sliding_window is true with a window of {window} positions below "
            f"the context of {max_positions}: sliding windows are not supported"
        )


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whatever types they are stored."""
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype:
        return bool(torch.equal(a, b))
    return all(
        torch.equal(x.float(), y.float()) for x, y in zip(a.split(4096), b.split(4096), strict=True)
    )


def is_tied(
    tensors: Mapping[str, Tensor], flag: bool, problems: list[str], notes: list[str]
) -> bool:
    """Whether the output layer is the embedding: the tensors decide, the flag is cross-checked.

    `tensors` have FastVLM's names; `flag` is `tie_word_embeddings`, false where it is absent.
    """
    head = tensors.get("decoder.lm_head.weight")
    embedding = tensors.get("decoder.embed_tokens.weight")
    if head is None:
        if not flag:
            problems.append(
                "lm_head.weight is missing, and tie_word_embeddings is not true: if the output "
                "layer is the embedding, say so in config.json"
            )
        return True
    if embedding is not None and same_values(head, embedding):
        notes.append("lm_head.weight is a redundant copy of embed_tokens.weight")
        if not flag:
            notes.append("tie_word_embeddings is not true, yet both are the same: tied")
        return True
    if flag:
        notes.append(
            "tie_word_embeddings is true, yet lm_head.weight differs from embed_tokens.weight: "
            "untied"
        )
    return False
