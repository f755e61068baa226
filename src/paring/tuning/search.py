"""The search itself, on plain numbers: which scheme each layer gets, from the smallest model to the most exact one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

Allocation: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Option:
    """What one scheme on one layer costs.

    Attributes:
      scheme: Its name.
      cost: What is to be kept small: bytes, or bytes and time weighed together.
      noise: What it does to the output alone, as a share of the output's power.
    """

    scheme: str
    cost: float
    noise: float


def ladder(options: Mapping[str, Sequence[Option]]) -> list[Allocation]:
    """All allocations that no other beats, if noises add up: from the cheapest, always the step that gains most per cost.

    Each layer's options are reduced to their lower convex hull; the steps of all hulls in the order of their slopes are the
    solutions of the Lagrangian (Shoham and Gersho, Efficient bit allocation for an arbitrary set of quantizers, 1988).

    Args:
      options: By layer, at least one each.

    Returns:
      (layer, scheme) pairs in the order of `options`, the cheapest allocation first.

    >>> found = ladder({"a": [Option("int4", 10, 0.5), Option("int8", 20, 0.01)], "b": [Option("int8", 5, 0.1)]})
    >>> [dict(allocation)["a"] for allocation in found]
    ['int4', 'int8']
    """
    chosen: dict[str, str] = {}
    steps: list[tuple[float, int, str, str]] = []
    for layer, found in options.items():
        hull = _hull(found)
        chosen[layer] = hull[0].scheme
        for number, (a, b) in enumerate(pairwise(hull)):
            steps.append(((a.noise - b.noise) / (b.cost - a.cost), -number, layer, b.scheme))
    rungs = [tuple(chosen.items())]
    for _, _, layer, scheme in sorted(steps, key=lambda step: (-step[0], -step[1])):
        chosen[layer] = scheme
        rungs.append(tuple(chosen.items()))
    return rungs


def _hull(options: Iterable[Option]) -> list[Option]:
    """The lower convex hull of cost and noise, the cheapest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.noise)):
        if hull and (option.noise >= hull[-1].noise or option.cost <= hull[-1].cost):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (a.noise - b.noise) / (b.cost - a.cost)


def smaller(allocation: Allocation, options: Mapping[str, Sequence[Option]]) -> list[Allocation]:
    """Allocations with one layer a scheme cheaper, those that save most for the noise they add first."""
    found = []
    for place, (layer, scheme) in enumerate(allocation):
        now = next(o for o in options[layer] if o.scheme == scheme)
        for other in options[layer]:
            if other.cost < now.cost:
                changed = (*allocation[:place], (layer, other.scheme), *allocation[place + 1 :])
                found.append(((now.cost - other.cost) / max(other.noise - now.noise, 1e-12), changed))
    return [allocation for _, allocation in sorted(found, key=lambda item: -item[0])]


def first_right(count: int, ask: Callable[[list[int]], list[bool]], width: int) -> int | None:
    """The first index that is right, where right ones follow wrong ones; `width` are asked at a time.

    >>> first_right(10, lambda places: [p >= 7 for p in places], 2)
    7
    """
    low, high = 0, count  # all below low are wrong, high and above are right or do not exist
    while low < high:
        span = high - low
        places = sorted({low + (span * (i + 1)) // (width + 1) for i in range(width)} - {high})
        for place, right in zip(places, ask(places), strict=True):
            if right:
                high = min(high, place)
            elif place < high:
                low = max(low, place + 1)
    return high if high < count else None


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (cost, loss; both better when smaller) no other one beats.

    >>> pareto([(1, 5), (2, 3), (3, 4), (2, 3)])
    [True, True, False, True]
    """
    return [not any((c <= cost and d <= loss) and (c < cost or d < loss) for c, d in points) for cost, loss in points]
