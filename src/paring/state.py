"""Grids of what an operator keeps for itself in static forms: recurrent state, and results only its kernel sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from paring.calibration import TensorStatistics
from paring.compress.base import Encoded
from paring.errors import InputError
from paring.graph import Graph, Op, Quantization, TensorId, Weight
from paring.grids import activation_grid

ROOM = 2.0  # more than was seen: the last state of each run is, not those in between
CELL = 16.0  # a cell state's magnitude that is always made room for: 15 bits are more than the kernels use
CELL_MAX = 64.0  # the largest that they take


@dataclass(frozen=True)
class Kept:
    """The grids, in the order of the operator's demands.

    Attributes:
      grids: One for each state.
      note: What was taken for granted.
      beyond: Why no static kernel can keep this state; empty where one can.
    """

    grids: tuple[Quantization, ...]
    note: str = ""
    beyond: str = ""


def kept(graph: Graph, op: Op, seen: Mapping[TensorId, TensorStatistics], result: Quantization) -> Kept:
    """Solves the state of one operator.

    Args:
      graph: Where the operator is.
      op: The operator; its `demands.state` says what to solve.
      seen: Statistics of state tensors.
      result: The grid of its first result.

    Raises:
      InputError: A state whose range cannot be known beforehand has no statistics.
    """
    grids, note, beyond = [], "", ""
    for number, use in enumerate(op.demands.state if op.demands else ()):
        tensor = op.inputs[use.input] if use.input is not None else None
        found = seen.get(tensor) if tensor is not None else None
        reach = ROOM * max(abs(found.low), abs(found.high)) if found is not None and found.count else None
        weights = [t.weight for w, t in graph.weights_of(op) if w.meets == number and t.weight is not None]
        if use.grid == "result" or (use.grid == "hidden" and not weights):
            grids.append(result)
        elif use.grid == "hidden":
            grids.append(_symmetric(1 / 127, "int8"))
        elif use.grid == "unused":
            grids.append(_symmetric(2.0**-12, "int16"))
        elif use.grid == "cell":
            clip = float(op.params.get("cell_clip", 0.0))
            limit = clip if 0 < clip <= CELL_MAX else max(CELL, reach or 0.0)
            if reach is None and limit == CELL:
                note = f"its cell state is taken to stay within {CELL:g}: nothing was seen of it"
            if limit > CELL_MAX:
                beyond = f"its cell state reaches {limit / ROOM:.3g}, and the int8 kernels keep up to {CELL_MAX:g}"
            # The kernels shift by the scale: only a power of two is right.
            grids.append(_symmetric(2.0 ** (max(0, np.ceil(np.log2(min(limit, CELL_MAX)))) - 15), "int16"))
        elif reach is None:
            raise InputError(
                "no calibration statistics",
                where=f"the state of {op.name}",
                todo="Give data that reaches it (--data), or leave the operator float (--skip)",
            )
        else:
            sums = [_summed(weight, graph.tensors[op.outputs[0]].shape[-1]) for weight in weights]
            grids.append(_symmetric(max([reach / 32767, 1e-12, *(reach * s / 2**30 for s in sums)]), "int16"))
    return Kept(tuple(grids), note, beyond)


def wide(weight: Weight) -> Encoded:
    """Weights that a kernel wants in int16, one scale for the tensor."""
    values = np.asarray(weight.read(), np.float32)
    grid = activation_grid(float(values.min(initial=0.0)), float(values.max(initial=0.0)), "int16")
    return Encoded(np.rint(values / grid.scale).astype(np.int16), "int16", grid)


def _summed(weight: Weight, results: int) -> float:
    """The largest sum of absolute codes behind one result: the kernel adds up products in 32 bits."""
    rows = np.abs(wide(weight).values.astype(np.int64)).sum(axis=1)
    return float(rows.reshape(results, -1).sum(axis=1).max(initial=0))


def _symmetric(scale: float, dtype: str) -> Quantization:
    return Quantization(np.array([scale], np.float32), np.zeros(1, np.int64), dtype)
