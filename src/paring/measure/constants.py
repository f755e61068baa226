"""Constants of both models as real numbers: how alike they are, and what rounding did to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from paring.compress.encodings import decode
from paring.compress.support import PROMISE
from paring.graph import Graph, Tensor, WeightUse
from paring.measure.noise import Growing, decibel
from paring.measure.result import Histogram
from paring.measure.units import LINEAR, Unit

_ROWS = 64  # channels, and values of each, that a comparison looks at
_FEW = 64  # distinct values of a channel that are no accident
_CHUNK = 1 << 22  # elements in memory at a time


def likeness(x: np.ndarray | None, y: np.ndarray | None) -> float | None:
    """Correlation of two samples of constants (`sample`); None where there are none, or of unlike shape.

    The order of dimensions does not matter (a product with a transposed constant), nor does a factor for each channel.

    >>> likeness(np.array([[0.6, 0.8]]), np.array([[0.8, 0.6]]))
    0.96
    """
    if x is None or y is None or x.shape != y.shape:
        return None
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.vdot(x, y)) / norm if norm else None


def chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    """The real values of a constant, float32, some rows of its first dimension at a time."""
    weight = tensor.weight
    assert weight is not None
    rows = weight.shape[0] if weight.shape else 1
    step = max(1, _CHUNK * rows // max(1, weight.size))
    for start in range(0, rows, step):
        yield _real(tensor, start, min(rows, start + step))
        weight.release()


def channel(unit: Unit) -> int | None:
    """The dimension of the unit's constant that its result's channels come from; None where it is no weight."""
    use = _use(unit)
    if use is None or unit.constant is None:
        return None
    ndim = len(unit.constant.shape)
    if use.axis is not None or not use.reduced or ndim < 2:
        return use.axis if use.axis is None else use.axis % ndim
    return ndim - 1 if use.reduced[-1] % ndim == ndim - 2 else ndim - 2


def _use(unit: Unit) -> WeightUse | None:
    demands, constant = unit.head.demands, unit.constant
    if demands is None or constant is None:
        return None
    return next((u for u in demands.weights if u.input < len(unit.head.inputs)
                 and unit.head.inputs[u.input] == constant.id), None)  # fmt: skip


def _real(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    assert tensor.weight is not None
    values, grid = tensor.weight.read(start, stop), tensor.quantization
    if values.dtype.kind == "f" or grid is None:
        return np.asarray(values, np.float32)
    if grid.axis == 0 and (grid.block or grid.scale.size > 1):
        grid = replace(grid, scale=grid.scale[start:stop], zero_point=grid.zero_point[start:stop])
    return decode(values, grid)


def sample(unit: Unit) -> np.ndarray | None:
    """Some values of some channels of a unit's largest constant, each channel of norm 1.

    Returns:
      float32 [channels, values], at most 64 of each; one channel where it is no weight; None without a constant.
    """
    tensor = unit.constant
    if tensor is None or tensor.weight is None or tensor.weight.size < 2:
        return None
    axis, shape = channel(unit), tensor.weight.shape
    if len(shape) > 1 and (axis in (0, None) or len(shape) == 2):
        values = np.concatenate([_real(tensor, row, row + 1) for row in _some(shape[0])])
    else:
        values = np.concatenate([np.atleast_1d(chunk) for chunk in chunks(tensor)])
    if axis is not None:
        values = np.moveaxis(values, axis, 0)
        values = values[_some(len(values))]
    values = values.reshape(len(values) if axis is not None else 1, -1).astype(np.float64)
    values[~np.isfinite(values)] = 0
    if unit.head.kind not in LINEAR:
        values = values - values.mean()
    values = values[:, _some(values.shape[1])]
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    tensor.weight.release()
    return np.asarray(values / np.where(norm > 0, norm, 1), np.float32)


def _some(count: int) -> np.ndarray:
    """At most `_ROWS` numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, _ROWS)).astype(np.int64))


def weight_db(graphs: tuple[Graph, Graph], source: Unit, optimized: Unit) -> float | None:
    """Signal to noise of the stored weights of a layer, in dB; None where they are not laid out alike."""
    mine, theirs = (
        [t for _, t in graph.weights_of(unit.head)] for graph, unit in zip(graphs, (source, optimized), strict=True)
    )
    if not mine or len(mine) != len(theirs):
        return None
    signal = noise = 0.0
    for a, b in zip(mine, theirs, strict=True):
        assert a.weight is not None and b.weight is not None
        if a.weight.shape == b.weight.shape:
            parts = zip(chunks(a), chunks(b), strict=True)
        elif a.weight.shape == b.weight.shape[::-1] and len(a.weight.shape) == 2:
            parts = zip([np.concatenate(list(chunks(a)))], [np.concatenate(list(chunks(b))).T], strict=True)
        else:
            return None
        for x, y in parts:
            signal += float(np.square(x, dtype=np.float64).sum())
            with np.errstate(all="ignore"):  # what a broken file holds may be anything
                noise += float(np.square(y.astype(np.float64) - x).sum())
    return decibel(signal, noise)


def shared(unit: Unit) -> str:
    """What the weights of a layer have in common: exact zeros, and few values in every channel; empty where they do not."""
    tensor, axis = unit.constant, channel(unit)
    if tensor is None or tensor.weight is None or axis is None or not tensor.weight.size:
        return ""
    size, per_channel = tensor.weight.size, tensor.weight.size // tensor.weight.shape[axis]
    zeros, most = 0, 0
    for part in chunks(tensor) if axis == 0 else [np.concatenate(list(chunks(tensor)))]:
        rows = np.moveaxis(part, axis, 0).reshape(part.shape[axis], -1)
        zeros += rows.size - int(np.count_nonzero(rows))
        if most <= _FEW:
            ordered = np.sort(rows, axis=1)
            most = max(most, 1 + int((ordered[:, 1:] != ordered[:, :-1]).sum(axis=1).max()))
    natural = 15 if tensor.weight.stored == "int4" else _FEW + 1  # values that every int4 channel has
    found = [f"{zeros / size:.0%} zeros"] if zeros >= PROMISE * size else []
    few = most < natural and per_channel >= 4 * most
    return ", ".join([*found, f"{most} values per channel"] if few else found)


def weight_histogram(source: Unit, optimized: Unit) -> Histogram | None:
    """Histogram of a layer's float weights, with the widest channel's grid of the optimized ones."""
    tensor = source.constant
    if tensor is None or channel(source) is None:
        return None
    found = Growing()
    for part in chunks(tensor):
        found.update(part)
    other = optimized.constant
    return found.histogram(other.quantization if other is not None else None)
