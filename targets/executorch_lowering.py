"""Traced methods -> one ExecuTorch program, what a backend takes handed over to it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.fx.traceback import NodeSource
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import bound_sympy

from ..quantize.quiet import quiet_import
from . import executorch_memory, executorch_pack

with quiet_import():
    from executorch.backends.xnnpack import xnnpack_preprocess
    from executorch.backends.xnnpack.operators import node_visitor
    from executorch.backends.xnnpack.partition.config import xnnpack_config
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

FIRST = 256
"""Positions of a call, and of the cache, that XNNPACK sets memory aside for as it starts."""


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
def _sized_by_run() -> Iterator[None]:
    """Let XNNPACK take and set aside memory for the sizes that a run has, not for the largest.

    Its partitioner leaves out tensors whose size is a number of the run, since they could be empty.
    Its runtime sets memory aside for the sizes that are written down, and more when a run needs
    it: the largest would be scores of a prompt that fills the context.
    """
    asked, shape = xnnpack_config.has_free_unbacked_symbols, node_visitor.get_shape
    xnnpack_config.has_free_unbacked_symbols = _may_be_empty
    node_visitor.get_shape = _first_sizes
    try:
        yield
    finally:
        xnnpack_config.has_free_unbacked_symbols, node_visitor.get_shape = asked, shape


def _may_be_empty(x: Any) -> bool:
    if not has_free_unbacked_symbols(x):
        return False
    sizes = [size.node for size in x.shape if isinstance(size, torch.SymInt)]
    ranges = [bound_sympy(size.expr, size.shape_env.var_to_range) for size in sizes]
    return any(limits.lower < 1 or limits.upper == int_oo for limits in ranges)


def _first_sizes(node: Node) -> list[int]:
    return [size if isinstance(size, int) else _first_size(size) for size in node.meta["val"].shape]


def _first_size(size: torch.SymInt) -> int:
    limits = {name: size.node.shape_env.var_to_range[name] for name in size.node.expr.free_symbols}
    values = {name: min(max(FIRST, at.lower), at.upper) for name, at in limits.items()}
    return int(size.node.expr.subs(values))


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
    with torch.no_grad(), quiet_copies(), _shortened(), _sized_by_run():
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
                memory_planning_pass=executorch_memory.AliasPlanning(),
                external_constants=executorch_pack.external_constant if external else False,
            )
        )
    weights = program._tensor_data.get(executorch_pack.WEIGHTS_TAG)
    return Lowered(
        pte=executorch_pack.share(bytes(program.buffer)),
        ptd=None if weights is None else bytes(weights),
    )
