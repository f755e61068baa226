"""Patterns of zeros: which weights become zero together, and which of them do at a wanted share."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from paring.errors import InputError

UNSTRUCTURED = "unstructured"
USUAL = (UNSTRUCTURED, "4x1", "8x1", "16x1", "4x4", "8x4", "16x4", "2:4")
_WIDEST = 64  # outputs or inputs of a block: kernels take at most a few vector registers


@dataclass(frozen=True)
class Pattern:
    """Blocks of neighbouring outputs and inputs that are zero together, or the number kept of neighbouring inputs.

    What is left over at the end of the outputs, or of the inputs of one tap, makes smaller blocks.

    Attributes:
      outputs: Neighbouring output channels of a block.
      inputs: Neighbouring input channels of a block, within one tap of a convolution.
      keep: Weights that stay of every `of` neighbouring inputs; 0 for blocks.
      of: See `keep`.
    """

    outputs: int = 1
    inputs: int = 1
    keep: int = 0
    of: int = 0

    @classmethod
    def parse(cls, name: str) -> Pattern:
        """The pattern of a name: `unstructured`, outputs x inputs as in `16x1`, or N of M inputs as in `2:4`.

        >>> Pattern.parse("16x4")
        Pattern(outputs=16, inputs=4, keep=0, of=0)
        """
        if name == UNSTRUCTURED:
            return cls()
        found = re.fullmatch(r"(\d{1,2})([x:])(\d{1,2})", name) if isinstance(name, str) else None
        first, second = (int(found[1]), int(found[3])) if found else (0, 0)
        if found and found[2] == "x" and 1 <= first <= _WIDEST and 1 <= second <= _WIDEST:
            return cls(first, second)
        if found and found[2] == ":" and 1 <= first < second <= _WIDEST:
            return cls(keep=first, of=second)
        todo = "Others have the form OUTPUTSxINPUTS (blocks) or N:M (N of every M inputs kept)"
        if isinstance(name, int):
            todo = "In YAML an N:M pattern needs quotes; without them it is a number of seconds"
        raise InputError("unknown sparsity pattern", where=str(name), expected=f"one of {', '.join(USUAL)}", todo=todo)

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern itself demands; None for blocks.

        >>> Pattern.parse("2:4").sparsity
        0.5
        """
        return 1 - self.keep / self.of if self.of else None

    def kept(self, score: np.ndarray, alive: np.ndarray, share: float) -> np.ndarray:
        """Which weights stay: the blocks with the largest score per weight.

        Args:
          score: float >= 0, [groups, rows, taps, inputs]; a block has the sum over its weights.
          alive: bool, the same shape; what is not alive is zero already and stays so.
          share: Of all weights that are to be zero, met to within half a block; N:M patterns have their own.

        Returns:
          bool, the same shape.

        >>> Pattern.parse("2x1").kept(np.array([[[[3.0, 1.0]], [[3.0, 4.0]]]]), np.ones((1, 2, 1, 2), bool), 0.5)[0, :, 0]
        array([[ True, False],
               [ True, False]])
        """
        if self.of:
            return self._of_each(score, alive)
        rows, inputs = score.shape[1], score.shape[3]
        blocks, counts = self._sum(np.where(alive, score, 0)).ravel(), self._sum(alive.astype(np.int32)).ravel()
        stays = np.zeros(counts.shape, bool)
        open_ = np.flatnonzero(counts)
        remove = share * score.size - (score.size - int(counts.sum()))
        stays[open_] = ~_least(blocks[open_] / counts[open_], counts[open_], remove)
        grid = stays.reshape(score.shape[0], -(-rows // self.outputs), score.shape[2], -(-inputs // self.inputs))
        wide = np.repeat(np.repeat(grid, self.outputs, 1)[:, :rows], self.inputs, 3)[..., :inputs]
        return np.asarray(wide & alive)

    def scores(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sum of squares of each block, and how many weights it has: of float [groups, rows, taps, inputs], both flat.

        >>> Pattern.parse("2x1").scores(np.array([[[[1.0, 0.0]], [[2.0, 0.0]], [[3.0, 0.0]]]]))
        (array([5., 0., 9., 0.]), array([2, 2, 1, 1]))
        """
        return self._sum(np.square(weight)).ravel(), self._sum(np.ones(weight.shape, np.int64)).ravel()

    def crowded(self, alive: np.ndarray) -> tuple[int, int]:
        """Of N:M patterns: how many sets have more than they may keep, and how many there are.

        Args:
          alive: bool [groups, rows, taps, inputs]; a last set that is smaller may keep as large a part.
        """
        number = -(-alive.shape[3] // self.of)
        rest = number * self.of - alive.shape[3]
        sets = np.pad(alive, [(0, 0)] * 3 + [(0, rest)]).reshape(*alive.shape[:3], number, self.of).sum(axis=-1)
        may = np.full(number, self.keep)
        may[-1] = -(-(self.of - rest) * self.keep // self.of)
        return int((sets > may).sum()), int(sets.size)

    def _sum(self, values: np.ndarray) -> np.ndarray:
        down = np.add.reduceat(values, np.arange(0, values.shape[1], self.outputs), axis=1)
        return np.asarray(np.add.reduceat(down, np.arange(0, values.shape[3], self.inputs), axis=3))

    def _of_each(self, score: np.ndarray, alive: np.ndarray) -> np.ndarray:
        inputs = score.shape[3]
        rest = -inputs % self.of
        padded = np.pad(np.where(alive, score, -1.0), [(0, 0)] * 3 + [(0, rest)], constant_values=-2.0)
        sets = padded.reshape(*padded.shape[:3], -1, self.of)
        best = np.argpartition(-sets, self.keep - 1, axis=-1)[..., : self.keep]
        stays = np.zeros(sets.shape, bool)
        np.put_along_axis(stays, best, True, axis=-1)
        if rest:  # the last set is smaller: as large a part of it stays
            last = -(-(self.of - rest) * self.keep // self.of)
            least = np.argsort(-sets[..., -1, :], axis=-1, kind="stable")[..., last:]
            np.put_along_axis(stays[..., -1, :], least, False, axis=-1)
        return np.asarray(stays.reshape(padded.shape)[..., :inputs] & alive)


def _least(score: np.ndarray, counts: np.ndarray, remove: float) -> np.ndarray:
    """The blocks with the least score that together hold about `remove` weights -> bool."""
    gone = np.zeros(score.size, bool)
    if not score.size or remove <= 0:
        return gone
    if counts.min() == counts.max():  # a selection costs a tenth of sorting
        number = min(score.size, int(np.floor(remove / int(counts[0]) + 0.5)))
        if number:
            gone[np.argpartition(score, number - 1)[:number]] = True
        return gone
    order = np.argsort(score, kind="stable")
    total = np.concatenate([[0], np.cumsum(counts[order])])
    gone[order[: int(np.abs(total - remove).argmin())]] = True
    return gone
