"""What a checkpoint is and what is odd about it, for `fastvlm-export inspect`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint, load
from .config import TowerConfig
from .preprocess import Preprocessing
from .tensor_names import Layout

BATCH_NORM_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The facts of one checkpoint.

    `parameters` counts trained numbers (no BatchNorm statistics) of tower, projector, decoder and
    the whole; `tower_form` is "train" or "inference"; `resolution` in pixels.
    """

    path: Path
    layout: Layout
    tower: TowerConfig
    tower_form: str
    projector: str
    decoder: Mapping[str, int | float | bool]
    parameters: Mapping[str, int]
    tied: bool
    resolution: int
    image_tokens: int
    context: int
    preprocessing: Preprocessing
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    tokenizer_size: int
    padding_rows: int
    dtype: str
    sha256: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """The same as plain JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def summary(self) -> dict[str, str]:
        """The same for people: label -> one line, or a line each."""
        stages = self.tower.stages
        decoder, images = self.decoder, self.preprocessing
        form = "parallel branches" if self.tower_form == "train" else "branches folded"
        return {
            "Layout": f"{self.layout}, stored as {self.dtype}",
            "Tower": f"{self.tower_form} form ({form}), {self.tower.features} features",
            "  widths": ", ".join(str(stage.width) for stage in stages),
            "  depths": ", ".join(str(stage.depth) for stage in stages),
            "  mixers": ", ".join(stage.mixer for stage in stages),
            "Projector": self.projector,
            "Decoder": f"{decoder['layers']} layers, hidden {decoder['hidden_size']}, "
            f"ffn {decoder['intermediate_size']}, {decoder['heads']} heads, "
            f"{decoder['kv_heads']} key/value heads of {decoder['head_dim']}",
            "  embedding": f"{decoder['vocab_size']} rows, {self.padding_rows} of them padding, "
            + ("tied to the head" if self.tied else "head apart"),
            "Parameters": "\n".join(f"{n:,} {part}" for part, n in self.parameters.items()),
            "Image": f"{self.resolution} px, {self.image_tokens} tokens, {images.strategy}, "
            f"{images.resampling}, mean {images.mean}, std {images.std}",
            "Image token": str(self.image_token_id),
            "End tokens": ", ".join(map(str, self.eos_token_ids)) or "none",
            "Context": f"{self.context} positions",
            "SHA-256": self.sha256,
            "Findings": "\n".join(self.notes) or "nothing odd",
        }


def inspect(path: Path) -> Inspection:
    """Read a checkpoint folder whole; ExportError lists everything that is wrong with it."""
    return describe(load(path))


def describe(checkpoint: Checkpoint) -> Inspection:
    """The facts of a checkpoint that is already read."""
    config = checkpoint.config
    layers = config.projector_layers
    used = checkpoint.tokenizer.vocab_size
    return Inspection(
        path=checkpoint.path,
        layout=checkpoint.layout,
        tower=config.tower,
        tower_form="train" if config.tower.train_form else "inference",
        projector="linear" if layers == 1 else f"mlp{layers}x_gelu",
        decoder=dataclasses.asdict(config.decoder),
        parameters=_parameters(checkpoint),
        tied=config.decoder.tied,
        resolution=checkpoint.resolution,
        image_tokens=config.tower.image_tokens(checkpoint.resolution),
        context=checkpoint.context,
        preprocessing=checkpoint.preprocessing,
        image_token_id=checkpoint.image_token_id,
        eos_token_ids=checkpoint.eos_token_ids,
        tokenizer_size=used,
        padding_rows=config.decoder.vocab_size - used,
        dtype=checkpoint.dtype,
        sha256=checkpoint.sha256,
        notes=checkpoint.notes,
    )


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    counts = {"vision_tower": 0, "projector": 0, "decoder": 0}
    for name, tensor in checkpoint.state.items():
        if not name.endswith(BATCH_NORM_STATISTICS):
            counts[name.split(".", 1)[0]] += tensor.numel()
    return {**counts, "total": sum(counts.values())}
