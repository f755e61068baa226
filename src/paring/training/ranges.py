"""Fake quantization of activations: a grid from a range, and what each phase does with a value.

Training runs on moving averages of each batch's minimum and maximum (Jacob et al., CVPR 2018). Evaluation rounds half to even,
because XNNPACK does: it adds a large number and takes it away again.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from paring.compress.straight import short, through
from paring.grids import LEVELS

_SMALLEST = 1e-6  # of a range, as in `grids.activation_grid`


def grid(low: Any, high: Any, bits: int, symmetric: bool = False) -> tuple[Any, Any]:
    """Scale and zero point (a whole number, float32) of a range, by `grids.activation_grid`; for 8 bits zero counts from 0.

    Args:
      low: float32 scalar tensor; the range is widened to hold 0.
      high: Likewise.
      bits: 8 or 16 (symmetric).
      symmetric: With 8 bits too.
    """
    low, high = ops.minimum(low, 0.0), ops.maximum(high, 0.0)
    if bits == 16:
        return ops.maximum(ops.maximum(-low, high), _SMALLEST) * np.float32(1 / LEVELS["int16"][1]), ops.zeros_like(low)
    if symmetric:
        return ops.maximum(ops.maximum(-low, high), _SMALLEST) * np.float32(1 / 127), ops.full_like(low, 128.0)
    # Products, because compilers turn division by a constant into one, which is another number.
    scale = ops.maximum(high - low, _SMALLEST) * np.float32(1 / 255)
    return scale, ops.floor(-low / scale + 0.5)


def exact_grid(low: Any, high: Any, bits: int, symmetric: bool = False) -> tuple[Any, Any]:
    """The same with a scale of 16 significant bits: products with codes are exact, so a file says the very same grid."""
    scale, zero = grid(low, high, bits, symmetric)
    return ops.reshape(short(ops, ops.reshape(scale, (1, 1)), 16), ()), zero


def bounds(scale: Any, zero: Any, bits: int) -> tuple[Any, Any]:
    """The smallest and largest value of a grid."""
    if bits == 16:
        return -32767 * scale, 32767 * scale
    return -zero * scale, (255 - zero) * scale


def train(x: Any, low: Any, high: Any, bits: int, symmetric: bool = False) -> Any:
    """The value on its grid, with gradient to `x` inside the range, and to the range where it is trained."""
    scale, zero = grid(low, high, bits, symmetric)
    least, most = bounds(scale, zero, bits)
    if bits == 8 and keras.backend.backend() == "tensorflow":
        return keras.quantizers.fake_quant_with_min_max_vars(x, least, most)  # one kernel instead of a dozen
    return _rounded(x, scale, least, most)


def evaluate(x: Any, low: Any, high: Any, bits: int, symmetric: bool = False) -> Any:
    """The value on its grid as XNNPACK computes it, with the same gradient."""
    scale, zero = exact_grid(low, high, bits, symmetric)
    return _rounded(x, scale, *bounds(scale, zero, bits))


def _rounded(x: Any, scale: Any, least: Any, most: Any) -> Any:
    inside = ops.clip(ops.cast(x, "float32"), least, most)
    codes = inside / scale
    # Gradients of codes * scale: to x straight through, to the scale by what rounding leaves (Esser et al., ICLR 2020).
    return ops.cast(through(ops, ops.round(codes), codes) * scale, x.dtype)
