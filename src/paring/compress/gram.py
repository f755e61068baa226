"""Second moments of what weights meet, in the float model and behind the layers that are quantized already."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from paring.compress.support import fit
from paring.compress.unfold import Unfolding

BLUR = 1e-4  # of an input's power: below, what float32 sums leave of a variance is their own rounding
BATCH = 512  # rows that are summed up at a time


@dataclass(frozen=True)
class Gram:
    """Moments of the input rows of one operator: x in the float model, x' in the model as optimized so far.

    Attributes:
      unfolding: How the weights lie as matrices.
      second: Mean of x' x'^T, float64 [groups, inputs, inputs].
      cross: Mean of x' x^T, the same shape.
      mean: Mean of x', float64 [groups, inputs].
      mean_float: Mean of x.
      rows: How many rows were seen.
    """

    unfolding: Unfolding
    second: np.ndarray = field(repr=False)
    cross: np.ndarray = field(repr=False)
    mean: np.ndarray = field(repr=False)
    mean_float: np.ndarray = field(repr=False)
    rows: int = 0

    def centered(self) -> Gram:
        """Covariances instead: what is left to lose where the bias takes the mean error away.

        `BLUR` of each input's power stays, so that inputs that hardly change (of one sample alone, none does) keep weights near
        what they were instead of following noise.
        """
        blur = BLUR * np.einsum("gkk->gk", self.second)[..., None] * np.eye(self.second.shape[-1])
        second = self.second - self.mean[..., :, None] * self.mean[..., None, :]
        cross = self.cross - self.mean[..., :, None] * self.mean_float[..., None, :]
        return replace(self, second=second + blur, cross=cross + blur)

    def damped(self, damping: float) -> np.ndarray:
        """`second` with a share of its mean diagonal added, so that it is positive definite; dead inputs get 1.

        Where that share is lost in the rounding of the sums, it is ten times as much, and so on.
        """
        diagonal = np.einsum("gkk->gk", self.second)
        while True:
            added = damping * diagonal.mean(axis=-1, keepdims=True)
            added = np.where(diagonal + added > 0, added, 1.0)
            held = self.second + added[..., None] * np.eye(self.second.shape[-1])
            try:
                np.linalg.cholesky(held)
            except np.linalg.LinAlgError:
                damping *= 10
            else:
                return held

    def retarget(self, weight: np.ndarray, damping: float, kept: np.ndarray | None = None) -> np.ndarray:
        """The weights that give the float model's outputs from x': least squares, drawn to `weight` by the damping.

        |W x - W' x'|^2 is least where W' E[x' x'^T] = W E[x x'^T]; rounding W' on x' then makes good what the layers before
        have lost. Where x' is x, W' is W.

        Args:
          weight: float32, the operator's weights W.
          damping: Share of the mean diagonal that pulls towards W.
          kept: bool [groups, rows, inputs]; where False, W' is to be zero.
        """
        held = self.damped(damping)
        pulled = self.cross + (held - self.second)
        matrix = self.unfolding.matrix(weight).astype(np.float64)
        moved = np.swapaxes(np.linalg.solve(held, pulled @ np.swapaxes(matrix, -1, -2)), -1, -2)
        if kept is not None:
            moved = fit(moved, held, kept)
        return np.asarray(self.unfolding.tensor(moved), np.float32)

    def shift(self, weight: np.ndarray, decoded: np.ndarray) -> np.ndarray:
        """What the mean output lost by going from W x to `decoded` x', per output channel, float32."""
        before = np.einsum("grk,gk->gr", self.unfolding.matrix(weight), self.mean_float)
        after = np.einsum("grk,gk->gr", self.unfolding.matrix(decoded), self.mean)
        return np.asarray(self.unfolding.channels(before - after), np.float32)

    def loss(self, error: np.ndarray) -> np.ndarray:
        """Mean square output error per row for weight errors in the weights' shape -> float64 [groups, rows]."""
        rows = self.unfolding.matrix(error).astype(np.float64)
        return np.asarray(np.einsum("grk,grk->gr", rows @ self.second, rows))


class GramSum:
    """Adds up rows of many samples; memory stays that of the result and of `BATCH` rows."""

    def __init__(self, unfolding: Unfolding, positions: int, seed: int) -> None:
        """Takes up to `positions` output positions of each sample; the seed draws them."""
        self.unfolding, self.positions, self.seed = unfolding, positions, seed
        self.samples = self.rows = self.waiting = 0
        self.patches: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        self.sums: list[np.ndarray] = []

    def update(self, x: np.ndarray, seen: np.ndarray) -> None:
        """Adds one sample: the operator's input in the float model, and the same behind what is quantized so far."""
        pair = []
        for values in (x, seen):
            # The same positions on both sides.
            patches, _ = self.unfolding.patches(np.asarray(values, np.float32), self.positions, self.random())
            pair.append(patches)
        self.add(pair[0], pair[1])

    def random(self) -> np.random.Generator:
        """Draws the positions of the next sample."""
        return np.random.default_rng([self.seed, self.samples])

    def add(self, rows: np.ndarray, seen: np.ndarray) -> None:
        """Adds one sample's rows, float32 [groups * parts, positions, inputs]; `seen` may be the very same array."""
        for values, waiting in zip((rows, seen), self.patches, strict=True):
            waiting.append(values)
        count = rows.shape[1]
        self.samples, self.rows, self.waiting = self.samples + 1, self.rows + count, self.waiting + count
        if self.waiting >= BATCH:
            self._add()

    def _add(self) -> None:
        """Sums up what waits: a product of many rows costs little more than one of a single row."""
        same = all(one is other for one, other in zip(*self.patches, strict=True))
        a = np.concatenate(self.patches[0], axis=1)
        b = a if same else np.concatenate(self.patches[1], axis=1)
        turned = np.swapaxes(b, -1, -2)
        with np.errstate(over="ignore", invalid="ignore"):  # `finish` refuses what is not finite
            second, mean = turned @ b, b.sum(axis=1, dtype=np.float64)
            parts = [second, second if same else turned @ a, mean, mean if same else a.sum(axis=1, dtype=np.float64)]
            if not self.sums:
                self.sums = [np.zeros(part.shape, np.float64) for part in parts]
            for place, part in enumerate(parts):
                self.sums[place] += part
        self.patches, self.waiting = ([], []), 0

    def finish(self) -> Gram | None:
        """The means; None where no row was seen or one was not finite."""
        if self.waiting:
            self._add()
        if not self.rows or not all(np.isfinite(total).all() for total in self.sums):
            return None
        second, cross, mean, mean_float = (total / self.rows for total in self.sums)
        return Gram(self.unfolding, second, cross, mean, mean_float, self.rows)
