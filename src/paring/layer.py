"""Operators as layers: the few numbers that say how much work they are, and their weights as matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from paring.graph import Graph, Op, WeightUse


@dataclass(frozen=True)
class Layer:
    """What a prediction has to know of a layer.

    Attributes:
      kind: The operator's kind.
      outputs: Channels (or units) that it makes.
      inputs: Channels that each of them reads, at each tap.
      taps: Height times width of the kernel; 1 for dense layers.
      positions: Output pixels, or rows, of one run.
      dtype: `float32`, `int8` (activations too), `dynamic-int8` (float activations), or another that nothing serves.
      strided: A stride or a dilation above 1.
      groups: Of channels that do not see each other.
    """

    kind: str
    outputs: int
    inputs: int
    taps: int = 1
    positions: int = 1
    dtype: str = "float32"
    strided: bool = False
    groups: int = 1

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.outputs * self.depth

    @property
    def depth(self) -> int:
        """Multiply-adds of one output element."""
        return self.taps * self.inputs

    @property
    def results(self) -> int:
        """Output elements of one run."""
        return self.positions * self.outputs

    @property
    def pointwise(self) -> bool:
        """Whether it is one matrix product over its input as it is."""
        return self.taps == 1 and not self.strided


def layer_of(
    op: Op, weight_shape: Sequence[int], positions: int, dtype: str, *, channels: int = 0, groups: int = 1
) -> Layer:
    """The layer that an operator is.

    Args:
      op: Its kind, strides and dilations.
      weight_shape: Outputs first: OHWI or [outputs, inputs], those of a matrix product turned round where need be.
      positions: Output pixels, or rows, of one run.
      dtype: See `Layer`.
      channels: Of its input, where known: more than the weights read means groups.
      groups: Where they are known otherwise.

    >>> op = Op((0, 0), "fc", "dense", "FULLY_CONNECTED", (), ())
    >>> layer_of(op, (128, 64), 1, "float32").weights
    8192
    """
    shape = tuple(weight_shape)
    if op.kind == "depthwise_conv2d":
        return Layer(op.kind, shape[-1], 1, prod(shape[:-1]), positions, dtype, groups=shape[-1])
    steps = [op.params.get(name) or 1 for name in ("stride_w", "stride_h", "dilation_w_factor", "dilation_h_factor")]
    if op.kind == "conv2d" and channels > shape[-1] > 0:
        groups = channels // shape[-1]
    return Layer(op.kind, shape[0], shape[-1], prod(shape[1:-1]), positions, dtype, max(steps) > 1, groups)


def laid_out(op: Op, weight: np.ndarray) -> np.ndarray:
    """Weights as [outputs, taps, inputs], the way patterns of zeros are told; several matrices lie one below the other.

    >>> op = Op((0, 0), "mm", "matmul", "BATCH_MATMUL", (), ())
    >>> laid_out(op, np.zeros((2, 64, 8))).shape
    (16, 1, 64)
    """
    if op.kind == "matmul":
        rows = weight if op.params.get("adj_y") else weight.swapaxes(-1, -2)
        return rows.reshape(-1, 1, rows.shape[-1])
    if op.kind == "depthwise_conv2d":
        return weight.reshape(-1, weight.shape[-1]).T[:, :, np.newaxis]
    return weight.reshape(len(weight), -1, weight.shape[-1])


def layers_of(graph: Graph, op: Op) -> list[tuple[WeightUse, Layer]]:
    """The weights of an operator, each as a layer: an empty list where it has none."""
    found = []
    for use, tensor in graph.weights_of(op):
        if tensor.weight is None or len(tensor.weight.shape) < 2 or not tensor.weight.size:
            continue
        source = op.inputs[op.demands.data[0]] if op.demands is not None and op.demands.data else None
        given = graph.tensors[source] if source is not None else None
        result = graph.tensors[op.outputs[0]].shape
        positions = prod(max(1, size) for size in result[:-1])
        read = given.dtype if given is not None else ""
        if read == tensor.weight.dtype:
            dtype = read
        else:
            dtype = (
                "dynamic-int8"
                if (read, tensor.weight.dtype) == ("float32", "int8")
                else f"{read} x {tensor.weight.dtype}"
            )
        shape, groups = tensor.weight.shape, 1
        if op.kind == "matmul":
            shape, groups = shape[-2:] if op.params.get("adj_y") else shape[:-3:-1], prod(shape[:-2])
        channels = given.shape[-1] if given is not None and given.shape else 0
        found.append((use, layer_of(op, shape, positions, dtype, channels=channels, groups=groups)))
    return found
