"""The sizes that define a FastVLM: tower, projector, decoder. Plain data, no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from .errors import ExportError

STRIDE_OF_STEM = 4  # two stride-2 convolutions
ATTENTION_HEAD_DIM = 32  # FastViT section 3: every attention stage uses heads of 32 channels


class Mixer(StrEnum):
    """How a stage mixes tokens: RepMixer (depthwise 3x3) or self-attention."""

    REPMIXER = "repmixer"
    ATTENTION = "attention"


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of FastViTHD. Every stage but the first starts with a stride-2 PatchEmbed.

    `position_kernel` is the size of the RepCPE depthwise convolution before the blocks, 0 for none.
    """

    mixer: Mixer
    depth: int
    width: int
    mlp_width: int
    position_kernel: int = 0


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """FastViTHD (FastVLM, CVPR 2025, section 3.2).

    `features` is the width after `conv_exp` (Apple's `mm_hidden_size`), `se_width` the inner width
    of its squeeze-and-excite, `head_width` that of the classifier head (0: none; the VLM never
    runs it). `train_form` tells parallel branches from the folded convolutions.
    """

    stages: tuple[StageConfig, ...]
    features: int
    se_width: int
    head_width: int = 0
    train_form: bool = False

    @property
    def stride(self) -> int:
        """Input pixels per output cell: 64 for FastViTHD's five stages."""
        return STRIDE_OF_STEM << (len(self.stages) - 1)

    def image_tokens(self, resolution: int) -> int:
        """Tokens of a square image of `resolution` pixels: every stride-2 layer rounds up."""
        side: int = -(-resolution // self.stride)
        return side * side


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Qwen2 decoder: grouped-query attention with biases, RoPE, SwiGLU, RMSNorm."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_positions: int = 32768
    tied: bool = True


@dataclass(frozen=True, kw_only=True)
class FastVLMConfig:
    """The whole model. `projector_layers` is 1 for `linear`, N for `mlpNx_gelu`."""

    tower: TowerConfig
    decoder: DecoderConfig
    projector_layers: int = 2


def fastvithd(
    *,
    widths: tuple[int, ...] = (96, 192, 384, 768, 1536),
    depths: tuple[int, ...] = (2, 12, 24, 4, 2),
    attention_stages: int = 2,
    mlp_ratio: int = 4,
    features: int = 3072,
    se_width: int = 192,
    head_width: int = 768,
    train_form: bool = False,
) -> TowerConfig:
    """FastViTHD's plan: RepMixer stages, then `attention_stages` with RepCPE 7x7 and attention."""
    first_attention = len(widths) - attention_stages
    stages = tuple(
        StageConfig(
            mixer=Mixer.ATTENTION if i >= first_attention else Mixer.REPMIXER,
            depth=depth,
            width=width,
            mlp_width=mlp_ratio * width,
            position_kernel=7 if i >= first_attention else 0,
        )
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True))
    )
    return TowerConfig(
        stages=stages,
        features=features,
        se_width=se_width,
        head_width=head_width,
        train_form=train_form,
    )


def _qwen2(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> Callable[[], FastVLMConfig]:
    decoder = DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        tied=tied,
    )
    return lambda: FastVLMConfig(tower=fastvithd(), decoder=decoder)


PRESETS: dict[str, Callable[[], FastVLMConfig]] = {
    "fastvlm-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "fastvlm-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "fastvlm-7b": _qwen2(3584, 18944, 28, 28, 4, 152064, tied=False),
}


def preset(name: str) -> FastVLMConfig:
    """The sizes of a released FastVLM by name; raises ExportError for an unknown one."""
    if name not in PRESETS:
        raise ExportError(
            f"There is no model named '{name}'.",
            f"Use one of: {', '.join(PRESETS)}. For example: fastvlm-export --random fastvlm-0.5b",
        )
    return PRESETS[name]()
