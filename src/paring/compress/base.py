"""What an algorithm is: a frozen dataclass whose fields are its settings.

`encode` and `decode` are NumPy and compress a weight once; `variables`, `update` and `project` are what training does with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np

from paring.compress.gram import Gram
from paring.compress.unfold import Unfolding
from paring.graph import Quantization


@dataclass(frozen=True)
class Encoded:
    """A compressed weight.

    Attributes:
      values: Codes (int8, one per element, also for int4) or float values; the shape of the weight.
      form: The storage form, a row of `encodings.FORMS`, or `float32`.
      grid: What the codes mean; None for floats.
      factors: Matrices [outputs, rank] and [rank, inputs] that can be stored in place of the weight: `values` is their
        product. None for all algorithms but those that decompose.
    """

    values: np.ndarray = field(repr=False)
    form: str
    grid: Quantization | None
    factors: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)


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
      short: Scales are rounded up to bfloat16, in which they are stored; else they are float32.
      taps: In training, in which a weight is a matrix [outputs, taps * inputs]: positions of a convolution's kernel, else 1.
      gain: In training, what the batch normalization behind multiplies each output with, float32 [outputs]; None where
        there is none.
    """

    name: str
    axis: int | None
    reduced: tuple[int, ...] = ()
    moments: Moments | None = None
    grid: Quantization | None = None
    gram: Gram | None = None
    unfolding: Unfolding | None = None
    pruned: bool = False
    short: bool = False
    taps: int = 1
    gain: np.ndarray | None = field(default=None, repr=False)

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


@dataclass(frozen=True)
class Extra:
    """A variable that an algorithm has beside a weight while training: a scale, centroids, a mask.

    Attributes:
      value: What it starts with; its dtype and shape are those of the variable.
      trainable: Trained by gradient. Others are what `update` gives.
    """

    value: np.ndarray = field(repr=False)
    trainable: bool = False


PROMISES = ("zeros", "values", "tensor values", "grid", "rank")
"""What a weight can have that later stages may break: exact zeros; few distinct values in each channel, or in the whole
tensor; an integer grid; a low rank."""


@dataclass(frozen=True)
class Algorithm:
    """A compression algorithm: pure functions of its settings, which are the fields of a frozen dataclass.

    `encode` and `decode` are all that a one-shot algorithm needs. In training a weight comes as a float32 matrix
    [outputs, taps * inputs], whatever its layer (`Context.taps`), and `ops` is `keras.ops`, given and not imported.

    Attributes:
      makes: What it promises of a weight, of `PROMISES`; `promises` says whether a weight holds it.
      trains_weight: Whether gradients reach the raw weight. False where variables stand in for it.
    """

    makes: ClassVar[frozenset[str]] = frozenset()
    trains_weight: ClassVar[bool] = True

    @property
    def gives_up(self) -> frozenset[str]:
        """Of what stages before it made, what it does not keep; by default all but zeros."""
        return frozenset(PROMISES) - {"zeros"}

    def encode(self, weight: np.ndarray, context: Context) -> Encoded:
        """Compresses float32 values of any shape."""
        raise NotImplementedError

    def decode(self, encoded: Encoded) -> np.ndarray:
        """Gives the float32 values that the kernels must agree with."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults: what a recipe file says."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def describe(self) -> str:
        """In a few words, for reports.

        >>> Algorithm().describe()
        'Algorithm'
        """
        said = ", ".join(f"{name}={value}" for name, value in self.settings().items())
        return type(self).__name__ + (f"({said})" if said else "")

    # -- training --------------------------------------------------------------------------------------------------

    def variables(self, weight: np.ndarray, context: Context) -> Mapping[str, Extra]:
        """What it keeps beside a weight, float32 [outputs, taps * inputs]; nothing by default."""
        del weight, context
        return {}

    def update(
        self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context
    ) -> dict[str, Any]:
        """New values of variables that are not trained by gradient, before a training step; none by default.

        Runs inside the compiled step of every backend: no Python branch may hang on a value.

        Args:
          ops: `keras.ops`.
          weight: float32 [outputs, taps * inputs], as the stages before this one leave it.
          variables: Present values by name.
          step: float32 scalar, the optimizer's steps so far.
          context: As `encode` gets it, without data.
        """
        del ops, weight, variables, step, context
        return {}

    def project(self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context) -> Any:
        """The weight as the layer is to see it, differentiable as written (with its own straight-through estimator).

        Arguments are those of `update`; what comes back has the shape of `weight`. While training `step` is the optimizer's;
        in evaluation it is infinite: what the weights are when training is over, with the variables as they are.
        """
        raise NotImplementedError

    @property
    def by_data(self) -> bool:
        """Whether `prepare` and `allocate` make use of `Context.gram`, which is then gathered where training has data."""
        return False

    def prepare(self, weight: np.ndarray, context: Context) -> np.ndarray:
        """What the raw weight, float32 [outputs, taps * inputs], becomes before training; by default what it is."""
        del context
        return weight

    def begin(self, weight: np.ndarray, context: Context) -> np.ndarray:
        """What the weight, float32 [outputs, taps * inputs], is at the first step: what the next stage begins with."""
        return self.decode(self.encode(weight, context))

    def factors(
        self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context
    ) -> tuple[Any, Any] | None:
        """Matrices [outputs, rank] and [rank, inputs] that are stored in place of the weight, whose product `project` gives.

        Arguments are those of `project`. Later stages get each of them, in place of the weight. None: the weight is one matrix.
        """
        del ops, weight, variables, step, context
        return None

    def hold(self, ops: Any, weight: Any, variables: Mapping[str, Any], context: Context) -> Any:
        """What the raw weight becomes behind each optimizer step, so that a checkpoint holds it; None to leave it."""
        del ops, weight, variables, context
        return None

    def resolved(self, steps_per_epoch: int | None, epochs: float | None) -> Algorithm:
        """The algorithm with schedules in steps.

        Raises:
          InputError: A schedule is in epochs or fractions of training and these are not known.
        """
        del steps_per_epoch, epochs
        return self

    def allocate(self, weights: Sequence[np.ndarray], contexts: Sequence[Context]) -> Sequence[Algorithm]:
        """One algorithm per weight of a group that one rule selects: the hook for budgets over all of them."""
        del contexts
        return [self] * len(weights)

    def promises(self, weight: np.ndarray, context: Context) -> tuple[str, ...]:
        """What a finished weight, float32 [outputs, taps * inputs], does not hold of what is promised; empty if it holds all.

        >>> Algorithm().promises(np.ones((2, 3), np.float32), Context("layer", axis=0))
        ()
        """
        del weight, context
        return ()
