"""Axes for charts drawn as inline SVG: where a value goes, and where the round numbers are."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
      low: Value at `start`.
      high: Value at `end`.
      start: Place of `low` in the drawing.
      end: Place of `high`.
      log: Equal ratios lie equally far apart; wants `low` above 0.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value; beyond the ends, the end.

        >>> Axis(0, 10, 100, 200).at(2.5), Axis(1, 100, 0, 100, log=True).at(10), Axis(0, 1, 0, 10).at(7)
        (125.0, 50.0, 10)
        """
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        part = (value - low) / (high - low)
        return round(self.start + part * (self.end - self.start), 2) if part < 1 else self.end

    def ticks(self, count: int = 6) -> list[float]:
        """About `count` round values on the axis.

        >>> Axis(0, 47, 0, 1).ticks(), Axis(30e3, 420e3, 0, 1, log=True).ticks()
        ([0.0, 10.0, 20.0, 30.0, 40.0], [50000.0, 100000.0, 200000.0])
        """
        if self.log and self.high / self.low >= 4:
            first = math.floor(math.log10(self.low))
            last = math.ceil(math.log10(self.high))
            wide = last - first > 4
            found = [m * 10.0**e for e in range(first, last + 1) for m in ((1,) if wide else (1, 2, 5))]
            return [value for value in found if self.low <= value <= self.high]
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(n * step, 12) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def labels(self) -> list[tuple[float, str]]:
        """The ticks with their text, all of as many decimals.

        >>> Axis(0.77, 0.83, 0, 1).labels()[2:4]
        [(0.79, '0.79'), (0.8, '0.80')]
        """
        found = self.ticks()
        decimals = max((len(f"{tick:.8g}".partition(".")[2]) for tick in found if abs(tick) < 1e6), default=0)
        return [(tick, f"{tick:.{decimals}f}".replace("-", "−")) for tick in found]


def around(low: float, high: float, room: float = 0.05) -> tuple[float, float]:
    """A span with some room at both ends, never empty.

    >>> around(10, 20), around(3, 3)
    ((9.5, 20.5), (2.85, 3.15))
    """
    spare = (high - low) * room or abs(high) * room or 1.0
    return low - spare, high + spare


__all__ = ["Axis", "around"]
