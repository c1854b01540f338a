"""Random weights for a whole FastVLM, scaled so that numbers neither vanish nor explode.

They stand in for a released checkpoint where only sizes matter (latency, memory) and where parity
needs outputs with a meaningful spread: logits have a deviation of a few units, images change them,
BatchNorm statistics and layer scales are not trivial.
"""

import math

import torch
from torch import Tensor

from .config import FastVLMConfig
from .model.fastvlm import build

LOGIT_DEVIATION = 3.0
GAIN_AFTER_GELU = 1.5  # 1 / sqrt(E[gelu(x)^2]) for x ~ N(0, 1)
GAIN_OF_ATTENTION = 1.3  # of queries and keys: scores with a deviation of 1.7
UNIFORM = {
    "running_var": (0.5, 1.5),
    "layer_scale": (0.1, 0.3),
    "layer_scale_1": (0.1, 0.3),
    "layer_scale_2": (0.1, 0.3),
}
SCHEME = 1  # part of the source's hash: raise it when the numbers change


@torch.no_grad()
def random_state(config: FastVLMConfig, seed: int) -> dict[str, Tensor]:
    """Float32 tensors for every weight of `config`, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, meta in build(config).state_dict().items():
        if not name.endswith("num_batches_tracked"):
            tensor = torch.empty(meta.shape, dtype=torch.float32)
            state[name] = _fill(name, tensor, generator)
    return state


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in UNIFORM:
        return tensor.uniform_(*UNIFORM[leaf], generator=generator)
    if "norm" in name or ".bn." in name:
        if leaf == "weight":
            return tensor.uniform_(0.8, 1.2, generator=generator)
        return tensor.normal_(0, 0.1, generator=generator)
    if leaf == "bias":
        return tensor.normal_(0, 0.05, generator=generator)
    tensor.normal_(0, _gain(name) / math.sqrt(tensor[0].numel()), generator=generator)
    if name.endswith(".reparam_conv.weight") and ".network." in name and ".proj." not in name:
        _make_near_identity(tensor)
    return tensor


def _gain(name: str) -> float:
    """The deviation of a layer's outputs for inputs of deviation 1."""
    if "embed_tokens" in name or "lm_head" in name:
        return LOGIT_DEVIATION
    if "q_proj" in name or "k_proj" in name:
        return GAIN_OF_ATTENTION
    after_activation = ("patch_embed", ".proj.", ".fc2.", "down_proj", "projector.2")
    return GAIN_AFTER_GELU if any(part in name for part in after_activation) else 1.0


def _make_near_identity(tensor: Tensor) -> None:
    """A folded RepMixer or RepCPE, depthwise [C,1,k,k]: the identity and a little of the rest."""
    middle = tensor.shape[-1] // 2
    tensor *= 0.3
    tensor[:, 0, middle, middle] += 1.0
