"""Marks in an exported graph, on TensorFlow: ranges for the writer to read, and names that say what belongs to which rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from paring.training.ranges import SMALLEST


@contextmanager
def label(number: int) -> Iterator[None]:
    """Operations made inside carry the number in their names."""
    with tf.name_scope(f"paring{number}"):
        yield


def annotate(x: Any, low: float, high: float, bits: int) -> Any:
    """Marks a value with its range: the converter leaves a pair of QUANTIZE and DEQUANTIZE there.

    The pair has 8 bits in any case; for 16 its range is chosen so that the symmetric range of 16 bits can be read off exactly.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if bits == 16:
        step = np.float32(max(-low, high, SMALLEST)) / np.float32(128)
        least, most = -128 * step, 127 * step
    else:
        step = np.float32(max(float(np.float32(high) - np.float32(low)), SMALLEST)) / np.float32(255)
        zero = np.floor(np.float32(-low) / step + np.float32(0.5))
        least, most = -zero * step, (255 - zero) * step
    marked = tf.quantization.fake_quant_with_min_max_args(tf.cast(x, tf.float32), float(least), float(most))
    return tf.cast(marked, x.dtype)
