"""What each row of a weight is multiplied with, cut out of an operator's input: products of any shape, convolutions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from paring.compress.unfold import WIDEST, Unfolding, same_margins
from paring.formats.saved_model.flow import Source, Use
from paring.formats.saved_model.operators import ROWS
from paring.formats.saved_model.scope import Scope, field

_REST = "."  # stands for all dimensions that an operand has more
_KERNELS = {"conv2d": "hwio", "depthwise_conv2d": "hwcm", "conv2d_transpose": "hwoi"}
"""Convolutions: the dimensions of their kernels."""


@dataclass(frozen=True)
class Volume:
    """A convolution of three dimensions: each one's size of the kernel, stride and dilation; whether the padding is SAME."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    same: bool

    def rows(self, x: np.ndarray, limit: int, random: np.random.Generator) -> np.ndarray:
        """[batch, depth, height, width, channels] -> the kernel's windows, [1, positions, inputs]."""
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        if self.same:
            x = np.pad(x, [(0, 0), *same_margins(x.shape[1:4], spans, self.strides), (0, 0)])
        steps = (slice(None), *(slice(None, None, s) for s in self.strides), slice(None))
        inner = tuple(slice(None, None, d) for d in self.dilations)
        views = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(1, 2, 3))[(*steps, *inner)]
        count = prod(views.shape[:4])
        chosen = np.sort(random.choice(count, limit, replace=False)) if count > limit else np.arange(count)
        found = views[np.unravel_index(chosen, views.shape[:4])].transpose(0, 2, 3, 4, 1)
        return np.ascontiguousarray(found.reshape(1, len(chosen), -1), np.float32)


@dataclass(frozen=True)
class Meeting:
    """How a weight lies as matrices [groups, rows, inputs], and how an operator's input becomes what these meet.

    Attributes:
      input: Which input of the operator it is.
      order: The weight's dimensions: those that the result has too, then those that are summed over.
      outputs: How many of them the result has.
      sizes: Of these dimensions, in that order.
      shape: Of the weight as one matrix: (groups * rows, inputs).
      groups: Sets of rows that see inputs of their own.
      letters: Of a product: the dimensions of the input by letters, those that are groups, those that are summed over.
      extents: Of a product: how large the groups' dimensions are.
      window: Of a convolution of images: how it cuts its input.
      volume: Of one of three dimensions: the same.
      turn: Of a convolution: how its input has to be transposed first.
      margins: Of a convolution: what to add around its input, then.
    """

    input: int
    order: tuple[int, ...]
    outputs: int
    sizes: tuple[int, ...]
    shape: tuple[int, int]
    groups: int = 1
    letters: tuple[str, str, str] | None = None
    extents: tuple[int, ...] = ()
    window: Unfolding | None = None
    volume: Volume | None = None
    turn: tuple[int, ...] = ()
    margins: tuple[tuple[int, int], ...] = ()

    @property
    def matrices(self) -> Unfolding:
        """How the matrix lies as matrices; wide ones in parts, as if other parts had nothing to do with them."""
        width, parts = self.shape[1], 1
        if self.groups == 1:
            parts = next(n for n in range(1, width + 1) if width % n == 0 and width // n <= WIDEST)
        return Unfolding("dense", self.shape, self.groups, parts)

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """The weight as a matrix [groups * rows, inputs]."""
        return weight.transpose(self.order).reshape(self.shape)

    def outwards(self, values: np.ndarray) -> np.ndarray:
        """One value for each row of the matrix, in the weight's rank: 1 in every dimension that is summed over."""
        sizes = [*self.sizes[: self.outputs], *([1] * (len(self.order) - self.outputs))]
        return values.reshape(sizes).transpose(np.argsort(self.order))

    def meeting(self, shape: tuple[int, ...]) -> Meeting:
        """The same for an input of this shape, whose channels tell the groups of a convolution."""
        if self.window is None or self.window.kind != "conv2d":
            return self
        channels = shape[self.turn[3] if self.turn else 3]
        groups = max(1, channels // self.window.shape[3])
        return replace(self, groups=groups, window=replace(self.window, groups=groups))

    def rows(self, x: np.ndarray, limit: int, random: np.random.Generator) -> np.ndarray:
        """What the rows of each group meet, at up to `limit` positions -> float32 [groups, positions, inputs]."""
        if self.turn:
            x = x.transpose(self.turn)
        if self.volume is not None:
            return self.volume.rows(x, limit, random)
        if self.window is not None:
            x = np.pad(x, self.margins) if self.margins else x
            return self.window.patches(np.asarray(x, np.float32), limit, random)[0]
        assert self.letters is not None
        own, group, inputs = self.letters
        names = [*own]
        if _REST in own:
            place = own.index(_REST)
            names[place : place + 1] = [f"{_REST}{n}" for n in range(x.ndim - len(own) + 1)]
        for letter, size in zip(group, self.extents, strict=True):
            if x.shape[names.index(letter)] != size:  # an input of one row is the same for all groups
                x = np.repeat(x, size, axis=names.index(letter))
        free = [name for name in names if name not in group + inputs]
        x = x.transpose([names.index(name) for name in (*group, *free, *inputs)]).reshape(
            self.groups, -1, self.shape[1]
        )
        if x.shape[1] > limit:
            x = x[:, np.sort(random.choice(x.shape[1], limit, replace=False))]
        return np.asarray(x, np.float32)


def meeting(scope: Scope, source: Source, use: Use) -> Meeting | str:
    """How an operator's input meets a weight that it reads; or why nobody knows."""
    node = scope.by_name[use.node]
    row = ROWS[node.op]
    others = [index for index in row.data if index != use.input]
    if row.picks or not others:
        return f"{node.op} multiplies nothing"
    if use.axes is None or source.shape is None:
        return f"the weight of {node.op} is reshaped on its way"
    if row.kind in ("dense", "matmul", "einsum"):
        return _product(node, source.shape, use, others[0])
    if row.kind == "conv3d":
        return _volume(node, source.shape, use, others[0])
    if row.kind in _KERNELS:
        return _convolution(node, row.kind, source.shape, use, others[0])
    return f"{node.op} is not known as a product"


def _product(node: Any, shape: tuple[int, ...], use: Use, other: int) -> Meeting | str:
    axes = use.axes or ()
    if node.op == "Einsum":
        inputs, _, result = field(node, "equation").s.decode(errors="replace").replace(" ", "").partition("->")
        operands = [part.replace("...", _REST) for part in inputs.split(",")]
        if len(operands) != 2 or any(len(set(part)) < len(part) for part in operands):
            return "Einsum with repeated letters is not known as a product"
    else:
        batch = "abcdef"[: len(axes) - 2]
        turned = [
            any(field(node, name).b for name in names) for names in (("transpose_a", "adj_x"), ("transpose_b", "adj_y"))
        ]
        pairs = ["km" if turned[0] else "mk", "nk" if turned[1] else "kn"]
        more = "" if node.op == "MatMul" else _REST
        operands = [(batch if index == use.input else f"{more}{batch}") + pair for index, pair in enumerate(pairs)]
        result = f"{more}{batch}mn"
    own, x = operands[use.input], operands[other]
    if len(own) != len(axes) or _REST in own:
        return f"{node.op} with dimensions without names is not known as a product"
    group = [letter for letter in own if letter in x and letter in result]
    inner = [letter for letter in own if letter in x and letter not in result]
    outer = [letter for letter in own if letter not in x and letter in result]
    alone = [letter for letter in x if letter not in own and letter not in result]
    if len(group) + len(inner) + len(outer) < len(own) or alone:
        return "Einsum that sums one operand alone is not known as a product"
    found = _laid(shape, own, use, (*group, *outer), inner, other)
    extents = tuple(_size(shape, axes[own.index(letter)]) for letter in group)
    return replace(found, groups=prod(extents), letters=(x, "".join(group), "".join(inner)), extents=extents)


def _convolution(node: Any, kind: str, shape: tuple[int, ...], use: Use, other: int) -> Meeting:
    axes = use.axes or ()
    own = _KERNELS[kind]
    sizes = {letter: _size(shape, group) for letter, group in zip(own, axes, strict=True)}
    found = _laid(shape, own, use, "cm" if kind == "depthwise_conv2d" else "o", "hw" if "c" in own else "hwi", other)
    first = field(node, "data_format").s.startswith(b"NC")
    at = (2, 3) if first else (1, 2)
    strides, dilations = ([*field(node, name).list.i] or [1] * 4 for name in ("strides", "dilations"))
    explicit = [*field(node, "explicit_paddings").list.i]
    padding = field(node, "padding").s
    params = {
        "stride_h": strides[at[0]], "stride_w": strides[at[1]],
        "dilation_h_factor": dilations[at[0]], "dilation_w_factor": dilations[at[1]], "padding": int(padding != b"SAME"),
    }  # fmt: skip
    kernel = (sizes["h"], sizes["w"])
    if kind == "depthwise_conv2d":
        window = Unfolding(kind, (1, *kernel, sizes["c"] * sizes["m"]), sizes["c"], 1, params)
    else:
        window = Unfolding(kind, (sizes["o"], *kernel, sizes["i"]), 1, 1, params)
    margins: tuple[tuple[int, int], ...] = ()
    if padding == b"EXPLICIT" and len(explicit) == 8:
        margins = ((0, 0), *(tuple(explicit[2 * d : 2 * d + 2]) for d in at), (0, 0))
    turn = (0, 2, 3, 1) if first else ()
    return replace(found, groups=window.groups, window=window, turn=turn, margins=margins)


def _volume(node: Any, shape: tuple[int, ...], use: Use, other: int) -> Meeting:
    first = field(node, "data_format").s.startswith(b"NC")
    at = slice(2, 5) if first else slice(1, 4)
    strides, dilations = (tuple([*field(node, name).list.i] or [1] * 5)[at] for name in ("strides", "dilations"))
    kernel = tuple(_size(shape, group) for group in (use.axes or ())[:3])
    volume = Volume(kernel, strides, dilations, field(node, "padding").s == b"SAME")
    found = _laid(shape, "dhwio", use, "o", "dhwi", other)
    return replace(found, volume=volume, turn=(0, 2, 3, 4, 1) if first else ())


def _laid(shape: tuple[int, ...], own: Any, use: Use, kept: Any, summed: Any, other: int) -> Meeting:
    """The weight as a matrix, from the letters of an operand."""
    axes = use.axes or ()
    kept_dims = [d for letter in kept for d in axes[own.index(letter)]]
    summed_dims = [d for letter in summed for d in axes[own.index(letter)]]
    rest = [d for d in range(len(shape)) if d not in kept_dims + summed_dims]  # of size 1, squeezed out
    width = prod(shape[d] for d in summed_dims)
    order = (*kept_dims, *summed_dims, *rest)
    sizes = tuple(shape[d] for d in order)
    return Meeting(other, order, len(kept_dims), sizes, (prod(shape[d] for d in kept_dims), width))


def _size(shape: tuple[int, ...], dims: tuple[int, ...]) -> int:
    return prod(shape[d] for d in dims)


__all__ = ["Meeting", "Volume", "meeting"]
