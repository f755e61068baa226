"""How much each layer of a group is pruned, so that all together lose least under a common share of zeros."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


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


def _slope(shares: np.ndarray, curve: np.ndarray, a: int, b: int) -> float:
    return float((curve[b] - curve[a]) / (shares[b] - shares[a]))
