"""Lookup operators: what they mean, in both float types, eagerly and traced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvlm_export.quantize import ops
from fastvlm_export.quantize.ops import lookup, palettized_embedding

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


def weights(
    groups: int, bits: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random indices of `shape` and tables for groups of rows."""
    torch.manual_seed(seed)
    indices = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    return indices, torch.randn(groups, 2**bits).to(dtype)


def one_by_one(indices: Tensor, table: Tensor) -> Tensor:
    rows = len(indices) // len(table)
    looked_up = [table[n // rows][row.long()] for n, row in enumerate(indices)]
    return torch.stack(looked_up)


@settings(deadline=None)
@given(
    groups=st.integers(1, 5),
    rows=st.integers(1, 4),
    rest=st.lists(st.integers(1, 5), max_size=3),
    bits=st.sampled_from((1, 2, 3, 4, 6, 8)),
    dtype=st.sampled_from((torch.float32, torch.float16)),
    chunk=st.sampled_from((1, 3, 64, ops.CHUNK)),
)
def test_consecutive_rows_share_a_table(
    groups: int, rows: int, rest: list[int], bits: int, dtype: torch.dtype, chunk: int
) -> None:
    indices, table = weights(groups, bits, groups * rows, *rest, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "CHUNK", chunk)
        found = lookup(indices, table)
    assert found.dtype is dtype
    assert torch.equal(found, one_by_one(indices, table))


def test_the_last_of_256_entries_is_reached() -> None:
    table = torch.arange(512.0).reshape(2, 256)
    indices = torch.full((4, 3), 255, dtype=torch.uint8)
    assert lookup(indices, table).tolist() == [[255.0] * 3] * 2 + [[511.0] * 3] * 2


@FLOATS
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_an_embedding_is_the_rows_of_the_looked_up_table(groups: int, dtype: torch.dtype) -> None:
    indices, table = weights(groups, 4, 12, 5, dtype=dtype)
    ids = torch.tensor([[0, 11, 4, 4], [3, 8, 7, 0]])
    found = palettized_embedding(ids, indices, table)
    assert found.dtype is dtype
    assert torch.equal(found, lookup(indices, table)[ids])


@FLOATS
def test_operators_can_be_traced(dtype: torch.dtype) -> None:
    indices, table = weights(2, 3, 6, 4, 1, 1, dtype=dtype)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(lookup, (indices, table), test_utils=checks)
    ids = torch.tensor([[0, 5, 2]])
    flat = indices.flatten(1)
    torch.library.opcheck(palettized_embedding, (ids, flat, table), test_utils=checks)
