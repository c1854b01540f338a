"""ONNX graph -> file, the weights of a large one beside it in chunks."""

from pathlib import Path

import onnx
import onnx_ir as ir

INLINE_LIMIT = 100_000_000
"""Bytes of weights that stay inside the .onnx file: small models are three files. Larger weights
are mapped instead of parsed and copied: the 0.5B embedding (545 MB) loads in 0.02 s and 9 MB
instead of 2.8 s and 528 MB, its vision graph in 2.5 s and 645 MB instead of 4.2 s and 923 MB."""

CHUNK_LIMIT = 2_000_000_000
"""Bytes of one external data file: a buffer of a browser holds 2 GiB. A single larger tensor (the
7B model's head) gets a file of its own."""

SMALL = 1024
"""Bytes up to which a tensor stays in the graph: shapes and scalars must, for shape inference."""

ALIGNMENT = 4096
"""Offsets of large tensors fall on pages, so that a runtime can map them."""


def is_large(model: ir.Model) -> bool:
    """Whether the weights go into data files."""
    return sum(_nbytes(value) for value in _weights(model)) > INLINE_LIMIT


def save(model: ir.Model, path: Path, *, apart: ir.Value | None = None) -> int:
    """Write `path` and, when it is needed, `path`_data, `path`_data_1, ...; returns their number.

    `apart` gets the last data file for itself. Weights that lie in a data file already stay there.
    The same model gives the same bytes. The checker reads the result from the disk.
    """
    chunks: list[list[ir.Value]] = []
    if is_large(model):
        chunks = split([value for value in _weights(model) if value is not apart])
        chunks += [] if apart is None else [[apart]]
    for index, chunk in enumerate(chunks):
        suffix = f"_{index}" if index else ""
        external = ir.external_data.convert_tensors_to_external(
            [value.const_value for value in chunk if value.const_value is not None],
            base_dir=path.parent,
            relative_path=f"{path.name}_data{suffix}",
            alignment=ALIGNMENT,
        )
        for value, tensor in zip(chunk, external, strict=True):
            value.const_value = tensor
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))
    return len(chunks)


def _weights(model: ir.Model) -> list[ir.Value]:
    """Initializers that may go into data files, by name."""
    return [
        value
        for _, value in sorted(model.graph.initializers.items())
        if _nbytes(value) > SMALL and not isinstance(value.const_value, ir.ExternalTensor)
    ]


def split(weights: list[ir.Value]) -> list[list[ir.Value]]:
    """Consecutive groups of at most CHUNK_LIMIT bytes, padding included."""
    chunks: list[list[ir.Value]] = []
    filled = CHUNK_LIMIT + 1
    for value in weights:
        size = -(-_nbytes(value) // ALIGNMENT) * ALIGNMENT
        if filled + size > CHUNK_LIMIT:
            chunks.append([])
            filled = 0
        chunks[-1].append(value)
        filled += size
    return chunks


def _nbytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else int(value.const_value.nbytes)
