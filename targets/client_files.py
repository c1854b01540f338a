"""The JSON files of a folder that LLaVA's clients open: model, processors, tokenizer.

Transformers.js and Apple's FastVLM app read the same names; each adds keys of its own.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Inner

from ..exporter.errors import ExportError
from ..exporter.prompt import IMAGE_TOKEN, SYSTEM
from ..exporter.spec import ExportSpec
from .base import Statement

BICUBIC = 3  # PIL's number for it
TOKENIZER = "tokenizer.json"

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The `qwen_2` conversation of `exporter.prompt`, for messages of text and image parts."""


def write_json(files: Mapping[str, Any], out: Path) -> None:
    """Write each name's content into the folder `out`."""
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def statements(files: Mapping[str, Any], folder: Path) -> Iterator[Statement]:
    """Each name's content as it lies in the folder, beside what `write_json` would write.

    A tokenizer is compared as the installed library reads it: another version of that library
    writes the same tokenizer with other keys.
    """
    for name, content in files.items():
        wanted = json.loads(json.dumps(content))
        found = _read(folder / name)
        if name == TOKENIZER:
            found, wanted = _as_read(found), _as_read(wanted)
        yield Statement(where=name, found=found, wanted=wanted)


def _read(path: Path) -> Any:
    """A JSON file's content, or its text where that is no JSON; None where it is missing."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read: {error}"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _as_read(content: Any) -> Any:
    try:
        return json.loads(Inner.from_str(json.dumps(content)).to_str())
    except Exception:  # `tokenizers` raises plain Exception for what is no tokenizer
        return content


def client_files(spec: ExportSpec) -> dict[str, Any]:
    """File name -> content, of all but `config.json`."""
    return {
        "generation_config.json": {"do_sample": False, **ends(spec)},
        "preprocessor_config.json": preprocessor_config(spec),
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_TOKEN,
            "patch_size": patch_size(spec),
            "num_additional_image_tokens": 0,
        },
        "tokenizer_config.json": tokenizer_config(spec),
        "tokenizer.json": tokenizer(spec),
    }


def patch_size(spec: ExportSpec) -> int:
    """The patch size with which these clients count the right number of image tokens.

    They put floor(R / patch)^2 of them into the prompt, while the tower gives ceil(R / 64)^2: 64
    would be wrong for 224 or 336 px. R // side gives side patches for all R from 64 to 4094.
    """
    return spec.preprocessing.resolution // math.isqrt(spec.image_tokens)


def config(spec: ExportSpec) -> dict[str, Any]:
    """`config.json`: the decoder's sizes and the image token, in `llava_qwen2`'s words."""
    decoder = spec.decoder
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "rope_theta": decoder.rope_theta,
        "rms_norm_eps": decoder.rms_norm_eps,
        "max_position_embeddings": spec.context,
        "vocab_size": decoder.vocab_size,
        "tie_word_embeddings": decoder.tied,
        "mm_hidden_size": spec.features,
        "image_token_index": spec.image_token_id,
        **ends(spec),
    }


def ends(spec: ExportSpec) -> dict[str, Any]:
    """End tokens, a list or one id. With none the client writes until the limit it is given."""
    ids = spec.eos_token_ids
    if not ids:
        return {}
    return {"eos_token_id": list(ids) if len(ids) > 1 else ids[0], "pad_token_id": ids[0]}


def preprocessor_config(spec: ExportSpec) -> dict[str, Any]:
    """`preprocessor_config.json`. These clients crop from the centre, whatever the strategy is.

    So a bundle's `pad` and their crop agree on square images only.
    """
    size = spec.preprocessing.resolution
    return {
        "processor_class": "LlavaProcessor",
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.preprocessing.mean),
        "image_std": list(spec.preprocessing.std),
    }


def tokenizer_config(spec: ExportSpec) -> dict[str, Any]:
    """`tokenizer_config.json`, the one place where they look for the chat template."""
    inner = Inner.from_str(spec.tokenizer.to_json())
    tokens = [inner.id_to_token(i) for i in spec.eos_token_ids]
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        **({"eos_token": tokens[0], "pad_token": tokens[0]} if tokens else {}),
        "model_max_length": spec.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def tokenizer(spec: ExportSpec) -> dict[str, Any]:
    """`tokenizer.json` with `<image>` as a special token of the id that the graphs know."""
    content: dict[str, Any] = json.loads(spec.tokenizer.to_json())
    inner = Inner.from_str(spec.tokenizer.to_json())
    taken, known = inner.id_to_token(spec.image_token_id), inner.token_to_id(IMAGE_TOKEN)
    if known is None and taken is None:
        entry = {"id": spec.image_token_id, "content": IMAGE_TOKEN, "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"] = [*content["added_tokens"], {**entry, **flags}]
    elif known != spec.image_token_id:
        raise ExportError(
            f"The image token's id is {spec.image_token_id}, but the tokenizer has '{taken}' there "
            f"and {IMAGE_TOKEN} at {known}.",
            "Set image_token_index in the checkpoint's config.json to the tokenizer's own id.",
        )
    return content
