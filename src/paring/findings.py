"""How far one operator's result lies from its own arithmetic, in units of what its kernel is allowed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.formats.tflite.constants import quantization_of, shape_of, type_name
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.twin import Probe


@dataclass
class Finding:
    """One operator on one path: by how much it differs from its arithmetic.

    Attributes:
      quanta: Largest difference in units of the allowed quantum (output quanta; for dynamic operators the share of the
        bound that run-time quantization may use).
      allowed: The bound, in the same units.
    """

    name: str
    native: str
    quanta: float
    allowed: float

    @property
    def right(self) -> bool:
        """Within the bound."""
        return self.quanta <= self.allowed


def measure(probe: Probe, outputs: list[np.ndarray]) -> Finding:
    """What one run of an instrumented model says of one operator."""
    got, twin = outputs[probe.place], outputs[probe.place + 1]
    if probe.grid is not None:
        scale, zero = float(probe.grid.scale[0]), int(probe.grid.zero_point[0])
        info = np.iinfo(got.dtype)
        wanted = np.clip(np.rint(twin.astype(np.float64) / scale) + zero, info.min, info.max)
        worst = _distance(got, wanted).max(initial=0)
        return Finding(probe.name, probe.native, float(worst), float(probe.quanta))
    error = _distance(got, twin)
    slack = 1e-4 * float(np.abs(_finite(twin)).max(initial=0)) + 1e-6
    if probe.reach is None or probe.source < 0:
        return Finding(probe.name, probe.native, float(error.max(initial=0) / slack), 1.0)
    values = _finite(outputs[probe.source])
    quantum = (max(float(values.max(initial=0)), 0.0) - min(float(values.min(initial=0)), 0.0)) / 255
    bound = quantum * probe.reach.astype(np.float64) + slack
    if bound.size > 1 and (not got.ndim or got.shape[-1] != bound.size):
        bound = bound.max()
    return Finding(probe.name, probe.native, float((error / bound).max(initial=0)), 1.0)


def _distance(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """|got - wanted|: 0 where both are the same infinity or both not-a-number, infinite where only one is."""
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        error = np.abs(a - b)
    return np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.zeros((), values.dtype))


def fit(sample: list[np.ndarray], model: TfliteModel, number: int) -> list[np.ndarray]:
    """The source's sample in the types of the written model's inputs; `number` is the subgraph it enters."""
    graph = model.subgraphs[number]
    fitted = []
    for value, index in zip(sample, (int(i) for i in graph.inputs), strict=True):
        tensor = graph.tensors[index]
        grid = quantization_of(model, graph, tensor)
        dtype = type_name(tensor)
        if value.dtype == np.float32 and dtype != "float32" and grid is not None:
            info = np.iinfo(dtype)
            codes = np.rint(value.astype(np.float64) / float(grid.scale[0])) + int(grid.zero_point[0])
            value = np.clip(codes, info.min, info.max).astype(dtype)
        fitted.append(value)
    return fitted


def real(value: np.ndarray, model: TfliteModel, number: int, position: int) -> np.ndarray:
    """An output of a subgraph as real numbers."""
    graph = model.subgraphs[number]
    grid = quantization_of(model, graph, graph.tensors[int(graph.outputs[position])])
    if grid is None or value.dtype.kind not in "iu":
        return value.astype(np.float64)
    return (value.astype(np.float64) - int(grid.zero_point[0])) * float(grid.scale[0])


def made_up(model: TfliteModel, number: int, seed: int) -> list[np.ndarray] | None:
    """Seeded inputs for a subgraph that no sample reaches.

    Normal numbers, codes around their zero point (so that results do not all saturate), zero for counters and indices.

    Returns:
      One array per input, or None where a shape is open or a type (resource, string) has no values to make up.
    """
    graph, rng = model.subgraphs[number], np.random.default_rng(seed)
    found = []
    for tensor in (graph.tensors[int(i)] for i in graph.inputs):
        dtype, shape = type_name(tensor), shape_of(tensor)
        if tensor.shape_signature is not None and (np.asarray(tensor.shape_signature) < 0).any():
            return None
        if dtype == "float32":
            found.append(rng.normal(size=shape).astype(np.float32))
        elif dtype in ("int8", "int16", "uint8") and (grid := quantization_of(model, graph, tensor)) is not None:
            info = np.iinfo(dtype)
            codes = np.rint(rng.normal(int(grid.zero_point[0]), (info.max - info.min) / 10, shape))
            found.append(np.clip(codes, info.min, info.max).astype(dtype))
        elif dtype in ("int32", "int64", "bool"):
            found.append(np.zeros(shape, dtype))
        else:
            return None
    return found
