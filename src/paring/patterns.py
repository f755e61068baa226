"""What patterns the zeros of a weight form: blocks that are zero as a whole, so many of every so many, or none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNSTRUCTURED = "unstructured"
BLOCKS = ((16, 4), (8, 4), (16, 1), (8, 1), (4, 4), (4, 1))
"""Outputs and neighbouring inputs of the blocks that kernels exist for; the first that fits is the pattern."""

COVERED = 0.97
"""Share of the zeros that must lie in zero blocks for blocks to be the pattern: few weights round to zero by chance."""

_CHANCE = 0.05  # share of weights that may be zero by chance where a pattern keeps them
FEW = 0.02  # share of zeros that says nothing
_GROUPS = ((1, 4), (2, 4), (2, 8), (4, 8), (4, 16), (8, 16))  # N of every M kept, sparsest first for each M


@dataclass(frozen=True)
class Found:
    """The zeros of one weight.

    Attributes:
      zeros: Share of elements that are zero.
      pattern: `16x1` and the like (outputs x inputs), `2:4` and the like (kept of neighbouring inputs), `unstructured`, or
        empty where there are hardly any zeros.
      covered: For each block of `BLOCKS`, by name: share of the zeros that lie in blocks which are zero as a whole.
      stored: For each block, by name: share of the elements that a kernel of such blocks has to read.
    """

    zeros: float
    pattern: str
    covered: dict[str, float]
    stored: dict[str, float]


def block_name(block: tuple[int, int]) -> str:
    """The pattern's name: outputs x inputs.

    >>> block_name((16, 4))
    '16x4'
    """
    return f"{block[0]}x{block[1]}"


def detect(weight: np.ndarray) -> Found:
    """What pattern the zeros form.

    Blocks begin at multiples of their size; a block at the end of a dimension may be smaller.

    Args:
      weight: [outputs, inputs], or [outputs, ..., inputs] where what is between are the taps of a kernel; any numbers.

    >>> dense = np.ones((32, 8))
    >>> detect(dense * (np.arange(32)[:, None] // 16 == np.arange(8) % 2)).pattern
    '16x1'
    >>> found = detect(dense * (np.arange(8) % 4 < 2))
    >>> found.pattern, found.zeros, found.stored["16x4"]
    ('16x1', 0.5, 1.0)
    """
    nonzero = (weight != 0).reshape(len(weight), -1, weight.shape[-1] if weight.ndim > 1 else 1)
    total = max(1, nonzero.size)
    kept = int(np.count_nonzero(nonzero))
    zeros = nonzero.size - kept
    covered, stored = {}, {}
    for block in BLOCKS:
        read = _stored(nonzero, block)
        covered[block_name(block)] = (nonzero.size - read) / zeros if zeros else 0.0
        stored[block_name(block)] = read / total
    stored[UNSTRUCTURED] = kept / total
    return Found(zeros / total, _name(nonzero, zeros / total, covered), covered, stored)


def _stored(nonzero: np.ndarray, block: tuple[int, int]) -> int:
    """Elements of the blocks that are not zero as a whole; `nonzero` is [outputs, taps, inputs]."""
    blocks = nonzero
    for axis, size in ((0, block[0]), (2, block[1])):
        if blocks.shape[axis]:
            blocks = np.logical_or.reduceat(blocks, np.arange(0, blocks.shape[axis], size), axis=axis)
    heights = _sizes(nonzero.shape[0], block[0])
    widths = _sizes(nonzero.shape[2], block[1])
    return int((blocks.sum(axis=1) * heights[:, None] * widths).sum()) if nonzero.size else 0


def _sizes(length: int, size: int) -> np.ndarray:
    """How long each of the parts of a dimension is."""
    return np.diff(np.append(np.arange(0, length, size), length))


def _name(nonzero: np.ndarray, zeros: float, covered: dict[str, float]) -> str:
    if zeros < FEW:
        return ""
    for name, share in covered.items():
        if share >= COVERED:
            return name
    inputs = nonzero.shape[2]
    for kept, of in _GROUPS:
        # At most so many: a weight that was kept may be zero by itself. But many more zeros are another pattern's.
        few = zeros <= 1 - kept / of + _CHANCE
        if few and inputs % of == 0 and nonzero.reshape(-1, of).sum(axis=1).max() <= kept:
            return f"{kept}:{of}"
    return UNSTRUCTURED
