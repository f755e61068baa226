"""LowRank: a weight matrix as the product of two thin ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.compress.base import Algorithm, Context, Encoded
from paring.errors import InputError


@dataclass(frozen=True)
class LowRank(Algorithm):
    """Truncated singular value decomposition: of all matrices of that rank the nearest (Eckart, Young 1936).

    Attributes:
      rank: Columns of the left and rows of the right factor; a smaller matrix has as many as it can.
      energy: In place of `rank`: the smallest rank that keeps this share of the squared singular values, above 0, at most 1.

    >>> w = np.outer([1.0, 2.0], [3.0, 4.0, 5.0]).astype(np.float32)
    >>> found = LowRank(rank=1).encode(w, Context("layer", axis=0))
    >>> [factor.shape for factor in found.factors], bool(np.allclose(found.values, w))
    ([(2, 1), (1, 3)], True)
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            got = f"rank {self.rank}, energy {self.energy}"
            raise InputError("bad setting", where="low_rank", expected="either rank or energy", got=got)
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise InputError(
                "bad setting", where="low_rank.rank", expected="a whole number from 1", got=repr(self.rank)
            )
        if self.energy is not None and (type(self.energy) not in (int, float) or not 0 < self.energy <= 1):
            expected = "above 0, at most 1"
            raise InputError("bad setting", where="low_rank.energy", expected=expected, got=repr(self.energy))

    def encode(self, weight: np.ndarray, context: Context) -> Encoded:
        """The two factors and their product.

        Args:
          weight: float32, at least two dimensions; the context's axis (None: the first) holds the outputs.
          context: Where the outputs are.

        Returns:
          `factors` are float32 [outputs, rank] and [rank, inputs], inputs being all other dimensions in their order; both carry
          the root of the singular values, so that their grids are alike when they are quantized. `values` is their product in
          the weight's shape.
        """
        if not np.isfinite(weight).all():
            raise InputError("cannot decompose weights", expected="finite values", got="infinity or not-a-number")
        lead = np.moveaxis(weight, context.axis or 0, 0)
        left, right = self._factors(lead.reshape(len(lead), -1))
        values = np.moveaxis((left @ right).reshape(lead.shape), 0, context.axis or 0)
        return Encoded(np.ascontiguousarray(values), "float32", None, factors=(left, right))

    def decode(self, encoded: Encoded) -> np.ndarray:
        """The product."""
        return encoded.values

    def _factors(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left, power, right = np.linalg.svd(matrix, full_matrices=False)
        rank = self.rank
        if self.energy is not None:
            share = np.cumsum(np.square(power, dtype=np.float64))
            rank = int((share < self.energy * share[-1] * (1 - 1e-12)).sum()) + 1
        root = np.sqrt(power[:rank])
        return np.ascontiguousarray(left[:, :rank] * root), np.ascontiguousarray(root[:, None] * right[:rank])
