"""k-means on the number line: how good its tables are, and what they never are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor

from fastvlm_export.quantize import kmeans
from fastvlm_export.quantize.kmeans import cluster

BITS = (1, 2, 3, 4, 6, 8)


def drawn(kind: str, size: int) -> Tensor:
    """Three rows of weights as layers have them: [3,size]."""
    rng = np.random.default_rng(5)
    values = {
        "normal": lambda: rng.normal(size=(3, size)),
        "heavy tails": lambda: rng.standard_t(3, size=(3, size)),
        "uniform, away from 0": lambda: rng.uniform(100, 101, size=(3, size)),
        "outliers": lambda: (
            np.where(rng.random((3, size)) < 0.001, 80, 1) * rng.normal(size=(3, size))
        ),
        "channels of many sizes": lambda: (
            rng.normal(size=(3, size)) * np.exp(rng.normal(size=size))
        ),
    }[kind]()
    return torch.from_numpy(values * 0.02).float()


def squared_error(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    return (table.gather(1, indices.long()) - values).double().square().sum(1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "kind",
    ["normal", "heavy tails", "uniform, away from 0", "outliers", "channels of many sizes"],
)
def test_no_worse_than_the_best_of_three_random_starts(kind: str, bits: int) -> None:
    values = drawn(kind, 3000)
    found = squared_error(values, *cluster(values, bits))
    for row, error in zip(values, found, strict=True):
        plain = KMeans(2**bits, n_init=3, random_state=0, max_iter=300)
        best = plain.fit(row.double().numpy()[:, None]).inertia_
        print(f"{kind}, {bits} bits: {error / best:.4f} of sklearn's")
        assert error <= 1.01 * best


def exact(values: list[float], entries: int) -> float:
    """The least squared error there is, by trying all ways to cut the sorted values."""
    ordered = np.sort(np.asarray(values))
    cost = np.array(
        [
            [
                ((x := ordered[i:j]) - x.mean()).dot(x - x.mean()) if j > i else 0.0
                for j in range(len(ordered) + 1)
            ]
            for i in range(len(ordered))
        ]
    )
    best = cost[0]
    for _ in range(entries - 1):
        best = np.array(
            [
                min(best[i] + (cost[i, j] if i < j else 0.0) for i in range(j + 1))
                for j in range(len(best))
            ]
        )
    return float(best[-1])


def test_tables_of_a_few_values_are_the_best_there_are() -> None:
    torch.manual_seed(3)
    worst = 0.0
    for size in (5, 12, 40):
        values = torch.randn(8, size)
        for bits in (1, 2, 3):
            found = squared_error(values, *cluster(values, bits))
            for row, error in zip(values, found, strict=True):
                best = exact(row.double().tolist(), 2**bits)
                worst = max(worst, float(error) / max(best, 1e-9) if error > 1e-9 else 0.0)
    print(f"{worst:.4f} of the least error")
    assert worst < 1.02


@settings(deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-100, 100, width=16), min_size=6, max_size=6), min_size=1, max_size=3
    ),
    repeats=st.integers(1, 4),
    bits=st.sampled_from((1, 2, 3)),
)
def test_whatever_the_values(rows: list[list[float]], repeats: int, bits: int) -> None:
    values = torch.tensor(rows).repeat(1, repeats)
    indices, table = cluster(values, bits)
    assert indices.dtype is torch.uint8
    assert indices.shape == values.shape
    assert table.shape == (len(rows), 2**bits)
    assert table.diff(dim=1).min() >= 0
    assert (table.amin(1) >= values.amin(1) - 1e-4).all()
    assert (table.amax(1) <= values.amax(1) + 1e-4).all()
    nearest = (values[:, :, None] - table[:, None, :]).abs().amin(2)
    chosen = (table.gather(1, indices.long()) - values).abs()
    torch.testing.assert_close(chosen, nearest, rtol=1e-5, atol=1e-5)
    few = [len(row.unique()) <= 2**bits for row in values]
    # Each value has an entry of its own, but for those that are one beside the largest.
    assert (chosen[few] <= 1e-6 * values.abs().max()).all()


def test_the_same_each_time_and_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    values = drawn("heavy tails", 500)
    together = cluster(values, 4)
    monkeypatch.setattr(kmeans, "CHUNK", 100)
    apart = cluster(values, 4)
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)


def test_entries_are_the_means_of_their_values() -> None:
    values = drawn("normal", 2000)
    indices, table = cluster(values, 4)
    for row, places, entries in zip(values, indices, table, strict=True):
        for place, entry in enumerate(entries):
            torch.testing.assert_close(row[places == place].mean(), entry, rtol=1e-3, atol=1e-6)
