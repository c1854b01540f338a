"""The embedding as ExecuTorch's runtime runs it: the table's rows, to the bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from fastvlm_export.quantize.ops import quantized_embedding
from fastvlm_export.targets import executorch_backends, executorch_lowering
from fastvlm_export.targets.executorch_embedding import embedding_method
from fastvlm_export.targets.executorch_file import parse
from fastvlm_export.targets.executorch_model import EMBEDDING, Backend

ROWS, WIDTH, CONTEXT = 100, 32, 50


class Table(nn.Module):
    """Rows of a table whose image token lies beyond it, as `graphs.build` looks them up."""

    def __init__(self, *, quantized: bool) -> None:
        super().__init__()
        if quantized:
            integers = torch.randint(-127, 128, (ROWS, WIDTH), dtype=torch.int8)
            self.register_buffer("integers", integers)
            self.register_buffer("scale", torch.rand(ROWS, 1))
        else:
            self.register_buffer("floats", torch.randn(ROWS, WIDTH))
        self.quantized = quantized

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.clamp(max=ROWS - 1)
        if self.quantized:
            out: Tensor = quantized_embedding(ids, self.integers, self.scale, None, 8)
            return out
        return functional.embedding(ids, self.floats)


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_are_the_table_s(*, quantized: bool) -> None:
    from executorch.extension.pybindings import portable_lib  # noqa: PLC0415

    torch.manual_seed(0)
    table = Table(quantized=quantized).eval()
    method = embedding_method(traced(table), CONTEXT)
    partitioners = {EMBEDDING: executorch_backends.partitioners(Backend.XNNPACK, EMBEDDING)}
    pte = executorch_lowering.lower({EMBEDDING: method}, partitioners, {}).pte
    largest = max(
        len(constant.data or b"")
        for constant in parse(memoryview(pte), "test").methods[EMBEDDING].constants
    )
    assert largest == ROWS * WIDTH * (1 if quantized else 4)
    module = portable_lib._load_for_executorch_from_buffer(pte)

    def run(ids: list[int]) -> Any:
        return module.run_method(EMBEDDING, [torch.tensor([ids])])[0].clone()

    for ids in ([1], [3, ROWS - 1, 5, 0], list(range(CONTEXT)), [ROWS + 7, 2]):
        assert torch.equal(run(ids), table(torch.tensor([ids])))
    for bad in ([-1], [0, -ROWS - 1], list(range(CONTEXT + 1))):
        with pytest.raises(RuntimeError):
            run(bad)
    assert torch.equal(run([4]), table(torch.tensor([[4]])))  # and it still runs


def traced(table: Table) -> ExportedProgram:
    return torch.export.export(
        table,
        (torch.zeros(2, 3, dtype=torch.int64),),
        dynamic_shapes=({0: Dim("batch_size"), 1: Dim("sequence_length")},),
    )
