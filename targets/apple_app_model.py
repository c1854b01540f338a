"""What Apple's app builds from `config.json` and the safetensors files, in PyTorch and float32.

It is how parity sees the weights that the app will see: read back from the files, unpacked as MLX
documents it (w = q * scale + bias, the first value of a word in its lowest bits), and refused where
the app's loader would refuse them. Sums are float32; of MLX's own rounding only that of embeddings
is there: they enter the model in the type of the table's scales. Positions are rotated by tables
of the norm's type, as in the exported programs: they are not in the files.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..exporter.config import DecoderConfig
from ..exporter.errors import ExportError
from ..exporter.json_file import Section, read_json
from ..exporter.model.decoder import CacheInputsDecoder, Decoder
from ..exporter.model.fastvlm import projector
from ..exporter.weight_files import read_weights
from .coreml_model import EXPORT_APP_HINT
from .eager import TorchSession

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SHOWN = 8
"""Problems that one message names."""


class _App(nn.Module):
    """The modules that the app computes in MLX, by its names below its own prefixes."""

    def __init__(self, config: DecoderConfig, features: int) -> None:
        super().__init__()
        self.decoder = Decoder(config)
        self.projector = projector(features, config.hidden_size, 2)


def open_rest(folder: Path, context: int, *, exact: bool = False) -> TorchSession:
    """Projector and language model of a folder; `encode_image` takes features [1,N,features].

    `exact`: embeddings are not rounded either. Raises one ExportError for all that is damaged,
    missing, too much or of another shape.
    """
    problems: list[str] = []
    config = read_json(folder / "config.json", problems)
    decoder, features = _sizes(config)
    stored = read_weights(folder, problems)
    if problems or stored is None or decoder is None:
        raise _damaged(folder, problems)
    with torch.device("meta"):
        model = _App(decoder, features)
    weights = _unpacked(model, stored.tensors, config.section("quantization"), problems)
    if problems:
        raise _damaged(folder, problems)
    model.load_state_dict(weights, assign=True)
    table = f"{_app_name('decoder.embed_tokens')}."
    types = {name: value.dtype for name, value in stored.tensors.items()}
    return _session(
        model.eval().requires_grad_(False),
        context,
        norm=types[_app_name("decoder.norm.weight")],
        embeds=torch.float32 if exact else types.get(f"{table}scales", types[f"{table}weight"]),
    )


def _damaged(folder: Path, problems: list[str]) -> ExportError:
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return ExportError(
        f"{folder} is damaged: {'; '.join(problems[:SHOWN] + more)}.", EXPORT_APP_HINT
    )


def _sizes(config: Section) -> tuple[DecoderConfig | None, int]:
    """What the app decodes, with the keys that it insists on; heads share the hidden size."""
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "features": "mm_hidden_size",
        "image_token": "image_token_index",
    }
    config.only("model_type", ("llava_qwen2",), "the app knows no other")
    found: dict[str, int] = {}
    for name, key in names.items():
        value = config.integer(key, low=0 if name == "image_token" else 1)
        if value is None and key not in config:
            config.problems.append(f"{config.where}: {key} is missing")
        found[name] = value or 1
    theta, eps = config.number("rope_theta"), config.number("rms_norm_eps")
    tied = config.flag("tie_word_embeddings")
    if config.problems:
        return None, 0
    decoder = DecoderConfig(
        vocab_size=found["vocab_size"],
        hidden_size=found["hidden_size"],
        intermediate_size=found["intermediate_size"],
        layers=found["layers"],
        heads=found["heads"],
        kv_heads=found["kv_heads"],
        head_dim=found["hidden_size"] // found["heads"],
        rope_theta=theta or 1e6,
        rms_norm_eps=eps or 1e-6,
        tied=tied is not False,
    )
    return decoder, found["features"]


def _unpacked(
    model: _App, stored: Mapping[str, Tensor], form: Section, problems: list[str]
) -> dict[str, Tensor]:
    """The model's tensors in float32, by its own names; all of `stored` has to be used."""
    group, bits = form.integer("group_size"), form.integer("bits", high=8)
    left = dict(stored)
    weights: dict[str, Tensor] = {}
    for name, meta in model.state_dict().items():
        theirs = _app_name(name)
        scales = f"{theirs.removesuffix('weight')}scales"
        if theirs.endswith(".weight") and scales in stored and group and bits:
            parts = {part: f"{scales.removesuffix('scales')}{part}" for part in _AFFINE}
            found = {part: left.pop(key) for part, key in parts.items() if key in left}
            problems += _affine_problems(theirs, found, meta.shape, group, bits)
            if not problems:
                weights[name] = unpack(found["weight"], found["scales"], found["biases"], bits)
        elif theirs not in left:
            problems.append(f"{theirs} is missing")
        else:
            value = left.pop(theirs)
            problems += _tensor_problems(theirs, value, tuple(meta.shape), FLOATS)
            weights[name] = value.float()
    problems += [f"{name} is in no layer of the model" for name in left]
    return weights


_AFFINE = ("weight", "scales", "biases")


def _app_name(name: str) -> str:
    """`projector.0.bias` -> `multi_modal_projector.linear_0.bias`, and the decoder's."""
    first, _, rest = name.partition(".")
    if first == "projector":
        return f"multi_modal_projector.linear_{rest}"
    return (
        f"language_model.{rest}" if rest.startswith("lm_head.") else f"language_model.model.{rest}"
    )


def _affine_problems(
    name: str, found: Mapping[str, Tensor], shape: torch.Size, group: int, bits: int
) -> Iterator[str]:
    rows, width = shape
    wanted = {
        "weight": ((rows, width * bits // 32), (torch.uint32,)),
        "scales": ((rows, width // group), FLOATS),
        "biases": ((rows, width // group), FLOATS),
    }
    for part, (size, types) in wanted.items():
        full = f"{name.removesuffix('weight')}{part}"
        if part not in found:
            yield f"{full} is missing"
        else:
            yield from _tensor_problems(full, found[part], size, types)


def _tensor_problems(
    name: str, value: Tensor, shape: tuple[int, ...], types: tuple[torch.dtype, ...]
) -> Iterator[str]:
    if tuple(value.shape) != shape:
        yield f"{name} has shape {list(value.shape)}, not {list(shape)}"
    if value.dtype not in types:
        wanted = " or ".join(str(t).removeprefix("torch.") for t in types)
        yield f"{name} is {str(value.dtype).removeprefix('torch.')}, not {wanted}"


def unpack(words: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """q * scale + bias in float32: uint32 [N, K * bits / 32], [N, K / group] twice -> [N, K]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words.view(torch.int32)[:, :, None] >> shifts) & (2**bits - 1)  # no sign is left
    groups = values.flatten(1).unflatten(1, (scales.shape[1], -1)).float()
    out: Tensor = groups * scales.float()[:, :, None] + biases.float()[:, :, None]
    return out.flatten(1)


def _session(model: _App, context: int, *, norm: torch.dtype, embeds: torch.dtype) -> TorchSession:
    """`norm`: the type of the rotary tables; `embeds`: what embeddings are rounded to."""
    decoder = CacheInputsDecoder(model.decoder, context).eval()
    decoder.cos, decoder.sin = decoder.cos.to(norm).float(), decoder.sin.to(norm).float()
    table, last = model.decoder.embed_tokens, model.decoder.config.vocab_size - 1
    return TorchSession(
        {
            "vision": lambda features: (model.projector(features),),
            "embedding": lambda ids: (table(ids.clamp(max=last)).to(embeds).float(),),
            "decoder": decoder,
        },
        model.decoder.config,
        context,
    )
