"""Traced methods -> one ExecuTorch program, what a backend takes handed over to it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx.traceback import NodeSource

from ..quantize.quiet import quiet_import
from . import executorch_pack

with quiet_import():
    from executorch.backends.xnnpack import xnnpack_preprocess
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )

NOTHING_TO_DO = frozenset(
    (
        "ConstPropPass",
        "Conv1dUnsqueezePass",
        "ConvertToSDPAPass",
        "ConvertToUpsampleBilinear2d",
        "DecomposeBatchNorm",
        "FuseBatchNormPass",
        "InsertPadQDQPass",
        "PReLUReshapePass",
    )
)
"""XNNPACK's passes for operators that no method of ours has. Each traces a whole method anew."""


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The files' contents; `ptd` is None where every weight is in the program."""

    pte: bytes
    ptd: bytes | None = None


@contextmanager
def quiet_copies() -> Iterator[None]:
    """Drop what PyTorch and ExecuTorch say about copies and about the cache; all else passes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        warnings.filterwarnings("ignore", "Mutation on a buffer in the model", UserWarning)
        yield


class _ShortPassManager(xnnpack_preprocess.XNNPACKPassManager):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passes: list[type] = [one for one in self.passes if one.__name__ not in NOTHING_TO_DO]


@contextmanager
def _shortened() -> Iterator[None]:
    """Leave out half of the lowering's time; there is no option for either.

    Each of some 30 passes also copies where every node came from in all passes before, which
    nothing reads: copies share it here.
    """
    manager = xnnpack_preprocess.XNNPACKPassManager
    xnnpack_preprocess.XNNPACKPassManager = _ShortPassManager
    NodeSource.__deepcopy__ = lambda source, _: source  # type: ignore[attr-defined]
    try:
        yield
    finally:
        xnnpack_preprocess.XNNPACKPassManager = manager
        del NodeSource.__deepcopy__  # type: ignore[attr-defined]


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
    with torch.no_grad(), quiet_copies(), _shortened():
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
