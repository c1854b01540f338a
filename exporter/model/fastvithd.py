"""FastViTHD, FastVLM's vision tower (FastVLM, section 3.2; blocks from FastViT, ICCV 2023).

One module serves both forms. In train form a convolution is the sum of parallel branches with a
BatchNorm each; `reparameterize()` on each block returns the plain convolution that computes the
same. Parameter names below the tower are the checkpoint's own, so that loading is renaming only.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ATTENTION_HEAD_DIM, Mixer, StageConfig, TowerConfig

EPS_OF_CHANNEL_NORM = 1e-5


def _conv_bn(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(conv.out_channels)))


def _scaled(x: Tensor, scale: nn.Parameter | None) -> Tensor:
    # None once reparameterization has folded the layer scale into the layer before it.
    return x if scale is None else x * scale


class SqueezeExcite(nn.Module):
    """x * sigmoid(expand(relu(reduce(mean over H, W of x)))). [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, inner, 1)
        self.expand = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        # A mean instead of a pooling window of the input's size, so that no size is baked in.
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(pooled))))


class MobileOneBlock(nn.Module):
    """Trains as up to three branches: kxk, 1x1 (`rbr_scale`), identity (`rbr_skip`).

    [B,C,H,W] -> [B,C',H/stride,W/stride], then squeeze-and-excite and GELU where asked for.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        train_form: bool = False,
        activation: bool = True,
        conv_branch: bool = True,
        scale_branch: bool = True,
        se_width: int = 0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.kernel, self.groups = kernel, groups

        def conv(size: int, bias: bool) -> nn.Conv2d:
            return nn.Conv2d(width_in, width_out, size, stride, size // 2, groups=groups, bias=bias)

        if se_width:
            self.se = SqueezeExcite(width_out, se_width)
        if not train_form:
            self.reparam_conv = conv(kernel, bias=True)
            return
        if conv_branch:
            self.rbr_conv = nn.ModuleList([_conv_bn(conv(kernel, bias=False))])
        if scale_branch and kernel > 1:
            self.rbr_scale = _conv_bn(conv(1, bias=False))
        if width_in == width_out and stride == 1:
            self.rbr_skip = nn.BatchNorm2d(width_in)

    def branches(self, x: Tensor) -> Tensor:
        """The sum of the branches, before squeeze-and-excite and activation."""
        if hasattr(self, "reparam_conv"):
            out: Tensor = self.reparam_conv(x)
            return out
        parts = list(getattr(self, "rbr_conv", ()))
        parts += [getattr(self, name) for name in ("rbr_scale", "rbr_skip") if hasattr(self, name)]
        out = parts[0](x)
        for part in parts[1:]:
            out = out + part(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.branches(x)
        if hasattr(self, "se"):
            x = self.se(x)
        return F.gelu(x) if self.activation else x


class ReparamLargeKernelConv(nn.Module):
    """Depthwise stride 2, 7x7 beside 3x3, then GELU. [B,C,H,W] -> [B,C',H/2,W/2]."""

    def __init__(self, width_in: int, width_out: int, train_form: bool) -> None:
        super().__init__()
        self.groups = width_in

        def conv(size: int, bias: bool) -> nn.Conv2d:
            return nn.Conv2d(width_in, width_out, size, 2, size // 2, groups=width_in, bias=bias)

        if train_form:
            self.lkb_origin = _conv_bn(conv(7, bias=False))
            self.small_conv = _conv_bn(conv(3, bias=False))
        else:
            self.lkb_reparam = conv(7, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "lkb_reparam"):
            x = self.lkb_reparam(x)
        else:
            x = self.lkb_origin(x) + self.small_conv(x)
        return F.gelu(x)


class PatchEmbed(nn.Module):
    """Downsampling between stages: large-kernel depthwise stride 2, then a 1x1 MobileOne block."""

    def __init__(self, width_in: int, width_out: int, train_form: bool) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            ReparamLargeKernelConv(width_in, width_out, train_form),
            MobileOneBlock(width_out, width_out, 1, train_form=train_form),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


class RepCPE(nn.Module):
    """Conditional positional encoding: x + depthwise(x), one depthwise convolution once folded."""

    def __init__(self, width: int, kernel: int, train_form: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        if train_form:
            self.pe = conv
        else:
            self.reparam_conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.reparam_conv(x) if hasattr(self, "reparam_conv") else x + self.pe(x)
        return out


class RepMixer(nn.Module):
    """Token mixing x + g * (mixer(x) - norm(x)), one depthwise 3x3 once folded (FastViT, eq. 4).

    The folded convolution replaces the identity too: there is no residual around it.
    """

    def __init__(self, width: int, train_form: bool, kernel: int = 3) -> None:
        super().__init__()
        if train_form:
            self.norm = MobileOneBlock(
                width,
                width,
                kernel,
                groups=width,
                train_form=True,
                activation=False,
                conv_branch=False,
                scale_branch=False,
            )
            self.mixer = MobileOneBlock(
                width, width, kernel, groups=width, train_form=True, activation=False
            )
            self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-5))
        else:
            self.reparam_conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if hasattr(self, "reparam_conv"):
            out = self.reparam_conv(x)
        else:
            out = x + self.layer_scale * (self.mixer(x) - self.norm(x))
        return out


class ConvFFN(nn.Module):
    """Depthwise 7x7 -> BatchNorm -> 1x1 -> GELU -> 1x1. The released folds keep the BatchNorm."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv = _conv_bn(nn.Conv2d(width, width, 7, padding=3, groups=width, bias=False))
        self.fc1 = nn.Conv2d(width, inner, 1)
        self.fc2 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(self.conv(x))))
        return out


class LayerNormChannel(nn.Module):
    """LayerNorm over the channels of [B,C,H,W], safe in fp16 for activations up to its range.

    y = (x - mean) / sqrt(var + eps) * weight + bias. Taken literally, fp16 (65504) overflows in the
    sum of x, in x - mean, and in its square beyond 256. Scaling by m = max|x| and then by
    p = max|x/m - mean(x/m)| gives the same y from numbers of size 1, for u = (x - mean) / (m p):
    (x - mean) / sqrt(var + eps) = u / sqrt(mean(u^2) + eps / (m p)^2).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        peak = x.abs().amax(1, keepdim=True).clamp(min=1.0)
        scaled = x / peak
        centred = scaled - scaled.mean(1, keepdim=True)
        # The floor keeps channels that are all alike from dividing by zero; it is an fp16 normal,
        # small enough for eps / (m p)^2 to stay above zero in fp16 at m = 6e4.
        spread = centred.abs().amax(1, keepdim=True).clamp(min=1e-4)
        unit = centred / spread
        size = peak * spread
        variance = (unit * unit).mean(1, keepdim=True)
        # Divided twice, because size * size would overflow.
        normed = unit * torch.rsqrt(variance + EPS_OF_CHANNEL_NORM / size / size)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


class Attention(nn.Module):
    """Multi-head self-attention over the cells of [B,C,H,W]; heads of 32 channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // ATTENTION_HEAD_DIM
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # [B,N,C]
        qkv = self.qkv(tokens).view(batch, height * breadth, 3, self.heads, ATTENTION_HEAD_DIM)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B,heads,N,32]
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.proj(mixed.transpose(1, 2).reshape(batch, height * breadth, width))
        out: Tensor = mixed.transpose(1, 2).reshape(batch, width, height, breadth)
        return out


class RepMixerBlock(nn.Module):
    """RepMixer, then x + layer_scale * ConvFFN(x)."""

    def __init__(self, stage: StageConfig, train_form: bool) -> None:
        super().__init__()
        self.token_mixer = RepMixer(stage.width, train_form)
        self.convffn = ConvFFN(stage.width, stage.mlp_width)
        self.layer_scale: nn.Parameter | None
        self.layer_scale = nn.Parameter(torch.full((stage.width, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + _scaled(self.convffn(x), self.layer_scale)


class AttentionBlock(nn.Module):
    """x + layer_scale_1 * attention(norm(x)), then x + layer_scale_2 * ConvFFN(x)."""

    def __init__(self, stage: StageConfig) -> None:
        super().__init__()
        self.norm = LayerNormChannel(stage.width)
        self.token_mixer = Attention(stage.width)
        self.convffn = ConvFFN(stage.width, stage.mlp_width)
        self.layer_scale_1: nn.Parameter | None
        self.layer_scale_2: nn.Parameter | None
        self.layer_scale_1 = nn.Parameter(torch.full((stage.width, 1, 1), 1e-5))
        self.layer_scale_2 = nn.Parameter(torch.full((stage.width, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + _scaled(self.token_mixer(self.norm(x)), self.layer_scale_1)
        return x + _scaled(self.convffn(x), self.layer_scale_2)


class Head(nn.Module):
    """The classifier's projection. Part of the checkpoint, never run by the VLM."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.zeros(features, width))


class FastViTHD(nn.Module):
    """Pixels [B,3,H,W] in 0..1 -> feature map [B,features,ceil(H/64),ceil(W/64)]."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        train = config.train_form
        width = config.stages[0].width
        self.patch_embed = nn.Sequential(
            MobileOneBlock(3, width, 3, stride=2, train_form=train, scale_branch=False),
            MobileOneBlock(
                width, width, 3, stride=2, groups=width, train_form=train, scale_branch=False
            ),
            MobileOneBlock(width, width, 1, train_form=train, scale_branch=False),
        )
        self.network = nn.ModuleList()
        for index, stage in enumerate(config.stages):
            if index:
                self.network.append(PatchEmbed(width, stage.width, train))
            if stage.position_kernel:
                self.network.append(RepCPE(stage.width, stage.position_kernel, train))
            self.network.append(_blocks(stage, train))
            width = stage.width
        self.conv_exp = MobileOneBlock(
            width, config.features, 3, groups=width, train_form=train, se_width=config.se_width
        )
        if config.head_width:
            self.head = Head(config.features, config.head_width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)
        for layer in self.network:
            x = layer(x)
        out: Tensor = self.conv_exp(x)
        return out


def _blocks(stage: StageConfig, train_form: bool) -> nn.Sequential:
    if stage.mixer is Mixer.ATTENTION:
        return nn.Sequential(*(AttentionBlock(stage) for _ in range(stage.depth)))
    return nn.Sequential(*(RepMixerBlock(stage, train_form) for _ in range(stage.depth)))
