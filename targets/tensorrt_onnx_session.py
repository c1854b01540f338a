"""A TensorRT bundle's ONNX graphs in ONNX Runtime on the CPU, where no GPU runs its engines.

Each node is computed as the graph says it: quantized tensors are dequantized to floats and
multiplied as such, and nothing is fused that would round in other places. So its numbers are the
graphs', and its speed is no runtime's.
"""

from functools import partial
from pathlib import Path

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from .onnx_session import OnnxSession, load_model, session_options
from .tensorrt_onnx_float import has_bfloat16, unrounded, widen
from .tensorrt_plan import GRAPHS, HINT, onnx_file

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where ONNX Runtime looks for the data files of a graph that it gets as bytes."""


class TensorRTOnnxSession(OnnxSession):
    """The vision, embedding and decoder graphs. See `Session` and `OnnxSession`.

    The buffers of the cache are bound as past and as present at once, as they are on a GPU.
    `exact`: nothing is rounded, see `tensorrt_onnx_float.unrounded`.
    """

    target = "tensorrt"

    def __init__(self, bundle: Bundle, *, exact: bool = False) -> None:
        paths = {name: bundle.path / onnx_file(name) for name in GRAPHS}
        super().__init__(paths, context=bundle.manifest.context, load=partial(load, exact=exact))


def load(
    path: Path, *, intra_op_threads: int | None = None, exact: bool = False
) -> ort.InferenceSession:
    """A graph on the CPU, its QuantizeLinear and DequantizeLinear as they are written.

    See `tensorrt_onnx_float` for bfloat16 and `exact`. Raises ExportError where the file can't be
    read, or has nodes that no graph of this target has.
    """
    options = session_options(intra_op_threads)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ExportError(f"{path} can't be read: {error}", HINT) from error
    if not exact and not has_bfloat16(model):
        return load_model(path, str(path), options, "tensorrt")
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
    try:
        model = unrounded(model) if exact else widen(model)
    except (LookupError, ValueError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path} is no graph of target 'tensorrt': {error!r}", HINT) from error
    return load_model(path, model.SerializeToString(), options, "tensorrt")
