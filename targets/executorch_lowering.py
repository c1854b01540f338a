"""Traced methods -> one ExecuTorch program, what a backend takes handed over to it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from ..quantize.quiet import quiet_import
from . import executorch_pack

with quiet_import():
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The files' contents; `ptd` is None where every weight is in the program."""

    pte: bytes
    ptd: bytes | None = None


@contextmanager
def quiet_copies() -> Iterator[None]:
    """Drop what PyTorch says of itself when ExecuTorch copies a program; all else passes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        yield


def lower(
    methods: Mapping[str, ExportedProgram],
    partitioners: Mapping[str, Sequence[Any]],
    constants: Mapping[str, Any],
    *,
    external: bool = False,
) -> Lowered:
    """Hand each method's operators to its partitioners, and serialize what comes out.

    `constants` become methods without inputs, for clients to ask. With `external`, large weights
    go to a file of their own. Equal bytes are stored once.
    """
    with torch.no_grad(), quiet_copies():
        edge = to_edge_transform_and_lower(
            dict(methods),
            partitioner={name: list(found) for name, found in partitioners.items()},
            constant_methods=dict(constants),
            # int32 biases and int8 pairs are XNNPACK's to check: Edge knows only ATen's types.
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        if external:
            executorch_pack.externalize(edge)
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                run_reinplace_pass=True,  # else the whole cache is copied for each new token
                external_constants=executorch_pack.external_constant if external else False,
            )
        )
    weights = program._tensor_data.get(executorch_pack.WEIGHTS_TAG)
    return Lowered(
        pte=executorch_pack.share(bytes(program.buffer)),
        ptd=None if weights is None else bytes(weights),
    )
