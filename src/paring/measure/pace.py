"""How long models take, each in a process of its own, started anew several times, round by round in turns.

A process may be a few percent slow for as long as it lives, because of where its memory lies: so a ratio needs several
launches. A machine has slow spells: so rounds are short, take turns, and are compared only with their neighbours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from paring.measure.latency import interleaved
from paring.measure.result import Timing
from paring.runtime import Worker

WALL, CPU = 0, 1
_ROUND = 0.0015  # seconds: shorter than the turns that a busy machine takes from one process to another
_WARM = 0.05  # seconds of calls ahead of the first round
_FEW = 6  # rounds at least, however slow the models are
_T = (12.71, 4.30, 3.18, 2.78)  # Student's t for a 95% interval, from two launches on


def measure(workers: Sequence[Worker], *, rounds: int, seconds: float, seed: int) -> tuple[np.ndarray, list[int]]:
    """Rounds of models that are loaded as `model` and have run once.

    Args:
      workers: One child per model.
      rounds: Number of rounds.
      seconds: No further round is begun after so long, but for the first few.
      seed: Of the order.

    Returns:
      float64 [rounds, models, 2], wall and CPU seconds of one call; and the calls in a round, by model.
    """
    calls = [_warm_up(worker) for worker in workers]
    turns = [partial(worker.beat, "model", number) for worker, number in zip(workers, calls, strict=True)]
    end = time.monotonic() + seconds
    found = []
    for times in interleaved(turns, seed):
        found.append(times)
        if len(found) >= rounds or (len(found) >= _FEW and time.monotonic() > end):
            break
    return np.array(found) / np.array(calls)[:, None], calls


def _warm_up(worker: Worker) -> int:
    """Calls for a while -> the calls that fill a round at the fastest pace seen."""
    passed, fastest, calls = 0.0, math.inf, 1
    while passed < _WARM:
        spent = max(worker.beat("model", calls)[WALL], 1e-9)
        passed, fastest = passed + spent, min(fastest, spent / calls)
        calls = max(1, math.ceil(_ROUND / fastest))
    return calls


def combine(launches: Sequence[np.ndarray], threads: int, calls: Sequence[int]) -> list[Timing]:
    """One `Timing` per model from the rounds of several launches.

    The ratio is the median over the launches of the median over a launch's rounds. One thread is compared by CPU time,
    which leaves out what other processes take; several by wall time, because they also wait for each other.

    Args:
      launches: For each launch float64 [rounds, models, 2], as `measure` gives it.
      threads: How many each model had.
      calls: In one round of the last launch, by model.

    >>> rounds = np.array([[[1.0, 1.0], [2.0, 2.0]]] * 3)
    >>> [timing.ratio for timing in combine([rounds, rounds], 1, [5, 5])]
    [1.0, 2.0]
    """
    whole = np.concatenate(launches)
    clock = CPU if threads == 1 and (whole[..., CPU] > 0).all() else WALL
    logs = np.array([np.median(np.log(times[..., clock] / times[:, :1, clock]), axis=0) for times in launches])
    ratios = np.exp(np.median(logs, axis=0))
    errors = [_half_width(column) for column in logs.T]
    low, median, high = np.percentile(whole[..., WALL], [25, 50, 75], axis=0) * 1e3
    cpu = np.median(whole[..., CPU], axis=0) * 1e3
    return [
        Timing(
            threads=threads,
            median_ms=float(median[place]),
            spread_ms=float(high[place] - low[place]),
            cpu_ms=float(cpu[place]),
            ratio=float(ratios[place]),
            error=None if errors[place] is None else float(errors[place] * ratios[place]),
            launches=len(launches),
            rounds=len(whole),
            calls=number,
        )
        for place, number in enumerate(calls)
    ]


def _half_width(values: np.ndarray) -> float | None:
    """Half the width of a 95% interval of the median of the launches; None for a single one.

    From six launches on it lies between two of them: the median of what they are drawn from is as likely above each of
    them as below. Fewer are taken to be normal.
    """
    count = len(values)
    if count < 2:
        return None
    if count < len(_T) + 2:
        return float(_T[count - 2] * values.std(ddof=1) / math.sqrt(count))
    tails = np.cumsum([math.comb(count, k) for k in range(count)]) / 2.0**count
    outside = max(0, int((tails <= 0.025).sum()) - 1)
    ordered = np.sort(values)
    return float(ordered[-1 - outside] - ordered[outside]) / 2


__all__ = ["combine", "measure"]
