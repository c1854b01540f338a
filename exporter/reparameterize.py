"""Fold the tower into plain convolutions, and prove that nothing changed.

Three exact folds, computed in float64 (FastViT, section 3.2, and MobileOne, section 3.2):
parallel branches with their BatchNorms into one convolution; the BatchNorm that released
checkpoints keep in each ConvFFN into its 7x7; layer scales into the 1x1 or projection before them.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ExportError
from .model.fastvithd import (
    AttentionBlock,
    ConvFFN,
    MobileOneBlock,
    PatchEmbed,
    ReparamLargeKernelConv,
    RepCPE,
    RepMixer,
    RepMixerBlock,
)
from .model.fastvlm import FastVLM

# The float32 result of a fold may differ from the float64 original by this share of the output's
# peak, or by ten times what float32 alone costs the unfolded block, whichever is larger: branches
# that nearly cancel lose digits before and after the fold alike.
ROUNDING = 1e-5
ROUNDING_FACTOR = 10.0
PROBE_RESOLUTION = 256


@dataclass(frozen=True, kw_only=True)
class Fold:
    """What happened to one block: `branches` merged away, BatchNorms and layer scales absorbed.

    `difference` is the worst |after - before| over the block's outputs as a share of their peak,
    `limit` what rounding explains.
    """

    block: str
    branches: int
    batch_norms: int
    layer_scales: int
    difference: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class Reparameterization:
    """The folded model, the proof block by block, and the same for the whole tower."""

    model: FastVLM
    folds: tuple[Fold, ...]
    difference: float
    limit: float


Kernel = tuple[Tensor, Tensor]
"""Convolution weight [O,I/groups,k,k] and bias [O], float64."""


def _batch_norm(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """y = scale x + shift: scale = gamma / sqrt(var + eps), shift = beta - mean scale."""
    if bn.running_mean is None or bn.running_var is None:
        raise TypeError("a BatchNorm without running statistics cannot be folded")
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    return scale, bn.bias.double() - bn.running_mean.double() * scale


def _conv_bn(branch: nn.Module) -> Kernel:
    conv, bn = branch.get_submodule("conv"), branch.get_submodule("bn")
    if not (isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)):
        raise TypeError(f"not a convolution with a BatchNorm: {branch}")
    scale, shift = _batch_norm(bn)
    return conv.weight.double() * scale[:, None, None, None], shift


def _identity(width: int, groups: int, kernel: int) -> Tensor:
    """The kernel that returns its input: 1 at the centre of channel i, input i % (width/groups)."""
    weight = torch.zeros(width, width // groups, kernel, kernel, dtype=torch.float64)
    channel = torch.arange(width)
    weight[channel, channel % (width // groups), kernel // 2, kernel // 2] = 1
    return weight


def _widen(weight: Tensor, kernel: int) -> Tensor:
    """Zero-pad a small kernel to kernel x kernel around the same centre."""
    return F.pad(weight, [(kernel - weight.shape[-1]) // 2] * 4)


def _mobile_one(block: MobileOneBlock) -> Kernel:
    """Sum of the branches, each folded with its own BatchNorm first."""
    branches: list[Kernel] = [_conv_bn(branch) for branch in getattr(block, "rbr_conv", ())]
    if hasattr(block, "rbr_scale"):
        branches.append(_conv_bn(block.rbr_scale))
    if hasattr(block, "rbr_skip"):
        scale, shift = _batch_norm(block.rbr_skip)
        identity = _identity(len(scale), block.groups, block.kernel)
        branches.append((identity * scale[:, None, None, None], shift))
    weights = [_widen(weight, block.kernel) for weight, _ in branches]
    return torch.stack(weights).sum(0), torch.stack([bias for _, bias in branches]).sum(0)


def _conv(kernel: Kernel, stride: int, groups: int) -> nn.Conv2d:
    """A float32 convolution with 'same' padding from a float64 kernel."""
    weight, bias = kernel
    out, inner, size, _ = weight.shape
    conv = nn.Conv2d(inner * groups, out, size, stride, size // 2, groups=groups, device="meta")
    conv.weight = nn.Parameter(weight.float(), requires_grad=False)
    conv.bias = nn.Parameter(bias.float(), requires_grad=False)
    return conv


def _fold_mobile_one(block: MobileOneBlock) -> None:
    if hasattr(block, "reparam_conv"):
        return
    first = block.rbr_conv[0].get_submodule("conv")
    stride = first.stride[0] if isinstance(first, nn.Conv2d) else 1
    block.reparam_conv = _conv(_mobile_one(block), stride, block.groups)
    _drop(block, "rbr_conv", "rbr_scale", "rbr_skip")


def _fold_large_kernel(block: ReparamLargeKernelConv) -> None:
    if hasattr(block, "lkb_reparam"):
        return
    (weight, bias), (small, small_bias) = _conv_bn(block.lkb_origin), _conv_bn(block.small_conv)
    weight = weight + _widen(small, weight.shape[-1])
    block.lkb_reparam = _conv((weight, bias + small_bias), 2, block.groups)
    _drop(block, "lkb_origin", "small_conv")


def _fold_mixer(block: RepMixer) -> None:
    """x + g (mixer(x) - norm(x)) = (I + g (Wm - Wn)) x + g (bm - bn)."""
    if hasattr(block, "reparam_conv"):
        return
    (mixer, mixer_bias), (norm, norm_bias) = _mobile_one(block.mixer), _mobile_one(block.norm)
    gain = block.layer_scale.double()  # [C,1,1]
    width = len(gain)
    weight = _identity(width, width, mixer.shape[-1]) + gain[..., None] * (mixer - norm)
    block.reparam_conv = _conv((weight, gain.flatten() * (mixer_bias - norm_bias)), 1, width)
    _drop(block, "mixer", "norm", "layer_scale")


def _fold_position(block: RepCPE) -> None:
    """x + W x = (I + W) x."""
    if hasattr(block, "reparam_conv"):
        return
    weight = block.pe.weight.double()
    if block.pe.bias is None:
        raise TypeError("RepCPE's convolution has a bias")
    width = len(weight)
    weight = weight + _identity(width, width, weight.shape[-1])
    block.reparam_conv = _conv((weight, block.pe.bias.double()), 1, width)
    _drop(block, "pe")


def _fold_ffn(block: ConvFFN) -> None:
    if not hasattr(block.conv, "bn"):
        return
    weight, bias = _conv_bn(block.conv)
    block.conv = nn.Sequential()
    block.conv.add_module("conv", _conv((weight, bias), 1, len(weight)))


def _fold_scale(block: nn.Module, name: str, layer: nn.Conv2d | nn.Linear) -> None:
    """g * (W x + b) = (g W) x + g b."""
    scale = getattr(block, name)
    if scale is None:
        return
    gain = scale.double().flatten()
    weight = layer.weight.double()
    layer.weight = nn.Parameter((weight.transpose(0, -1) * gain).transpose(0, -1).float(), False)
    if layer.bias is not None:
        layer.bias = nn.Parameter((layer.bias.double() * gain).float(), False)
    setattr(block, name, None)


def _drop(block: nn.Module, *names: str) -> None:
    for name in names:
        if hasattr(block, name):
            delattr(block, name)


_FOLDS: dict[type[nn.Module], Callable[..., None]] = {
    MobileOneBlock: _fold_mobile_one,
    ReparamLargeKernelConv: _fold_large_kernel,
    RepMixer: _fold_mixer,
    RepCPE: _fold_position,
    ConvFFN: _fold_ffn,
}


def _fold(block: nn.Module) -> None:
    """Fold in place whatever is inside `block`, which must be a copy."""
    # Outermost first: a RepMixer folds its MobileOne blocks itself and drops them.
    if type(block) in _FOLDS:
        _FOLDS[type(block)](block)
    for child in block.children():
        _fold(child)
    if isinstance(block, RepMixerBlock):
        _fold_scale(block, "layer_scale", block.convffn.fc2)
    if isinstance(block, AttentionBlock):
        _fold_scale(block, "layer_scale_1", block.token_mixer.proj)
        _fold_scale(block, "layer_scale_2", block.convffn.fc2)


_BLOCKS = (MobileOneBlock, PatchEmbed, RepCPE, RepMixerBlock, AttentionBlock)


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost blocks that are reported one by one, in order."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, _BLOCKS):
            yield path, child
        else:
            yield from _blocks(child, path)


def _count(block: nn.Module) -> tuple[int, int, int]:
    """Parallel branches beyond the first, BatchNorms, layer scales."""
    branches = norms = scales = 0
    for module in block.modules():
        norms += isinstance(module, nn.BatchNorm2d)
        scales += sum(
            name.startswith("layer_scale") for name, _ in module.named_parameters(recurse=False)
        )
        if isinstance(module, MobileOneBlock) and not hasattr(module, "reparam_conv"):
            parts = len(getattr(module, "rbr_conv", ()))
            branches += parts + hasattr(module, "rbr_scale") + hasattr(module, "rbr_skip") - 1
        branches += isinstance(module, ReparamLargeKernelConv) and hasattr(module, "small_conv")
        branches += isinstance(module, RepCPE) and hasattr(module, "pe")
        # x, mixer and norm become one.
        branches += 2 * (isinstance(module, RepMixer) and hasattr(module, "mixer"))
    return branches, norms, scales


def _difference(before: nn.Module, after: nn.Module, x: Tensor) -> tuple[float, float]:
    """Worst |after - before| over the peak, and what rounding explains; `before` in float64."""
    exact = copy.deepcopy(before).double()(x.double())
    peak = exact.abs().max().item()
    if not peak > 0:
        peak = 1.0
    unfolded = (before(x).double() - exact).abs().max().item() / peak
    folded = (after(x).double() - exact).abs().max().item() / peak
    return folded, max(ROUNDING, ROUNDING_FACTOR * unfolded)


def _probe(resolution: int) -> Tensor:
    """A fixed image with energy at every frequency: noise over a smooth gradient, in 0..1."""
    noise = torch.rand(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1, resolution)
    return 0.5 * noise + 0.25 * (ramp[:, None] + ramp)


@torch.no_grad()
def reparameterize(
    model: FastVLM, progress: Callable[[str], None] = lambda _: None
) -> Reparameterization:
    """Fold `model`'s tower into plain convolutions; `model` stays as it is.

    Every block is run before (float64) and after (float32) on the activations that a probe image
    gives it. Raises ExportError when a block, or the tower as a whole, differs by more than
    rounding. The classifier head, which the VLM never runs, is dropped.
    """
    tower = copy.deepcopy(model.vision_tower).eval()
    # Any size shows the same folds: the tower is convolutional.
    probe = x = _probe(PROBE_RESOLUTION)
    folds = []
    for path, block in list(_blocks(tower, "")):
        progress(path)
        after = copy.deepcopy(block)
        _fold(after)
        difference, limit = _difference(block, after, x)
        branches, batch_norms, layer_scales = _count(block)
        folds.append(
            Fold(
                block=path,
                branches=branches,
                batch_norms=batch_norms,
                layer_scales=layer_scales,
                difference=difference,
                limit=limit,
            )
        )
        x = block(x)
        parent, _, name = path.rpartition(".")
        setattr(tower.get_submodule(parent), name, after)
    if hasattr(tower, "head"):
        del tower.head
    difference, limit = _difference(model.vision_tower.eval(), tower, probe)
    _refuse([fold for fold in folds if not fold.difference <= fold.limit], difference, limit)
    if any(isinstance(module, nn.BatchNorm2d) for module in tower.modules()):
        raise TypeError("a BatchNorm was left after reparameterization")
    folded = copy.copy(model)
    folded._modules = dict(model._modules)
    folded.vision_tower = tower
    return Reparameterization(model=folded, folds=tuple(folds), difference=difference, limit=limit)


def _refuse(broken: list[Fold], difference: float, limit: float) -> None:
    hint = (
        "Run `fastvlm-export inspect` on the checkpoint: its BatchNorm statistics may be damaged."
    )
    if broken:
        worst = max(broken, key=lambda fold: fold.difference / fold.limit)
        raise ExportError(
            f"Reparameterization changes {len(broken)} blocks, most of all {worst.block}: "
            f"{worst.difference:.3g} of the output's peak, where rounding explains "
            f"{worst.limit:.3g}.",
            hint,
        )
    if not difference <= limit:
        raise ExportError(
            f"Reparameterization changes the tower's output by {difference:.3g} of its peak, "
            f"where rounding explains {limit:.3g}.",
            hint,
        )
