"""Where a variable's dimensions are in what operators read, behind Transpose, Reshape and the like.

Axes say for each dimension of a value which dimensions of the variable it is: `((1,), (0,))` behind a transposition,
`((0, 1),)` where two became one, `()` for a new dimension of size 1.
"""

from __future__ import annotations

from math import prod
from typing import Any, TypeAlias

import numpy as np

from paring.formats.saved_model.scope import Scope, field

Axes: TypeAlias = tuple[tuple[int, ...], ...]
MOVES = {"Identity", "StopGradient", "PreventGradient", "EnsureShape", "Transpose", "Reshape", "ExpandDims", "Squeeze"}
"""Operators that only move or rename values, for any type of them."""
FLOATS = {"Cast", "Enter", "RefEnter", "Switch", "CheckNumerics", "Snapshot"}
"""Operators that hand values on, but whose result is to be float."""


def moved(scope: Scope, node: Any, axes: Axes, shape: tuple[int, ...]) -> Axes | None:
    """The axes behind one of `MOVES` or `FLOATS`, None where they cannot be told; `shape` is the variable's."""
    if node.op == "Transpose":
        order = scope.constant(node.input[1])
        return None if order is None else tuple(axes[int(place)] for place in order)
    if node.op == "ExpandDims":
        axis = scope.constant(node.input[1])
        if axis is None:
            return None
        place = int(axis) % (len(axes) + 1)
        return (*axes[:place], (), *axes[place:])
    if node.op in ("Reshape", "Squeeze"):
        sizes = _target(scope, node)
        return None if sizes is None else regrouped(axes, shape, sizes)
    return axes


def _target(scope: Scope, node: Any) -> list[int] | None:
    """The shape that a node gives, -1 at most once."""
    sizes = scope.constant(node.input[1]) if node.op == "Reshape" else None
    if sizes is not None:
        return [int(size) for size in sizes]
    shapes = field(node, "_output_shapes").list.shape
    if not shapes or shapes[0].unknown_rank:
        return None
    found = [int(d.size) for d in shapes[0].dim]
    return found if found.count(-1) <= 1 else None


def regrouped(axes: Axes, shape: tuple[int, ...], sizes: list[int]) -> Axes | None:
    """The axes behind a reshape that joins dimensions or puts in ones; None where it splits them.

    >>> regrouped(((0,), (1,), (2,)), (3, 4, 5), [3, 1, 20])
    ((0,), (), (1, 2))
    >>> regrouped(((0,), (1,)), (6, 4), [2, 12]) is None
    True
    """
    total = prod(shape[d] for group in axes for d in group)
    known = prod(size for size in sizes if size >= 0)
    if -1 in sizes:
        if not known or total % known:
            return None
        sizes = [total // known if size < 0 else size for size in sizes]
    if prod(sizes) != total:
        return None
    left = [(group, prod(shape[d] for d in group)) for group in axes]
    left = [(group, size) for group, size in left if size != 1]
    found: list[tuple[int, ...]] = []
    for size in sizes:
        taken: tuple[int, ...] = ()
        held = 1
        while held < size and left:
            group, own = left.pop(0)
            taken, held = (*taken, *group), held * own
        if held != size:
            return None
        found.append(taken)
    return None if left else tuple(found)


def along(scale: np.ndarray, shape: tuple[int, ...], axes: Axes) -> np.ndarray | None:
    """A variable's scales laid out for a value with these axes; None where a joined dimension has them in part only.

    Args:
      scale: float32, the variable's rank, 1 in each dimension that shares one.
      shape: Of the variable.
      axes: Of the value.

    >>> along(np.ones((1, 4), np.float32), (3, 4), ((1,), (0,))).shape
    (4, 1)
    >>> along(np.ones((1, 4), np.float32), (3, 4), ((0, 1),)) is None
    True
    """
    sizes = []
    for group in axes:
        real = [d for d in group if shape[d] != 1]
        own = [d for d in real if scale.shape[d] != 1]
        if own and own != real:
            return None
        sizes.append(prod(scale.shape[d] for d in group))
    order = [d for group in axes for d in group]
    order += [d for d in range(scale.ndim) if d not in order]  # of size 1, squeezed out
    return scale.transpose(order).reshape(sizes)
