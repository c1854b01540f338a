"""The files beside the graphs that Transformers.js reads: configuration, processor, tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..exporter.spec import ExportSpec
from . import client_files
from .client_files import patch_size, tokenizer, tokenizer_config


def write_client_files(spec: ExportSpec, dtype: str, chunks: Mapping[str, int], out: Path) -> None:
    """Write the six JSON files into `out`. `chunks`: file name -> its external data files."""
    client_files.write_json(files(spec, dtype, chunks), out)


def files(spec: ExportSpec, dtype: str, chunks: Mapping[str, int]) -> dict[str, Any]:
    """Name -> content of what `write_client_files` writes."""
    return {"config.json": config(spec, dtype, chunks), **client_files.client_files(spec)}


def config(spec: ExportSpec, dtype: str, chunks: Mapping[str, int]) -> dict[str, Any]:
    """`config.json`. `dtype` is what the client opens when it is not told: the files' suffix."""
    return {
        **client_files.config(spec),
        "transformers.js_config": {
            "dtype": dtype,
            "use_external_data_format": {name: count for name, count in chunks.items() if count},
        },
    }


__all__ = ["config", "patch_size", "tokenizer", "tokenizer_config", "write_client_files"]
