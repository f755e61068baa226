"""Streaming statistics of activations: independent of the order of samples, memory bounded per tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from paring.compress.base import Moments
from paring.errors import InputError
from paring.graph import TensorId

RANGE, HISTOGRAM, MOMENTS = "range", "histogram", "moments"
_BUCKETS = 1 << 16


@lru_cache(maxsize=64)
def _ones(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


@dataclass
class TensorStatistics:
    """What is kept of one tensor, whatever the number of samples.

    Attributes:
      low: Smallest value seen.
      high: Largest.
      count: Values seen.
      histogram: int64 [65536] counts by the upper 16 bits of the float32 pattern (0.8 % relative resolution at every
        magnitude, so that no range has to be known beforehand); None unless asked for.
      mean_sum: Sum per channel (last dimension), float64; None unless asked for.
      square_sum: Sum of squares per channel.
    """

    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    histogram: np.ndarray | None = field(default=None, repr=False)
    mean_sum: np.ndarray | None = field(default=None, repr=False)
    square_sum: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def for_requests(cls, wanted: set[str]) -> TensorStatistics:
        """Empty statistics that keep what is `wanted`."""
        return cls(histogram=np.zeros(_BUCKETS, np.int64) if HISTOGRAM in wanted else None)

    def update(self, values: np.ndarray, wanted: set[str]) -> None:
        """Takes one array of float32, any shape, into account."""
        if not values.size:
            return
        low, high = float(np.minimum.reduce(values, axis=None)), float(np.maximum.reduce(values, axis=None))
        # Not-a-number comes in and stays, so that solving refuses it.
        if low < self.low or low != low:
            self.low = low
        if high > self.high or high != high:
            self.high = high
        self.count += values.size
        if self.histogram is not None:
            keys = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32) >> 16
            self.histogram += np.bincount(keys, minlength=_BUCKETS)
        if MOMENTS in wanted:
            rows = values.reshape(-1, values.shape[-1] if values.ndim else 1)
            if self.mean_sum is None or self.square_sum is None:
                self.mean_sum, self.square_sum = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
            # One sample in float32, many samples in float64. A product with ones sums narrow rows fastest.
            ones = _ones(len(rows))
            self.mean_sum += ones @ rows
            self.square_sum += ones @ np.square(rows)

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of both together; channel sums survive only where both have them."""
        both = self.histogram is not None and other.histogram is not None
        sums = self.mean_sum is not None and other.mean_sum is not None and self.mean_sum.shape == other.mean_sum.shape
        return TensorStatistics(
            float(np.minimum(self.low, other.low)),
            float(np.maximum(self.high, other.high)),
            self.count + other.count,
            self.histogram + other.histogram if both else None,  # type: ignore[operator]
            self.mean_sum + other.mean_sum if sums else None,  # type: ignore[operator]
            self.square_sum + other.square_sum if sums else None,  # type: ignore[operator]
        )

    @property
    def moments(self) -> Moments | None:
        """Mean and second moment per channel, None unless they were asked for."""
        if self.mean_sum is None or self.square_sum is None or not self.count:
            return None
        rows = self.count / self.mean_sum.size
        return Moments(self.mean_sum / rows, self.square_sum / rows)

    def channel_db(self, levels: int) -> float | None:
        """Signal to rounding noise of the median channel, in dB, when one grid of `levels` steps spans the whole range."""
        moments = self.moments
        step = (max(self.high, 0.0) - min(self.low, 0.0)) / levels
        noise = step * step / 12
        if moments is None or not 0 < noise < np.inf:
            return None
        power = float(np.median(moments.second))
        return 10 * float(np.log10(max(power / noise, 1e-30)))

    def range(self, how: str, percentile: float = 99.99, levels: int = 256) -> tuple[float, float]:
        """The range to quantize: `minmax`, `percentile` (both tails), or `mse` (least expected square error)."""
        if how == "minmax" or self.histogram is None or self.low >= self.high:
            return self.low, self.high
        values, counts = _occupied(self.histogram)
        if how == "percentile":
            share = np.cumsum(counts) / counts.sum()
            last = len(values) - 1
            low = values[min(int(np.searchsorted(share, 1 - percentile / 100)), last)]
            high = values[min(int(np.searchsorted(share, percentile / 100)), last)]
            return max(float(low), self.low), min(float(high), self.high)
        return _least_square_range(values, counts, self.low, self.high, levels)


def _occupied(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bucket middles in ascending order, and their counts, of the buckets that hold something."""
    keys = np.nonzero(histogram)[0]
    middle = ((keys.astype(np.uint32) << 16) | np.where(keys & 0x7FFF, 0x8000, 0).astype(np.uint32)).view(np.float32)
    values = middle.astype(np.float64)
    order = np.argsort(values, kind="stable")
    return values[order], histogram[keys][order].astype(np.float64)


def _least_square_range(
    values: np.ndarray, counts: np.ndarray, low: float, high: float, levels: int
) -> tuple[float, float]:
    """The (low, high) with the least clipping plus rounding error; exact zeros round to themselves and cost nothing."""
    shrink = np.linspace(1.0, 0.2, 81)
    lows = min(low, 0.0) * shrink if low < 0 else np.zeros(1)
    highs = max(high, 0.0) * shrink if high > 0 else np.zeros(1)

    def clipping(limits: np.ndarray, sign: int) -> np.ndarray:
        x, c = (values, counts) if sign > 0 else (-values[::-1], counts[::-1])
        tail = [np.append(np.cumsum(p[::-1])[::-1], 0.0) for p in (c, c * x, c * x * x)]
        edge = limits * sign
        first = np.searchsorted(x, edge, side="right")
        return np.asarray(tail[2][first] - 2 * edge * tail[1][first] + edge * edge * tail[0][first])

    busy = counts[values != 0].sum()
    step = (highs[None, :] - lows[:, None]) / (levels - 1)
    error = clipping(lows, -1)[:, None] + clipping(highs, 1)[None, :] + busy * step**2 / 12
    row, column = np.unravel_index(int(np.argmin(error)), error.shape)
    return max(low, float(lows[row])) if low > 0 else float(lows[row]), float(highs[column])


@dataclass(frozen=True)
class Statistics:
    """Statistics by tensor, and how many samples they come from.

    Attributes:
      tensors: By tensor id.
      names: Tensor names, so that a saved file can be held against the model.
      samples: Number of samples.
      unseen: By subgraph, why nothing could be seen of it; not saved.
    """

    tensors: Mapping[TensorId, TensorStatistics]
    names: Mapping[TensorId, str]
    samples: int = 0
    unseen: Mapping[int, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes an .npz that `load` reads back.

        Raises:
          InputError: The file cannot be written.
        """
        ids = list(self.tensors)
        found: dict[str, Any] = {
            "ids": np.array(ids, np.int64).reshape(-1, 2),
            "names": np.array([self.names.get(i, "") for i in ids], dtype=np.str_),
            "samples": np.array(self.samples),
            "ranges": np.array([[self.tensors[i].low, self.tensors[i].high] for i in ids], np.float64).reshape(-1, 2),
            "counts": np.array([self.tensors[i].count for i in ids], np.int64),
        }
        for number, key in enumerate(ids):
            for part in ("histogram", "mean_sum", "square_sum"):
                value = getattr(self.tensors[key], part)
                if value is not None:
                    found[f"{part}.{number}"] = value
        try:
            with Path(path).open("wb") as file:
                np.savez(file, **found)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError("cannot write the statistics", where=str(path), got=reason) from error

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Reads what `save` wrote; never unpickles."""
        from paring.samples.arrays import read_npz  # here: the child needs statistics and not the readers of data

        data = read_npz(Path(path))
        try:
            ids = [(int(a), int(b)) for a, b in data["ids"]]
            tensors = {}
            for number, key in enumerate(ids):
                low, high = (float(v) for v in data["ranges"][number])
                parts = [data.get(f"{p}.{number}") for p in ("histogram", "mean_sum", "square_sum")]
                if parts[0] is not None and parts[0].shape != (_BUCKETS,):
                    raise ValueError(f"a histogram of {parts[0].size} buckets")
                tensors[key] = TensorStatistics(low, high, int(data["counts"][number]), *parts)
            names = dict(zip(ids, (str(n) for n in data["names"]), strict=True))
            return cls(tensors, names, int(data["samples"]))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise InputError(
                "cannot read the statistics",
                where=str(path),
                expected="a file that `--save-statistics` wrote",
                got=str(error),
            ) from error
