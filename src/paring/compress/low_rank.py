"""LowRank: a weight matrix as the product of two thin ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from paring.compress.base import PROMISES, Algorithm, Context, Encoded, Extra
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
    makes: ClassVar[frozenset[str]] = frozenset({"rank"})
    trains_weight: ClassVar[bool] = False  # its factors are trained in its place

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

    def describe(self) -> str:
        """In a few words.

        >>> LowRank(rank=8).describe()
        'rank 8'
        """
        return f"rank {self.rank}" if self.rank is not None else f"{100 * (self.energy or 0):.4g} % of the energy"

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

    @property
    def gives_up(self) -> frozenset[str]:
        """Everything: a product has neither the zeros nor the values of the weight."""
        return frozenset(PROMISES) - {"rank"}

    def variables(self, weight: np.ndarray, context: Context) -> dict[str, Extra]:
        """The factors, both trained."""
        found = self.encode(weight, context).factors
        assert found is not None
        return {name: Extra(value, trainable=True) for name, value in zip(("left", "right"), found, strict=True)}

    def factors(
        self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context
    ) -> tuple[Any, Any]:
        """Left and right, which later stages get."""
        return variables["left"], variables["right"]

    def project(self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context) -> Any:
        """The product of the trained factors; the raw weight only sets them at first."""
        return ops.matmul(variables["left"], variables["right"])

    def hold(self, ops: Any, weight: Any, variables: Mapping[str, Any], context: Context) -> Any:
        """The product, so that a checkpoint's weight is the trained one."""
        return ops.matmul(variables["left"], variables["right"])

    def promises(self, weight: np.ndarray, context: Context) -> tuple[str, ...]:
        """At most the rank that was asked for, to rounding; a rank that follows from `energy` is not promised."""
        found = int(np.linalg.matrix_rank(weight)) if self.rank is not None else 0
        return () if not self.rank or found <= self.rank else (f"rank {found}, not at most {self.rank}",)

    def _factors(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left, power, right = np.linalg.svd(matrix, full_matrices=False)
        rank = self.rank
        if self.energy is not None:
            share = np.cumsum(np.square(power, dtype=np.float64))
            rank = int((share < self.energy * share[-1] * (1 - 1e-12)).sum()) + 1
        root = np.sqrt(power[:rank])
        return np.ascontiguousarray(left[:, :rank] * root), np.ascontiguousarray(root[:, None] * right[:rank])
