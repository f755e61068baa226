"""What the user asked of a search, and what a candidate makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from paring.errors import InputError
from paring.measure.metrics import Metric
from paring.tuning.trial import Outcome

_SIZES = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TIMES = {"": 1.0, "ms": 1.0, "us": 1e-3, "s": 1e3}


@dataclass(frozen=True)
class Limits:
    """Bounds; None where there is none.

    Attributes:
      drop: Largest loss, in the metric's unit.
      size: Largest file, in bytes.
      latency: Longest median latency with one thread, in milliseconds.
    """

    drop: float | None = None
    size: float | None = None
    latency: float | None = None

    @classmethod
    def parse(
        cls,
        drop: str | float | None,
        size: str | float | None,
        latency: str | float | None,
        metric: Metric,
        score: float,
    ) -> Limits:
        """Bounds as the user wrote them.

        Args:
          drop: `0.5pt` (points, for metrics in percent), `0.5%` (of the float model's score), or a plain number in the
            metric's unit where it has none.
          size: `60kB`, `1.5MB`, or bytes.
          latency: `3ms`, `800us`; milliseconds without a unit.
          metric: The metric.
          score: What the float model scores.

        Raises:
          InputError: A number or unit that cannot be read.

        >>> from paring.measure.metrics import find_metric
        >>> Limits.parse("0.5%", "60kB", "3ms", find_metric("top1"), 80.0)
        Limits(drop=0.4, size=60000.0, latency=3.0)
        """
        return cls(
            None if drop is None else _drop(drop, metric, score),
            None if size is None else _number(size, _SIZES, "--max-size", "a size such as 60kB or 1.5MB"),
            None if latency is None else _number(latency, _TIMES, "--max-latency", "a time such as 3ms or 800us"),
        )

    def said(self) -> dict[str, float]:
        """Those that there are, by the names of a results file."""
        named = {"max_drop": self.drop, "max_size": self.size, "max_latency": self.latency}
        return {name: value for name, value in named.items() if value is not None}

    def misses(self, outcome: Outcome, latency: float | None, drop: float | None = None) -> float:
        """By how much a candidate misses the bounds, as a share of each and summed; 0 where it keeps all.

        Args:
          outcome: What was measured.
          latency: Milliseconds, None where it was not measured.
          drop: What counts as its drop; the measured one where None.
        """
        if outcome.failed or outcome.drop is None:
            return float("inf")
        drop = outcome.drop if drop is None else drop
        pairs = [(drop, self.drop), (float(outcome.bytes), self.size), (latency, self.latency)]
        over = [(value - bound, abs(bound)) for value, bound in pairs if value is not None and bound is not None]
        return sum(max(0.0, by) / max(bound, 1e-3) for by, bound in over)


def _drop(text: str | float, metric: Metric, score: float) -> float:
    found = re.fullmatch(r"\s*(-?[\d.]+(?:e-?\d+)?)\s*(%|pt|points?)?\s*", str(text), re.I)
    try:
        value = float(found[1]) if found else None
    except ValueError:
        value = None
    if found is None or value is None:
        raise InputError("bad --max-drop", expected="a number with a unit, such as 0.5pt or 0.5%", got=str(text))
    unit = (found[2] or "").lower()
    if unit == "%":
        return abs(score) * value / 100
    if metric.unit and not unit:
        raise InputError(
            "bad --max-drop", expected=f"a unit: {value:g}pt ({metric.unit} of {metric.name}) or {value:g}% (of the score)",
            got=str(text),
        )  # fmt: skip
    if unit and not metric.unit:
        raise InputError("bad --max-drop", expected=f"a plain number, for {metric.name} has no points", got=str(text))
    return value


def _number(text: str | float, units: dict[str, float], option: str, expected: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", str(text), re.I)
    if found is None or found[2].lower() not in units:
        raise InputError(f"bad {option}", expected=expected, got=str(text))
    return float(found[1]) * units[found[2].lower()]
