"""Quantize: weights onto an integer grid, per channel, per tensor or per block; activations by their ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np

from paring.compress.base import Algorithm, Context, Encoded, Extra
from paring.compress.encodings import FORMS, decode, from_bfloat16, to_bfloat16, up_to_bfloat16
from paring.compress.gram import Gram
from paring.compress.rounding import ROUNDERS
from paring.compress.straight import lsq, short, through
from paring.compress.support import PROMISE, supports
from paring.errors import InputError
from paring.graph import Quantization

CHOICES: dict[str, tuple[Any, ...]] = {
    "weights": ("int8", "int4", "float16", "bfloat16", "float"),
    "activations": ("float", "dynamic", "int8", "int16", "bfloat16"),
    "granularity": ("channel", "tensor", "block"),
    "range": ("minmax", "percentile", "mse"),
    "rounding": ("nearest", *ROUNDERS),
    "block_size": (0, 32, 64, 128, 256),
    "steps": ("range", "lsq"),
}
Loss = Callable[[np.ndarray], np.ndarray]
BLOCK = 1 << 16  # elements rounded at a time
_SIGN = np.uint32(1 << 31)
_HALF = np.nextafter(np.float32(0.5), np.float32(0)).view(np.uint32)  # 0.5 itself would round 0.49999997 up
_EXACT, _HALF_EXACT = 17, 11  # bits of a significand: codes times such scales are exact; float16 holds such scales
_SMALLEST = np.float32(5e-7)  # a row of zeros gets this range, as in the converter


@dataclass(frozen=True)
class Quantize(Algorithm):
    """Quantization of one operator.

    Attributes:
      weights: `int8`, `int4`, `float16`, `bfloat16` (in SavedModels only), or `float` (leave them).
      activations: `int8` or `int16` (static: ranges from calibration), `dynamic` (float outside, quantized by the kernel
        at run time), `float` (weight-only: weights are converted back to float before use) or `bfloat16` (in training and in
        SavedModels only).
      granularity: Weights share one scale per output `channel`, per `tensor`, or per `block` of inputs.
      block_size: Inputs per block: 32, 64, 128 or 256.
      range: How ranges of weights and activations are chosen: `minmax`; `percentile` (activations; weights take minmax);
        `mse` (the range of least mean square error).
      percentile: Share of values inside the range, in percent, for `percentile`.
      rounding: `nearest`; `gptq` or `adaround` (need data): weights are rounded together so that the layer's output, behind the
        layers quantized before it, is nearest to that of the float model.
      damping: Share of the mean second moment that is added to each input's, for `gptq` and `adaround`.
      act_order: Inputs with the largest second moment are rounded first, for `gptq`.
      iterations: Gradient steps of `adaround`.
      bias_correction: Shift the bias so that the mean output is that of the float weights (needs data).
      steps: Of training: `range`: step sizes follow the weights' largest value; `lsq`: they are learned (Esser et al., ICLR
        2020), so that large weights may be clipped. What training leaves lies on a grid that `encode` finds again.

    Training rounds to nearest with max-abs ranges of weights, whatever `range`, `rounding` and `bias_correction` say: these are
    for weights that are not trained.

    >>> q = Quantize(weights="int8", activations="float")
    >>> w = np.array([[0.5, -1.0], [0.1, 0.0]], np.float32)
    >>> q.encode(w, Context("layer", axis=0)).values.tolist()
    [[64, -127], [127, 0]]
    """

    weights: str = "int8"
    activations: str = "dynamic"
    granularity: str = "channel"
    block_size: int = 0
    range: str = "minmax"
    percentile: float = 99.99
    rounding: str = "nearest"
    bias_correction: bool = False
    damping: float = 0.01
    act_order: bool = True
    iterations: int = 300
    steps: str = "range"
    makes: ClassVar[frozenset[str]] = frozenset({"grid"})

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    "bad setting",
                    where=f"quantize.{name}",
                    expected=", ".join(str(a) for a in allowed),
                    got=repr(getattr(self, name)),
                )
        if not isinstance(self.percentile, (int, float)) or not 50 < self.percentile <= 100:
            got = repr(self.percentile)
            raise InputError("bad setting", where="quantize.percentile", expected="50 to 100", got=got)
        for name in ("bias_correction", "act_order"):
            if not isinstance(getattr(self, name), bool):
                got = repr(getattr(self, name))
                raise InputError("bad setting", where=f"quantize.{name}", expected="true or false", got=got)
        if not isinstance(self.damping, (int, float)) or not 0 < self.damping <= 1:
            raise InputError(
                "bad setting", where="quantize.damping", expected="above 0, at most 1", got=repr(self.damping)
            )
        if type(self.iterations) is not int or not 1 <= self.iterations <= 1_000_000:
            got = repr(self.iterations)
            raise InputError("bad setting", where="quantize.iterations", expected="a whole number from 1", got=got)
        if (self.granularity == "block") != (self.block_size > 0):
            raise InputError(
                "bad setting",
                where="quantize.block_size",
                expected="a block_size (32, 64, 128 or 256) exactly when granularity is block",
                got=f"granularity {self.granularity}, block_size {self.block_size}",
            )
        if self.granularity == "block" and self.weights != "int4":
            raise InputError("bad setting", where="quantize.granularity", expected="int4 weights with block scales")

    @property
    def static(self) -> bool:
        """True where activations are quantized with ranges known beforehand."""
        return self.activations in ("int8", "int16")

    @property
    def needs_data(self) -> bool:
        """True where encoding asks for activations."""
        return self.static or self.bias_correction or self.range == "percentile" or self.sequential

    @property
    def sequential(self) -> bool:
        """True where weights are rounded by what their operator reads behind those that are quantized already."""
        return self.rounding != "nearest" and self.weights in ("int8", "int4")

    @property
    def multiplied(self) -> str:
        """The type in which kernels multiply the weights: `float32`, `int8` (activations too) or `dynamic-int8`.

        >>> Quantize("int8", "int8").multiplied, Quantize("int8", "float").multiplied
        ('int8', 'float32')
        """
        if self.weights not in ("int8", "int4") or self.activations in ("float", "bfloat16"):
            return "float32"
        return "int8" if self.static else "dynamic-int8"

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, plus weights and activations: what a recipe file says."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {"weights": self.weights, "activations": self.activations, **found}

    @property
    def gives_up(self) -> frozenset[str]:
        """With scales per channel, that a tensor has few values; with scales per block, that a channel has."""
        found = {"channel": {"tensor values"}, "block": {"tensor values", "values"}}
        return frozenset(found.get(self.granularity, ()) if self.weights in ("int8", "int4") else ())

    def encode(self, weight: np.ndarray, context: Context) -> Encoded:
        """Rounds float32 values onto the grid; zeros stay zeros (rounded by data: where so many are zero that somebody pruned).

        Args:
          weight: float32, any shape; int4 blocks want [outputs, inputs] with inputs a multiple of `block_size`.
          context: Where the channels are, and what is known of the input.
        """
        if self.weights == "float16":
            limit = np.float32(np.finfo(np.float16).max)
            return Encoded(np.clip(weight, -limit, limit).astype(np.float16), "float16", None)
        if self.weights == "bfloat16":
            return Encoded(to_bfloat16(weight), "bfloat16", None)
        form = FORMS[self.weights]
        kept = context.grid
        fits = kept is not None and kept.dtype == form.dtype and kept.axis in (None, context.axis) and not kept.block
        if kept is not None and fits and not kept.zero_point.any():
            with np.errstate(all="ignore"):  # a scale in a file may be anything: what it cannot hold is not kept
                codes = np.rint(weight / _along(kept.scale, kept.axis, weight.ndim))
            top = 2 ** (form.bits - 1)
            if ((codes >= -top) & (codes < top)).all():
                return Encoded(codes.astype(np.int8), form.dtype, kept)
        gram = context.gram if self.sequential else None
        left = None
        if gram is not None:
            zeros = weight == 0
            left = gram.unfolding.matrix(~zeros) if context.pruned or zeros.mean() >= PROMISE else None
            weight = gram.retarget(weight, self.damping, left)
        found = self._encode_blocks(weight, context) if self.granularity == "block" else self._nearest(weight, context)
        return found if gram is None else self._round(weight, gram, left, found)

    def _round(self, weight: np.ndarray, gram: Gram, left: np.ndarray | None, nearest: Encoded) -> Encoded:
        """The codes of `rounding` on the grid of the nearest ones, 0 where nothing is `left`."""
        assert nearest.grid is not None
        form, unit = FORMS[self.weights], replace(nearest.grid, zero_point=np.zeros_like(nearest.grid.zero_point))
        matrix, second = gram.unfolding.matrix, gram.damped(self.damping)
        values, steps = matrix(weight), matrix(decode(np.ones(weight.shape, np.int8), unit))

        def rounded(values: np.ndarray, second: np.ndarray, steps: np.ndarray) -> np.ndarray:
            options: dict[str, Any] = {"act_order": self.act_order, "iterations": self.iterations}
            return ROUNDERS[self.rounding](values, second, steps, form.low, form.high, **options)

        if left is None:
            codes = rounded(values, second, steps)
        else:
            codes = np.zeros(values.shape, np.int8)
            for part in supports(left):
                own = part.take(steps, np.nan)
                own = np.where(np.isnan(own), np.nanmean(own, axis=-1, keepdims=True), own)
                part.put(rounded(part.take(values), part.second(second), own), codes)
        return replace(nearest, values=gram.unfolding.tensor(codes))

    def _nearest(self, weight: np.ndarray, context: Context) -> Encoded:
        form = FORMS[self.weights]
        axis = context.axis if self.granularity == "channel" else None
        rows = (
            np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1) if axis is not None else weight.reshape(1, -1)
        )
        loss = self._loss(weight, context, lambda full: np.moveaxis(full, axis or 0, 0).reshape(rows.shape))
        low = form.low  # never -8: the builtin hybrid FULLY_CONNECTED reads that int4 code wrongly
        scale = self._scales(rows, low, form.high, loss)
        scale = up_to_bfloat16(scale) if context.short else scale  # before the codes are made, so that nothing clips
        grid = Quantization(scale, np.zeros(scale.shape, np.int64), form.dtype, axis)
        return Encoded(
            _codes(weight, _along(scale, axis, weight.ndim), low, form.high, clip=self.range == "mse"), form.dtype, grid
        )

    def decode(self, encoded: Encoded) -> np.ndarray:
        """The float32 values that the codes stand for."""
        if encoded.form == "bfloat16":
            return from_bfloat16(encoded.values)
        return encoded.values.astype(np.float32) if encoded.grid is None else decode(encoded.values, encoded.grid)

    def describe(self) -> str:
        """In a few words.

        >>> Quantize("int8", "int8").describe()
        'int8 weights, int8 activations'
        """
        block = f" in blocks of {self.block_size}" if self.granularity == "block" else ""
        return f"{self.weights} weights{block}, {self.activations} activations"

    # -- training --------------------------------------------------------------------------------------------------

    def variables(self, weight: np.ndarray, context: Context) -> dict[str, Extra]:
        """With `lsq`, the scales at first (those of least square error) and the logarithm of what they are multiplied with.

        Raises:
          InputError: The inputs make no whole blocks.
        """
        if self.granularity == "block":
            self._check_blocks(weight.shape, context.name)
        if self.steps != "lsq" or self.weights not in ("int8", "int4"):
            return {}
        rows, high = weight.reshape(self._rows(weight.shape)), FORMS[self.weights].high
        least = replace(self, range="mse")
        scale = least._scales(rows, FORMS[self.weights].low, high, lambda error: np.square(error).sum(axis=1))[:, None]
        return {"scale": Extra(scale), "stretch": Extra(np.zeros_like(scale), trainable=True)}

    def project(self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context) -> Any:
        """The weight on its grid, with the gradient straight through; learned step sizes have their own.

        The largest value of every channel, tensor or block is the largest code: the range of what comes out says the grid.
        Step sizes are therefore at most those of the range; they are learned as logarithms (Jain et al., Trained Quantization
        Thresholds, MLSys 2020), so that an optimizer's step means the same for every size of weights.
        """
        if self.weights == "float":
            return weight
        if self.weights == "float16":
            limit = float(np.finfo(np.float16).max)
            return through(ops, ops.cast(ops.cast(ops.clip(weight, -limit, limit), "float16"), "float32"), weight)
        if self.weights == "bfloat16":
            return through(ops, ops.cast(ops.cast(weight, "bfloat16"), "float32"), weight)
        form, block = FORMS[self.weights], self.granularity == "block"
        rows = ops.reshape(weight, self._rows(weight.shape))
        peak = ops.stop_gradient(ops.max(ops.abs(rows), axis=1, keepdims=True))
        # A product, because compilers turn division by a constant into one, which is another number.
        scale = ops.maximum(peak, _SMALLEST) * np.float32(1 / form.high)
        if "scale" in variables:
            learned = variables["scale"] * ops.exp(variables["stretch"])
            scale = ops.maximum(ops.minimum(learned, scale), _SMALLEST / np.float32(form.high))
        exact = short(ops, scale, _HALF_EXACT if block else _EXACT)
        if block:  # stored as float16, at least its smallest normal number
            limit16 = np.finfo(np.float16)
            exact = ops.clip(exact, float(limit16.tiny), float(limit16.max))
        else:  # a row this small has a range of its own, as in `encode`
            exact = ops.where(peak > _SMALLEST, exact, _SMALLEST / np.float32(form.high))
        if "scale" in variables:
            strength = 1.0 / float(np.sqrt(int(rows.shape[1]) * form.high))
            found = lsq(ops, rows, through(ops, exact, scale), float(form.low), float(form.high), strength)
        else:
            found = through(ops, ops.clip(ops.round(rows / exact), form.low, form.high) * exact, rows)
        return ops.reshape(found, weight.shape)

    def promises(self, weight: np.ndarray, context: Context) -> tuple[str, ...]:
        """Every value lies on the grid that the values' own range gives, so that a file holds it exactly.

        >>> Quantize("int8").promises(np.array([[1.27, 0.5], [1.27, 0.501]], np.float32), Context("layer", axis=0))
        ('1 of 2 channels is off the grid of int8',)
        """
        if self.weights == "float" or not weight.size:
            return ()
        plain = replace(self, range="minmax", rounding="nearest")
        off = (plain.decode(plain.encode(weight, Context(context.name, axis=0))) != weight).any(axis=1)
        be = "is" if off.sum() == 1 else "are"
        return (f"{off.sum()} of {len(off)} channels {be} off the grid of {self.weights}",) if off.any() else ()

    def _check_blocks(self, shape: tuple[int, ...], where: str) -> None:
        if len(shape) != 2 or shape[1] % self.block_size:
            raise InputError(
                "cannot quantize weights in blocks", where=where,
                expected=f"a matrix with a multiple of {self.block_size} inputs",
                got="x".join(map(str, shape)), todo="Take one scale per channel",
            )  # fmt: skip

    def _rows(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape in which each row has one scale."""
        outputs, inputs = int(shape[0]), int(shape[1])
        if self.granularity == "block":
            return outputs * inputs // self.block_size, self.block_size
        return (outputs, inputs) if self.granularity == "channel" else (1, outputs * inputs)

    def _encode_blocks(self, weight: np.ndarray, context: Context) -> Encoded:
        self._check_blocks(weight.shape, context.name)
        outputs, inputs = weight.shape
        blocks = weight.reshape(outputs * (inputs // self.block_size), self.block_size)
        loss = self._loss(weight, context, lambda full: full.reshape(blocks.shape))
        # Files store block scales as float16; the codes are made for the stored value.
        exact, limit = self._scales(blocks, -7, 7, loss), np.finfo(np.float16)
        if exact.size and exact.max() > limit.max:
            raise InputError(
                "cannot quantize weights in blocks", expected=f"values within {7 * float(limit.max):g}",
                got=f"{7 * float(exact.max()):g}", todo="Take one scale per channel",
            )  # fmt: skip
        scale = exact.astype(np.float16).astype(np.float32)
        scale = np.maximum(scale, np.float32(limit.tiny))
        codes = _codes(blocks, scale[:, None], -7, 7, clip=True).reshape(weight.shape)
        scale = scale.reshape(outputs, -1)
        return Encoded(codes, "int4", Quantization(scale, np.zeros(scale.shape, np.int64), "int4", 0, self.block_size))

    def _loss(self, weight: np.ndarray, context: Context, lay: Callable[[np.ndarray], np.ndarray]) -> Loss:
        """What `mse` minimises per row: the output error under the input's mean and variance, else plain square error."""
        spread = context.input_spread(weight.shape) if self.range == "mse" else None
        if spread is None:
            return lambda error: np.square(error).sum(axis=1, dtype=np.float64)
        variance, mean = (lay(np.broadcast_to(s, weight.shape)).astype(np.float32) for s in spread)
        corrected = self.bias_correction  # a corrected bias takes the mean error away

        def loss(error: np.ndarray) -> np.ndarray:
            shift = 0.0 if corrected else (error * mean).sum(axis=1, dtype=np.float64)
            return np.asarray((np.square(error) * variance).sum(axis=1, dtype=np.float64) + np.square(shift))

        return loss

    def _scales(self, rows: np.ndarray, low: int, high: int, loss: Loss) -> np.ndarray:
        """One scale per row of float32 [n, k] -> float32 [n]."""
        if not rows.size:
            return np.ones(len(rows), np.float32)
        peak = np.maximum(rows.max(axis=1), -rows.min(axis=1))
        if not np.isfinite(peak).all():
            raise InputError("cannot quantize weights", expected="finite values", got="infinity or not-a-number")
        scale = np.maximum(peak, _SMALLEST) / np.float32(high)
        if self.range == "mse":
            scale = _least_square_scale(rows, scale, low, high, loss)
        return scale.astype(np.float32)


def _along(scale: np.ndarray, axis: int | None, ndim: int) -> np.ndarray:
    if axis is None:
        return scale.reshape([1] * ndim)
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def _codes(weight: np.ndarray, scale: np.ndarray, low: int, high: int, *, clip: bool) -> np.ndarray:
    """Times the inverse in float32, half away from zero: the converter's arithmetic, so that the codes are its codes.

    In blocks of rows that stay in the cache, with buffers made once: fresh memory costs more than the arithmetic.
    """
    shape, weight = weight.shape, np.atleast_1d(weight)
    inverse = np.broadcast_to((1.0 / scale.astype(np.float64)).astype(np.float32), weight.shape)
    codes = np.empty(weight.shape, np.int8)
    step = max(1, BLOCK * len(weight) // max(1, weight.size))
    scaled = np.empty((min(step, len(weight)), *weight.shape[1:]), np.float32)
    halves = np.empty(scaled.shape, np.uint32)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        count = len(codes[rows])
        x, half = scaled[:count], halves[:count]
        np.multiply(weight[rows], inverse[rows], out=x)
        np.bitwise_and(x.view(np.uint32), _SIGN, out=half)
        np.bitwise_or(half, _HALF, out=half)
        np.add(x, half.view(np.float32), out=x)
        if clip:
            np.clip(x, low, high, out=x)
        codes[rows] = x
    return codes.reshape(shape)


def _least_square_scale(rows: np.ndarray, start: np.ndarray, low: int, high: int, measure: Loss) -> np.ndarray:
    """Per row, the fraction of the min-max scale with the least loss: a coarse, then a fine scan."""
    best, least = start.copy(), np.full(len(rows), np.inf)

    def scan(factors: np.ndarray) -> None:
        for factor in factors.T:
            scale = (start * factor).astype(np.float32)
            error = rows / scale[:, None]
            np.rint(error, out=error)
            np.clip(error, low, high, out=error)
            error *= scale[:, None]
            error -= rows
            loss = measure(error)
            better = loss < least
            least[better], best[better] = loss[better], scale[better]

    coarse = np.linspace(1.0, 0.3 if high < 16 else 0.7, 15, dtype=np.float32)
    scan(np.broadcast_to(coarse, (len(rows), coarse.size)))
    step = coarse[0] - coarse[1]
    scan((best / start)[:, None] + np.linspace(-step, step, 9, dtype=np.float32)[None, [1, 2, 3, 5, 6, 7]])
    return best
