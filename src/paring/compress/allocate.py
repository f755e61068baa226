"""How much each layer of a group is pruned, so that all together lose least under a common share of zeros."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

SHARES = (0.3, 0.5, 0.65, 0.75, 0.85, 0.9, 0.95, 0.98)  # at which the error of a layer is measured


def allocate(sizes: Sequence[int], shares: np.ndarray, errors: np.ndarray, share: float) -> np.ndarray:
    """Shares of zeros per layer whose errors add up to least.

    Each layer's error is taken as the convex hull of its curve, so that going down the steepest gains in zeros per error gives
    the optimum (Everett 1963: one price for all).

    Args:
      sizes: Weights of each layer.
      shares: The shares at which errors are known, ascending, float [points]; each layer gets the first at least.
      errors: Of each layer at these shares, float [layers, points].
      share: Of all weights that are to be zero.

    Returns:
      float [layers]; weighed by `sizes` they are `share` on average, where the curves reach as far.

    >>> allocate([100, 100], np.array([0.0, 0.5, 0.9]), np.array([[0.0, 0.1, 0.3], [0.0, 0.3, 0.9]]), 0.5).round(2).tolist()
    [0.9, 0.1]
    """
    pieces = []  # (error per zero, layer, zeros)
    for layer, (size, curve) in enumerate(zip(sizes, errors, strict=True)):
        points = [0]
        for new in range(1, len(shares)):
            while len(points) > 1 and _slope(shares, curve, points[-1], new) <= _slope(shares, curve, *points[-2:]):
                points.pop()
            points.append(new)
        for a, b in pairwise(points):
            pieces.append((_slope(shares, curve, a, b) / size, layer, size * (shares[b] - shares[a])))
    zeros = np.asarray(sizes, np.float64) * shares[0]
    left = max(0.0, share * sum(sizes) - float(zeros.sum()))
    for _, layer, count in sorted(pieces):
        taken = min(count, left)
        zeros[layer], left = zeros[layer] + taken, left - taken
    return np.asarray(zeros / np.maximum(1, np.asarray(sizes)))


def one_threshold(blocks: Sequence[tuple[np.ndarray, np.ndarray]], share: float) -> np.ndarray:
    """Shares of zeros per layer where one threshold decides over the blocks of all of them.

    Args:
      blocks: Of each layer: sums of squares and numbers of weights, one per block.
      share: Of all weights that are to be zero.

    Returns:
      float [layers]; each layer keeps one block at least, the one with the largest mean square.

    >>> small, large = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    >>> one_threshold([(small, np.ones(2)), (large, np.ones(2))], 0.25).tolist()
    [0.5, 0.0]
    """
    score = np.concatenate([power / counts for power, counts in blocks])
    counts = np.concatenate([counts for _, counts in blocks]).astype(np.float64)
    layer = np.repeat(np.arange(len(blocks)), [len(counts) for _, counts in blocks])
    starts = np.cumsum([0, *(len(counts) for _, counts in blocks)])
    best = [start + int(score[start:stop].argmax()) for start, stop in pairwise(starts)]
    score[best] = np.inf
    order = np.argsort(score, kind="stable")[: len(score) - len(best)]
    total = np.concatenate([[0.0], np.cumsum(counts[order])])
    gone = order[: int(np.abs(total - share * counts.sum()).argmin())]
    sizes = np.bincount(layer, counts, len(blocks))
    return np.asarray(np.bincount(layer[gone], counts[gone], len(blocks)) / sizes)


def erdos_renyi_kernel(shapes: Sequence[tuple[int, int, int]], share: float) -> np.ndarray:
    """Shares of zeros per layer whose densities go with (outputs + inputs + kernel) / (outputs * inputs * taps).

    So small layers stay denser (Evci, Gale, Menick, Castro, Elsen: Rigging the Lottery, ICML 2020; Mocanu et al. 2018). A
    kernel's height and width count as those of a square of as many taps.

    Args:
      shapes: (outputs, inputs, taps) of each layer.
      share: Of all weights that are to be zero.

    Returns:
      float [layers]; weighed by size they are `share` on average. A layer that would be more than dense stays dense.

    >>> erdos_renyi_kernel([(100, 100, 1), (10, 10, 1)], 0.8).round(3).tolist()
    [0.808, 0.0]
    """
    sizes = np.array([o * i * t for o, i, t in shapes], np.float64)
    raw = np.array([(o + i + (2 * np.sqrt(t) if t > 1 else 0)) / (o * i * t) for o, i, t in shapes])
    dense = np.zeros(len(shapes), bool)
    while True:
        budget = (1 - share) * sizes.sum() - sizes[dense].sum()
        factor = budget / (raw * sizes)[~dense].sum()
        over = ~dense & (factor * raw > 1)
        if not over.any():
            return np.where(dense, 0.0, 1 - factor * raw)
        dense |= over


def _slope(shares: np.ndarray, curve: np.ndarray, a: int, b: int) -> float:
    return float((curve[b] - curve[a]) / (shares[b] - shares[a]))
