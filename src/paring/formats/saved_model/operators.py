"""TensorFlow's operators that multiply with weights or pick rows of them: one row each.

Nothing else about operators is written anywhere; what has no row reads its weights as floats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from paring.formats.saved_model.scope import NATIVE, Scope, field


@dataclass(frozen=True)
class Row:
    """What is known of an operator.

    Attributes:
      kind: The canonical kind.
      weights: Inputs that may hold weights, by preference.
      data: Inputs that meet them.
      kept: (scope, node, input, rank of the weight) -> the weight's dimensions that its result has too, each index of which
        gets a scale of its own; None where nobody can tell.
      after: (node, input, scale, shape of the weight) -> what the result is multiplied with, in place of the weight; `scale`
        has the weight's rank, 1 in every dimension that shares one. None where the weight has to be multiplied.
      picks: It picks rows, so that these are converted and not the whole.
    """

    kind: str
    weights: tuple[int, ...]
    data: tuple[int, ...]
    kept: Callable[[Scope, Any, int, int], tuple[int, ...] | None]
    after: Callable[[Any, int, np.ndarray, tuple[int, ...]], np.ndarray | None]
    picks: bool = False


def _outputs(node: Any, index: int) -> int:
    """Of a matrix product, the dimension of an operand that the result has."""
    if index == 0:
        return 1 if field(node, "transpose_a").b or field(node, "adj_x").b else 0
    return 0 if field(node, "transpose_b").b or field(node, "adj_y").b else 1


def _kept_product(scope: Scope, node: Any, index: int, rank: int) -> tuple[int, ...] | None:
    del scope
    return (*range(rank - 2), rank - 2 + _outputs(node, index)) if rank >= 2 else None


def _after_product(node: Any, index: int, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    del shape
    own = scale.ndim - 2 + _outputs(node, index)
    summed = 2 * scale.ndim - 3 - own
    if scale.shape[summed] != 1:
        return None
    return np.swapaxes(scale, own, scale.ndim - 1) if index == 1 else np.swapaxes(scale, own, scale.ndim - 2)


def _kept_last(scope: Scope, node: Any, index: int, rank: int) -> tuple[int, ...]:
    del scope, node, index
    return (rank - 1,)


def _kept_before_last(scope: Scope, node: Any, index: int, rank: int) -> tuple[int, ...]:
    del scope, node, index
    return (rank - 2,)


def _channels(node: Any, values: np.ndarray, rank: int) -> np.ndarray:
    """One number per channel, laid out for the result of a convolution."""
    first = field(node, "data_format").s.startswith(b"NC")
    return values.reshape([-1] + [1] * (rank - 2)) if first else values.reshape(-1)


def _after_convolution(node: Any, index: int, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    del index
    back = node.op.endswith(("BackpropInput", "BackpropInputV2"))
    own = scale.ndim - 2 if back else scale.ndim - 1
    return _channels(node, scale, len(shape)) if scale.size == scale.shape[own] else None


def _kept_depthwise(scope: Scope, node: Any, index: int, rank: int) -> tuple[int, ...]:
    del scope, node, index
    return (rank - 2, rank - 1)


def _after_depthwise(node: Any, index: int, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    del index
    if scale.shape[:-2] != (1,) * (scale.ndim - 2):
        return None
    return _channels(node, np.broadcast_to(scale.reshape(scale.shape[-2:]), shape[-2:]), len(shape))


def _letters(node: Any, index: int) -> tuple[str, str] | None:
    """The letters of an operand of Einsum and of its result; None where the operand has unnamed or repeated dimensions."""
    inputs, _, result = field(node, "equation").s.decode(errors="replace").replace(" ", "").partition("->")
    own = inputs.split(",")[index]
    return None if "." in own or len(set(own)) < len(own) or len(inputs.split(",")) != 2 else (own, result)


def _kept_einsum(scope: Scope, node: Any, index: int, rank: int) -> tuple[int, ...] | None:
    del scope
    letters = _letters(node, index)
    if letters is None or len(letters[0]) != rank:
        return None
    return tuple(place for place, letter in enumerate(letters[0]) if letter in letters[1])


def _after_einsum(node: Any, index: int, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    del shape
    letters = _letters(node, index)
    if letters is None:
        return None
    own, result = letters
    behind = result.split("...")[-1]  # what broadcasts from the right
    if any(size > 1 and letter not in behind for letter, size in zip(own, scale.shape, strict=True)):
        return None
    order = [own.index(letter) for letter in behind if letter in own]
    order += [place for place in range(len(own)) if place not in order]
    sizes = [scale.shape[own.index(letter)] if letter in own else 1 for letter in behind]
    return scale.transpose(order).reshape(sizes)


def picked(scope: Scope, node: Any) -> int | None:
    """The dimension that a gathering operator picks from; None where it is not known or differs by batch."""
    if field(node, "batch_dims").i:
        return None
    if node.op != "GatherV2":
        return 0
    axis = scope.constant(node.input[2])
    return int(axis) if axis is not None and axis.size == 1 and int(axis) >= 0 else None


def _kept_picked(scope: Scope, node: Any, index: int, rank: int) -> tuple[int, ...] | None:
    del index, rank
    axis = picked(scope, node)
    return None if axis is None else (axis,)


def _after_none(node: Any, index: int, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    del node, index, scale, shape
    return None


def _kept_unknown(scope: Scope, node: Any, index: int, rank: int) -> tuple[int, ...] | None:
    del scope, node, index, rank
    return None


_PRODUCT = Row("matmul", (1, 0), (0, 1), _kept_product, _after_product)
_CONVOLUTION = Row("conv2d", (1,), (0,), _kept_last, _after_convolution)
_TRANSPOSED = Row("conv2d_transpose", (1,), (2,), _kept_before_last, _after_convolution)
_PICK = Row("gather", (0,), (), _kept_picked, _after_none, picks=True)
ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "MatMul": Row("dense", (1, 0), (0, 1), _kept_product, _after_product),
        "BatchMatMul": _PRODUCT,
        "BatchMatMulV2": _PRODUCT,
        "BatchMatMulV3": _PRODUCT,
        "Einsum": Row("einsum", (1, 0), (0, 1), _kept_einsum, _after_einsum),
        "Conv2D": _CONVOLUTION,
        "Conv3D": Row("conv3d", (1,), (0,), _kept_last, _after_convolution),
        "DepthwiseConv2dNative": Row("depthwise_conv2d", (1,), (0,), _kept_depthwise, _after_depthwise),
        "Conv2DBackpropInput": _TRANSPOSED,
        "Conv3DBackpropInputV2": Row("conv3d_transpose", (1,), (2,), _kept_before_last, _after_convolution),
        "Gather": _PICK,
        "GatherV2": _PICK,
        "ResourceGather": _PICK,
        # Ours: what they read is quantized already, and stays as it is.
        f"{NATIVE}MatMul": Row("matmul", (1,), (0,), _kept_unknown, _after_none),
        f"{NATIVE}Conv2D": Row("conv2d", (1,), (0,), _kept_unknown, _after_none),
        f"{NATIVE}PackedMatMul": Row("dense", (1,), (0,), _kept_unknown, _after_none),
        f"{NATIVE}PackedConv2D": Row("conv2d", (1,), (0,), _kept_unknown, _after_none),
    }
)
