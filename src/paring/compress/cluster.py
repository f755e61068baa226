"""Cluster: few distinct values per channel or per tensor, found by k-means, so that files compress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paring.compress.base import Algorithm, Context, Encoded, Extra
from paring.compress.kmeans import kmeans, nearest
from paring.compress.schedule import UNITS, check_time, in_steps, must_be_steps
from paring.compress.straight import damped
from paring.compress.support import PROMISE
from paring.errors import InputError

CHOICES: dict[str, tuple[str, ...]] = {"granularity": ("channel", "tensor"), "unit": UNITS}
CHUNK = 1 << 20  # weights clustered at a time


@dataclass(frozen=True)
class Cluster(Algorithm):
    """Weight clustering: every weight becomes the mean of its cluster.

    Zeros that are there on purpose (a fifth of the weights, or the recipe made them) stay, as one of the clusters; nothing
    else becomes zero.

    In training the centers are trained by gradient, and so is each weight: what the layer sees is the center that is nearest to
    it. Until `start`, layers see the weights as they are, while the centers follow them by Lloyd steps.

    Attributes:
      clusters: Distinct values, 2 to 256.
      granularity: Per output `channel`, or of the whole `tensor`. An integer grid per channel, which comes later, keeps the
        clusters of channels, and of a tensor only that each channel has so few values.
      seed: Of the first centers' draw.
      start: When clustering begins, in training only: behind the end of gradual pruning, where both are wanted.
      unit: Of `start`: `steps`, `epochs`, or `fraction` of training.

    >>> w = np.array([[1.0, 1.5, 4.0, 5.0], [-1.0, -1.5, 2.0, 2.0]], np.float32)
    >>> Cluster(2).encode(w, Context("layer", axis=0)).values.tolist()
    [[1.25, 1.25, 4.5, 4.5], [-1.25, -1.25, 2.0, 2.0]]
    """

    clusters: int = 16
    granularity: str = "channel"
    seed: int = 0
    start: float = 0
    unit: str = "steps"

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
        check_time(self.start, self.unit, "cluster.start")

    @property
    def makes(self) -> frozenset[str]:  # type: ignore[override]
        """Few values per channel, or in the whole tensor."""
        return frozenset({"values"} if self.granularity == "channel" else {"values", "tensor values"})

    @property
    def gives_up(self) -> frozenset[str]:
        """A grid, on which centers do not lie, and a rank."""
        return frozenset({"grid", "rank"})

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

    # -- training --------------------------------------------------------------------------------------------------

    def variables(self, weight: np.ndarray, context: Context) -> dict[str, Extra]:
        """Centers, float32 [channels or 1, clusters], one fewer where zero is one of them, and how far training moved them."""
        rows = weight if self.granularity == "channel" else weight.reshape(1, -1)
        parts = [centers for _, centers in self._centers(rows, self._reserves_zero(weight, context))]
        centers = np.concatenate(parts)
        return {"centroids": Extra(centers), "shift": Extra(np.zeros_like(centers), trainable=True)}

    def begin(self, weight: np.ndarray, context: Context) -> np.ndarray:
        """The clustered weight, or the weight where clustering begins later."""
        return weight if self.start > 0 else super().begin(weight, context)

    def update(
        self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context
    ) -> dict[str, Any]:
        """Before `start`, one Lloyd step: the centers are where the weights are when they are needed."""
        if self.start == 0:
            return {}
        must_be_steps(self.unit, f"cluster.start of {context.name}")
        centers = ops.convert_to_tensor(variables["centroids"])
        found = ops.cond(step < float(self.start), lambda: self._lloyd(ops, weight, centers), lambda: centers)
        return {"centroids": found}

    def project(self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context) -> Any:
        """Each weight's nearest center.

        The gradient goes straight through to the weight, so that it can change its cluster, and to the center. A center gets
        the mean over its members, not the sum: so it moves as fast as its members do under the same optimizer and stays among
        them, while the sum would carry it away hundreds of times faster.
        """
        rows, live, centers, index, number = self._assign(ops, weight, variables["centroids"] + variables["shift"])
        own = damped(ops, centers, 1.0 / ops.maximum(number, 1.0))
        found = ops.take(ops.reshape(own, (-1,)), index) + (rows - ops.stop_gradient(rows))
        found = found if live is None else ops.where(live, found, 0.0)
        found = ops.reshape(found, weight.shape)
        if self.start == 0:
            return found
        must_be_steps(self.unit, f"cluster.start of {context.name}")
        return ops.where(step < float(self.start), weight, found)

    def resolved(self, steps_per_epoch: int | None, epochs: float | None) -> Cluster:
        """With `start` in steps."""
        return replace(
            self, start=in_steps(self.start, self.unit, steps_per_epoch, epochs, "cluster.start"), unit="steps"
        )

    def _assign(self, ops: Any, weight: Any, centroids: Any) -> tuple[Any, Any, Any, Any, Any]:
        """(weights as rows, which of them are clustered or None for all, ascending centers, the nearest one's index among
        all rows' centers, how many weights are nearest to each). Ties go to the lower center, as in `nearest`."""
        rows = weight if self.granularity == "channel" else ops.reshape(weight, (1, -1))
        centers = ops.sort(centroids, axis=-1)
        count, width = int(centers.shape[0]), int(centers.shape[1])
        live = ops.not_equal(rows, 0.0) if width < self.clusters else None
        first = ops.convert_to_tensor(np.arange(count, dtype=np.int32)[:, None] * width)
        fixed = ops.stop_gradient(centers)
        middle = (fixed[:, 1:] + fixed[:, :-1]) / 2
        # Bisection: as many gathers as the number of clusters has bits, and nothing larger than the weight.
        edges = ops.reshape(ops.pad(middle, [(0, 0), (0, 1)], constant_values=np.inf), (-1,))
        index = ops.zeros_like(rows, dtype="int32")
        for bit in reversed(range((width - 1).bit_length())):
            probe = index + (1 << bit)
            edge = ops.take(edges, first + ops.minimum(probe, width) - 1)
            index = ops.where(rows > edge, probe, index)
        index = first + index
        ones = ops.ones_like(rows) if live is None else ops.cast(live, "float32")
        number = ops.segment_sum(ops.reshape(ones, (-1,)), ops.reshape(index, (-1,)), num_segments=count * width)
        return rows, live, centers, index, ops.reshape(number, (count, width))

    def _lloyd(self, ops: Any, weight: Any, centroids: Any) -> Any:
        """Centers moved to the means of their members; one that has none goes where the square error is largest."""
        rows, live, centers, index, number = self._assign(ops, weight, centroids)

        def total(values: Any) -> Any:
            values = values if live is None else ops.where(live, values, 0.0)
            found = ops.segment_sum(
                ops.reshape(values, (-1,)), ops.reshape(index, (-1,)), num_segments=int(np.prod(centers.shape))
            )
            return ops.reshape(found, centers.shape)

        least = ops.maximum(number, 1.0)
        mean = ops.where(number > 0, total(rows) / least, centers)
        error = total(ops.square(rows - ops.take(ops.reshape(mean, (-1,)), index)))
        worst = ops.expand_dims(ops.argmax(error, axis=-1), -1)
        spread = ops.sqrt(ops.take_along_axis(error / least, worst, axis=-1))
        target = ops.take_along_axis(mean, worst, axis=-1) + spread
        empty = ops.cast(number == 0, "int32")
        first = ops.logical_and(empty == 1, ops.cumsum(empty, axis=-1) == 1)
        return ops.sort(ops.where(first, target, mean), axis=-1)

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
