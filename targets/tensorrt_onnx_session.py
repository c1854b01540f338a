"""A TensorRT bundle's ONNX graphs in ONNX Runtime on the CPU, where no GPU runs its engines.

Each node is computed as the graph says it: quantized tensors are dequantized to floats and
multiplied as such, and nothing is fused that would round in other places. So its numbers are the
graphs', and its speed is no runtime's.
"""

from pathlib import Path

import onnxruntime as ort

from ..exporter.bundle import Bundle
from .onnx_session import OnnxSession, load_model, session_options
from .tensorrt_plan import GRAPHS, onnx_file


class TensorRTOnnxSession(OnnxSession):
    """The vision, embedding and decoder graphs. See `Session` and `OnnxSession`.

    The buffers of the cache are bound as past and as present at once, as they are on a GPU.
    """

    def __init__(self, bundle: Bundle) -> None:
        paths = {name: bundle.path / onnx_file(name) for name in GRAPHS}
        super().__init__(paths, context=bundle.manifest.context, load=load)


def load(path: Path, *, intra_op_threads: int | None = None) -> ort.InferenceSession:
    """A graph on the CPU, its QuantizeLinear and DequantizeLinear as they are written."""
    options = session_options(intra_op_threads)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return load_model(path, str(path), options, "tensorrt")
