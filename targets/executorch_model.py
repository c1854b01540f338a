"""What the parts of the ExecuTorch target call things: its files, methods and backends."""

from enum import StrEnum

PROGRAM = "model.pte"
WEIGHTS = "model.ptd"

VISION, EMBEDDING, DECODER = "vision_encoder", "token_embedding", "text_decoder"
METHODS = {"vision": VISION, "embedding": EMBEDDING, "decoder": DECODER}
"""Graph -> method, as ExecuTorch's `MultimodalRunner` looks it up."""

EXPORT_HINT = "Export it again: fastvlm-export --target executorch --out DIR --force"


class Backend(StrEnum):
    """What a method's operators are handed to; `portable` hands over none."""

    XNNPACK = "xnnpack"
    PORTABLE = "portable"
    COREML = "coreml"
    VULKAN = "vulkan"
    QNN = "qnn"
