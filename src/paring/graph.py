"""The view of a model that planning works on: frozen, NumPy only, weights read on demand.

A Graph is read from a model and never written back. Ids are opaque and belong to the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

TensorId: TypeAlias = tuple[int, int]
OpId: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Quantization:
    """An affine grid: real = (integer - zero_point) * scale.

    Attributes:
      scale: float32 [1] per tensor, [channels] per channel, or [channels, blocks] per block.
      zero_point: int64, the shape of `scale`.
      dtype: Storage type: int4, int8, uint8, int16, int32 or int64.
      axis: The channel dimension, None per tensor.
      block: Inputs that share one scale, 0 when not blockwise.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    dtype: str
    axis: int | None = None
    block: int = 0

    def same_grid(self, other: Quantization | None) -> bool:
        """True where both store the same real numbers as the same integers."""
        return (
            other is not None
            and self.dtype == other.dtype
            and self.axis == other.axis
            and self.block == other.block
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


@dataclass(frozen=True)
class Weight:
    """A constant, read when asked and never kept.

    Attributes:
      shape: As the operators see it.
      dtype: The type of the values that `read` gives (float32 even where float16 is stored).
      stored: How the file stores it: float32, float16, int8, sparse float16, ...
      stored_bytes: Bytes in the file.
      reader: Gives rows [start, stop) of the first dimension.
      releaser: Lets the system take the pages back that reading brought in.
      origin: What is stored once and read by several tensors (of several subgraphs, too); None where that is unknown.
    """

    shape: tuple[int, ...]
    dtype: str
    stored: str
    stored_bytes: int
    reader: Callable[[int, int], np.ndarray] = field(repr=False, compare=False)
    releaser: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    origin: int | None = None

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the first dimension (all by default); a scalar comes whole."""
        rows = self.shape[0] if self.shape else 1
        return self.reader(start, rows if stop is None else min(stop, rows))

    def release(self) -> None:
        """Says that the values are not needed for now."""
        if self.releaser is not None:
            self.releaser()

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Tensor:
    """One value of the graph: `shape` holds -1 where a dimension is dynamic; `weight` is set on constants."""

    id: TensorId
    name: str
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None
    weight: Weight | None = None


@dataclass(frozen=True)
class WeightUse:
    """An operator's input that holds weights.

    Attributes:
      input: Index among the operator's inputs.
      axis: Channel dimension of per-channel scales; None means one scale for the tensor.
      reduced: Dimensions that are summed over with the input (what GPTQ and bias correction look at).
      bias: Input index of the bias that is added to their product.
      meets: The state whose grid they are multiplied with, an index into `Demands.state`; None for the first of `data`.
      dtype: Integer type in static forms: int8 (or int4 where a form says so) or int16.
      grouped: Each channel sees a part of the input only; hybrid kernels then read one scale per channel.
    """

    input: int
    axis: int | None
    reduced: tuple[int, ...] = ()
    bias: int | None = None
    meets: int | None = None
    dtype: str = "int8"
    grouped: bool = False


@dataclass(frozen=True)
class StateUse:
    """A tensor that an operator keeps for itself, which needs a grid in static forms.

    Attributes:
      input: Index among the operator's inputs; None for one that only the kernel sees.
      grid: What its grid is: `result` (that of the first result), `cell` (int16, the scale a power of two), `range`
        (int16, from statistics), `hidden` (int8 on [-1, 1] where weights meet it, otherwise as `result`) or `unused`
        (int16; the kernel wants one and does not look).
    """

    input: int | None
    grid: str


@dataclass(frozen=True)
class Demands:
    """What quantized execution asks of one operator, filled in by the format's operator table.

    Attributes:
      data: Input indices that carry real-valued activations (constants among them are quantized per tensor).
      weights: Inputs that hold weights.
      bias: Input index of the bias, None without one.
      same: True where all `data` inputs and `results` must share one grid.
      results: Output indices that carry real values.
      fixed: The grid that the kernel demands of its results, by activation dtype: `{"int8": (scale, zero_point)}`.
      versions: Operator version that each form needs; a missing form has no kernel. Forms: `float`; `int8` and `int16`
        (activations, with int8 weights); `int8-int4`, `int16-int4` (with int4 weights); `dynamic-int8`, `dynamic-int4`,
        `dynamic-int4-block` (float activations, quantized weights).
      ties: Tensors that are one value under several names (carried by a loop or branch): one grid or float, together. The
        first ones belong to the `data` inputs, in their order; what enters a loop is not among them, it can be converted.
      computes: False for operators that only move, reshape or fill.
      symmetric: Inputs that need zero point 0 in int8 too (int16 always does); with `same` the results follow.
      rescale: Ratio of scales within which the kernels are right: (`each`, `product` or `quotient`, low, high); `input`:
        bounds of the scale itself.
      state: What it keeps for itself, in the order the kernel wants it.
      refuses: By form, why it does not take this operator as it is.
      since: Release of the first right runtime, by form, where operator versions do not tell.
    """

    data: tuple[int, ...] = ()
    weights: tuple[WeightUse, ...] = ()
    bias: int | None = None
    same: bool = False
    results: tuple[int, ...] = ()
    fixed: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    ties: tuple[tuple[TensorId, ...], ...] = ()
    computes: bool = True
    symmetric: tuple[int, ...] = ()
    rescale: tuple[str, float, float] | None = None
    state: tuple[StateUse, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    since: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """One operator: `kind` is canonical (conv2d, dense, ...), `native` the format's own name (CONV_2D).

    `constant` says that it only unpacks a stored constant (DEQUANTIZE of float16 weights): it vanishes with the stored form.
    """

    id: OpId
    name: str
    kind: str
    native: str
    inputs: tuple[TensorId | None, ...]
    outputs: tuple[TensorId, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    demands: Demands | None = None
    scope: str = ""
    version: int = 1
    constant: bool = False

    @property
    def ties(self) -> tuple[tuple[TensorId, ...], ...]:
        """The values that a loop or branch carries, each with all its names."""
        return self.demands.ties if self.demands is not None else ()


@dataclass(frozen=True)
class Graph:
    """Operators in topological order and the tensors between them; `inputs` and `outputs` are the model's own."""

    ops: tuple[Op, ...]
    tensors: Mapping[TensorId, Tensor]
    inputs: tuple[TensorId, ...]
    outputs: tuple[TensorId, ...]

    def producers(self) -> dict[TensorId, Op]:
        """The operator that makes each tensor."""
        return {tensor: op for op in self.ops for tensor in op.outputs}

    def consumers(self) -> dict[TensorId, list[tuple[Op, int]]]:
        """The uses of each tensor as (operator, input index)."""
        uses: dict[TensorId, list[tuple[Op, int]]] = {}
        for op in self.ops:
            for index, tensor in enumerate(op.inputs):
                if tensor is not None:
                    uses.setdefault(tensor, []).append((op, index))
        return uses

    def weights_of(self, op: Op) -> Iterator[tuple[WeightUse, Tensor]]:
        """The constant weights that `op` reads."""
        for use in op.demands.weights if op.demands else ():
            tensor = op.inputs[use.input] if use.input < len(op.inputs) else None
            if tensor is not None and self.tensors[tensor].weight is not None:
                yield use, self.tensors[tensor]
