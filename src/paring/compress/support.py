"""Weights of which some have to be zero: the rows that share their zeros are solved together, on what is left of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PROMISE = 0.2  # share of exact zeros from which on they are no accident: somebody pruned, and they stay
BATCH = 1 << 22  # elements of the matrices that are solved at a time


@dataclass(frozen=True)
class Support:
    """Some sets of rows; the rows of a set have the same weights left.

    Attributes:
      group: Which group the rows belong to.
      rows: int [sets, rows of a set].
      columns: int [sets, columns], padded with 0 where a set has fewer.
      real: bool, the shape of `columns`; False for padding.
    """

    group: int
    rows: np.ndarray
    columns: np.ndarray
    real: np.ndarray

    def second(self, second: np.ndarray) -> np.ndarray:
        """Second moments [groups, inputs, inputs] of what is left -> [sets, columns, columns].

        Padding has to do with nothing, and the mean moment of its set.
        """
        part = second[self.group][self.columns[:, :, None], self.columns[:, None, :]]
        part *= self.real[:, :, None] & self.real[:, None, :]
        mean = np.einsum("nkk->n", part) / np.maximum(1, self.real.sum(axis=1))
        part += (np.where(self.real, 0.0, np.maximum(mean, np.finfo(float).tiny)[:, None]))[:, :, None] * np.eye(
            part.shape[-1]
        )
        return np.asarray(part)

    def take(self, values: np.ndarray, padding: float = 0.0) -> np.ndarray:
        """Values [groups, rows, inputs] of what is left -> [sets, rows of a set, columns]."""
        found = values[self.group][self.rows[:, :, None], self.columns[:, None, :]]
        return np.where(self.real[:, None, :], found, padding)

    def put(self, values: np.ndarray, into: np.ndarray) -> None:
        """The inverse of `take`."""
        sets, rows, columns = np.nonzero(np.broadcast_to(self.real[:, None, :], values.shape))
        into[self.group, self.rows[sets, rows], self.columns[sets, columns]] = values[sets, rows, columns]


def supports(kept: np.ndarray) -> Iterator[Support]:
    """Sets of rows of bool [groups, rows, inputs], many at a time; rows with nothing left are in none."""
    for group, mask in enumerate(kept):
        packed, where = np.unique(np.packbits(mask, axis=1), axis=0, return_inverse=True)
        members = np.split(np.argsort(where.reshape(-1), kind="stable"), np.cumsum(np.bincount(where.reshape(-1)))[:-1])
        left = np.unpackbits(packed, axis=1, count=mask.shape[1]).astype(bool).sum(axis=1)
        order = sorted((i for i in range(len(members)) if left[i]), key=lambda i: (len(members[i]), left[i]))
        start = 0
        while start < len(order):
            rows, stop = len(members[order[start]]), start + 1
            while (
                stop < len(order)
                and len(members[order[stop]]) == rows
                and (stop + 1 - start) * int(left[order[stop]]) ** 2 <= BATCH
            ):
                stop += 1
            chosen = order[start:stop]
            width = int(left[chosen[-1]])
            real = np.arange(width) < left[chosen][:, None]
            columns = np.zeros(real.shape, np.int64)
            for i, one in enumerate(chosen):
                columns[i, : left[one]] = np.flatnonzero(mask[members[one][0]])
            yield Support(group, np.stack([members[one] for one in chosen]), columns, real)
            start = stop


def fit(wanted: np.ndarray, second: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The weights W that are zero where not `kept` and lose least: (wanted - W) H (wanted - W)^T over each row.

    On the support S of a row, W_S H_SS = (wanted H)_S: what optimal brain surgery would have arrived at, had it taken the
    same weights away in any order (Hassibi, Stork: Second Order Derivatives for Network Pruning, NeurIPS 1992).

    Args:
      wanted: float [groups, rows, inputs].
      second: float64 H [groups, inputs, inputs], positive definite.
      kept: bool, the shape of `wanted`.

    Returns:
      float64, the shape of `wanted`.

    >>> h = np.array([[[1.0, 0.5], [0.5, 1.0]]])
    >>> fit(np.array([[[1.0, 1.0]]]), h, np.array([[[True, False]]])).tolist()
    [[[1.5, 0.0]]]
    """
    goal, found = wanted @ second, np.zeros(wanted.shape, np.float64)
    for support in supports(kept):
        right = np.swapaxes(support.take(goal), -1, -2)
        support.put(np.swapaxes(np.linalg.solve(support.second(second), right), -1, -2), found)
    return found
