"""k-means on the number line, for many tables at once: the values of lookup tables.

Sorted values and their prefix sums make the sum of any run of neighbours one subtraction, so that
no step is a pass over the values. The start is Ward's merging: fine cells along the line, of which
the two neighbours that cost least become one, until as many are left as the table has entries. That
keeps outliers apart. Then dynamic programming moves all borders at once, each as far as the second
next, and Lloyd's algorithm settles them, in turns. Nothing is left to chance, and the result is
about as good as the best of several random starts, or better.
"""

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**23  # values clustered at once, or a single table's: the prefix sums take 8 bytes each
CELLS = 8  # to begin with, for each entry: half of equal counts, half of equal width
ROUNDS = 6
TRIED = 192  # places between a table's borders that a border may move to; at least 4 in a cell
STEPS = 200
SETTLED = 1e-6  # of a table's range: borders that move less are where they will be


def cluster(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Tables of least squared error, each row by itself, and the nearest entry of each value.

    Float32 [G,n], finite -> indices uint8 [G,n], tables float32 [G,2^bits] in ascending order.
    Where a row has fewer different values than a table entries, the last entries repeat.
    """
    step = max(1, CHUNK // values.shape[1])
    parts = [_cluster(rows, 2**bits) for rows in values.split(step)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _cluster(values: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    ordered = torch.from_numpy(np.sort(values.numpy(), axis=1))
    sums = _prefix_sums(ordered)
    centres = _lloyd(ordered, sums, _merged(ordered, sums, entries))
    for _ in range(ROUNDS):
        before = centres
        edges = _moved(sums, _edges(ordered, centres))
        centres = _lloyd(ordered, sums, _means(sums, edges, centres))
        if torch.equal(before, centres):
            break
    table = centres.float()
    indices = torch.empty(values.shape, dtype=torch.uint8)
    for rows, borders, into in zip(values, _borders(table), indices, strict=True):
        for part, to in zip(rows.split(CHUNK), into.split(CHUNK), strict=True):
            to.copy_(torch.bucketize(part, borders, out_int32=True))
    return indices, table


def _prefix_sums(ordered: Tensor) -> Tensor:
    """float64 [G,n+1]: the sum of the values before each place."""
    sums = torch.zeros(len(ordered), ordered.shape[1] + 1, dtype=torch.float64)
    torch.cumsum(ordered, 1, dtype=torch.float64, out=sums[:, 1:])
    return sums


def _borders(centres: Tensor) -> Tensor:
    """Halfway between neighbours: [G,E] -> float32 [G,E-1]."""
    return ((centres[:, 1:] + centres[:, :-1]) / 2).float()


def _merged(ordered: Tensor, sums: Tensor, entries: int) -> Tensor:
    """Centres [G,`entries`], float64, from merging neighbours of least cost.

    Merging cells of n and m values around means u and v costs n m / (n + m) (u - v)^2.
    """
    edges = _fine_edges(ordered, CELLS * entries)
    counts = edges.diff(dim=1).double()
    totals = sums.gather(1, edges).diff(dim=1)
    columns = torch.arange(counts.shape[1])
    while counts.shape[1] > entries:
        n, m = counts[:, :-1], counts[:, 1:]
        means = totals / counts.clamp(min=1)
        cost = n * m / (n + m).clamp(min=1) * means.diff(dim=1).square_()
        cheapest = cost.argmin(1, keepdim=True)
        columns = columns[: counts.shape[1] - 1]
        both, after = columns == cheapest, columns > cheapest
        counts, totals = (
            torch.where(after, x[:, 1:], x[:, :-1]) + x[:, 1:].where(both, 0)
            for x in (counts, totals)
        )
    # Cells without values stand where the next lower centre is.
    means = torch.where(counts > 0, totals / counts.clamp(min=1), -torch.inf)
    means = means.cummax(1).values
    return torch.maximum(means, ordered[:, :1].double())


def _fine_edges(ordered: Tensor, cells: int) -> Tensor:
    """Places int64 [G,cells+1] that cut the sorted values, half by count and half by value."""
    size = ordered.shape[1]
    by_count = torch.linspace(0, size, cells // 2 + 1, dtype=torch.float64).round().long()
    inner = torch.linspace(0, 1, cells // 2 + 2)[1:-1]
    low, high = ordered[:, :1], ordered[:, -1:]
    by_value = torch.searchsorted(ordered, low + inner[: cells - len(by_count) + 1] * (high - low))
    edges = torch.cat([by_count.expand(len(ordered), -1), by_value], 1)
    return edges.sort(1).values


def _edges(ordered: Tensor, centres: Tensor) -> Tensor:
    """Places int64 [G,E+1] where the values nearest to each centre begin; the last is the end."""
    inner = torch.searchsorted(ordered, _borders(centres))
    first = inner.new_zeros(len(inner), 1)
    return torch.cat([first, inner, torch.full_like(first, ordered.shape[1])], 1)


def _means(sums: Tensor, edges: Tensor, centres: Tensor) -> Tensor:
    """Means of the values between edges in ascending order; a centre without values stays."""
    counts = edges.diff(dim=1)
    means = sums.gather(1, edges).diff(dim=1) / counts.clamp(min=1)
    return torch.where(counts > 0, means, centres).sort(1).values


def _lloyd(ordered: Tensor, sums: Tensor, centres: Tensor) -> Tensor:
    """Lloyd's algorithm to its end: each centre becomes the mean of the values nearest to it."""
    slack = SETTLED * (ordered[:, -1:] - ordered[:, :1]).double()
    for _ in range(STEPS):
        before = centres
        centres = _means(sums, _edges(ordered, centres), centres)
        if ((centres - before).abs() <= slack).all():
            break
    return centres


def _moved(sums: Tensor, edges: Tensor) -> Tensor:
    """The best edges [G,E+1] of those that are tried, at least as good as the ones given.

    A cell of n values with the sum s has squared error (sum of squares) - s^2 / n, so the sum of
    s^2 / n over the cells is to be as large as can be.
    """
    places = _tried(edges)  # [G,E+1,W]
    at = sums.gather(1, places.flatten(1)).reshape(places.shape)
    best = at.new_zeros(at.shape[0], at.shape[2])
    choices = []
    for cell in range(1, places.shape[1]):
        count = places[:, cell, None, :] - places[:, cell - 1, :, None]  # [G, from, to]
        total = at[:, cell, None, :] - at[:, cell - 1, :, None]
        gain = total.square_().div_(count.clamp(min=1))
        gain = gain.masked_fill_(count < 0, -torch.inf).add_(best[:, :, None])
        best, choice = gain.max(1)
        choices.append(choice)
    chosen = torch.zeros(len(edges), 1, dtype=torch.int64)  # all tried ends are the same
    found = [edges[:, -1:]]
    for cell in reversed(range(1, len(choices))):
        chosen = choices[cell].gather(1, chosen)
        found.append(places[:, cell].gather(1, chosen))
    return torch.cat([edges[:, :1], *reversed(found[1:]), found[0]], 1)


def _tried(edges: Tensor) -> Tensor:
    """[G,E+1,W]: places from the second border before each to the second after, both ends fixed."""
    first, last = edges[:, :1], edges[:, -1:]
    padded = torch.cat([first, first, edges, last, last], 1)
    count = edges.shape[1]
    around = torch.stack([padded[:, i : i + count] for i in range(5)], 2)
    between = max(4, TRIED // (count - 1))
    fine = (
        around[:, :, :-1, None] + around.diff(dim=2)[..., None] * torch.arange(between) // between
    )
    tried = torch.cat([fine.flatten(2), around[:, :, -1:]], 2)
    tried[:, 0], tried[:, -1] = first, last
    return tried
