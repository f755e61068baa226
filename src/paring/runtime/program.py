"""A model as steps: slices that interpreters run, loops and branches followed here, so that bodies can be seen into.

LiteRT's interpreter shows only what its outermost subgraph holds. A program cuts a model at its loops and branches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from paring.calibration import TensorStatistics
from paring.graph import TensorId


@dataclass(frozen=True)
class Step:
    """One step of a routine.

    Attributes:
      kind: `run` (a slice), `while` (condition and body), `if` (then and else) or `call`.
      target: The slice's number, or the numbers of the routines.
      inputs: Tensors of this routine that go in.
      outputs: Tensors that come out.
    """

    kind: str
    target: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Routine:
    """One subgraph as steps."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Program:
    """A whole entry of a model.

    Attributes:
      entry: The routine that samples enter.
      routines: By subgraph.
      slices: A model file for each slice.
      constants: Values that go into a loop or branch, or out of a routine, as they are stored.
      watched: Tensors that statistics may be asked of, in the order of the request.
    """

    entry: int
    routines: Mapping[int, Routine]
    slices: tuple[str, ...]
    constants: Mapping[TensorId, np.ndarray] = field(default_factory=dict)
    watched: tuple[TensorId, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """Plain data for the pipe; the values of the constants travel beside it."""
        routines = [
            [number, r.inputs, r.outputs, [[s.kind, s.target, s.inputs, s.outputs] for s in r.steps]]
            for number, r in self.routines.items()
        ]
        named = {"constants": list(self.constants), "watched": self.watched, "slices": self.slices}
        return {"entry": self.entry, "routines": routines, **named}

    @classmethod
    def from_data(cls, data: Mapping[str, Any], values: Sequence[np.ndarray]) -> Program:
        """What `to_data` gave."""
        routines = {
            number: Routine(tuple(ins), tuple(outs), tuple(Step(s[0], *(tuple(part) for part in s[1:])) for s in steps))
            for number, ins, outs, steps in data["routines"]
        }
        constants = {(n, i): value for (n, i), value in zip(data["constants"], values, strict=True)}
        watched = tuple((n, i) for n, i in data["watched"])
        return cls(data["entry"], routines, tuple(data["slices"]), constants, watched)


class Slice(Protocol):
    """What runs a slice: a loaded model."""

    def run(self, arrays: list[np.ndarray], *, reset: bool = True) -> list[np.ndarray]:
        """Inputs in the model's order -> outputs."""


class ProgramSession:
    """One loaded program; it runs and observes as a loaded model does."""

    def __init__(self, program: Program, load: Callable[[str], Slice]) -> None:
        """Loads every slice with `load`."""
        self.program = program
        self.slices = [load(path) for path in program.slices]
        self.statistics: list[tuple[int, set[str], TensorStatistics]] = []
        self._kept: dict[TensorId, tuple[set[str], TensorStatistics]] = {}
        self._started: set[int] = set()
        self._captured: dict[int, list[list[np.ndarray]]] = {}
        self._collected: dict[TensorId, list[np.ndarray]] = {}

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Runs one sample."""
        self._started.clear()
        self._captured.clear()
        return self._call(self.program.entry, arrays)

    def observe(self, arrays: list[np.ndarray]) -> None:
        """Runs one sample and takes what it passes through into the statistics, every iteration of every loop."""
        self._kept = {self.program.watched[place]: (wanted, found) for place, wanted, found in self.statistics}
        try:
            self.run(arrays)
        finally:
            self._kept = {}

    def collect(self, arrays: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Runs one sample -> every value that each watched tensor took, in order."""
        self._collected = {tensor: [] for tensor in self.program.watched}
        try:
            self.run(arrays)
            return [self._collected[tensor] for tensor in self.program.watched]
        finally:
            self._collected = {}

    def captured(self, number: int) -> list[list[np.ndarray]]:
        """What the routine read in its first and its last call of the latest run."""
        return self._captured.get(number, [])

    def _call(self, number: int, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        routine = self.program.routines[number]
        self._captured[number] = [*self._captured.get(number, [])[:1], list(arrays)]
        values = {index: value for (n, index), value in self.program.constants.items() if n == number}
        self._bind(number, values, routine.inputs, arrays)
        for step in routine.steps:
            given = [values[i] for i in step.inputs]
            if step.kind == "run":
                got = self._run(step.target[0], given)
            elif step.kind == "while":
                got = self._while(step.target[0], step.target[1], given)
            elif step.kind == "if":
                got = self._call(step.target[0 if bool(given[0].reshape(-1)[0]) else 1], given[1:])
            else:
                got = self._call(step.target[0], given)
            self._bind(number, values, step.outputs, got)
        return [values[i] for i in routine.outputs]

    def _run(self, place: int, arrays: list[np.ndarray]) -> list[np.ndarray]:
        first = place not in self._started
        self._started.add(place)
        return self.slices[place].run(arrays, reset=first)

    def _while(self, condition: int, body: int, carried: list[np.ndarray]) -> list[np.ndarray]:
        while bool(self._call(condition, carried)[0].reshape(-1)[0]):
            carried = self._call(body, carried)
        return carried

    def _bind(
        self, number: int, values: dict[int, np.ndarray], places: Sequence[int], arrays: Sequence[np.ndarray]
    ) -> None:
        for index, array in zip(places, arrays, strict=True):
            values[index] = array
            if (number, index) in self._collected:
                self._collected[number, index].append(array)
            kept = self._kept.get((number, index))
            if kept is not None:
                kept[1].update(array, kept[0])
