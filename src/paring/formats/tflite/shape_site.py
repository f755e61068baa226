"""One operator as the shape rules see it, and what they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from paring.formats.tflite.flatbuffer import Malformed, Table

Shape = tuple[int, ...]
Found = Sequence["Shape | None"]


@dataclass(frozen=True)
class Site:
    """One operator as the rules see it.

    Attributes:
      ins: Shapes of its inputs; None where absent or not given.
      outs: Shapes of its outputs.
      constant: The integers of a small constant input, None for any other.
      options: Its options table.
    """

    ins: tuple[Shape | None, ...]
    outs: tuple[Shape | None, ...]
    constant: Callable[[int], list[int] | None]
    options: Table | None

    def option(self, kind: str, name: str) -> Any:
        """A field of the options, which must be of this kind."""
        if self.options is None or self.options.type_name != kind:
            got = "none" if self.options is None else self.options.type_name
            raise Malformed(f"needs {kind} and has {got}")
        return getattr(self.options, name)


def fits(got: Shape, want: Shape) -> bool:
    """True where no static dimension differs."""
    return len(got) == len(want) and all(a == b or a < 0 or b < 0 for a, b in zip(got, want, strict=True))


def listed(shape: Shape) -> str:
    """A shape for messages."""
    return str(list(shape[:16]))


def shown(shapes: Found) -> str:
    """Several shapes for messages."""
    return ", ".join("none" if s is None else listed(s) for s in shapes[:8])


def count(shape: Shape) -> int:
    """Elements, -1 where dynamic."""
    return -1 if any(d < 0 for d in shape) else math.prod(shape)


def replaced(shape: Shape, axis: int, size: int) -> Shape:
    """The shape with another size along one dimension."""
    axis = axis_of(axis, len(shape))
    return (*shape[:axis], size, *shape[axis + 1 :])


def axis_of(axis: int, rank: int) -> int:
    """A dimension counted from the front; raises Malformed where there is none."""
    if not -rank <= axis < rank:
        raise Malformed(f"works along dimension {axis} of a tensor with {rank}")
    return axis % rank


def ranked(shape: Shape | None, rank: int, what: str) -> Shape | None:
    """The shape, which must have so many dimensions."""
    if shape is not None and len(shape) != rank:
        raise Malformed(f"has {what} of shape {listed(shape)}, expected {rank} dimensions")
    return shape
