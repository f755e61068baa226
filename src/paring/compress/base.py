"""What an algorithm is: a frozen dataclass whose fields are its settings, with `encode` and `decode` in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from paring.compress.gram import Gram
from paring.compress.unfold import Unfolding
from paring.graph import Quantization


@dataclass(frozen=True)
class Encoded:
    """A compressed weight.

    Attributes:
      values: Codes (int8, one per element, also for int4) or float16 values; the shape of the weight.
      form: The storage form, a row of `encodings.FORMS`.
      grid: What the codes mean; None for float16.
    """

    values: np.ndarray = field(repr=False)
    form: str
    grid: Quantization | None


@dataclass(frozen=True)
class Moments:
    """Input statistics per channel (the input's last dimension), float64 [channels].

    Attributes:
      mean: Mean of the input.
      second: Mean of its square.
    """

    mean: np.ndarray
    second: np.ndarray


@dataclass(frozen=True)
class Context:
    """What an algorithm may ask about a weight.

    Attributes:
      name: Operator name, for messages.
      axis: Channel dimension, None for one scale per tensor.
      reduced: Dimensions summed over with the input.
      moments: Input statistics, None without data.
      grid: The grid the values already lie on (a weight that was quantized elsewhere), None for a float weight.
      gram: Second moments of the rows that the weights meet, None unless the algorithm asked for them.
      unfolding: How the weights lie as matrices, where that is known without data.
      pruned: The zeros among the weights are there on purpose, however few: they stay.
    """

    name: str
    axis: int | None
    reduced: tuple[int, ...] = ()
    moments: Moments | None = None
    grid: Quantization | None = None
    gram: Gram | None = None
    unfolding: Unfolding | None = None
    pruned: bool = False

    def input_spread(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
        """Variance and mean of the input that each weight element meets, broadcastable to `shape`; None without data."""
        if self.moments is None:
            return None
        mean = per_input(self.moments.mean, shape, self.axis, self.reduced)
        second = per_input(self.moments.second, shape, self.axis, self.reduced)
        if mean is None or second is None or not np.isfinite(second).all():
            return None
        return np.maximum(second - mean**2, 0.0), mean


def per_input(
    values: np.ndarray, shape: tuple[int, ...], axis: int | None, reduced: tuple[int, ...]
) -> np.ndarray | None:
    """Per-input-channel values laid out to broadcast over a weight; None where the layout does not say how.

    >>> per_input(np.array([1.0, 2.0]), (3, 2), 0, (1,)).shape
    (1, 2)
    >>> per_input(np.array([1.0, 2.0]), (4, 1), 0, (1,)).reshape(-1).tolist()  # two groups of two outputs
    [1.0, 1.0, 2.0, 2.0]
    """
    view = [1] * len(shape)
    if axis == len(shape) - 1:  # depthwise: each input makes its own outputs, `multiplier` of them
        view[axis] = -1
        whole = values.size and shape[axis] % values.size == 0
        return np.repeat(values, shape[axis] // values.size).reshape(view) if whole else None
    within = shape[reduced[-1]] if reduced else 0
    if within == values.size:
        view[reduced[-1]] = -1
        return values.reshape(view)
    if not within or axis is None or values.size % within or shape[axis] % (values.size // within):
        return None
    groups = values.size // within  # each group of outputs sees its own inputs
    view[axis], view[reduced[-1]] = shape[axis], within
    return np.repeat(values.reshape(groups, within), shape[axis] // groups, axis=0).reshape(view)


class Algorithm(Protocol):
    """A compression algorithm: pure functions of its settings."""

    def encode(self, weight: np.ndarray, context: Context) -> Encoded:
        """Compresses float32 values of any shape."""

    def decode(self, encoded: Encoded) -> np.ndarray:
        """Gives the float32 values that the kernels must agree with."""
