"""A FastVLM's sizes, read from the names and shapes of its tensors (under FastVLM's names)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .config import ATTENTION_HEAD_DIM, FastVLMConfig, Mixer, StageConfig, TowerConfig

Shapes = Mapping[str, tuple[int, ...]]

TRAIN_BRANCHES = re.compile(r"\.(rbr_(conv|scale|skip)|lkb_origin|small_conv|pe)\.")
FOLDED = re.compile(r"\.(reparam_conv|lkb_reparam)\.")


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What the decoder's tensors tell; the head count is not in them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    query_width: int
    key_width: int
    has_lm_head: bool


def _rows(shapes: Shapes, pattern: str, axis: int = 0) -> int | None:
    """The size of `axis` of the first tensor, not empty, whose name matches."""
    for name, shape in shapes.items():
        if len(shape) > axis and shape[axis] and re.fullmatch(pattern, name):
            return shape[axis]
    return None


def _count(numbers: Iterable[int], what: str, problems: list[str]) -> int | None:
    """How many there are when they are 0, 1, 2, ... without a gap."""
    found = sorted(set(numbers))
    if not found:
        problems.append(f"{what}: there are none")
        return None
    gaps = set(range(len(found))) - set(found)
    if gaps:
        problems.append(f"{what}: number {min(gaps)} is missing")
        return None
    return len(found)


def decoder_shape(shapes: Shapes, problems: list[str]) -> DecoderShape | None:
    """The decoder's sizes, or None with problems noted."""
    layer = r"decoder\.layers\.\d+\."
    numbers = (int(m[1]) for name in shapes if (m := re.match(r"decoder\.layers\.(\d+)\.", name)))
    layers = _count(numbers, "decoder layers", problems)
    sizes = {
        "decoder.embed_tokens.weight": _rows(shapes, r"decoder\.embed_tokens\.weight"),
        "decoder.norm.weight": _rows(shapes, r"decoder\.(embed_tokens\.weight|norm\.weight)", 1)
        or _rows(shapes, r"decoder\.norm\.weight"),
        "mlp.gate_proj.weight": _rows(shapes, layer + r"mlp\.(gate|up)_proj\.weight"),
        "self_attn.q_proj.weight": _rows(shapes, layer + r"self_attn\.q_proj\.weight"),
        "self_attn.k_proj.weight": _rows(shapes, layer + r"self_attn\.[kv]_proj\.weight"),
    }
    problems += [f"the decoder has no {name}" for name, size in sizes.items() if size is None]
    found = [size for size in sizes.values() if size is not None]
    if layers is None or len(found) < len(sizes):
        return None
    vocab, hidden, inner, query, key = found
    return DecoderShape(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        layers=layers,
        query_width=query,
        key_width=key,
        has_lm_head="decoder.lm_head.weight" in shapes,
    )


def projector_layers(shapes: Shapes, problems: list[str]) -> int | None:
    """1 for `linear`, N for `mlpNx_gelu` (linear layers at 0, 2, 4, ... with GELU between them)."""
    if "projector.weight" in shapes:
        return 1
    numbers = [int(m[1]) for name in shapes if (m := re.match(r"projector\.(\d+)\.", name))]
    if odd := [number for number in numbers if number % 2]:
        problems.append(f"projector.{odd[0]} holds weights: it is neither linear nor mlpNx_gelu")
        return None
    return _count((number // 2 for number in numbers), "projector layers", problems)


def tower_config(shapes: Shapes, problems: list[str]) -> TowerConfig | None:
    """FastViTHD's plan, or None with problems noted."""
    before = len(problems)
    names = [name for name in shapes if name.startswith("vision_tower.")]
    train = [name for name in names if TRAIN_BRANCHES.search(name)]
    folded = [name for name in names if FOLDED.search(name)]
    if train and folded:
        problems.append(
            f"the tower is half folded: {train[0]} is of the train form, {folded[0]} is not"
        )
    stages = _stages(shapes, problems)
    conv_exp = r"vision_tower\.conv_exp\.(reparam_conv|rbr_conv\.0\.conv)\.weight"
    features = _rows(shapes, conv_exp)
    se_width = _rows(shapes, r"vision_tower\.conv_exp\.se\.reduce\.weight")
    for size, what in ((features, "convolution"), (se_width, "squeeze-and-excite")):
        if size is None:
            problems.append(f"the tower's conv_exp has no {what}")
    if len(problems) > before or features is None or se_width is None:
        return None
    return TowerConfig(
        stages=tuple(stages),
        features=features,
        se_width=se_width,
        head_width=_rows(shapes, r"vision_tower\.head\.proj", 1) or 0,
        train_form=bool(train),
    )


def _stages(shapes: Shapes, problems: list[str]) -> list[StageConfig]:
    """Walk `network`: [RepCPE] blocks, then PatchEmbed [RepCPE] blocks for every further stage."""
    parts: dict[int, set[str]] = {}
    for name in shapes:
        if match := re.match(r"vision_tower\.network\.(\d+)\.(\w+)\.", name):
            parts.setdefault(int(match[1]), set()).add(match[2])
    length = _count(parts, "modules of the tower's network", problems)
    stages: list[StageConfig] = []
    kernel, downsampled = 0, True
    for index in range(length or 0):
        prefix = rf"vision_tower\.network\.{index}\."
        if "proj" in parts[index]:
            downsampled = True
        elif parts[index] & {"pe", "reparam_conv"}:
            kernel = _rows(shapes, prefix + r"(pe|reparam_conv)\.weight", 3) or 0
        else:
            if not downsampled:
                problems.append(f"the tower's network.{index} does not follow a downsampling")
            stage = _blocks(shapes, prefix, index, kernel, problems)
            stages += [stage] if stage else []
            kernel, downsampled = 0, False
    if length and (downsampled or kernel):
        problems.append(f"the tower's network.{length - 1} is not followed by blocks")
    return stages


def _blocks(
    shapes: Shapes, prefix: str, index: int, kernel: int, problems: list[str]
) -> StageConfig | None:
    numbers = (int(m[1]) for name in shapes if (m := re.match(prefix + r"(\d+)\.", name)))
    depth = _count(numbers, f"blocks of the tower's network.{index}", problems)
    width = _rows(shapes, prefix + r"\d+\.convffn\.(conv\.conv|fc2)\.weight")
    inner = _rows(shapes, prefix + r"\d+\.convffn\.fc1\.weight")
    attention = _rows(shapes, prefix + r"\d+\.token_mixer\.qkv\.weight") is not None
    if depth is None or width is None or inner is None:
        if depth is not None:
            problems.append(f"the blocks of the tower's network.{index} have no convffn")
        return None
    if attention and width % ATTENTION_HEAD_DIM:
        problems.append(
            f"the tower's network.{index} attends at width {width}, "
            f"which is not a multiple of its head width {ATTENTION_HEAD_DIM}"
        )
    return StageConfig(
        mixer=Mixer.ATTENTION if attention else Mixer.REPMIXER,
        depth=depth,
        width=width,
        mlp_width=inner,
        position_kernel=kernel,
    )


def compare(config: FastVLMConfig, shapes: Shapes, problems: list[str]) -> None:
    """Every tensor that the sizes call for is there, in its shape, and no other."""
    from .model.fastvlm import build  # noqa: PLC0415 - imports this package's modules only

    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in build(config).state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    for name, shape in wanted.items():
        if name not in shapes:
            problems.append(f"the tensor {name} {list(shape)} is missing")
        elif shapes[name] != shape:
            problems.append(f"the tensor {name} is {list(shapes[name])}, not {list(shape)}")
    problems += [
        f"the tensor {name} has no place in FastVLM" for name in shapes if name not in wanted
    ]
