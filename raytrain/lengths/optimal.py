"""Bucket edges of least cost, by dynamic programming on the histogram.

The cost of a plan is what all utterances cost padded to the edges of their buckets (`CostModel`). Duration edges are
nested over token edges. Every pair of candidate durations is a possible row of the grid; the best token edges of each
row, for every number of them, come from a dynamic program over tokens, and a second one over durations chooses the rows
and distributes a budget of cells among them by need.

Candidates are spaced so that equal parts of the corpus's cost lie between them, so the work does not grow with the
corpus; the final token edges are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raytrain.lengths.cost import CostModel
from raytrain.lengths.histogram import LengthHistogram

NUM_CANDIDATES = (144, 56)  # durations and tokens


class GridRow(NamedTuple):
    """A duration edge (ms) and the number of token edges in its row."""

    max_duration_ms: int
    num_token_buckets: int


def optimal_rows(
    histogram: LengthHistogram,
    cost: CostModel,
    num_cells: int,
    *,
    num_rows: int | None = None,
    max_split: int = 8,
    num_candidates: tuple[int, int] = NUM_CANDIDATES,
) -> list[GridRow]:
    """Rows of the grid of at most `num_cells` cells (and `num_rows` rows) that pads least; at most `max_split`
    token edges in a row. `histogram` holds what the plan keeps, at least one utterance.

    Exact if it has at most `num_candidates` distinct durations and tokens.
    """
    of_durations, of_tokens = num_candidates
    weights = histogram.counts * cost.of(histogram.cells, histogram.tokens)
    durations = candidates(histogram.cells, weights, of_durations)
    weights = histogram.counts * cost.decoder(histogram.cells, histogram.tokens)
    tokens = candidates(histogram.tokens, weights, of_tokens)
    counts = _table(histogram, durations, tokens)
    split = min(max_split, num_cells, len(tokens))
    row_costs = _row_costs(counts, durations, tokens, cost, split)
    if num_rows is not None:
        return _share_rows(row_costs, durations, num_cells, min(num_rows, len(durations)))
    return _share(row_costs, durations, num_cells)


def candidates(values: np.ndarray, weights: np.ndarray, number: int) -> np.ndarray:
    """At most `number` ascending values between which equal parts of `weights` lie; the last is the largest."""
    distinct, inverse = np.unique(values, return_inverse=True)
    if len(distinct) <= number:
        return distinct
    mass = np.cumsum(np.bincount(inverse.ravel(), weights=weights))
    shares = mass[-1] * np.arange(1, number + 1) / number
    picked = np.searchsorted(mass, shares * (1 - 1e-12), side="left").clip(max=len(distinct) - 1)
    return np.unique(np.append(distinct[picked], distinct[-1]))


def _table(histogram: LengthHistogram, durations: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(D, T) utterances by candidate cell."""
    table = np.zeros((len(durations), len(tokens)))
    rows = np.searchsorted(durations, histogram.cells, side="left")
    columns = np.searchsorted(tokens, histogram.tokens, side="left")
    np.add.at(table, (rows, columns), histogram.counts)
    return table


def _row_costs(
    counts_DT: np.ndarray, durations: np.ndarray, tokens: np.ndarray, cost: CostModel, split: int
) -> np.ndarray:
    """(split, D+1, D): cost of a row from candidate i (exclusive, 0: from the start) to j with m+1 token edges."""
    size = len(durations)
    before = np.vstack((np.zeros((1, len(tokens))), np.cumsum(counts_DT, axis=0)))
    result = np.full((split, size + 1, size), np.inf)
    encoder = cost.encoder(durations)
    for j in range(size):
        inside = np.cumsum(before[j + 1] - before[: j + 1], axis=1)  # (i, T) utterances of at most T tokens
        # With no utterance past some token edge, the row ends there.
        last = np.argmax(inside >= inside[:, -1:], axis=1)
        decoder = cost.decoder(np.full(len(tokens), durations[j]), tokens)
        best = inside * decoder
        rows = np.arange(j + 1)
        result[0, : j + 1, j] = best[rows, last]
        for m in range(1, split):
            # One more edge at s; lengths between s and t are padded to t.
            options = best[:, :, None] - inside[:, :, None] * decoder
            np.minimum.accumulate(options, axis=1, out=options)
            best = np.minimum(best, np.diagonal(options, axis1=1, axis2=2) + inside * decoder)
            result[m, : j + 1, j] = best[rows, last]
        result[:, : j + 1, j] += inside[:, -1] * encoder[j]
    return result


def _share(row_costs: np.ndarray, durations: np.ndarray, num_cells: int) -> list[GridRow]:
    """Share the cells among rows: best[j, n] is the least cost of durations up to j in at most n cells."""
    split, _, size = row_costs.shape
    best = np.full((size + 1, num_cells + 1), np.inf)
    best[0] = 0
    came = np.zeros((size + 1, num_cells + 1, 2), np.int64)
    for j in range(size):
        for n in range(1, num_cells + 1):
            used = min(split, n)
            # (m, i): a last row from i with m cells, the rest before it.
            options = best[: j + 1, n - used : n][:, ::-1].T + row_costs[:used, : j + 1, j]
            m, i = divmod(int(np.argmin(options)), j + 1)
            best[j + 1, n] = options[m, i]
            came[j + 1, n] = i, m + 1
    rows, j, n = [], size, num_cells
    while j:
        i, m = came[j, n]
        rows.append(GridRow(int(durations[j - 1]), int(m)))
        j, n = int(i), int(n - m)
    return rows[::-1]


def _share_rows(row_costs: np.ndarray, durations: np.ndarray, num_cells: int, num_rows: int) -> list[GridRow]:
    """The same with a fixed number of rows that have equally many cells each, K × S."""
    each = min(max(1, num_cells // num_rows), row_costs.shape[0])
    costs, size = row_costs[each - 1], len(durations)
    best = np.full((num_rows + 1, size + 1), np.inf)
    best[:, 0] = 0
    came = np.zeros((num_rows + 1, size + 1), np.int64)
    for k in range(1, num_rows + 1):
        options = best[k - 1][:, None] + costs
        came[k, 1:] = np.argmin(options, axis=0)
        best[k, 1:] = options.min(axis=0)
    rows, j, k = [], size, num_rows
    while j:
        rows.append(GridRow(int(durations[j - 1]), each))
        j, k = int(came[k, j]), k - 1
    return rows[::-1]


def optimal_token_edges(
    tokens: np.ndarray, counts: np.ndarray, duration_ms: int, cost: CostModel, number: int
) -> np.ndarray:
    """At most `number` ascending token edges for one row, exact. `tokens`, `counts`: (N,), in any order."""
    values, inverse = np.unique(tokens, return_inverse=True)
    until = np.cumsum(np.bincount(inverse.ravel(), weights=counts))
    decoder = cost.decoder(np.full(len(values), duration_ms), values)
    best = [until * decoder]
    came: list[np.ndarray] = []
    for _ in range(1, min(number, len(values))):
        options = best[-1][:, None] - until[:, None] * decoder
        options[np.tril_indices(len(values))] = np.inf  # the edge before is below
        options[0, 0] = 0
        came.append(np.argmin(options, axis=0))
        best.append(np.where(np.arange(len(values)) > 0, options.min(axis=0) + until * decoder, best[-1]))
    level = int(np.argmin([costs[-1] for costs in best]))
    edges, edge = [values[-1]], len(values) - 1
    while level and edge:
        edge = int(came[level - 1][edge])
        level -= 1
        edges.append(values[edge])
    return np.unique(edges)
