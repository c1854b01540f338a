"""Where the weights come from, and the contract that artifacts made from them are built to."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from . import checkpoint as checkpoints
from .bundle import Manifest
from .checkpoint import Checkpoint
from .errors import ExportError
from .spec import ExportSpec
from .tensor_names import Layout

ROOM_FOR_TEXT = 96  # positions beside the image that the proof's prompts and answers need


@dataclass(frozen=True, kw_only=True)
class SourceRequest:
    """Which weights: a checkpoint folder, seeded random ones, or (neither) the bundled model."""

    checkpoint: Path | None = None
    random: str | None = None
    seed: int = 0


def load_source(request: SourceRequest) -> Checkpoint:
    """The checkpoint that was asked for; raises ExportError."""
    if request.checkpoint is not None and request.random is not None:
        raise ExportError(
            f"--checkpoint {request.checkpoint} and --random {request.random} contradict each "
            "other.",
            "Give one of them, or none for the bundled model.",
        )
    if request.checkpoint is not None:
        return checkpoints.load(request.checkpoint)
    if request.random is not None:
        return checkpoints.random(request.random, request.seed)
    return checkpoints.bundled()


def contract(checkpoint: Checkpoint, resolution: int | None, context: int | None) -> ExportSpec:
    """What artifacts are built to: the checkpoint's own values, or the user's where given."""
    config = checkpoint.config
    resolution = checkpoint.resolution if resolution is None else resolution
    context = checkpoint.context if context is None else context
    stride = config.tower.stride
    if resolution < stride:
        raise ExportError(
            f"--resolution {resolution} is smaller than one image token's {stride} pixels.",
            f"Use {stride} or more; this checkpoint was made for {checkpoint.resolution}.",
        )
    if context > config.decoder.max_positions:
        raise ExportError(
            f"--context {context} is beyond the decoder's {config.decoder.max_positions} "
            "positions.",
            f"Use {config.decoder.max_positions} or less.",
        )
    image_tokens = config.tower.image_tokens(resolution)
    if context < image_tokens + ROOM_FOR_TEXT:
        raise ExportError(
            f"--context {context} can't hold an image of {image_tokens} tokens "
            f"(--resolution {resolution}) and {ROOM_FOR_TEXT} tokens of text.",
            f"Use --context {image_tokens + ROOM_FOR_TEXT} or more, or a smaller --resolution.",
        )
    return ExportSpec(
        decoder=config.decoder,
        features=config.tower.features,
        projector_layers=config.projector_layers,
        context=context,
        image_tokens=image_tokens,
        preprocessing=dataclasses.replace(checkpoint.preprocessing, resolution=resolution),
        tokenizer=checkpoint.tokenizer,
        image_token_id=checkpoint.image_token_id,
        eos_token_ids=checkpoint.eos_token_ids,
    )


def recorded_source(manifest: Manifest) -> SourceRequest:
    """The source that a manifest names, where it can be made again without the user's files."""
    source = manifest.source
    if source.layout == Layout.RANDOM:
        return SourceRequest(random=source.name, seed=source.seed or 0)
    if source.layout == Layout.BUNDLED:
        return SourceRequest()
    raise ExportError(
        f"The bundle was made from the checkpoint '{source.name}', which is the reference.",
        "Say where it is: fastvlm-export validate BUNDLE --checkpoint DIR",
    )
