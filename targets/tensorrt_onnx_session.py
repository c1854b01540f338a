"""A TensorRT bundle's ONNX graphs in ONNX Runtime on the CPU, where no GPU runs its engines.

Each node is computed as the graph says it: quantized tensors are dequantized to floats and
multiplied as such, and nothing is fused that would round in other places. So its numbers are the
graphs', and its speed is no runtime's.
"""

from functools import partial
from pathlib import Path

import onnx
import onnxruntime as ort

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from .onnx_exact import graph_options, load_exact, read_graph
from .onnx_session import OnnxSession, load_model
from .tensorrt_onnx_float import has_bfloat16, widen
from .tensorrt_plan import GRAPHS, HINT, onnx_file


class TensorRTOnnxSession(OnnxSession):
    """The vision, embedding and decoder graphs. See `Session` and `OnnxSession`.

    The buffers of the cache are bound as past and as present at once, as they are on a GPU.
    `exact`: nothing is rounded, see `onnx_unrounded`.
    """

    target = "tensorrt"

    def __init__(self, bundle: Bundle, *, exact: bool = False) -> None:
        paths = {name: bundle.path / onnx_file(name) for name in GRAPHS}
        chosen = partial(load_exact, target="tensorrt") if exact else load
        super().__init__(paths, context=bundle.manifest.context, load=chosen)


def load(path: Path, *, intra_op_threads: int | None = None) -> ort.InferenceSession:
    """A graph on the CPU, its QuantizeLinear and DequantizeLinear as they are written.

    See `tensorrt_onnx_float` for bfloat16. Raises ExportError where the file can't be read, or has
    nodes that no graph of this target has.
    """
    model = read_graph(path, "tensorrt")
    options = graph_options(path, intra_op_threads)
    if not has_bfloat16(model):
        return load_model(path, str(path), options, "tensorrt")
    try:
        model = widen(model)
    except (LookupError, ValueError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path} is no graph of target 'tensorrt': {error!r}", HINT) from error
    return load_model(path, model.SerializeToString(), options, "tensorrt")
