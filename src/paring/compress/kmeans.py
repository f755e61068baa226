"""k-means of numbers: rows are clustered each on their own, all at once; sorted values make every step cheap."""

from __future__ import annotations

import numpy as np

SKETCH = 1024  # order statistics of a row that seeds are drawn from
ROUNDS = 300  # Lloyd steps; most rows settle within some dozens


def kmeans(values: np.ndarray, kept: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """The centers of each row: k-means++ seeds (Arthur, Vassilvitskii, SODA 2007), then Lloyd steps until none moves a value.

    Args:
      values: float32 [rows, n], finite.
      kept: bool, the same shape: the values that count.
      clusters: Centers per row.
      rng: Draws the seeds.

    Returns:
      float32 [rows, clusters], ascending. A row with fewer distinct values has them exactly, some of them twice.

    >>> row = np.array([[0.0, 0.1, 4.0, 4.2, 9.0]], np.float32)
    >>> kmeans(row, row > -1, 3, np.random.default_rng(0)).round(2).tolist()
    [[0.05000000074505806, 4.099999904632568, 9.0]]
    """
    ordered = np.sort(np.where(kept, values, np.float32(np.inf)), axis=1)
    counts = kept.sum(axis=1)
    centers = np.zeros((len(values), clusters), np.float32)
    open_ = np.ones(len(values), bool)
    steps = (ordered[:, 1:] > ordered[:, :-1]) & np.isfinite(ordered[:, 1:])
    for row in np.flatnonzero(steps.sum(axis=1) < clusters):  # as many values as centers: nothing to search
        found = np.unique(ordered[row, : counts[row]])
        centers[row] = np.concatenate([found, np.repeat(found[-1:], clusters - len(found))]) if len(found) else 0.0
        open_[row] = False
    if open_.any():
        ordered, counts = ordered[open_], counts[open_]
        centers[open_] = settle(ordered, counts, seeds(ordered, counts, clusters, rng))
    return centers


def seeds(ordered: np.ndarray, counts: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each next seed is drawn with the chance of its squared distance to the nearest seed so far.

    Args:
      ordered: float32 [rows, n], ascending; the first `counts` of a row count.
      counts: int [rows], at least 1.
      clusters: Seeds per row.
      rng: Draws them.

    Returns:
      float32 [rows, clusters], ascending, all of them values of the row.
    """
    size = min(ordered.shape[1], SKETCH)
    where = np.rint(np.linspace(0.0, 1.0, size)[None] * (counts[:, None] - 1)).astype(np.int64)
    sketch = np.take_along_axis(ordered, where, axis=1)
    rows = np.arange(len(sketch))
    found = np.empty((len(sketch), clusters), np.float32)
    found[:, 0] = sketch[rows, rng.integers(size, size=len(sketch))]
    distance = np.square(sketch - found[:, :1])
    for number in range(1, clusters):
        total = np.cumsum(distance, axis=1, dtype=np.float64)
        drawn = rng.random(len(sketch)) * total[:, -1]
        pick = np.minimum((total <= drawn[:, None]).sum(axis=1), size - 1)
        found[:, number] = sketch[rows, pick]
        np.minimum(distance, np.square(sketch - found[:, number : number + 1]), out=distance)
    found.sort(axis=1)
    return found


def settle(ordered: np.ndarray, counts: np.ndarray, centers: np.ndarray, rounds: int = ROUNDS) -> np.ndarray:
    """Lloyd steps: centers become the means of what is nearest to them, until no value changes its center.

    A center that nothing is nearest to goes into the cluster with the largest square error, one deviation above its mean:
    there it can only help.

    Args:
      ordered: float32 [rows, n], ascending; the first `counts` of a row count.
      counts: int [rows].
      centers: float32 [rows, clusters], ascending.
      rounds: At most so many steps.

    Returns:
      float32, the shape of `centers`, ascending.
    """
    finite = np.where(np.arange(ordered.shape[1]) < counts[:, None], ordered, 0.0)
    start = np.zeros((len(ordered), 1))
    first = np.concatenate([start, np.cumsum(finite, axis=1, dtype=np.float64)], axis=1)
    second = np.concatenate([start, np.cumsum(np.square(finite, dtype=np.float64), axis=1)], axis=1)
    centers, moving, before = centers.copy(), np.arange(len(centers)), None
    for _ in range(rounds):
        edges = _edges(ordered, counts, moving, centers[moving])
        if before is not None:
            still = (edges != before).any(axis=1)
            moving, edges = moving[still], edges[still]
        if not moving.size:
            break
        number = np.diff(edges, axis=1)
        sums = np.diff(first[moving[:, None], edges], axis=1)
        squares = np.diff(second[moving[:, None], edges], axis=1)
        mean = np.where(number > 0, sums / np.maximum(number, 1), centers[moving])
        error = np.maximum(squares - number * np.square(mean), 0.0)
        empty = number == 0
        if (rows := np.flatnonzero(empty.any(axis=1))).size:
            worst = error[rows].argmax(axis=1)
            spread = np.sqrt(error[rows, worst] / np.maximum(number[rows, worst], 1))
            mean[rows, empty[rows].argmax(axis=1)] = mean[rows, worst] + spread
        centers[moving] = np.sort(mean.astype(np.float32), axis=1)
        before = edges
    return centers


def nearest(values: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Each value's nearest center, the lower one of two that are equally near: float32 [rows, n] of [rows, clusters].

    >>> nearest(np.array([[0.4, 0.5, 0.6]], np.float32), np.array([[0.0, 1.0]], np.float32)).tolist()
    [[0.0, 0.0, 1.0]]
    """
    found = np.empty(values.shape, np.float32)
    for row, (line, own) in enumerate(zip(values, centers, strict=True)):
        found[row] = own[np.searchsorted(_middles(own), line)]
    return found


def _middles(centers: np.ndarray) -> np.ndarray:
    """Half way between neighbours, float64: in float32 there is nothing between two that are next to each other."""
    wide = centers.astype(np.float64)
    return np.asarray((wide[..., 1:] + wide[..., :-1]) / 2)


def _edges(ordered: np.ndarray, counts: np.ndarray, rows: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Where each center's values begin and end, of some rows: int [rows, clusters + 1], by bisection of all at once."""
    middle = _middles(centers)
    low = np.zeros(middle.shape, np.int64)
    high = np.broadcast_to(counts[rows, None], middle.shape).copy()
    while (open_ := low < high).any():
        probe = (low + high) // 2
        below = ordered[rows[:, None], np.minimum(probe, ordered.shape[1] - 1)] <= middle
        low, high = np.where(open_ & below, probe + 1, low), np.where(open_ & ~below, probe, high)
    return np.concatenate([np.zeros((len(rows), 1), np.int64), low, counts[rows, None]], axis=1)
