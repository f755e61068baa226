"""`latency` on a clock of our own: nothing here depends on how fast the machine is."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest

from paring.errors import InputError
from paring.measure.latency import Latency, latency


class Machine:
    """A clock, and candidates that move it: `slowness(round)` scales every candidate of a round."""

    def __init__(self, slowness: Callable[[int], float] = lambda _: 1.0) -> None:
        self.now = 0.0
        self.called: list[str] = []
        self.slowness = slowness

    def clock(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            turn = self.called.count(name)
            self.called.append(name)
            self.now += seconds * self.slowness(turn)

        return run


def test_median_ratio_and_calls_are_those_of_the_clock():
    machine = Machine()
    runs = {"float": machine.candidate("float", 1.0), "int8": machine.candidate("int8", 0.25)}
    result = latency(runs, rounds=5, min_seconds=1.0, clock=machine.clock)
    assert list(result) == ["float", "int8"]
    assert result["float"].median_ms == pytest.approx(1000.0)
    assert result["int8"].median_ms == pytest.approx(250.0)
    assert result["float"].ratio == 1.0
    assert result["int8"].ratio == pytest.approx(0.25)
    assert (result["float"].calls, result["int8"].calls) == (1, 4)
    assert result["int8"].spread_ms == pytest.approx(0.0, abs=1e-9)


def test_ratio_survives_a_machine_that_slows_down():
    # Turn 0 is the warm-up. Every round is slower than the one before, for both alike.
    machine = Machine(slowness=lambda turn: 1.0 + turn)
    runs = {"a": machine.candidate("a", 1.0), "b": machine.candidate("b", 3.0)}
    result = latency(runs, rounds=4, min_seconds=0.0, clock=machine.clock)
    assert result["b"].ratio == pytest.approx(3.0)
    # Rounds of 2, 3, 4 and 5 seconds: quartiles 2.75 and 4.25.
    assert result["a"].median_ms == pytest.approx(3500.0)
    assert result["a"].spread_ms == pytest.approx(1500.0)


def test_every_candidate_runs_once_per_round_and_every_second_round_goes_backwards():
    machine = Machine()
    runs = {name: machine.candidate(name, 1.0) for name in "abcd"}
    latency(runs, rounds=6, min_seconds=0.0, clock=machine.clock)
    warm_up, *rounds = itertools.zip_longest(*[iter(machine.called)] * 4)
    assert warm_up == tuple("abcd")
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert all(back == there[::-1] for there, back in zip(rounds[::2], rounds[1::2], strict=True))
    assert len(set(rounds)) > 2


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_is_a_function_of_the_seed(seed: int):
    orders = []
    for _ in range(2):
        machine = Machine()
        latency({n: machine.candidate(n, 1.0) for n in "abcd"}, rounds=6, seed=seed, clock=machine.clock)
        orders.append(machine.called)
    assert orders[0] == orders[1]


def test_a_clock_that_stands_still_gives_finite_numbers():
    result = latency({"a": lambda: None, "b": lambda: None}, rounds=2, min_seconds=0.0, clock=lambda: 0.0)
    assert result["b"].ratio == 1.0


def test_the_default_clock_runs():
    result = latency({"a": lambda: None}, rounds=2, min_seconds=0.0)
    assert result["a"].rounds == 2


def test_latency_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Latency(1.0, 0.0, 1.0, 1, 1).ratio = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("runs", "rounds", "message"),
    [
        ({}, 3, "cannot measure latency: expected at least one candidate, got none."),
        ({"a": lambda: None}, 0, "cannot measure latency: expected at least 1 round, got 0."),
    ],
)
def test_nothing_to_measure_is_refused(runs: dict[str, Callable[[], None]], rounds: int, message: str):
    with pytest.raises(InputError, match=message):
        latency(runs, rounds=rounds)
