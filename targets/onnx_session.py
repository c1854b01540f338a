"""The ONNX bundle in ONNX Runtime on the CPU: no copy of the cache, no allocation per token."""

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..exporter.errors import ExportError
from .base import Array, TokenIds, available_cores, check_context

_TYPES: Mapping[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
"""ONNX Runtime's names of the types that a cache may have."""

_SILENT = 4
"""Log only what ends the process: every error is raised, too, and logged in red besides."""

_STATUS = re.compile(
    r"(\[ONNXRuntimeError\] : \d+ : \w+ : |Error in execution: )?"
    r"(Non-zero status code returned while running (?P<operator>\w+) node\. "
    r"Name:'(?P<node>[^']*)' Status Message: )?"
)
"""What ONNX Runtime writes before a cause."""


class OnnxSession:
    """Vision, embedding and decoder graphs, batch 1. See `Session`.

    Arrays are float32 whatever the recipe; only the cache has the decoder's own type.
    Keys and values lie in buffers of the whole context that are bound as past and as present at
    once, so that GroupQueryAttention appends in place. A graph that cannot be loaded or run raises
    ExportError.
    """

    target = "onnx"

    def __init__(self, paths: Mapping[str, Path], context: int, load: "Load | None" = None) -> None:
        self.context, self._paths = context, paths
        load = load or load_graph
        # Side by side: ONNX Runtime loads and packs the weights of one graph on one thread.
        with ThreadPoolExecutor() as pool:
            vision = pool.submit(load, paths["vision"])
            decoder = pool.submit(load, paths["decoder"])
            # A gather has nothing to share out.
            self.embedding = load(paths["embedding"], intra_op_threads=1)
            self.vision, self.decoder = vision.result(), decoder.result()
        self.past = 0
        self._mask = np.ones((1, context), dtype=np.int64)
        self._binding = self.decoder.io_binding()
        self._logits = np.zeros((1, 1, _last_size(self.decoder, "logits")), dtype=np.float32)
        _bind_output(self._binding, "logits", self._logits)
        self._cache = [
            self._shared_buffer(node.name, tuple(node.shape), _TYPES[node.type])
            for node in self.decoder.get_inputs()
            if node.name.startswith("past_key_values.")
        ]

    def _shared_buffer(
        self, name: str, shape: tuple[Any, ...], dtype: type[np.floating[Any]]
    ) -> NDArray[np.floating[Any]]:
        buffer = np.zeros((1, shape[1], self.context, shape[3]), dtype=dtype)
        _bind_input(self._binding, name, buffer)
        _bind_output(self._binding, name.replace("past_key_values", "present"), buffer)
        return buffer

    def encode_image(self, pixels: Array) -> Array:
        """Pixels [1,3,R,R] -> [1,N,D]."""
        with self._failures("vision"):
            out: Array = self.vision.run(None, {"pixel_values": pixels})[0]
        return out

    def embed(self, input_ids: TokenIds) -> Array:
        """Token ids [1,S] -> [1,S,D]."""
        with self._failures("embedding"):
            out: Array = self.embedding.run(None, {"input_ids": input_ids})[0]
        return out

    def decode(self, inputs_embeds: Array) -> Array:
        """Embeddings [1,S,D] -> logits of the last position [1,V]."""
        new = inputs_embeds.shape[1]
        check_context(self.past, new, self.context)
        embeds = np.ascontiguousarray(inputs_embeds)
        _bind_input(self._binding, "inputs_embeds", embeds)
        _bind_input(self._binding, "attention_mask", self._mask[:, : self.past + new])
        with self._failures("decoder"):
            self.decoder.run_with_iobinding(self._binding)
        self.past += new
        return self._logits[:, 0].copy()

    def reset(self) -> None:
        """Empty the cache."""
        self.past = 0

    @contextmanager
    def _failures(self, graph: str) -> Iterator[None]:
        """Whatever ONNX Runtime raises while it runs the graph, as one ExportError."""
        try:
            yield
        except Exception as error:  # ONNX Runtime's classes share no other base
            raise ExportError(
                f"{self._paths[graph]} cannot be run by ONNX Runtime {ort.__version__}: "
                f"{cause(error)}",
                f"Export it again: {_again(self.target)}",
            ) from error


def cause(error: Exception) -> str:
    """The first line of ONNX Runtime's error without its codes, behind the operator it is about."""

    def named(found: re.Match[str]) -> str:
        return f"{found['operator']} ('{found['node']}'): " if found["operator"] else ""

    return _STATUS.sub(named, str(error).strip().partition("\n")[0], count=1)


def _again(target: str) -> str:
    return f"fastvlm-export --target {target} --out DIR --force"


class Load(Protocol):
    """How a graph's file becomes a session of ONNX Runtime's: `load_graph`, or like it."""

    def __call__(self, path: Path, *, intra_op_threads: int | None = None) -> ort.InferenceSession:
        """None: a thread for each core."""
        ...


def load_graph(path: Path, *, intra_op_threads: int | None = None) -> ort.InferenceSession:
    """A graph on the CPU, every optimization on. Raises ExportError when it can't be loaded."""
    return load_model(path, str(path), session_options(intra_op_threads), "onnx")


def session_options(intra_op_threads: int | None) -> ort.SessionOptions:
    """Every optimization on, nothing logged. None: a thread for each core."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = intra_op_threads or available_cores()
    options.log_severity_level = _SILENT
    return options


def load_model(
    path: Path, model: str | bytes, options: ort.SessionOptions, target: str
) -> ort.InferenceSession:
    """A graph of the file `path`, itself or as `model` has it, on the CPU.

    Raises ExportError when it can't be loaded, which says how to get another of `target`.
    """
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's classes share no other base
        raise ExportError(
            f"{path} cannot be loaded by ONNX Runtime {ort.__version__}: {cause(error)}",
            f"Export it again: {_again(target)}",
        ) from error


def _last_size(session: ort.InferenceSession, output: str) -> int:
    return int(next(node.shape[-1] for node in session.get_outputs() if node.name == output))


def _bind_input(binding: Any, name: str, array: np.ndarray[Any, Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: Any, name: str, array: np.ndarray[Any, Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
