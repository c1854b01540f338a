"""What only Apple's layout (LLaVA, `llava_qwen2`) says: resolution, preprocessing, projector."""

import re

from .config import TowerConfig
from .json_file import Section
from .preprocess import Preprocessing, Strategy

LARGEST_RESOLUTION = 8192


def check_model(
    config: Section, tower: TowerConfig | None, layers: int | None, notes: list[str]
) -> None:
    """Compare config.json with the tensors, and refuse what changes the sums."""
    problems = config.problems
    config.only("model_type", ("llava_qwen2",), "the tensors are named as llava_qwen2's")
    if tower is not None:
        config.agree("mm_hidden_size", tower.features, "the tower's features have width")
    kind = config.text("mm_projector_type") or "linear"
    match = re.fullmatch(r"mlp(\d{1,3})x_gelu", kind)
    stated = 1 if kind == "linear" else int(match[1]) if match else None
    if stated is None:
        config.complain("mm_projector_type", "linear or mlpNx_gelu")
    elif layers is not None and stated != layers:
        problems.append(f"{config.where}: mm_projector_type is {kind}, but its layers are {layers}")
    config.only("mm_use_im_start_end", (False,), "image markers in the prompt are not supported")
    config.only("s2", (False,), "multi-scale features are not supported")
    config.only("mm_resampler_type", (), "resamplers are not supported")
    if (config.text("mm_patch_merge_type") or "flat") != "flat":
        notes.append("mm_patch_merge_type only matters for tiled images, which are not used")


def resolution(config: Section) -> int | None:
    """The side of the input image in pixels: the suffix of the tower's name."""
    key = "mm_vision_tower" if "mm_vision_tower" in config else "vision_tower"
    name = config.text(key)
    if name is None:
        config.problems.append(f"{config.where}: mm_vision_tower is missing")
        return None
    match = re.search(r"_(\d{1,5})/?$", name)
    if not match or not 1 <= int(match[1]) <= LARGEST_RESOLUTION:
        config.complain(key, "a name that ends in the resolution, as mobileclip_l_1024 does")
        return None
    return int(match[1])


def preprocessing(config: Section, size: int) -> Preprocessing:
    """LLaVA pads when told to; otherwise its image processor crops. Mean 0, deviation 1."""
    ratio = config.text("image_aspect_ratio")
    if ratio is not None and (ratio.startswith("anyres") or ratio == "highres"):
        config.complain("image_aspect_ratio", "pad or square: tiling is not supported")
    strategy = Strategy.PAD if ratio == "pad" else Strategy.CROP
    return Preprocessing(strategy=strategy, resolution=size)
