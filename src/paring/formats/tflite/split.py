"""One operator becomes two: its weights were decomposed into factors, with a smaller value between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paring.compress.base import Encoded
from paring.formats.tflite.apply import makers_of
from paring.formats.tflite.draft import Draft
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel
from paring.graph import OpId

SPLITTABLE = ("dense", "conv2d")
"""Kinds that can become two: the first does what the old operator did, for fewer outputs; the second looks at single points."""


@dataclass(frozen=True)
class Split:
    """An operator with new weights, and another behind it.

    Attributes:
      op: The operator.
      input: Where its weights are.
      first: [rank, ..., inputs], float32 or float16: strides, padding and dilation stay with them.
      second: [outputs, 1, ..., rank], of the same type: bias and fused activation go with them.
    """

    op: OpId
    input: int
    first: Encoded
    second: Encoded


def split(model: TfliteModel, splits: Sequence[Split]) -> tuple[TfliteModel, dict[OpId, OpId]]:
    """Splits operators of `SPLITTABLE` kinds; dynamic dimensions stay dynamic, and the result keeps its name and place.

    Args:
      model: The source; it is not changed.
      splits: At most one for each operator.

    Returns:
      The new model, and where the first of the two operators is; the second makes what the old one made.
    """
    draft, between = Draft(model), {}
    by_op = {part.op: part for part in splits}
    for number, subgraph in enumerate(draft.subgraphs):
        operators: list[Table] = []
        for position, operator in enumerate(subgraph.operators or ()):
            part = by_op.get((number, position))
            if part is not None:
                between[part.op] = (number, _split(draft, number, operator, part, operators))
            operators.append(operator)
        subgraph.operators = operators
    changed = draft.finish()
    makers = makers_of(changed)
    return changed, {op: makers[n, changed.places[n][tensor]] for op, (n, tensor) in between.items()}


def _split(draft: Draft, number: int, operator: Table, part: Split, operators: list[Table]) -> int:
    """Puts the first operator in front and makes `operator` the second -> the tensor between them."""
    tensors = draft.subgraphs[number].tensors
    result, weight = tensors[int(operator.outputs[0])], tensors[int(operator.inputs[part.input])]
    rank = len(part.first.values)
    smaller = Table("Tensor")
    for field in ("shape", "shape_signature", "has_rank"):
        value = result.__dict__.get(field)
        if isinstance(value, np.ndarray) and value.size:
            value = np.append(value[:-1], np.int32(rank))
        if value is not None:
            setattr(smaller, field, value)
    name = f"{result.name}/low_rank"
    middle = draft.tensor(number, smaller, name, "float32", None)
    weights = []
    for which, encoded in (("first", part.first), ("second", part.second)):
        like = Table("Tensor", shape=np.array(encoded.values.shape, np.int32))
        stored = draft.constant(number, like, f"{weight.name}/{which}", encoded)
        if encoded.form == "float16":
            unpacked = draft.tensor(number, like, f"{weight.name}/{which}_dequantized", "float32", None)
            operators.append(draft.operator("DEQUANTIZE", 3, [stored], [unpacked], Table("DequantizeOptions")))
            stored = unpacked
        weights.append(stored)
    # Without a bias, kernels of integers ask for a later version of the operator, and nothing can be corrected in it.
    zero = Encoded(np.zeros(rank, np.float32), "float32", None)
    bias = draft.constant(number, Table("Tensor", shape=np.array([rank], np.int32)), f"{name}/bias", zero)
    first = operator.clone()
    first.inputs = np.array([int(operator.inputs[0]), weights[0], bias], np.int32)
    first.outputs = np.array([middle], np.int32)
    first.builtin_options.fused_activation_function = 0
    operators.append(first)
    operator.inputs = np.array([middle, weights[1], *(int(i) for i in operator.inputs[2:])], np.int32)
    for option in ("stride_w", "stride_h", "dilation_w_factor", "dilation_h_factor"):
        if option in operator.builtin_options.__dict__:
            setattr(operator.builtin_options, option, 1)
    return middle
