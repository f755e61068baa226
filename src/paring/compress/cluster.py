"""Cluster: few distinct values per channel or per tensor, found by k-means, so that files compress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from paring.compress.base import Algorithm, Context, Encoded
from paring.compress.kmeans import kmeans, nearest
from paring.compress.support import PROMISE
from paring.errors import InputError

CHOICES: dict[str, tuple[str, ...]] = {"granularity": ("channel", "tensor")}
CHUNK = 1 << 20  # weights clustered at a time


@dataclass(frozen=True)
class Cluster(Algorithm):
    """Weight clustering: every weight becomes the mean of its cluster.

    Zeros that are there on purpose (a fifth of the weights, or the recipe made them) stay, as one of the clusters; nothing
    else becomes zero.

    Attributes:
      clusters: Distinct values, 2 to 256.
      granularity: Per output `channel`, or of the whole `tensor`. An integer grid per channel, which comes later, keeps the
        clusters of channels, and of a tensor only that each channel has so few values.
      seed: Of the first centers' draw.

    >>> w = np.array([[1.0, 1.5, 4.0, 5.0], [-1.0, -1.5, 2.0, 2.0]], np.float32)
    >>> Cluster(2).encode(w, Context("layer", axis=0)).values.tolist()
    [[1.25, 1.25, 4.5, 4.5], [-1.25, -1.25, 2.0, 2.0]]
    """

    clusters: int = 16
    granularity: str = "channel"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                expected, got = ", ".join(allowed), repr(getattr(self, name))
                raise InputError("bad setting", where=f"cluster.{name}", expected=expected, got=got)
        if type(self.clusters) is not int or not 2 <= self.clusters <= 256:
            got = repr(self.clusters)
            raise InputError("bad setting", where="cluster.clusters", expected="a whole number from 2 to 256", got=got)
        if type(self.seed) is not int or self.seed < 0:
            raise InputError("bad setting", where="cluster.seed", expected="a whole number", got=repr(self.seed))

    def encode(self, weight: np.ndarray, context: Context) -> Encoded:
        """Gives each weight the value of its cluster.

        Args:
          weight: float32, any shape; the context's axis holds the channels, None: the tensor is one channel.
          context: With `pruned`, all zeros are kept.
        """
        axis = context.axis if self.granularity == "channel" else None
        lead = np.moveaxis(weight, axis, 0) if axis is not None else weight
        rows = lead.reshape(weight.shape[axis] if axis is not None else 1, -1)
        reserved = self._reserves_zero(weight, context)
        found = np.empty(rows.shape, np.float32)
        for part, centers in self._centers(rows, reserved):
            found[part] = nearest(rows[part], centers)
        if reserved:
            found[rows == 0] = 0.0
        shaped = found.reshape(lead.shape)
        values = np.moveaxis(shaped, 0, axis) if axis is not None else shaped
        return Encoded(np.ascontiguousarray(values), "float32", None)

    def decode(self, encoded: Encoded) -> np.ndarray:
        """The weights."""
        return encoded.values

    def describe(self) -> str:
        """In a few words.

        >>> Cluster(8, "tensor").describe()
        '8 clusters per tensor'
        """
        return f"{self.clusters} clusters" + (" per tensor" if self.granularity == "tensor" else "")

    def promises(self, weight: np.ndarray, context: Context) -> tuple[str, ...]:
        """At most `clusters` distinct values per channel or tensor.

        >>> Cluster(2).promises(np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]], np.float32), Context("layer", axis=0))
        ('1 of 2 channels has more than 2 distinct values, up to 3',)
        """
        del context
        rows = weight if self.granularity == "channel" else weight.reshape(1, -1)
        ordered = np.sort(rows, axis=1)
        number = (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1) + 1 if rows.size else np.zeros(len(rows), int)
        over = int((number > self.clusters).sum())
        if not over:
            return ()
        if self.granularity == "tensor":
            return (f"the tensor has {number[0]} distinct values, not at most {self.clusters}",)
        have = "has" if over == 1 else "have"
        return (
            f"{over} of {len(rows)} channels {have} more than {self.clusters} distinct values, up to {number.max()}",
        )

    def _reserves_zero(self, weight: np.ndarray, context: Context) -> bool:
        """Whether zero is one of the clusters."""
        return bool(context.pruned or (weight.size and np.mean(weight == 0) >= PROMISE))

    def _centers(self, rows: np.ndarray, reserved: bool) -> Iterator[tuple[slice, np.ndarray]]:
        """Centers of rows, some rows at a time."""
        if not np.isfinite(rows).all():
            raise InputError("cannot cluster weights", expected="finite values", got="infinity or not-a-number")
        step = max(1, CHUNK // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            kept = rows[part] != 0 if reserved else np.ones(rows[part].shape, bool)
            rng = np.random.default_rng([self.seed, start])
            yield part, kmeans(rows[part], kept, self.clusters - reserved, rng)
