"""Marks in an exported graph, on TensorFlow: ranges for the writer to read, and names that say what belongs to which rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf


@contextmanager
def label(number: int, op: Any) -> Iterator[None]:
    """Operations that `op` makes inside carry the number in their names."""
    with tf.name_scope(f"paring{number}"), _grouped(op):
        yield


@contextmanager
def _grouped(op: Any) -> Iterator[None]:
    """A grouped convolution as one operation: Keras has it in a compiled function, in which names are lost."""
    if getattr(op, "groups", 1) == 1 or not hasattr(op, "convolution_op") or op.data_format != "channels_last":
        yield
        return

    def convolve(x: Any, kernel: Any) -> Any:
        kernel = tf.convert_to_tensor(kernel)
        return tf.nn.convolution(x, kernel, list(op.strides), op.padding.upper(), dilations=list(op.dilation_rate))

    op.convolution_op = convolve
    try:
        yield
    finally:
        del op.convolution_op


def annotate(x: Any, scale: float, zero: float, bits: int) -> Any:
    """Marks a value with its grid: the converter leaves a pair of QUANTIZE and DEQUANTIZE there.

    The pair has 8 bits in any case; for 16 the range of 16 bits can be read off exactly.
    """
    if bits == 16:
        scale, zero = scale * 32767 / 128, 128.0
    marked = tf.quantization.fake_quant_with_min_max_args(tf.cast(x, tf.float32), -zero * scale, (255 - zero) * scale)
    return tf.cast(marked, x.dtype)
