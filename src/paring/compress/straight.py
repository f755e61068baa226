"""Rounding inside training, on any backend: exact values forward, straight-through gradients backward.

`x + stop_gradient(value - x)`, the usual way to write it, gives back `value` only to rounding. Here the term that carries the
gradient is an exact zero: `stop_gradient(value) + (x - stop_gradient(x))`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

POWERS = np.exp2(np.arange(-32, 33)).astype(np.float32)  # of scales: the smallest row has a range of 5e-7


def through(ops: Any, value: Any, x: Any) -> Any:
    """`value`, bit by bit, with the gradient of `x` (Bengio, Léonard, Courville 2013)."""
    return ops.stop_gradient(value) + (x - ops.stop_gradient(x))


def damped(ops: Any, x: Any, factor: Any) -> Any:
    """`x` with its gradient times `factor`."""
    return ops.stop_gradient(x) + (x - ops.stop_gradient(x)) * factor


def short(ops: Any, scale: Any, bits: int) -> Any:
    """A scale, rounded to a significand of so many bits, without gradient.

    With 17 bits its products with codes up to 127 are exact in float32. So they are the same however a compiler fuses or
    reorders the arithmetic, and whoever divides the largest by 127 finds the scale again. It is off by at most 2^-17.

    Args:
      ops: `keras.ops`.
      scale: float32 [n, 1], positive.
      bits: Of the significand, the leading one counted.
    """
    powers = ops.convert_to_tensor(POWERS)
    unit = ops.max(ops.where(powers <= scale, powers, POWERS[0]), axis=-1, keepdims=True)
    parts = np.float32(2.0 ** (bits - 1))
    return ops.stop_gradient(ops.round(scale / unit * parts) / parts * unit)


def fake_quant(ops: Any, x: Any, low: Any, high: Any, bits: int, symmetric: bool) -> Any:
    """An activation on the integer grid of a range, as integer kernels hold it.

    The range is widened to hold zero, and moved so that zero is a code. Inside it the gradient passes to `x`, outside to the
    end that clips. Values half way between two codes take the even one, as the default kernels do.

    Args:
      ops: `keras.ops`.
      x: float32, any shape.
      low: float32 scalar, the least value.
      high: float32 scalar, the largest.
      bits: 8 or 16 (any from 2).
      symmetric: Zero is code 0, and the scale is the larger side over 2^(bits - 1) - 1; else codes span the range.

    Returns:
      float32, the shape of `x`.
    """
    low, high = ops.minimum(low, 0.0), ops.maximum(high, 0.0)
    least = np.float32(1e-30)
    if symmetric:
        first, last = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
        scale = ops.maximum(ops.maximum(-low, high), least) / last
        zero = ops.zeros_like(scale)
    else:
        first, last = 0.0, 2.0**bits - 1
        scale = ops.maximum(high - low, least) / last
        zero = ops.clip(ops.floor(-low / scale + 0.5), first, last)
    scale, zero = ops.stop_gradient(scale), ops.stop_gradient(zero)
    codes = ops.clip(ops.round(x / scale) + zero, first, last)
    bottom, top = through(ops, (first - zero) * scale, low), through(ops, (last - zero) * scale, high)
    return through(ops, (codes - zero) * scale, ops.minimum(ops.maximum(x, bottom), top))


def lsq(ops: Any, x: Any, scale: Any, low: float, high: float, strength: float, zero: Any = 0.0) -> Any:
    """Values on a grid whose step size is learned (Esser et al., Learned Step Size Quantization, ICLR 2020).

    Args:
      ops: `keras.ops`.
      x: float32, any shape.
      scale: float32, positive, broadcasts to `x`; gets the paper's gradient, times `strength`.
      low: Smallest code.
      high: Largest.
      strength: The paper's 1 / sqrt(values per scale * high), which makes the scale move about as fast as its values do.
      zero: The zero point, a whole number.

    Returns:
      float32, the shape of `x`: (code - zero) * scale. Values that are clipped get no gradient.
    """
    scale = damped(ops, scale, strength)
    inside = ops.minimum(ops.maximum(x / scale, low - zero), high - zero)
    codes = ops.stop_gradient(ops.clip(ops.round(x / scale) + zero, low, high) - zero)
    return through(ops, codes * scale, through(ops, codes, inside) * scale)
