"""Masks while training: the same choice as `Pattern.kept`, in operations that every backend compiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from paring.compress.pattern import Pattern
from paring.errors import InputError


def check_fits(pattern: Pattern, name: str, outputs: int, inputs: int, where: str) -> None:
    """Raises InputError, with the nearest pattern that fits, where a layer is smaller than one block.

    Args:
      pattern: What is wanted.
      name: Its name.
      outputs: Of the layer.
      inputs: Of the layer, of one tap.
      where: The layer, for the message.
    """
    if pattern.outputs <= outputs and pattern.inputs <= inputs and pattern.of <= inputs:
        return
    if pattern.of:
        small = int(np.gcd(pattern.keep, pattern.of))
        nearest = f"{pattern.keep // small}:{pattern.of // small}" if pattern.of // small <= inputs else "unstructured"
    else:
        nearest = f"{min(pattern.outputs, outputs)}x{min(pattern.inputs, inputs)}"
        nearest = "unstructured" if nearest == "1x1" else nearest
    raise InputError(
        f"cannot prune in pattern {name}", where=where,
        expected=f"a layer of at least {max(pattern.outputs, 1)} outputs and {max(pattern.inputs, pattern.of)} inputs",
        got=f"{outputs} outputs and {inputs} inputs per tap", todo=f"The nearest that fits is {nearest}",
    )  # fmt: skip


def choose(ops: Any, pattern: Pattern, weight: Any, mask: Any, share: Any, taps: int) -> Any:
    """The mask at a larger share of zeros; what is zero in `mask` stays zero.

    Args:
      ops: `keras.ops`.
      pattern: Which weights become zero together. Of an N:M pattern, sets of M inputs come to obey it one after the other,
        those first that lose least.
      weight: float32 [outputs, taps * inputs].
      mask: float32 of 0 and 1, the same shape.
      share: float32 scalar: of all weights that are to be zero, met to within half a block (or set).
      taps: Positions of a convolution's kernel.

    Returns:
      float32 of 0 and 1, the shape of `weight`.
    """
    outputs, inputs = int(weight.shape[0]), int(weight.shape[1]) // taps
    score = ops.reshape(ops.square(weight * mask), (outputs, taps, inputs))
    alive = ops.reshape(mask, (outputs, taps, inputs))
    kept = _sets(ops, pattern, score, share) if pattern.of else _blocks(ops, pattern, score, alive, share)
    return ops.reshape(kept * alive, (outputs, taps * inputs))


def _rank(ops: Any, values: Any) -> Any:
    """Each value's place in ascending order along the last axis."""
    return ops.argsort(ops.argsort(values, axis=-1), axis=-1)


def _blocks(ops: Any, pattern: Pattern, score: Any, alive: Any, share: Any) -> Any:
    outputs, taps, inputs = score.shape
    down, across = -(-outputs // pattern.outputs), -(-inputs // pattern.inputs)
    pad = [(0, down * pattern.outputs - outputs), (0, 0), (0, across * pattern.inputs - inputs)]

    def total(values: Any) -> Any:
        wide = ops.reshape(ops.pad(values, pad), (down, pattern.outputs, taps, across, pattern.inputs))
        return ops.reshape(ops.sum(wide, axis=(1, 4)), (-1,))

    counts, size = total(alive), float(outputs * taps * inputs)
    # What is gone already comes first, and counts for nothing.
    mean = ops.where(counts > 0, total(score) / ops.maximum(counts, 1.0), -1.0)
    order = ops.argsort(mean)
    # Whole numbers below 2^24 are exact in float32; above, a share is met to a part in 2^24.
    removed = ops.cumsum(ops.take(counts, order))
    wanted = share * size - (size - ops.sum(counts))
    miss = ops.abs(ops.concatenate([ops.zeros((1,), "float32"), removed], axis=0) - wanted)
    number = ops.argmin(miss)
    stays = ops.cast(ops.argsort(order) >= ops.cast(number, "int32"), "float32")
    wide = ops.reshape(stays, (down, 1, taps, across, 1))
    wide = ops.broadcast_to(wide, (down, pattern.outputs, taps, across, pattern.inputs))
    whole = ops.reshape(wide, (down * pattern.outputs, taps, across * pattern.inputs))
    return whole[:outputs, :, :inputs]


def _sets(ops: Any, pattern: Pattern, score: Any, share: Any) -> Any:
    outputs, taps, inputs = score.shape
    number = -(-inputs // pattern.of)
    rest = number * pattern.of - inputs
    padded = ops.pad(score, [(0, 0), (0, 0), (0, rest)], constant_values=-1.0)
    sets = ops.reshape(padded, (outputs, taps, number, pattern.of))
    keep = np.full((number, 1), pattern.keep, np.int32)
    keep[-1] = -(-(pattern.of - rest) * pattern.keep // pattern.of)  # a smaller set keeps as large a part
    stays = _rank(ops, sets) >= ops.convert_to_tensor(pattern.of - keep)
    loss = ops.sum(ops.where(stays, 0.0, ops.maximum(sets, 0.0)), axis=-1)
    flat = ops.reshape(loss, (-1,))
    # Sets that obey already lose nothing and come first; those that always do, being small, are no part of the share.
    small = outputs * taps * int(keep[-1, 0] >= pattern.of - rest)
    obey = small + ops.round(share / float(1 - pattern.keep / pattern.of) * float(outputs * taps * number - small))
    obeys = ops.reshape(ops.cast(_rank(ops, flat), "float32") < obey, (outputs, taps, number, 1))
    kept = ops.cast(ops.logical_or(stays, ops.logical_not(obeys)), "float32")
    return ops.reshape(kept, (outputs, taps, number * pattern.of))[:, :, :inputs]
