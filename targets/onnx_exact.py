"""ONNX graphs without rounding, in ONNX Runtime on the CPU: for the proof, never for speed."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..exporter.errors import ExportError
from .base import Session
from .onnx_session import OnnxSession, load_model, session_options
from .onnx_unrounded import unrounded

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where ONNX Runtime looks for the data files of a graph that it gets as bytes."""


def open_exact(paths: Mapping[str, Path], context: int) -> Session:
    """The graphs of an ONNX bundle's files, in float32 with nothing rounded.

    Raises ExportError for files that can't be read or that round in ways which no export writes.
    """
    return OnnxSession(paths, context, load=partial(load_exact, target="onnx"))


def load_exact(
    path: Path, *, target: str, intra_op_threads: int | None = None
) -> ort.InferenceSession:
    """One graph of `target`'s without rounding: see `onnx_unrounded`.

    Optimizations are those that keep standard operators: constants are folded, and no kernel that
    rounds can take the place of two that do not. Raises ExportError, as `open_exact`.
    """
    try:
        model = unrounded(read_graph(path, target))
    except ValueError as error:
        raise ExportError(
            f"{path} is no graph of target '{target}': {error}", hint_for(target)
        ) from error
    options = graph_options(path, intra_op_threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return load_model(path, model.SerializeToString(), options, target)


def read_graph(path: Path, target: str) -> onnx.ModelProto:
    """A graph's file without its data files. Raises ExportError where it can't be read."""
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ExportError(f"{path} can't be read: {error}", hint_for(target)) from error


def hint_for(target: str) -> str:
    """What to do about a damaged file of that target's."""
    return f"Export it again: fastvlm-export --target {target} --out DIR --force"


def graph_options(path: Path, intra_op_threads: int | None) -> ort.SessionOptions:
    """For a graph that is given as bytes: `path` is where its data files lie.

    QuantizeLinear and DequantizeLinear are computed as they are written.
    """
    options = session_options(intra_op_threads)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
    return options
