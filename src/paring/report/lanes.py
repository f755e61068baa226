"""A model's graph as lanes beside a list of its layers, the way version control draws history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROW = 28  # units between two layers
STEP = 18  # units between two lanes
WIDEST = 200  # units that all lanes share; more lanes stand closer
RADII = (4, 5, 6, 7.5, 9)
"""Radius of a node by the class of its error: worse is larger, for those who do not see the colour."""


@dataclass(frozen=True)
class Lanes:
    """Where layers and the lines between them go.

    Attributes:
      lanes: Lane of each layer, 0 is the leftmost.
      edges: (maker, reader) of each line.
      width: Number of lanes.
    """

    lanes: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    width: int

    def x(self, layer: int) -> float:
        """Horizontal place of a layer."""
        return round(ROW / 2 + self.lanes[layer] * min(STEP, WIDEST / max(1, self.width)), 2)

    @staticmethod
    def y(layer: int) -> float:
        """Vertical place of a layer: the middle of its row."""
        return ROW * layer + ROW / 2

    @property
    def room(self) -> float:
        """Width of the drawing."""
        return ROW + (self.width - 1) * min(STEP, WIDEST / max(1, self.width))

    def path(self, edge: tuple[int, int]) -> str:
        """The line as an SVG path: down the maker's lane, then over to the reader."""
        source, reader = edge
        x, y, to_x, to_y = self.x(source), self.y(source), self.x(reader), self.y(reader)
        if x == to_x:
            return f"M{x:g} {y:g}V{to_y:g}"
        bend = to_y - ROW
        return f"M{x:g} {y:g}V{bend:g}C{x:g} {to_y - ROW / 4:g} {to_x:g} {to_y - 3 * ROW / 4:g} {to_x:g} {to_y:g}"


def lay_out(inputs: Sequence[Sequence[int]]) -> Lanes:
    """Gives every layer a lane, so that no line passes through a layer it does not belong to.

    A result keeps the lane of its layer until its last reader; that reader takes the lane over. So the trunk of a
    residual network stays straight.

    Args:
      inputs: For each layer, in topological order, the layers it reads. What is no earlier layer is left out.

    >>> lay_out([[], [0], [1], [0, 2]]).lanes
    (0, 1, 1, 0)
    """
    readers: list[list[int]] = [[] for _ in inputs]
    known = [list(dict.fromkeys(s for s in sources if 0 <= s < at)) for at, sources in enumerate(inputs)]
    for at, sources in enumerate(known):
        for source in sources:
            readers[source].append(at)
    busy: list[bool] = []
    lanes: list[int] = []
    for at, sources in enumerate(known):
        ending = sorted(lanes[s] for s in sources if readers[s][-1] == at)
        for lane in ending:
            busy[lane] = False
        if False not in busy:
            busy.append(False)
        lane = ending[0] if ending else busy.index(False)
        lanes.append(lane)
        busy[lane] = bool(readers[at])
    edges = tuple((source, at) for at, sources in enumerate(known) for source in sources)
    return Lanes(tuple(lanes), edges, max(1, len(busy)))


__all__ = ["RADII", "ROW", "Lanes", "lay_out"]
