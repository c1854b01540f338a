"""The embedding for ExecuTorch: rows of a table, by operators that its stock runtime has."""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from .executorch_retrace import Rewritten, retrace

EXAMPLE = 3  # ids while tracing: neither 0 nor 1, which torch.export would specialize


def embedding_method(program: ExportedProgram, context: int) -> ExportedProgram:
    """`graphs.build`'s embedding: input_ids [1,S] int64, S <= `context` -> [1,S,D] float32.

    The runtime refuses ids that the table does not have.
    """
    module = _Embedding(program)
    ids = torch.zeros(1, EXAMPLE, dtype=torch.int64)
    return retrace(module, (ids,), ({1: Dim("sequence_length", min=1, max=context)},))


class _Embedding(nn.Module):
    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.rows = Rewritten(program, {"fastvlm.quantized_embedding.default": _rows})

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.rows(input_ids)[0]
        return out


def _rows(ids: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, _: int) -> Tensor:
    """`fastvlm::quantized_embedding`: only the rows that are asked for become float32."""
    if zero_point is not None or scale.shape[1] != 1:
        raise NotImplementedError(f"a table with scales {tuple(scale.shape)}, zero points")
    out: Tensor = F.embedding(ids, weight).float() * F.embedding(ids, scale)
    return out
