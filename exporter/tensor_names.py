"""Tensor names of the two checkpoint layouts, renamed to those of `FastVLM`.

Apple's layout (LLaVA) only differs in its prefixes. Hugging Face's `fast_vlm` layout (transformers)
holds timm's tower, whose modules have names of their own and whose stages are numbered instead of
the modules between them.
"""

import re
from collections.abc import Iterable
from enum import StrEnum


class Layout(StrEnum):
    """Where a checkpoint comes from."""

    APPLE = "apple"
    HUGGINGFACE = "huggingface"
    RANDOM = "random"
    BUNDLED = "bundled"


APPLE_TOWER = "model.vision_tower.vision_tower.model."
APPLE_PREFIXES = {
    APPLE_TOWER: "vision_tower.",
    "model.mm_projector.": "projector.",
    "model.embed_tokens.": "decoder.embed_tokens.",
    "model.layers.": "decoder.layers.",
    "model.norm.": "decoder.norm.",
    "lm_head.": "decoder.lm_head.",
}
# Below an optional "model."; the longest prefix comes first.
HUGGINGFACE_PREFIXES = {
    "vision_tower.timm_model.": "vision_tower.",
    "multi_modal_projector.linear_1.": "projector.0.",
    "multi_modal_projector.linear_2.": "projector.2.",
    "language_model.lm_head.": "decoder.lm_head.",
    "language_model.model.": "decoder.",
    "language_model.": "decoder.",
    "lm_head.": "decoder.lm_head.",
}
TIMM_MODULES = {
    "stem": "patch_embed",
    "conv_kxk": "rbr_conv",
    "conv_scale": "rbr_scale",
    "identity": "rbr_skip",
    "large_conv": "lkb_origin",
    "final_conv": "conv_exp",
    "mlp": "convffn",
    "pos_enc": "pe",
}
# Buffers without a place in the sums: a counter of training steps, and RoPE's frequencies, which
# follow from rope_theta.
UNUSED = re.compile(r"(num_batches_tracked|rotary_emb\.(inv_freq|(cos|sin)_cached))$")
# A classifier beside the tower, which the VLM never runs; Apple's is a part of its own tower.
UNUSED_TIMM = re.compile(r"vision_tower\.timm_model\.head\.")


def detect(names: Iterable[str]) -> Layout | None:
    """The layout that the tensors' names show, None where they show no FastVLM tower."""
    for name in names:
        if name.startswith(APPLE_TOWER):
            return Layout.APPLE
        if name.removeprefix("model.").startswith("vision_tower.timm_model."):
            return Layout.HUGGINGFACE
    return None


def rename(names: Iterable[str], layout: Layout) -> tuple[dict[str, str], list[str]]:
    """FastVLM's name of each tensor that it uses, and the names that have no place in it.

    Tensors known to be unused are in neither.
    """
    names = [name for name in names if not UNUSED.search(name)]
    if layout is Layout.APPLE:
        renamed = {name: _with_prefix(name, APPLE_PREFIXES) for name in names}
    else:
        names = [name for name in names if not UNUSED_TIMM.search(name)]
        plain = {
            name: _with_prefix(name.removeprefix("model."), HUGGINGFACE_PREFIXES) for name in names
        }
        place = _network_indices(new for new in plain.values() if new)
        renamed = {name: _from_timm(new, place) if new else None for name, new in plain.items()}
    known = {name: new for name, new in renamed.items() if new}
    if "projector.0.weight" in known.values() and "projector.2.weight" not in known.values():
        # `mlp1x_gelu` is a list of one linear layer, which is `linear`.
        known = {name: re.sub(r"^projector\.0\.", "projector.", new) for name, new in known.items()}
    return known, [name for name, new in renamed.items() if not new]


def _with_prefix(name: str, prefixes: dict[str, str]) -> str | None:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def _network_indices(names: Iterable[str]) -> dict[str, int]:
    """timm's "stages.S.part" -> index in Apple's `network`, which counts every part in turn."""
    pattern = re.compile(r"vision_tower\.stages\.(\d{1,4})\.(downsample|pos_emb|blocks)\.")
    parts = {(int(m[1]), m[2]) for name in names if (m := pattern.match(name))}
    order = ("downsample", "pos_emb", "blocks")
    ranked = sorted(parts, key=lambda part: (part[0], order.index(part[1])))
    return {f"stages.{stage}.{part}": index for index, (stage, part) in enumerate(ranked)}


def _from_timm(name: str, place: dict[str, int]) -> str | None:
    """One of timm's names, already below `vision_tower.`, as Apple's."""
    if not name.startswith("vision_tower."):
        return name
    path = name.removeprefix("vision_tower.")
    if match := re.match(r"(stages\.\d+\.(downsample|pos_emb|blocks))\.", path):
        if match[1] not in place:
            return None
        path = f"network.{place[match[1]]}.{path[match.end() :]}"
    path = re.sub(r"^(network\.\d+\.proj\.0)\.reparam_conv\.", r"\1.lkb_reparam.", path)
    path = path.replace(".se.fc1.", ".se.reduce.").replace(".se.fc2.", ".se.expand.")
    path = re.sub(r"(layer_scale(_[12])?)\.gamma$", r"\1", path)
    return "vision_tower." + ".".join(TIMM_MODULES.get(part, part) for part in path.split("."))
