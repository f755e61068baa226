"""How long candidates take, measured side by side so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import TypeVar

import numpy as np

from paring.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Latency:
    """What one candidate took, over the rounds of `latency`.

    Attributes:
      median_ms: Median of the rounds, milliseconds for one call.
      spread_ms: Interquartile range of the rounds, milliseconds.
      ratio: Median over the rounds of this candidate's time divided by the first candidate's in the same round:
        1 for the first itself, below 1 where this one is faster.
      rounds: Number of rounds.
      calls: Calls in one round; a round's time is their mean.
    """

    median_ms: float
    spread_ms: float
    ratio: float
    rounds: int
    calls: int


def latency(
    runs: Mapping[str, Callable[[], None]],
    *,
    rounds: int = 30,
    min_seconds: float = 0.02,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Times candidates round by round, each candidate once in every round.

    The order is that of `interleaved`. Compare candidates by `ratio`, not by their medians: a slow spell of the machine
    cancels out of it. It does not isolate: candidates share the process, its caches and its memory.

    Args:
      runs: What to call, by name; the first is what the ratios refer to.
      rounds: Number of rounds, at least 1.
      min_seconds: A candidate is first called for at least this many seconds to warm up, and then in each round as
        often as filled that time, at least once.
      seed: Of the order.
      clock: Seconds so far. The default is wall time, what a user waits for; `time.thread_time` leaves out what other
        processes take, and is right only for a candidate that works in the calling thread.

    Returns:
      One `Latency` per candidate, in the order of `runs`.

    Raises:
      InputError: There is nothing to run, or less than one round is asked for.

    >>> result = latency({"list": lambda: sorted([2, 1]), "empty": lambda: None}, rounds=3, min_seconds=0)
    >>> result["list"].ratio, list(result)
    (1.0, ['list', 'empty'])
    """
    if not runs:
        raise InputError("cannot measure latency", expected="at least one candidate", got="none")
    if rounds < 1:
        raise InputError("cannot measure latency", expected="at least 1 round", got=str(rounds))
    names = list(runs)
    calls = [_warm_up(runs[name], min_seconds, clock) for name in names]
    measures = [partial(_seconds, runs[name], number, clock) for name, number in zip(names, calls, strict=True)]
    times = np.array(list(islice(interleaved(measures, seed), rounds)))
    low, median, high = np.percentile(times, [25, 50, 75], axis=0)
    ratios = np.median(times / times[:, :1], axis=0)
    return {
        name: Latency(
            median_ms=float(median[index]) * 1e3,
            spread_ms=float(high[index] - low[index]) * 1e3,
            ratio=float(ratios[index]),
            rounds=rounds,
            calls=calls[index],
        )
        for index, name in enumerate(names)
    }


def interleaved(measures: Sequence[Callable[[], T]], seed: int = 0) -> Iterator[list[T]]:
    """Endless rounds of measurements, each candidate once in every round -> what they gave, in the order of `measures`.

    The order is shuffled, and every second round goes backwards, so that no candidate always runs in the wake of the
    same neighbour, and what gets slower all the time gets slower for all alike.
    """
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for number in count():
        order = order[::-1] if number % 2 else rng.permutation(len(measures)).tolist()
        found = {index: measures[index]() for index in order}
        yield [found[index] for index in range(len(measures))]


def _warm_up(run: Callable[[], None], min_seconds: float, clock: Callable[[], float]) -> int:
    """Calls `run` until `min_seconds` have passed; the calls that fill `min_seconds` at the fastest call's pace."""
    passed, fastest = 0.0, math.inf
    while True:
        seconds = _seconds(run, 1, clock)
        passed, fastest = passed + seconds, min(fastest, seconds)
        if passed >= min_seconds:
            return max(1, math.ceil(min_seconds / fastest))


def _seconds(run: Callable[[], None], calls: int, clock: Callable[[], float]) -> float:
    """Mean seconds of `calls` calls."""
    start = clock()
    for _ in range(calls):
        run()
    # A clock that did not move would make a ratio of 0 / 0; a nanosecond is below what any of them resolves.
    return max(clock() - start, 1e-9) / calls
