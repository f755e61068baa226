"""Stores pruned weights without their zeros: LiteRT's sparse encoding behind a DENSIFY that unfolds them on load.

Measured on ai-edge-litert 2.3.0: right for float32 and float16 on the builtin kernels and XNNPACK. Integers are not: behind
DENSIFY the default interpreter refuses them, and as the operator's own input XNNPACK reads the stored values as dense ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from paring.formats.tflite.apply import versions_of
from paring.formats.tflite.constants import constant_weight, shape_of, type_name
from paring.formats.tflite.draft import Draft
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.schema import ENUMS
from paring.formats.tflite.versions import oldest_runtime
from paring.graph import TensorId

_DENSE, _CSR = 0, 1
_VECTORS = (("Uint8Vector", np.uint8), ("Uint16Vector", np.uint16), ("Int32Vector", np.int32))


def store_sparse(
    model: TfliteModel, weights: Iterable[TensorId], floors: Iterable[str] = ()
) -> tuple[TfliteModel, int]:
    """The model with weights stored sparsely where that is smaller, and how many were.

    Args:
      model: It is not changed.
      weights: Tensors that operators read as weights: constants, or what unpacks a float16 constant.
      floors: Releases that the model needs for other reasons than its operators' versions.
    """
    draft, done = Draft(model), set[TensorId]()
    for number, index in dict.fromkeys(weights):
        subgraph = draft.subgraphs[number]
        makers = {int(o): op for op in subgraph.operators or () for o in op.outputs}
        while index in makers:
            index = int(makers[index].inputs[0])
        tensor = subgraph.tensors[index]
        if (number, index) in done:
            continue
        weight = constant_weight(model, model.subgraphs[number].tensors[index])
        if weight is None or tensor.sparsity is not None or type_name(tensor) not in ("float32", "float16"):
            continue
        values = np.asarray(weight.read())
        sparsity, stored = encode(values)
        if _size(sparsity) + stored.nbytes >= values.nbytes:
            continue
        folded = draft.tensor(number, tensor, f"{tensor.name}_sparse", type_name(tensor), None, draft.buffer(stored))
        subgraph.tensors[folded].sparsity = sparsity
        subgraph.tensors[folded].shape = np.array(shape_of(tensor), np.int32)
        tensor.buffer = 0
        subgraph.operators.insert(0, draft.operator("DENSIFY", 1, [folded], [index], Table("DensifyOptions")))
        done.add((number, index))
    if done:
        runtime = oldest_runtime(versions_of(draft.root, model), floors)
        draft.metadata("min_runtime_version", runtime.encode().ljust(16, b"\0") if runtime is not None else b"")
    made = draft.finish()
    made.notes, made.folder = model.notes, model.folder
    return made, len(done)


def encode(values: np.ndarray) -> tuple[Table, np.ndarray]:
    """Compressed rows over the last dimension -> the description, and the values that are not zero (one at least)."""
    rows = values.reshape(-1, values.shape[-1])
    kept = rows != 0
    if not kept.any():
        kept.flat[0] = True  # a buffer without bytes would be no constant
    levels = [Table("DimensionMetadata", format=_DENSE, dense_size=extent) for extent in values.shape[:-1]]
    segments = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    last = Table("DimensionMetadata", format=_CSR)
    for name, numbers in (("array_segments", segments), ("array_indices", np.nonzero(kept)[1])):
        kind, dtype = next((k, d) for k, d in _VECTORS if numbers.max(initial=0) <= np.iinfo(d).max)
        setattr(last, f"{name}_type", ENUMS["SparseIndexVector"][kind])
        setattr(last, name, Table(kind, values=numbers.astype(dtype)))
    order = np.arange(values.ndim, dtype=np.int32)
    return Table("SparsityParameters", traversal_order=order, dim_metadata=[*levels, last]), rows[kept]


def _size(sparsity: Table) -> int:
    last = sparsity.dim_metadata[-1]
    return int(last.array_segments.values.nbytes + last.array_indices.values.nbytes) + 64 * len(sparsity.dim_metadata)
