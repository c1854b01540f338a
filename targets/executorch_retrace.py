"""A program traced anew, with operators of ours in the place of some of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, Interpreter, Node

from ..quantize.ranges import lifted

Operators = Mapping[str, Callable[..., Any]]
"""An operator's name, as `str(node.target)` -> what computes it instead, with its arguments."""


class Rewritten(nn.Module):
    """A program's graph as a module whose constants are buffers, so that it can be traced again.

    `operators` replace those of the same name; `graph` is an edited copy of the program's graph and
    `constants` what its first placeholders stand for, if they are no longer the program's own.
    `forward` takes the program's own inputs and returns the list of its outputs.
    """

    def __init__(
        self,
        program: ExportedProgram,
        operators: Operators,
        *,
        graph: Graph | None = None,
        constants: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        constants = lifted(program) if constants is None else constants
        for index, value in enumerate(constants):
            self.register_buffer(f"constant_{index}", _alone(value.detach()), persistent=False)
        self._constants = len(constants)
        self._interpreter = _Replacing(program.graph_module, operators, graph or program.graph)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The program's outputs, cache included where it has one."""
        constants = [getattr(self, f"constant_{index}") for index in range(self._constants)]
        return list(self._interpreter.run(*constants, *inputs, enable_io_processing=False))


def _alone(value: Tensor) -> Tensor:
    """The tensor in a storage of its own size: XNNPACK's lowering writes all of a storage."""
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone()


class _Replacing(Interpreter):
    def __init__(self, module: torch.fx.GraphModule, operators: Operators, graph: Graph) -> None:
        super().__init__(module, graph=graph)
        self.operators = operators

    def run_node(self, n: Node) -> Any:
        # Sizes and checks of the earlier trace: the new one makes its own.
        if n.op == "call_function" and str(n.target) in _ASSERTIONS:
            return None
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        replaced = self.operators.get(str(target))
        return super().call_function(replaced or target, args, kwargs)


_ASSERTIONS = (
    "aten._assert_scalar.default",
    "aten._assert_tensor_metadata.default",
    "aten.sym_constrain_range_for_size.default",
)


def retrace(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    dynamic_shapes: tuple[Mapping[int, Any] | None, ...],
) -> ExportedProgram:
    """Trace a module, commonly one around `Rewritten`, for inference.

    Constants keep their storage: nothing is copied.
    """
    module = module.eval().requires_grad_(False)
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)
