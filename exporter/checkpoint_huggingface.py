"""What only Hugging Face's layout (`fast_vlm`) says: model_args of timm's tower, images."""

import math
from pathlib import Path

from .config import Mixer, TowerConfig
from .json_file import Section, read_json_if_there
from .preprocess import Preprocessing, Strategy

DEFAULT_RESOLUTION = 1024
LARGEST_RESOLUTION = 8192
UNSET_SEQ_LENGTH = 576  # what transformers writes when nobody set image_seq_length
# timm's two FastViTHD architectures and the sizes that model_args can override.
ARCHITECTURES: dict[str, dict[str, tuple[float, ...]]] = {
    "fastvit_mci3": {
        "layers": (2, 12, 24, 4, 2),
        "embed_dims": (96, 192, 384, 768, 1536),
        "mlp_ratios": (4, 4, 4, 4, 4),
    },
    "fastvit_mci4": {
        "layers": (2, 12, 24, 4, 4),
        "embed_dims": (128, 256, 512, 1024, 2048),
        "mlp_ratios": (4, 4, 4, 4, 4),
    },
}
# Arguments that only matter in training, or outside of what the VLM runs.
IRRELEVANT_ARGS = {
    "num_classes",
    "drop_rate",
    "proj_drop_rate",
    "drop_path_rate",
    "global_pool",
    "layer_scale_init_value",
    "pretrained",
}
# Arguments that change the sums, with the one value that FastViTHD has.
FIXED_ARGS: dict[str, object] = {
    "in_chans": 3,
    "repmixer_kernel_size": 3,
    "down_patch_size": 7,
    "down_stride": 2,
    "lkc_use_act": True,
    "stem_use_scale_branch": False,
    "fork_feat": False,
    "features_only": False,
}
BICUBIC = 3  # PIL's number for it


def check_model(
    config: Section, tower: TowerConfig | None, layers: int | None, notes: list[str]
) -> None:
    """Compare config.json with the tensors, and refuse what changes the sums."""
    config.only("model_type", ("fast_vlm",), "the tensors are named as fast_vlm's")
    config.only("projector_hidden_act", ("gelu",), "the projector computes nothing else")
    config.only("vision_feature_select_strategy", ("full",), "FastVLM uses all features")
    config.only("vision_feature_layer", (-1,), "FastVLM uses the last features")
    if layers is not None and layers != 2:
        config.problems.append(f"the projector has {layers} layers, not fast_vlm's 2")
    config.section("text_config").only("model_type", ("qwen2",), "only Qwen2 is supported")
    vision = config.section("vision_config")
    vision.only("model_type", ("timm_wrapper",), "the tower must be timm's FastViTHD")
    vision.only("architecture", tuple(ARCHITECTURES), "the tower must be FastViTHD")
    if tower is None:
        return
    vision.agree("hidden_size", tower.features, "the tower's features have width")
    args = vision.section("model_args")
    stated = ARCHITECTURES.get(str(vision.values.get("architecture", "fastvit_mci3")), {})
    _check_args(args, stated, tower)
    form = args.flag("inference_mode")
    if form is not None and form == tower.train_form:
        notes.append(
            f"{args.where}.inference_mode is {str(form).lower()}, but the tower is stored in "
            f"{'train' if tower.train_form else 'inference'} form"
        )


def _check_args(args: Section, stated: dict[str, tuple[float, ...]], tower: TowerConfig) -> None:
    stages = tower.stages
    widths = [float(stage.width) for stage in stages]
    found = {
        "layers": [float(stage.depth) for stage in stages],
        "embed_dims": widths,
        "mlp_ratios": [stage.mlp_width / stage.width for stage in stages],
    }
    for key, sizes in found.items():
        given = args.numbers(key)
        wanted = list(given if given is not None else stated.get(key, sizes))
        if key == "mlp_ratios" and len(wanted) == len(widths):
            # timm rounds ratio * width down, so that ratios that are not whole still compare.
            agree = [int(r * w) for r, w in zip(wanted, widths, strict=True)] == [
                s.mlp_width for s in stages
            ]
        else:
            agree = wanted == sizes
        if not agree:
            args.problems.append(
                f"{args.where}: {key} is {_plain(wanted)}, but the tower has {_plain(sizes)}"
            )
    mixers = [stage.mixer.value for stage in stages]
    default_mixers = [Mixer.REPMIXER.value] * 3 + [Mixer.ATTENTION.value] * 2
    if args.values.get("token_mixers", default_mixers) != mixers:
        args.complain("token_mixers", f"the tower's {mixers}")
    args.only("downsamples", ([False] + [True] * (len(stages) - 1),), "every stage halves the size")
    args.only("se_downsamples", ([False] * len(stages),), "FastViTHD's downsampling has none")
    ratio = args.number("cls_ratio") or 2.0
    if int(widths[-1] * ratio) != tower.features:
        args.problems.append(
            f"{args.where}: cls_ratio is {ratio:g}, but the tower has {tower.features} features "
            f"at width {int(widths[-1])}"
        )
    for key, value in FIXED_ARGS.items():
        args.only(key, (value,), "FastViTHD has no other")
    known = {*found, *FIXED_ARGS, *IRRELEVANT_ARGS, "token_mixers", "downsamples"}
    known |= {"se_downsamples", "cls_ratio", "inference_mode"}
    for key in args.values:
        if key not in known:
            args.problems.append(f"{args.where}: {key} is not an argument known to be supported")


def _plain(sizes: list[float]) -> str:
    return "[" + ", ".join(f"{size:g}" for size in sizes) + "]"


def read_preprocessing(
    folder: Path, config: Section, stride: int, notes: list[str]
) -> Preprocessing:
    """What the folder's image processor does; FastVLM's own where the folder has none.

    transformers looks into processor_config.json before preprocessor_config.json.
    """
    problems = config.problems
    nested = read_json_if_there(folder, "processor_config.json", problems)
    nested = nested.section("image_processor")
    settings = nested
    if not nested.values:
        settings = read_json_if_there(folder, "preprocessor_config.json", problems)
    if not settings.values:
        size = _resolution_from_config(config, stride, notes)
        notes.append("the folder has no image processor, so FastVLM's own is used: crop")
        return Preprocessing(strategy=Strategy.CROP, resolution=size)
    strategy, size = _strategy(settings, config, stride, notes)
    settings.only("resample", (BICUBIC, "bicubic"), "images are resized with bicubic resampling")
    settings.only("do_rescale", (True,), "pixels are brought to 0..1")
    factor = settings.number("rescale_factor")
    if factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        settings.complain("rescale_factor", "1/255")
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings.flag("do_normalize") is not False:
        mean = _channels(settings, "image_mean", mean)
        std = _channels(settings, "image_std", std)
    if min(std) <= 0:
        settings.complain("image_std", "above zero")
        std = (1.0, 1.0, 1.0)
    return Preprocessing(strategy=strategy, resolution=size, mean=mean, std=std)


def _channels(
    settings: Section, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    values = settings.numbers(key)
    if values is None:
        return default
    if len(values) != 3:
        settings.complain(key, "three numbers")
        return default
    return values[0], values[1], values[2]


def _resolution_from_config(config: Section, stride: int, notes: list[str]) -> int:
    vision = config.section("vision_config")
    if (size := vision.integer("image_size", high=LARGEST_RESOLUTION)) is not None:
        return size
    tokens = config.integer("image_seq_length", high=(LARGEST_RESOLUTION // stride) ** 2)
    if tokens == UNSET_SEQ_LENGTH:
        tokens = None
    if tokens is not None and math.isqrt(tokens) ** 2 == tokens:
        notes.append(f"the resolution is that of image_seq_length {tokens}")
        return stride * math.isqrt(tokens)
    notes.append(f"no file tells the resolution, so it is FastVLM's {DEFAULT_RESOLUTION}")
    return DEFAULT_RESOLUTION


def _side(settings: Section, key: str) -> int | None:
    """The side of a square given as a number or as an object, None where it is neither."""
    value = settings.values.get(key)
    if value is None or isinstance(value, int | float):
        return settings.integer(key, high=LARGEST_RESOLUTION)
    sides = settings.section(key)
    found = {
        sides.integer(name, high=LARGEST_RESOLUTION)
        for name in ("shortest_edge", "height", "width")
        if name in sides
    }
    if len(found) != 1:
        settings.complain(key, "a square")
        return None
    return found.pop()


def _strategy(
    settings: Section, config: Section, stride: int, notes: list[str]
) -> tuple[Strategy, int]:
    """How the processor makes a square, and of how many pixels."""
    size, cut = _side(settings, "size"), _side(settings, "crop_size")
    crops = settings.flag("do_center_crop") is not False and cut is not None
    side = size or cut or _resolution_from_config(config, stride, notes)
    settings.only("do_resize", (True,), "images of every size are accepted")
    if crops and size is not None and cut != size:
        settings.complain("crop_size", f"the size {size} that images are resized to")
    if settings.flag("do_pad"):
        return Strategy.PAD, side
    shape = settings.values.get("size")
    shortest = not isinstance(shape, dict) or "shortest_edge" in shape
    if shortest and not crops and settings.flag("do_center_crop") is False:
        settings.complain("do_center_crop", "true: images must become squares")
    return (Strategy.CROP if shortest else Strategy.STRETCH), side
