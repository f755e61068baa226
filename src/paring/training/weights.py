"""Weights as a layer is to see them: projected while training, folded and on integer grids in the deployed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend import AutocastScope  # keeps mixed precision out of the arithmetic on weights
from keras.src.backend.common.stateless_scope import get_stateless_scope

from paring.compress.base import Algorithm, Context
from paring.compress.encodings import FORMS
from paring.compress.quantize import Quantize
from paring.compress.straight import short, through
from paring.training.layouts import Part, name_of

_SMALLEST = 5e-7  # the range of a row of zeros, as in `compress.quantize`
_BIAS_MAX = float(2**30)
_EXACT = float(2**24)  # float32 holds all integers below


@dataclass(eq=False)
class Target:
    """A weight that is compressed.

    Attributes:
      part: The variable and how it lies.
      algorithm: All stages of its rule, as one.
      context: What the algorithm may know.
      extras: The algorithm's variables.
      quantize: The last stage where it quantizes.
    """

    part: Part
    algorithm: Algorithm
    context: Context
    extras: Mapping[str, Any]
    quantize: Quantize | None = None

    def matrix(self, *, training: bool, step: Any) -> Any:
        """The projected weight, float32 [outputs, taps * inputs]."""
        return self.algorithm.project(ops, *self._now(training=training, step=step), self.context)

    def factors(self, *, training: bool, step: Any) -> tuple[Any, Any]:
        """The projected factors, float32 [outputs, rank] and [rank, taps * inputs]."""
        found = self.algorithm.factors(ops, *self._now(training=training, step=step), self.context)
        assert found is not None
        return found

    def _now(self, *, training: bool, step: Any) -> tuple[Any, dict[str, Any], Any]:
        """The raw weight, the algorithm's variables behind their update, and the step."""
        raw = self.part.layout.matrix(ops, ops.cast(ops.convert_to_tensor(self.part.variable), "float32"))
        now = {name: ops.convert_to_tensor(v) for name, v in self.extras.items()}
        if training:
            fresh = self.algorithm.update(ops, ops.stop_gradient(raw), now, step, self.context)
            for name, value in fresh.items():
                now[name] = ops.stop_gradient(value)
                self.extras[name].assign(ops.cast(now[name], self.extras[name].dtype))
        else:
            step = ops.convert_to_tensor(float("inf"), "float32")
        return raw, now, step

    def weight(self, matrix: Any) -> Any:
        """A matrix as the variable lies, in its type."""
        return ops.cast(self.part.layout.weight(ops, matrix, self.part.shape), self.part.variable.dtype)


@dataclass(frozen=True)
class Flat:
    """A dense layer as a product of matrices.

    Attributes:
      kernel: The variable, whose first dimensions are summed over.
      inputs: How many inputs.
      outputs: How many outputs.
      summed: How many dimensions of the layer's input they are.
      shape: The outputs' dimensions.
    """

    kernel: Any
    inputs: int
    outputs: int
    summed: int
    shape: tuple[int, ...]


def flat_of(layer: Any, part: Part) -> Flat | None:
    """How a dense layer lies as a product of matrices; None for other layers, and where dimensions would have to move."""
    shape, layout = part.shape, part.layout
    if name_of(layer) == "EinsumDense":
        inputs, rest = layer.equation.replace(" ", "").split(",")
        kernel, result = rest.split("->")
        out = kernel[layout.inputs :]
        if "..." in inputs or not inputs.endswith(kernel[: layout.inputs]) or not result.endswith(out):
            return None
        if layout.order[layout.outputs :] != tuple(range(layout.inputs)) or inputs[: -layout.inputs] + out != result:
            return None
    elif name_of(layer) != "Dense":
        return None
    summed = shape[: layout.inputs]
    return Flat(part.variable, prod(summed), prod(shape[layout.inputs :]), len(summed), shape[layout.inputs :])


@dataclass(eq=False)
class Compressed:
    """A layer with its compressed weights.

    Attributes:
      layer: The layer.
      targets: Its weights; the last one is added up with the bias.
      norm: The batch normalization that folds into it.
      bias: Its bias, None without one.
      flat: How it is a product of matrices, None where it is not.
      factored: Whether it runs as two products.
    """

    layer: Any
    targets: Sequence[Target] = ()
    norm: Any = None
    bias: Any = None
    flat: Flat | None = None
    factored: bool = False

    def factors(self, *, training: bool, step: Any) -> tuple[Any, Any, Any]:
        """Both factors, and what is added behind them (None for nothing); deployed, with batch normalization folded."""
        with AutocastScope(None):
            left, right = self.targets[0].factors(training=training, step=step)
            left, bias = self._folded(left) if not training and self.quantized else (left, self._bias())
        return left, right, bias

    @property
    def bfloat16(self) -> bool:
        """True where it reads its input rounded to bfloat16."""
        return any(t.quantize is not None and t.quantize.activations == "bfloat16" for t in self.targets)

    @property
    def quantized(self) -> bool:
        """True where its weights become integers."""
        return any(t.quantize is not None for t in self.targets)

    def values(self, *, training: bool, step: Any, scale: Any) -> tuple[list[tuple[Any, Any]], Any]:
        """What the layer is to see: variables with their values, and what is to be added to its result (None for nothing).

        Args:
          training: Whether the model trains: weights projected, batch normalization alive.
          step: The optimizer's step.
          scale: The step of the grid on which the layer reads its input in the deployed form; None where there is none.
        """
        shown: list[tuple[Any, Any]] = []
        with AutocastScope(None):
            for target in self.targets:
                matrix = target.matrix(training=training, step=step)
                last = target is self.targets[-1]
                if training or not last or not self.quantized:
                    shown.append((target.part.variable, target.weight(matrix)))
                    continue
                matrix, bias = self._deployed(target, matrix, scale)
                shown.append((target.part.variable, target.weight(matrix)))
                return shown, self._beside(shown, bias)
        return shown, None

    def codes(self, scale: Any) -> tuple[list[tuple[Any, Any]], Any, Any] | None:
        """The deployed form in integers, held in float32 in which their sums are exact up to 2^24.

        Args:
          scale: The step of the grid on which the last of its weights meets its input.

        Returns:
          Variables with their values, what is to be added to the result (None for nothing), and the real size of one unit of
          the result, float32 [outputs]; None where the layer has no such form.
        """
        if not self.quantized or self.factored:
            return None
        target = self.targets[-1]
        with AutocastScope(None):
            matrix, bias = self._deployed(target, target.matrix(training=False, step=None), scale)
            value, unit = _whole(target, matrix, scale)
            shown = [(target.part.variable, value)]
            if bias is None:
                return shown, None, unit
            times = int(bias.shape[0]) // int(unit.shape[0])
            unit = ops.tile(unit, (times,)) if times > 1 else unit
            bias = bias / unit
            bias = through(ops, ops.where(ops.abs(bias) < _EXACT, ops.round(bias), bias), bias)
            return shown, self._beside(shown, bias), unit

    def first_codes(self, scale: Any) -> tuple[tuple[Any, Any], Any]:
        """The first of two weights, a separable convolution's depthwise one, as `codes` gives the last: with nothing to add."""
        with AutocastScope(None):
            value, unit = _whole(self.targets[0], self.targets[0].matrix(training=False, step=None), scale)
        return (self.targets[0].part.variable, value), unit

    def _deployed(self, target: Target, matrix: Any, scale: Any) -> tuple[Any, Any]:
        """Batch normalization folded, and the bias on the grid of the product: what the integer kernel computes."""
        matrix, bias = self._folded(matrix)
        if self.norm is not None and target.quantize is not None and target.quantize.granularity == "channel":
            matrix = regrid(matrix, FORMS[target.quantize.weights].high)
        if bias is not None and scale is not None and target.quantize is not None:
            bias = on_grid(bias, scale, matrix, FORMS[target.quantize.weights].high)
        return matrix, bias

    def _folded(self, matrix: Any) -> tuple[Any, Any]:
        """Weights and bias with batch normalization in them, as they are without one."""
        bias = self._bias()
        if self.norm is None:
            return matrix, bias
        factor, shift = folding(self.norm)
        return matrix * ops.reshape(factor, (-1, 1)), shift if bias is None else bias * factor + shift

    def _bias(self) -> Any:
        """The bias, float32 [outputs]; None without one."""
        return None if self.bias is None else ops.reshape(ops.cast(ops.convert_to_tensor(self.bias), "float32"), (-1,))

    def _beside(self, shown: list[tuple[Any, Any]], bias: Any) -> Any:
        """Shows a bias as the layer's own, and gives back what is left to be added where it has none."""
        if bias is None or self.bias is None:
            return bias
        shown.append((self.bias, ops.cast(ops.reshape(bias, self.bias.shape), self.bias.dtype)))
        return None


def _whole(target: Target, matrix: Any, scale: Any) -> tuple[Any, Any]:
    """Codes of a weight as its variable lies, and the real size of one unit of its products with codes of a step `scale`."""
    assert target.quantize is not None
    steps = _steps(matrix, FORMS[target.quantize.weights].high)
    whole = matrix / ops.reshape(steps, (-1, 1))
    return target.weight(through(ops, ops.round(whole), whole)), scale * steps


def folding(norm: Any) -> tuple[Any, Any]:
    """Factor and shift of a batch normalization in evaluation, float32 [channels]."""
    with AutocastScope(None):
        mean, variance = (
            ops.cast(ops.convert_to_tensor(v), "float32") for v in (norm.moving_mean, norm.moving_variance)
        )
        factor = ops.rsqrt(variance + norm.epsilon)
        if norm.scale:
            factor = factor * ops.cast(ops.convert_to_tensor(norm.gamma), "float32")
        shift = -mean * factor
        return factor, shift + ops.cast(ops.convert_to_tensor(norm.beta), "float32") if norm.center else shift


def normalizing(norm: Any, scale: Any) -> tuple[Any, Any]:
    """Factor and shift of a batch normalization that is a depthwise convolution of its own, on integer grids.

    Args:
      norm: The layer.
      scale: The step of the grid that it reads, None where there is none.
    """
    factor, shift = folding(norm)
    if scale is None:
        return factor, shift
    rows = regrid(ops.reshape(factor, (-1, 1)), 127)
    return ops.reshape(rows, (-1,)), on_grid(shift, scale, rows, 127)


def normalizing_codes(norm: Any, scale: Any) -> tuple[Any, Any, Any]:
    """The same in integers: codes of the factor and of the shift, and the real size of one unit, float32 [channels] each."""
    factor, shift = normalizing(norm, scale)
    steps = _steps(ops.reshape(factor, (-1, 1)), 127)
    unit = scale * steps
    return (
        through(ops, ops.round(factor / steps), factor / steps),
        through(ops, ops.round(shift / unit), shift / unit),
        unit,
    )


def on_grid(bias: Any, scale: Any, matrix: Any, high: int) -> Any:
    """A bias on the int32 grid of input scale times weight scale, straight through.

    Args:
      bias: float32 [outputs], or a multiple of them.
      scale: Step of the input's grid.
      matrix: The weights, float32 [outputs, inputs]; their scale is that of the writer.
      high: Largest code of a weight.
    """
    steps = _steps(matrix, high)
    times = int(bias.shape[0]) // int(steps.shape[0])
    unit = ops.stop_gradient(scale) * (ops.tile(steps, (times,)) if times > 1 else steps)
    unit = ops.maximum(unit, ops.abs(ops.stop_gradient(bias)) / _BIAS_MAX)
    return through(ops, ops.round(bias / unit) * unit, bias)


def regrid(matrix: Any, high: int) -> Any:
    """Folded weights on a grid whose scales have 17 significant bits, as `compress.straight.short` explains."""
    steps = ops.reshape(_steps(matrix, high), (-1, 1))
    return through(ops, ops.round(matrix / steps) * steps, matrix)


def _steps(matrix: Any, high: int) -> Any:
    """The scale of each row as the writer finds it, float32 [outputs]."""
    # A product, because compilers turn division by a constant into one, which is another number.
    peak = ops.maximum(ops.max(ops.abs(ops.stop_gradient(matrix)), axis=1, keepdims=True), _SMALLEST)
    return short(ops, peak * np.float32(1 / high), 17)[:, 0]


@contextmanager
def showing(values: Sequence[tuple[Any, Any]], watched: Mapping[int, Any], layer: Any) -> Iterator[None]:
    """Inside, each variable of `values` reads as the value beside it.

    What is written to other variables of `watched`, which has them by identity, and the losses that `layer` adds, reach them
    behind.
    """
    outer = get_stateless_scope()
    mapping = dict(outer.state_mapping) if outer is not None else {}
    mapping |= {id(variable): value for variable, value in values}
    scope = keras.StatelessScope(collect_losses=True, initialize_variables=False)
    scope.state_mapping.update(mapping)
    with scope:
        yield
    own = {id(variable) for variable, _ in values}
    for key, new in scope.state_mapping.items():
        if new is not mapping.get(key) and key in watched and key not in own:
            watched[key].assign(new)
    if scope.losses and outer is not None:
        outer.losses.extend(scope.losses if outer.collect_losses else ())
    elif scope.losses:
        for owner in layer._flatten_layers():
            owner._losses.extend(loss for loss in scope.losses if id(loss) in owner._loss_ids)
