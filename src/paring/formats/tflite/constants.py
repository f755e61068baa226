"""Constants as operators see them: float16 or int8 behind DEQUANTIZE, sparse behind DENSIFY, packed int4; read on demand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from paring.compress.encodings import unpack_int4
from paring.formats.tflite.flatbuffer import Malformed, Table
from paring.formats.tflite.model import DTYPES, TfliteModel
from paring.formats.tflite.schema import NAMES
from paring.graph import Quantization, Weight

_INDEX = {"Int32Vector": "<i4", "Uint16Vector": "<u2", "Uint8Vector": "u1"}


def type_name(tensor: Table) -> str:
    """The tensor's type as NumPy would call it: float32, int8, int4, ..."""
    return NAMES["TensorType"][tensor.type].lower()


def shape_of(tensor: Table) -> tuple[int, ...]:
    """The static shape; () for a scalar or where the file gives none."""
    return () if tensor.shape is None else tuple(int(d) for d in tensor.shape)


def quantization_of(model: TfliteModel, subgraph: Table, tensor: Table) -> Quantization | None:
    """The grid a tensor is stored on, None for a float tensor."""
    q = tensor.quantization
    if q is None:
        return None
    if q.details is not None and q.details.type_name == "BlockwiseQuantization":
        scales = subgraph.tensors[q.details.scales]
        raw = model.constant(scales)
        if raw is None:
            return None
        values = raw.view(DTYPES[NAMES["TensorType"][scales.type]]).astype(np.float32).reshape(shape_of(scales))
        return Quantization(values, np.zeros(values.shape, np.int64), type_name(tensor), 0, int(q.details.block_size))
    if q.scale is None or not q.scale.size:
        return None
    zero = np.zeros(q.scale.size, np.int64) if q.zero_point is None or not q.zero_point.size else q.zero_point
    zero = np.broadcast_to(np.asarray(zero, np.int64), q.scale.shape)
    axis = int(q.quantized_dimension) if q.scale.size > 1 else None
    return Quantization(np.asarray(q.scale, np.float32), zero, type_name(tensor), axis)


def constant_weight(model: TfliteModel, tensor: Table, *, densify: bool = False) -> Weight | None:
    """The stored values of a constant tensor; None for an activation, and for a sparse one unless `densify`."""
    raw = model.constant(tensor)
    name = NAMES["TensorType"][tensor.type]
    shape = shape_of(tensor)
    if raw is None or name not in (*DTYPES, "INT4"):
        return None
    if tensor.sparsity is not None:
        if not densify or name == "INT4":
            return None
        dtype = DTYPES[name]
        kind = type_name(tensor)
        return Weight(shape, kind, f"sparse {kind}", raw.nbytes, _rows(lambda: _densify(tensor, raw.view(dtype))))
    if name == "INT4":
        return Weight(
            shape, "int4", "int4", raw.nbytes, _rows(lambda: unpack_int4(raw, math.prod(shape)).reshape(shape))
        )
    values = raw.view(DTYPES[name]).reshape(shape)
    return Weight(
        shape,
        type_name(tensor),
        type_name(tensor),
        raw.nbytes,
        _rows(lambda: values),
        lambda: model.forget(raw),
        int(tensor.buffer),
    )


def mapped(weight: Weight, dtype: str, change: Callable[[np.ndarray, int], np.ndarray]) -> Weight:
    """The weight behind an unpacking operator; `change` gets the rows and the number of the first."""

    def reader(start: int, stop: int) -> np.ndarray:
        return change(weight.reader(start, stop), start)

    return Weight(weight.shape, dtype, weight.stored, weight.stored_bytes, reader, weight.releaser)


def _rows(values: Callable[[], np.ndarray]) -> Callable[[int, int], np.ndarray]:
    def reader(start: int, stop: int) -> np.ndarray:
        array = values()
        return array[start:stop] if array.ndim else array

    return reader


def _densify(tensor: Table, values: np.ndarray) -> np.ndarray:
    """Unfolds LiteRT's sparse encoding (traversal order, dense and CSR levels, inner blocks)."""
    shape = shape_of(tensor)
    s = tensor.sparsity
    order = s.traversal_order.tolist()
    blocks = [] if s.block_map is None else s.block_map.tolist()
    sizes = list(shape)
    inner = {}
    for position, dimension in enumerate(blocks):
        block = s.dim_metadata[order.index(len(shape) + position)].dense_size
        if block <= 0 or sizes[dimension] % block:
            raise Malformed(f"{tensor.name} has sparse blocks of {block} in a dimension of {sizes[dimension]}")
        inner[len(shape) + position] = block
        sizes[dimension] //= block
    extents = [sizes[d] if d < len(shape) else inner[d] for d in order]
    # One row of coordinates per stored value, level by level.
    coordinates = np.zeros((1, 0), np.int64)
    for level, extent in zip(s.dim_metadata, extents, strict=True):
        if level.format == 0:
            count = len(coordinates)
            coordinates = np.column_stack([np.repeat(coordinates, extent, 0), np.tile(np.arange(extent), count)])
        else:
            segments = level.array_segments.values.astype(np.int64)
            indices = level.array_indices.values.astype(np.int64)
            if len(segments) != len(coordinates) + 1 or segments[-1] != len(indices) or (np.diff(segments) < 0).any():
                raise Malformed(f"{tensor.name} has sparse segments that do not fit its indices")
            if indices.size and (indices.min() < 0 or indices.max() >= extent):
                raise Malformed(f"{tensor.name} has a sparse index outside its dimension")
            coordinates = np.column_stack([np.repeat(coordinates, np.diff(segments), 0), indices])
        if len(coordinates) > math.prod(shape):
            raise Malformed(f"{tensor.name} has more sparse values than its shape holds")
    if len(coordinates) != values.size:
        raise Malformed(f"{tensor.name} stores {values.size} sparse values, its description names {len(coordinates)}")
    place = np.zeros((len(coordinates), len(shape)), np.int64)
    for column, dimension in enumerate(order):
        if dimension < len(shape):
            scale = math.prod(b for d, b in inner.items() if blocks[d - len(shape)] == dimension)
            place[:, dimension] += coordinates[:, column] * scale
        else:
            place[:, blocks[dimension - len(shape)]] += coordinates[:, column]
    dense = np.zeros(shape, values.dtype)
    dense[tuple(place.T)] = values
    return dense
