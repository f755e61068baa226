"""Sums over samples that errors are made from, and histograms whose range grows: memory bounded whatever the number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from paring.graph import Quantization
from paring.measure.result import Error, Histogram

BINS = 64
EXACT = 200.0  # dB: what is closer is written as equal; float32 itself is no better than about 150
_FINE = 4096


@dataclass
class Noise:
    """The difference of one tensor from its float counterpart, summed over all that was seen.

    Attributes:
      grid: The grid that the values lie on, None for float ones.
      signal: Sum of squares of the float values by channel (the last dimension), float64.
      noise: Sum of squared differences by channel.
    """

    grid: Quantization | None = None
    signal: np.ndarray = field(default_factory=lambda: np.zeros(0))
    noise: np.ndarray = field(default_factory=lambda: np.zeros(0))
    got: float = 0.0
    product: float = 0.0
    clipped: int = 0
    count: int = 0

    def update(self, exact: np.ndarray, got: np.ndarray) -> None:
        """Takes float32 values of any shape into account; `got` has as many, in the same order.

        Where the float value is not finite (masks) nothing is compared; a value that should be finite and is not makes
        the noise infinite.
        """
        if not exact.size:
            return
        width = exact.shape[-1] if exact.ndim else 1
        x, y = exact.reshape(-1, width), got.reshape(-1, width)
        finite = np.isfinite(x)
        if not finite.all():
            x, y = np.where(finite, x, 0), np.where(finite, y, 0)
        if not np.isfinite(y).all():
            y = np.where(np.isfinite(y), y, np.float32(3e38))
        with np.errstate(over="ignore"):
            difference = y.astype(np.float64) - x
            self._add(np.square(x, dtype=np.float64).sum(0), np.square(difference).sum(0))
            self.got += float(np.square(y, dtype=np.float64).sum())
            self.product += float(np.multiply(x, y, dtype=np.float64).sum())
        self.count += x.size
        if self.grid is not None and self.grid.scale.size == 1:
            low, high = reach(self.grid)
            half = float(self.grid.scale[0]) / 2
            self.clipped += int(np.count_nonzero((x < low - half) | (x > high + half)))

    def _add(self, signal: np.ndarray, noise: np.ndarray) -> None:
        if self.count and signal.size != self.signal.size:  # a dimension that changes has no channels
            signal, noise = signal.sum(keepdims=True), noise.sum(keepdims=True)
            self.signal, self.noise = self.signal.sum(keepdims=True), self.noise.sum(keepdims=True)
        self.signal = self.signal + signal if self.count else signal
        self.noise = self.noise + noise if self.count else noise


def error(noises: Sequence[Noise]) -> Error | None:
    """The error of a layer from those of its results; None where nothing was seen."""
    seen = [n for n in noises if n.count]
    if not seen:
        return None
    signal, noise = (np.concatenate([getattr(n, part) for n in seen]) for part in ("signal", "noise"))
    gridded = [(n, float(n.grid.scale[0]) ** 2) for n in seen if n.grid is not None and n.grid.scale.size == 1]
    count = sum(n.count for n, _ in gridded)
    norm = math.sqrt(float(signal.sum()) * sum(n.got for n in seen))
    return Error(
        snr_db=decibel(float(signal.sum()), float(noise.sum())),
        channel_db=channel_db(signal, noise),
        cosine=sum(n.product for n in seen) / norm if norm else float(not noise.any()),
        mse=sum(float(n.noise.sum()) / max(square, 1e-300) for n, square in gridded) / count if count else None,
        clipped=sum(n.clipped for n, _ in gridded) / count if count else None,
    )


def channel_db(signal: np.ndarray, noise: np.ndarray) -> float:
    """Signal to noise of the median channel among those that carry something.

    >>> channel_db(np.array([1.0, 100.0, 0.0]), np.array([0.01, 0.01, 0.0]))
    30.0
    """
    alive = signal > 0
    if not alive.any():
        return decibel(0.0, float(noise.sum()))
    return float(np.median([decibel(float(s), float(n)) for s, n in zip(signal[alive], noise[alive], strict=True)]))


def decibel(signal: float, noise: float) -> float:
    """10 log10 of the ratio, within +-200 so that every reader can sort it.

    >>> decibel(100.0, 1.0), decibel(0.0, 0.0), decibel(0.0, 1.0)
    (20.0, 200.0, -200.0)
    """
    if not noise > 0:
        return EXACT if noise == 0 else -EXACT
    return max(-EXACT, min(EXACT, 10 * (math.log10(signal) - math.log10(noise)))) if signal > 0 else -EXACT


def reach(grid: Quantization) -> tuple[float, float]:
    """The smallest and the largest real number that a per-tensor grid holds.

    >>> reach(Quantization(np.array([0.5], np.float32), np.array([-128]), "int8"))
    (0.0, 127.5)
    """
    info = np.iinfo(grid.dtype) if grid.dtype != "int4" else None
    low, high = (-8, 7) if info is None else (info.min, info.max)
    scale, zero = float(grid.scale.reshape(-1)[0]), int(grid.zero_point.reshape(-1)[0])
    return (low - zero) * scale, (high - zero) * scale


class Growing:
    """A histogram that needs no range beforehand: where a value lies outside, bins are joined in pairs.

    Bins begin at whole multiples of their width, which is a power of two.
    """

    def __init__(self) -> None:
        """Empty."""
        self.width = 0.0
        self.first = 0
        self.counts = np.zeros(_FINE, np.int64)
        self.low, self.high = math.inf, -math.inf

    def update(self, values: np.ndarray) -> None:
        """Counts the finite ones of float32 values of any shape."""
        flat = values.reshape(-1)
        if not np.isfinite(flat).all():
            flat = flat[np.isfinite(flat)]
        if not flat.size:
            return
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        self._fit()
        place = np.floor(flat.astype(np.float64) / self.width).astype(np.int64) - self.first
        self.counts += np.bincount(place, minlength=_FINE)

    def _fit(self) -> None:
        """Widens and moves the bins until they hold [low, high]."""
        span = self.high - self.low
        needed = 2.0 ** math.ceil(math.log2(max(span, abs(self.high) * 1e-6, 1e-30) / (_FINE - 2)))
        if not self.width:
            self.width, self.first = needed, math.floor(self.low / needed)
        while self.width < needed:
            if self.first % 2:
                self.counts = np.concatenate([[0], self.counts[:-1]])
                self.first -= 1
            joined = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([joined, np.zeros(_FINE // 2, np.int64)])
            self.first //= 2
            self.width *= 2
        start = math.floor(self.low / self.width)
        last = math.floor(self.high / self.width)
        if start < self.first or last >= self.first + _FINE:
            self.counts = np.roll(self.counts, self.first - start)  # what wraps round is empty
            self.first = start

    def histogram(self, grid: Quantization | None) -> Histogram | None:
        """The `BINS` bins over what was seen; None where nothing was."""
        if not self.width:
            return None
        start, stop = math.floor(self.low / self.width), math.floor(self.high / self.width) + 1
        step = max(1, -(-(stop - start) // BINS))
        counts = np.zeros(BINS * step, np.int64)
        inside = self.counts[start - self.first : stop - self.first]
        counts[: inside.size] = inside
        scale = range_ = None
        if grid is not None and not grid.block:
            widest = int(np.argmax(grid.scale))
            scale = float(grid.scale.reshape(-1)[widest])
            zero = grid.zero_point.reshape(-1)[widest : widest + 1]
            range_ = reach(Quantization(np.array([scale], np.float32), zero, grid.dtype))
        low = start * self.width
        return Histogram(
            low, low + BINS * step * self.width, tuple(int(c) for c in counts.reshape(BINS, step).sum(1)), scale, range_
        )
