"""Activation grids: which tensors keep their own range, and how grids travel through operators that must not rescale.

The rules are those of TensorFlow's converter, so that the same ranges give the same integers (docs/design.md says how
that was established): a grid flows forward through a same-scale operator with one real operand, backward into the operands of
one with several (CONCATENATION), and where two grids meet the reader gets a requantized copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from paring.decision import STATIC, Plan
from paring.graph import Graph, Op, OpId, Quantization, TensorId, Weight

LEVELS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32767, 32767)}


def activation_grid(low: float, high: float, dtype: str) -> Quantization:
    """The grid of a range: asymmetric with an exact zero for int8, symmetric for int16.

    Args:
      low: Smallest value; the range is widened to hold 0.
      high: Largest value.
      dtype: int8, uint8 or int16.

    >>> grid = activation_grid(0.0, 2.55, "int8")
    >>> round(float(grid.scale[0]), 6), int(grid.zero_point[0])
    (0.01, -128)
    """
    lowest, highest = LEVELS[dtype]
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if high - low < 1e-6:
        low, high = low - 1e-6, high + 1e-6
    if dtype == "int16":
        scale, zero = np.float32(max(-low, high)) / np.float32(highest), 0
    else:
        # The scale in float32, the zero point from the minimum in double: bit for bit the converter's.
        span = float(np.float32(high)) - float(np.float32(low))
        far = span > float(np.finfo(np.float32).max)  # no float32 holds the span, though one holds the scale
        scale = np.float32(span / (highest - lowest)) if far else np.float32(span) / np.float32(highest - lowest)
        zero = int(np.clip(_round_away(np.float32(lowest - low / float(scale))), lowest, highest))
    return Quantization(np.array([scale], np.float32), np.array([zero], np.int64), dtype)


def symmetric(grid: Quantization) -> Quantization:
    """The int8 grid with zero point 0 that holds the range of `grid`; codes stay within [-127, 127]."""
    if not grid.zero_point.any():
        return grid
    scale, zero = float(grid.scale[0]), int(grid.zero_point[0])
    reach = max(abs(-128 - zero), abs(127 - zero)) * scale
    return Quantization(np.array([reach / 127], np.float32), np.zeros(1, np.int64), grid.dtype)


def _round_away(value: np.float32) -> float:
    return float(np.trunc(value) + (np.sign(value) if abs(value - np.trunc(value)) >= 0.5 else 0))


@dataclass(frozen=True)
class Grids:
    """Solved grids by activation type: what a tensor is written in, and what each operand is read in.

    `carried` holds the one grid of all names of a value that a loop or branch carries: its form at a body's border.
    """

    written: Mapping[tuple[TensorId, str], Quantization]
    read: Mapping[tuple[OpId, int], Quantization]
    carried: Mapping[TensorId, Quantization] = field(default_factory=dict)


class Propagation:
    """Same-scale propagation for the static operators of one activation type."""

    def __init__(self, plan: Plan, dtype: str) -> None:
        """Collects the static operators whose activations are `dtype`."""
        self.graph: Graph = plan.graph
        self.dtype = dtype
        self.ops = [d.op for d in plan.decisions if d.mode == STATIC and d.activations == dtype]
        self.root = united(self.ops)
        self.joined = {self.node(t) for op in self.ops for tie in op.ties for t in tie if t in op.outputs}
        self.makers: dict[TensorId, list[Op]] = {}
        self.users: dict[TensorId, list[Op]] = {}
        for op in self.ops:
            for tensor in self.results(op):
                self.makers.setdefault(tensor, []).append(op)
            for tensor in self.operands(op):
                self.users.setdefault(tensor, []).append(op)
        self.carried: dict[TensorId, Quantization] = {}
        for tensor in [*self.makers, *self.users]:
            grid = plan.graph.tensors[tensor].quantization
            if grid is not None and grid.dtype in ("int8", "uint8") and dtype == "int8":
                self.carried[tensor] = _signed(grid)
            elif grid is not None and grid.dtype in ("int8", "uint8"):  # a range that somebody trained or fixed
                self.carried[tensor] = activation_grid(*_span(grid), dtype)
        for op in reversed(self.ops):  # a range behind what only moves values is that of the values
            if self._same(op) and self._reals(op) == 1 and not op.ties:
                known = [self.carried[t] for t in self.results(op) if t in self.carried]
                for tensor in self.operands(op) if known else ():
                    self.carried.setdefault(tensor, known[0])

    def node(self, tensor: TensorId) -> TensorId:
        """The representative of tensors that are one value under several names."""
        return self.root.get(tensor, tensor)

    def members(self, node: TensorId) -> list[TensorId]:
        """All tensors that a node stands for."""
        return [t for t, root in self.root.items() if root == node] or [node]

    def operands(self, op: Op) -> list[TensorId]:
        """Real-valued, non-constant inputs."""
        ids = [op.inputs[i] for i in op.demands.data] if op.demands else []
        return [self.node(t) for t in ids if t is not None and self.graph.tensors[t].weight is None]

    def results(self, op: Op) -> list[TensorId]:
        """Real-valued outputs."""
        return [self.node(t) for t in self.made_by(op)]

    def made_by(self, op: Op) -> list[TensorId]:
        """Real-valued outputs, under their own names."""
        return [op.outputs[i] for i in op.demands.results] if op.demands else []

    def _same(self, op: Op) -> bool:
        return bool(op.demands and op.demands.same)

    def tables(self, tensor: TensorId) -> list[Weight]:
        """The constants whose codes a tensor takes over as they are."""
        makers = [op for op in self.makers.get(tensor, ()) if self._same(op)]
        return [t.weight for op in makers for _, t in self.graph.weights_of(op) if t.weight is not None]

    def _symmetric(self, op: Op) -> tuple[int, ...]:
        """Inputs that need zero point 0."""
        wanted = op.demands.symmetric if op.demands and self.dtype == "int8" else ()
        return tuple(i for i in wanted if i < len(op.inputs) and op.inputs[i] is not None)

    def _fixed(self, op: Op) -> Quantization | None:
        found = op.demands.fixed.get(self.dtype) if op.demands else None
        return None if found is None else Quantization(
            np.array([found[0]], np.float32), np.array([found[1]], np.int64), self.dtype
        )  # fmt: skip

    def _reals(self, op: Op) -> int:
        """Real-valued operands, constants included."""
        return sum(op.inputs[i] is not None for i in op.demands.data) if op.demands else 0

    def owners(self) -> list[TensorId]:
        """The tensors whose own range decides; only these need statistics.

        What a loop carries, or several branches make, has a range that none of its makers knows.
        """
        everything = list(dict.fromkeys([*self.users, *self.makers]))
        dropped: set[TensorId] = set()
        for tensor in everything:
            if any(self._fixed(op) for op in self.makers.get(tensor, ())):
                dropped.add(tensor)
            for op in self.users.get(tensor, ()):
                if self._same(op) and self._reals(op) < 2:
                    dropped.update(self.results(op))
        dropped -= self.joined
        todo = [t for t in everything if t not in dropped and t not in self.joined]
        visited: set[TensorId] = set()
        while todo:
            for op in self.makers.get(todo.pop(), ()):
                reached = [t for t in self.operands(op) if t not in visited | self.joined] if self._same(op) else []
                visited.update(reached)
                dropped.update(reached)
                todo.extend(reached)
        return [t for t in everything if t not in dropped]

    def solve(self, ranges: Mapping[TensorId, tuple[float, float]]) -> Grids:
        """Gives every operand and result its grid; `ranges` holds those of `owners()`."""
        own = {t: self.carried.get(t) or activation_grid(*ranges[t], self.dtype) for t in self.owners()}
        for tensor, op in ((t, op) for t in own for op in self.users.get(t, ())):
            if any(self.node(op.inputs[i]) == tensor for i in self._symmetric(op)):  # type: ignore[arg-type]
                own[tensor] = symmetric(own[tensor])
        for tensor in self.joined & own.keys() - self.carried.keys():
            own[tensor] = self._taken_over(tensor, own[tensor])
        grid: dict[TensorId, Quantization] = dict(own)
        made: dict[TensorId, Quantization] = {}
        read: dict[tuple[OpId, int], Quantization] = {}
        pending = list(self.ops)
        done: set[OpId] = set()

        def settle(tensor: TensorId, got: Quantization) -> None:
            if tensor not in grid:
                grid[tensor] = got
                pending.extend(self.users.get(tensor, ()))
                pending.extend(self.makers.get(tensor, ()))

        while pending:
            op = pending.pop()
            if op.id in done or op.demands is None:
                continue
            fixed = self._fixed(op)
            if fixed is not None:
                for tensor in self.made_by(op):
                    settle(self.node(tensor), fixed)
                    made[tensor] = fixed
            if not self._same(op):
                done.add(op.id)
                continue
            got = self._shared(op, own, grid)
            if got is None:
                continue
            got = symmetric(got) if self._symmetric(op) else got
            done.add(op.id)
            for index in op.demands.data:
                operand = op.inputs[index]
                if operand is None:
                    continue
                read[op.id, index] = got
                if self.graph.tensors[operand].weight is None:
                    settle(self.node(operand), got)
            for tensor in self.made_by(op):
                settle(self.node(tensor), got)
                if not grid[self.node(tensor)].same_grid(got):
                    made[tensor] = got
        for tensor in self.makers.keys() | self.users.keys():
            if tensor not in grid:  # a ring of same-scale operators that no range reaches
                grid[tensor] = activation_grid(-1.0, 1.0, self.dtype)
        carried = {t: grid[root] for t, root in self.root.items() if root in grid}
        written = {(t, self.dtype): made.get(t, g) for t, g in {**grid, **carried}.items()}
        for op in self.ops:
            if op.demands is None:
                continue
            for index, tie in zip(op.demands.data, op.ties, strict=False):
                read[op.id, index] = carried[tie[0]]
            for index in op.demands.data:
                operand = op.inputs[index]
                if operand is not None and self.graph.tensors[operand].weight is None:
                    here = grid[self.node(operand)]
                    read.setdefault((op.id, index), symmetric(here) if index in self._symmetric(op) else here)
        return Grids(written, read, carried)

    def _taken_over(self, node: TensorId, own: Quantization) -> Quantization:
        """The fixed grid of a maker inside a body where it holds the whole range about as finely: no requantization."""
        for op in self.makers.get(node, ()):
            fixed = self._fixed(op)
            if fixed is not None:
                (low, high), (least, most) = _span(own), _span(fixed)
                if least - own.scale[0] <= low and high <= most + own.scale[0] and most - least <= 2 * (high - low):
                    return fixed
        return own

    def _shared(
        self, op: Op, own: Mapping[TensorId, Quantization], grid: Mapping[TensorId, Quantization]
    ) -> Quantization | None:
        """The one grid of a same-scale operator: an own range before an inherited one, the sole port first."""
        ins, outs = self.operands(op), self.results(op)
        for known in (own, grid):
            here_in, here_out = [t for t in ins if t in known], [t for t in outs if t in known]
            if len(op.inputs) == 1 and here_in:
                return known[here_in[0]]
            if len(op.outputs) == 1 and here_out:
                return known[here_out[0]]
            if here_in or here_out:
                return known[(here_in + here_out)[0]]
        return None


def _span(grid: Quantization) -> tuple[float, float]:
    """The real numbers at both ends of a grid."""
    lowest, highest = LEVELS[grid.dtype]
    scale, zero = float(grid.scale[0]), int(grid.zero_point[0])
    return (lowest - zero) * scale, (highest - zero) * scale


def united(ops: Iterable[Op]) -> dict[TensorId, TensorId]:
    """Union-find over the ties of loops and branches: tensor -> representative."""
    parent: dict[TensorId, TensorId] = {}

    def find(tensor: TensorId) -> TensorId:
        while parent.setdefault(tensor, tensor) != tensor:
            parent[tensor] = parent[parent[tensor]]
            tensor = parent[tensor]
        return tensor

    for op in ops:
        for tie in op.ties:
            for other in tie[1:]:
                parent[find(other)] = find(tie[0])
    return {tensor: find(tensor) for tensor in list(parent)}


def _signed(grid: Quantization) -> Quantization:
    """A uint8 grid as int8."""
    if grid.dtype != "uint8":
        return grid
    return Quantization(grid.scale, grid.zero_point - 128, "int8", grid.axis)
