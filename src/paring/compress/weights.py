"""Weights of any size: read as real numbers, encoded in row chunks on all cores, memory bounded."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from paring.compress.base import Context, Encoded
from paring.compress.encodings import decode
from paring.compress.quantize import Quantize
from paring.graph import Quantization, Tensor, Weight

CHUNK = 1 << 20  # elements encoded at a time: float32 in and codes out stay in the cache


def shelved(values: np.ndarray) -> np.ndarray:
    """The same values, read-only; large ones in a file without a name, so that a new model need not fit into memory.

    >>> bool((shelved(np.ones((512, 512), np.float32)) == 1).all())
    True
    """
    if values.size < CHUNK // 8:
        return values
    with tempfile.TemporaryFile(prefix="paring-") as file:
        file.write(np.ascontiguousarray(values).data.cast("B"))
        file.flush()
        return np.memmap(file, values.dtype, "r", shape=values.shape)


def real(tensor: Tensor) -> Weight:
    """The weight as real numbers: one that is stored as integers for a hybrid kernel is decoded."""
    weight, grid = tensor.weight, tensor.quantization
    assert weight is not None
    if weight.dtype == "float32" or grid is None:
        return weight
    return replace(weight, dtype="float32", reader=lambda start, stop: decode(weight.read(), grid)[start:stop])


def encode(settings: Quantize, weight: Weight, context: Context) -> Encoded:
    """Encodes a weight of any size, in row chunks on all cores where its channels are its rows; memory stays bounded."""
    rows = weight.shape[0] if weight.shape else 1
    per_row = max(1, weight.size // max(1, rows))
    step = max(1, CHUNK // per_row)
    kept, spread = context.grid, context.input_spread(weight.shape)
    shared = settings.granularity == "tensor" or (kept is not None and kept.axis != 0)
    shared = shared or (spread is not None and spread[0].shape[0] > 1)  # grouped: inputs differ from row to row
    if weight.dtype != "float32" or context.axis != 0 or shared or rows <= step or context.gram is not None:
        return settings.encode(np.asarray(weight.read(), np.float32), context)
    starts = range(0, rows, step)
    dtype = np.float16 if settings.weights == "float16" else np.int8
    values = np.empty(weight.shape, dtype)

    def one(start: int) -> Quantization | None:
        rows = slice(start, start + step)
        mine = None if kept is None else replace(kept, scale=kept.scale[rows], zero_point=kept.zero_point[rows])
        part = settings.encode(weight.read(start, start + step), replace(context, grid=mine))
        values[start : start + step] = part.values
        return part.grid

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        grids = list(pool.map(one, starts))
    if settings.weights == "float16" or grids[0] is None:
        return Encoded(values, "float16", None)
    scale = np.concatenate([g.scale for g in grids if g is not None])
    grid = replace(grids[0], scale=scale, zero_point=np.zeros(scale.shape, np.int64))
    return Encoded(values, grid.dtype, grid)
