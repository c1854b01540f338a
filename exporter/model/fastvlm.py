"""FastVLM: FastViTHD, an MLP projector and a Qwen2 decoder (FastVLM, CVPR 2025, section 3)."""

import torch
from torch import Tensor, nn

from ..config import FastVLMConfig
from .decoder import Decoder
from .fastvithd import FastViTHD


def projector(width_in: int, width_out: int, layers: int) -> nn.Module:
    """`linear` for one layer, else `mlpNx_gelu`: N linear layers with exact GELU between them."""
    if layers == 1:
        return nn.Linear(width_in, width_out)
    parts: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(layers - 1):
        parts += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*parts)


class FastVLM(nn.Module):
    """Image features and text embeddings into one decoder.

    Parameter names are the checkpoint's own below the three prefixes `vision_tower`, `projector`
    and `decoder`.
    """

    def __init__(self, config: FastVLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = FastViTHD(config.tower)
        self.projector = projector(
            config.tower.features, config.decoder.hidden_size, config.projector_layers
        )
        self.decoder = Decoder(config.decoder)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels [B,3,R,R] in 0..1 -> projected image features [B,N,D], row by row."""
        features: Tensor = self.vision_tower(pixels).flatten(2).transpose(1, 2)
        out: Tensor = self.projector(features)
        return out

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [B,S] -> embeddings [B,S,D]."""
        out: Tensor = self.decoder.embed_tokens(input_ids)
        return out

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """Embeddings [B,S,D] -> logits of every position [B,S,V]."""
        out: Tensor = self.decoder(inputs_embeds)
        return out


def build(config: FastVLMConfig) -> FastVLM:
    """A FastVLM on the meta device: its parameters have shapes but no storage yet."""
    with torch.device("meta"):
        return FastVLM(config)
