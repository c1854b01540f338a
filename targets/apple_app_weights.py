"""Everything but the tower as MLX stores it: names, float tensors, affine groups of integers.

MLX packs 32 / bits unsigned integers q into a uint32, the first in the lowest bits, and means
w = q * scale + bias, with a scale and a bias for each group along the input axis. The programs hold
signed integers i and mean w = (i - z) * s. So q = i + o, scale = s, bias = -(z + o) * s with
o = 2^(bits-1): the very weights where z is 0, since o is a power of two and the product is exact.
With other zero points a float16 bias is rounded, by at most 2^-11 of itself.

One `quantization {group_size, bits}` counts for all layers: the bits of the layer that has most, so
that all integers are stored as they are, and the largest group that divides all of ours, whose
scales are repeated. Every float tensor keeps its program's type, also the float32 of an operator
that the range scan kept: MLX computes in the wider of two types, so it is float32 there, too.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram

from ..exporter.errors import ExportError
from ..quantize.recipes import EMBEDDING, HEAD, Recipe
from .apple_app_recipes import BITS, GROUP_SIZES

SHARD = 2**31
"""Bytes of tensors in one file: what is in memory at once beside the programs."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Parts = Mapping[str, Tensor]
"""What the programs hold of a module: weight, bias, and with integers scale, zero_point."""

_MLX_PREFIXES = {
    "projector.": "multi_modal_projector.linear_",
    HEAD: "language_model.lm_head",
    "decoder.": "language_model.model.",
}
"""FastVLM's module names to the app's; the first that fits."""


@dataclass(frozen=True, kw_only=True)
class Affine:
    """`quantization` in config.json."""

    group_size: int
    bits: int

    def to_dict(self) -> dict[str, int]:
        """As JSON has it."""
        return asdict(self)


def mlx_name(module: str) -> str:
    """`decoder.layers.0.mlp.up_proj` -> `language_model.model.layers.0.mlp.up_proj`."""
    for prefix, new in _MLX_PREFIXES.items():
        if module.startswith(prefix):
            return new + module.removeprefix(prefix)
    raise ValueError(f"{module} is no part of the language model or projector")


def modules_of(programs: Mapping[str, ExportedProgram]) -> dict[str, Parts]:
    """Module name in FastVLM -> its tensors, of all that the app computes in MLX.

    The table is the embedding program's; the head is the decoder program's, left out where it is
    the very same table.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for graph, prefix in (("vision", ""), ("embedding", "decoder."), ("decoder", "")):
        for name, tensor in programs[graph].state_dict.items():
            module, _, part = f"{prefix}{name}".rpartition(".")
            if graph == "decoder" and module == EMBEDDING:
                module = f"{HEAD} (tied)"
            # Zero points of the vision graph are zero: see `quantize.activations`.
            if graph != "vision" or (
                module.startswith("projector.") and part != "weight_zero_point"
            ):
                part = "scale" if part == "weight_scale" else part
                found[module][part] = tensor.detach()
    tied = found.pop(f"{HEAD} (tied)", {})
    head = found.setdefault(HEAD, tied)
    if _same(head, found[EMBEDDING]):
        del found[HEAD]
    return {name: _grouped(parts) for name, parts in found.items()}


def _same(one: Parts, other: Parts) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype is other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def _grouped(parts: Parts) -> Parts:
    """With scales [N,G]: the vision graph's are [N]."""
    scale = parts.get("scale")
    return {**parts, "scale": scale[:, None]} if scale is not None and scale.dim() == 1 else parts


def affine(modules: Mapping[str, Parts], recipe: Recipe) -> Affine | None:
    """The one format that holds all integers, None where there are none."""
    problems = [f"{name} has a lookup table" for name in modules if "table" in modules[name]]
    widths = {
        name: parts["weight"].shape[1] // parts["scale"].shape[1]
        for name, parts in modules.items()
        if "scale" in parts
    }
    smallest = GROUP_SIZES[-1]
    problems += [
        f"{name} has one scale for {width} weights, no multiple of {smallest}"
        for name, width in widths.items()
        if width % smallest
    ]
    if problems:
        raise ExportError(
            "MLX cannot store " + "; ".join(problems) + ".",
            "Change the recipe, or leave --layout out.",
        )
    if not widths:
        return None
    needed = max(recipe.precision(name).bits or BITS[-1] for name in widths)
    return Affine(
        bits=min(bits for bits in BITS if bits >= needed),
        group_size=next(size for size in GROUP_SIZES if not any(w % size for w in widths.values())),
    )


def tensors(modules: Mapping[str, Parts], form: Affine | None) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that the file holds, made as they are asked for."""
    for module, parts in modules.items():
        name = mlx_name(module)
        if form is not None and "scale" in parts:
            yield from ((f"{name}.{part}", x) for part, x in packed(parts, form).items())
        else:
            yield f"{name}.weight", parts["weight"].contiguous()
        if parts.get("bias") is not None:
            yield f"{name}.bias", parts["bias"].contiguous()


def packed(parts: Parts, form: Affine) -> dict[str, Tensor]:
    """weight uint32 [N, K * bits / 32], scales and biases [N, K / group_size]."""
    weight, scale, zeros = parts["weight"], parts["scale"], parts.get("zero_point")
    offset = 2 ** (form.bits - 1)
    unsigned = (weight.to(torch.int16) + offset).to(torch.uint8)
    if form.bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    start = offset if zeros is None else zeros.to(torch.float64) + offset
    bias = (-start * scale.double()).to(scale.dtype)
    repeats = weight.shape[1] // scale.shape[1] // form.group_size
    return {
        "weight": unsigned.contiguous().view(torch.uint32),
        "scales": scale.repeat_interleave(repeats, dim=1).contiguous(),
        "biases": bias.repeat_interleave(repeats, dim=1).contiguous(),
    }


def save(items: Iterable[tuple[str, Tensor]], out: Path, shard: int = SHARD) -> None:
    """Write `model.safetensors`, or files of up to `shard` bytes and the index that names them."""
    held: dict[str, Tensor] = {}
    files: list[list[str]] = []
    sizes: list[int] = []

    def write() -> None:
        files.append(list(held))
        sizes.append(sum(x.nbytes for x in held.values()))
        path = out / _numbered(len(files), 0)
        save_file(held, path, metadata={"format": "mlx"})
        path.chmod(0o644)  # it is made for its owner's eyes only, unlike the files beside it
        held.clear()

    for name, tensor in items:
        if held and sum(x.nbytes for x in held.values()) + tensor.nbytes > shard:
            write()
        held[name] = tensor
    write()
    if len(files) == 1:
        (out / _numbered(1, 0)).rename(out / WEIGHTS)
        return
    for number in range(1, len(files) + 1):
        (out / _numbered(number, 0)).rename(out / _numbered(number, len(files)))
    index = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {
            name: _numbered(number, len(files))
            for number, names in enumerate(files, 1)
            for name in names
        },
    }
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _numbered(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"
