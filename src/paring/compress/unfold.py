"""Linear operators as matrix products: what each row of weights is multiplied with, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from paring.graph import Graph, Op, WeightUse

KINDS = ("dense", "conv2d", "depthwise_conv2d", "conv2d_transpose", "matmul")
WIDEST = 4096  # inputs of one row: above, they are looked at in parts, for memory grows with their square


@dataclass(frozen=True)
class Unfolding:
    """How the weights of one operator lie as matrices [groups, rows, inputs], and what they meet.

    A group is a set of rows that see the same inputs: one for a dense layer or a convolution, one per channel for a
    depthwise convolution. Row r of group g makes output channel g * rows + r.

    Attributes:
      kind: One of `KINDS`.
      shape: Of the weights.
      groups: Sets of rows with inputs of their own.
      parts: In how many equal parts the inputs of a row are looked at, as if other parts had nothing to do with them.
      params: The operator's options: strides, dilation, padding (1 is VALID), `adj_x`, `adj_y`.
    """

    kind: str
    shape: tuple[int, ...]
    groups: int = 1
    parts: int = 1
    params: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, op: Op, use: WeightUse) -> Unfolding | None:
        """The unfolding of an operator's weights; None where it is not one of `KINDS`, or its layout is not known."""
        tensor = op.inputs[use.input]
        source = op.inputs[op.demands.data[0]] if op.demands is not None and op.demands.data else None
        if op.kind not in KINDS or tensor is None or source is None or graph.tensors[tensor].weight is None:
            return None
        shape, seen = graph.tensors[tensor].shape, graph.tensors[source].shape
        if len(shape) < 2 or not prod(shape) or graph.tensors[source].weight is not None:
            return None
        groups = 1
        if op.kind == "conv2d":
            channels = seen[-1] if seen and seen[-1] > 0 else shape[-1]
            if channels % shape[-1] or shape[0] % (channels // shape[-1]):
                return None
            groups = channels // shape[-1]
        elif op.kind == "depthwise_conv2d":
            groups = shape[-1] // max(1, int(op.params.get("depth_multiplier", 1) or 1))
            if not groups or shape[-1] % groups or (seen and seen[-1] > 0 and seen[-1] != groups):
                return None
        elif op.kind == "matmul" and (groups := prod(shape[:-2])) > 1 and tuple(seen[:-2]) != shape[:-2]:
            return None
        inputs = prod(shape) // (groups * cls(op.kind, shape, groups, 1, op.params).rows)
        parts = next(n for n in range(1, inputs + 1) if inputs % n == 0 and inputs // n <= WIDEST)
        if parts > 1 and groups > 1:
            return None
        return cls(op.kind, shape, groups, parts, dict(op.params))

    @classmethod
    def plain(cls, shape: tuple[int, ...]) -> Unfolding:
        """Weights whose first dimension are the outputs."""
        return cls("dense" if len(shape) == 2 else "conv2d", shape)

    @property
    def rows(self) -> int:
        """Rows of one group."""
        if self.kind == "depthwise_conv2d":
            return self.shape[-1] // self.groups
        if self.kind == "matmul":
            return self.shape[-2 if self.params.get("adj_y") else -1]
        return self.shape[0] // self.groups

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """Weights [*shape] -> [groups * parts, rows, inputs]; also of anything that broadcasts to the weights."""
        weight = np.broadcast_to(weight, self.shape)
        if self.kind == "depthwise_conv2d":
            taps = weight.reshape(-1, self.groups, self.rows)
            return np.ascontiguousarray(taps.transpose(1, 2, 0))
        if self.kind == "matmul" and not self.params.get("adj_y"):
            weight = np.swapaxes(weight, -1, -2)
        found = weight.reshape(self.groups, self.rows, -1)
        if self.parts > 1:
            found = found.reshape(self.rows, self.parts, -1).transpose(1, 0, 2)
        return np.ascontiguousarray(found)

    def tensor(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of `matrix`."""
        if self.kind == "depthwise_conv2d":
            return np.ascontiguousarray(matrix.transpose(2, 0, 1)).reshape(self.shape)
        if self.parts > 1:
            matrix = matrix.transpose(1, 0, 2)
        if self.kind == "matmul" and not self.params.get("adj_y"):
            matrix = np.swapaxes(matrix.reshape(*self.shape[:-2], self.rows, -1), -1, -2)
        return np.ascontiguousarray(matrix).reshape(self.shape)

    def taps(self, matrix: np.ndarray) -> np.ndarray:
        """[groups * parts, rows, inputs] -> [groups, rows, taps, inputs of one tap]."""
        if self.parts > 1:
            matrix = matrix.transpose(1, 0, 2)
        depth = self.shape[-1] if self.kind in ("dense", "conv2d", "conv2d_transpose") else 1
        if self.kind == "matmul":
            depth = self.shape[-1 if self.params.get("adj_y") else -2]
        return matrix.reshape(self.groups, self.rows, -1, depth)

    def untaps(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `taps`."""
        if self.parts > 1:
            return np.ascontiguousarray(values.reshape(self.rows, self.parts, -1).transpose(1, 0, 2))
        return values.reshape(self.groups, self.rows, -1)

    def channels(self, values: np.ndarray) -> np.ndarray:
        """Values of rows [groups * parts, rows] -> one per output channel: the sum over parts."""
        return values.sum(axis=0) if self.parts > 1 else values.reshape(-1)

    def patches(self, x: np.ndarray, limit: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """What the rows meet at up to `limit` output positions.

        Args:
          x: The operator's input, any batch.
          limit: At most so many positions, drawn without replacement.
          rng: Draws them; the same state draws the same positions for an input of the same shape.

        Returns:
          float32 [groups * parts, positions, inputs], and how many positions there were.
        """
        if self.kind in ("dense", "matmul"):
            rows = self._rows_of(x)
        else:
            rows = self._windows(x, limit, rng)
            if self.kind == "depthwise_conv2d":
                rows = rows.reshape(len(rows), -1, self.groups).transpose(2, 0, 1)
                return np.ascontiguousarray(rows, np.float32), rows.shape[1]
            rows = rows.reshape(1, len(rows), -1)
            if self.groups > 1:  # [positions, taps, groups, channels of one]
                taps = rows.reshape(rows.shape[1], -1, self.groups, self.shape[-1])
                rows = taps.transpose(2, 0, 1, 3).reshape(self.groups, rows.shape[1], -1)
        if rows.shape[1] > limit:
            rows = rows[:, np.sort(rng.choice(rows.shape[1], limit, replace=False))]
        if self.parts > 1:
            rows = rows.reshape(rows.shape[1], self.parts, -1).transpose(1, 0, 2)
        return np.ascontiguousarray(rows, np.float32), rows.shape[1]

    def _rows_of(self, x: np.ndarray) -> np.ndarray:
        if self.kind == "dense":
            return x.reshape(1, -1, self.shape[-1])
        if self.params.get("adj_x"):
            x = np.swapaxes(x, -1, -2)
        return x.reshape(self.groups, -1, x.shape[-1])

    def _windows(self, x: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
        """[positions, height, width, channels] of the kernel's windows."""
        height, width = self.shape[1:3]
        stride = [int(self.params.get(f"stride_{d}", 1) or 1) for d in "hw"]
        dilation = [int(self.params.get(f"dilation_{d}_factor", 1) or 1) for d in "hw"]
        valid = int(self.params.get("padding", 0)) == 1
        if self.kind == "conv2d_transpose":
            x, stride = _spread(x, stride, (height, width), valid=valid), [1, 1]
        spans = [(k - 1) * d + 1 for k, d in zip((height, width), dilation, strict=True)]
        if not valid and self.kind != "conv2d_transpose":
            x = np.pad(x, [(0, 0), *same_margins(x.shape[1:3], spans, stride), (0, 0)])
        if x.shape[1] < spans[0] or x.shape[2] < spans[1]:
            return np.zeros((0, height, width, x.shape[3]), np.float32)
        views = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(1, 2))[
            :, :: stride[0], :: stride[1], :, :: dilation[0], :: dilation[1]
        ]
        count = prod(views.shape[:3])
        chosen = np.sort(rng.choice(count, limit, replace=False)) if count > limit else np.arange(count)
        found = views[np.unravel_index(chosen, views.shape[:3])].transpose(0, 2, 3, 1)
        return found[:, ::-1, ::-1] if self.kind == "conv2d_transpose" else found


def same_margins(size: tuple[int, ...], spans: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """TensorFlow's SAME padding of height and width, or of as many dimensions as are given."""
    found = []
    for n, span, step in zip(size, spans, stride, strict=True):
        total = max((-(-n // step) - 1) * step + span - n, 0)
        found.append((total // 2, total - total // 2))
    return found


def _spread(x: np.ndarray, stride: list[int], kernel: tuple[int, int], *, valid: bool) -> np.ndarray:
    """A transposed convolution's input with zeros between its values: an ordinary convolution of it, kernel turned
    around, gives the result."""
    sizes, pads = [], []
    for n, step, span in zip(x.shape[1:3], stride, kernel, strict=True):
        before = 0 if valid else max(span - step, 0) // 2
        out = n * step + (max(span - step, 0) if valid else 0)
        sizes.append((n - 1) * step + 1)
        pads.append((span - 1 - before, max(0, out - 1 + before - (n - 1) * step)))
    wide = np.zeros((len(x), *sizes, x.shape[3]), x.dtype)
    wide[:, :: stride[0], :: stride[1]] = x
    return np.pad(wide, [(0, 0), *pads, (0, 0)])
