"""Which layer of an optimized model is which layer of the float model, whatever tool renamed, fused or reordered them.

Both graphs are read as units (`units`). Every pair of the same family and size is a candidate, scored by what speaks
for it: the same past and the same future (labels of Weisfeiler and Lehman's kind, forwards over all that a unit depends
on and backwards over all that depends on it), the correlation of the weights, neighbours that are matched already, the
name, the place in the file. The best pair is taken, its neighbours are scored anew, and so on; a pair that would turn
the order of computation round is refused.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paring.errors import InputError
from paring.graph import Graph, Tensor, TensorId
from paring.measure.constants import likeness, sample
from paring.measure.units import Side, Unit, units

STRUCTURE, NAME, WEIGHTS, POSITION = "structure", "name", "weights", "position"
_ALIKE = 0.3  # correlation below which weights have nothing in common; 2-bit codes of a layer keep 0.8 and more
_SURE = 0.9


@dataclass(frozen=True)
class Port:
    """An input or output of both models: its name, and its tensor on either side."""

    name: str
    source: TensorId
    optimized: TensorId


@dataclass(frozen=True)
class Entry:
    """A pair of subgraphs that samples enter, with their inputs and outputs."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    source: int = 0
    optimized: int = 0


@dataclass(frozen=True, eq=False)
class Pair:
    """A unit of the float model and its counterpart.

    Attributes:
      how: What decided: `structure`, `weights`, `name` or `position`.
      likeness: Correlation of their weights, None without any.
    """

    source: Unit
    optimized: Unit
    how: str
    likeness: float | None


@dataclass(frozen=True, eq=False)
class Matching:
    """What `match` gives.

    Attributes:
      pairs: In the order of the float model.
      source_only: Units of the float model without a counterpart.
      optimized_only: Those of the optimized one.
      sides: Both sides of every pair of subgraphs, by their numbers.
    """

    pairs: tuple[Pair, ...]
    source_only: tuple[Unit, ...]
    optimized_only: tuple[Unit, ...]
    sides: Mapping[tuple[int, int], tuple[Side, Side]]


def match(source: Graph, optimized: Graph, entries: Sequence[Entry] | None = None) -> Matching:
    """Matches the layers of two models; loops and branches are entered where they are matched themselves.

    Args:
      source: The float model's graph.
      optimized: The optimized model's.
      entries: Which subgraphs, inputs and outputs belong together; by default the first ones, by name or in order.

    Raises:
      InputError: The models do not correspond; the message names the input, output or layer that differs.
    """
    given = list(entries) if entries is not None else [first_entry(source, optimized)]
    sides: dict[tuple[int, int], tuple[Side, Side]] = {}
    pairs: list[Pair] = []
    only: tuple[list[Unit], list[Unit]] = ([], [])
    seen: tuple[set[int], set[int]] = (set(), set())
    todo = given[::-1]
    while todo:
        entry = todo.pop()
        if entry.source in seen[0] or entry.optimized in seen[1]:
            continue
        seen[0].add(entry.source)
        seen[1].add(entry.optimized)
        a, b = units(source, entry.source), units(optimized, entry.optimized)
        sides[entry.source, entry.optimized] = a, b
        made = _Aligner(source, optimized, a, b, entry).run()
        pairs += made
        for found, side, left in zip(({id(p.source) for p in made}, {id(p.optimized) for p in made}), (a, b), only,
                                     strict=True):  # fmt: skip
            left += [unit for unit in side.units if id(unit) not in found]
        for pair in made[::-1]:
            inner = zip(pair.source.regions, pair.optimized.regions, strict=False)
            todo += [Entry((), (), number, other) for number, other in inner]
    _check_common(pairs, only[0])
    return Matching(tuple(pairs), tuple(only[0]), tuple(only[1]), sides)


def first_entry(source: Graph, optimized: Graph) -> Entry:
    """The first subgraphs' inputs and outputs, by name where both sides have the same names, else in order."""

    def named(graph: Graph, ends: Sequence[TensorId]) -> dict[str, TensorId]:
        return {graph.tensors[t].name: t for t in ends if t[0] == 0}

    return Entry(
        ports(source, optimized, "input", named(source, source.inputs), named(optimized, optimized.inputs)),
        ports(source, optimized, "output", named(source, source.outputs), named(optimized, optimized.outputs)),
    )


def ports(
    source: Graph, optimized: Graph, what: str, a: Mapping[str, TensorId], b: Mapping[str, TensorId]
) -> tuple[Port, ...]:
    """The inputs or outputs of both models, paired by name where the names are the same, else in order.

    Raises:
      InputError: Their number, a shape or a type differs.
    """
    if len(a) != len(b):
        raise InputError(
            "the models do not correspond", where=f"their {what}s", expected=f"{len(a)} ({', '.join(a)})",
            got=f"{len(b)} ({', '.join(b)})",
        )  # fmt: skip
    order = list(a) if set(a) == set(b) else list(b)
    found = tuple(Port(name, a[name], b[other]) for name, other in zip(a, order, strict=True))
    for port in found:
        x, y = source.tensors[port.source], optimized.tensors[port.optimized]
        if _open(x.shape, y.shape):
            raise _differs(what, port.name, str(list(x.shape)), str(list(y.shape)))
        if _type(x) != _type(y):
            raise _differs(what, port.name, x.dtype, y.dtype)
    return found


def _differs(what: str, name: str, expected: str, got: str) -> InputError:
    return InputError("the models do not correspond", where=f"{what} {name}", expected=expected, got=got)


def _open(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """True where no value can have both shapes; dimensions of 1 may come and go."""
    if -1 in a or -1 in b:
        return len(a) == len(b) and any(m != n and -1 not in (m, n) for m, n in zip(a, b, strict=True))
    return [d for d in a if d != 1] != [d for d in b if d != 1]


def _type(tensor: Tensor) -> str:
    real = tensor.dtype in ("float32", "float16") or (tensor.quantization is not None and tensor.dtype != "int64")
    return "real" if real else tensor.dtype


def _check_common(pairs: Sequence[Pair], left: Sequence[Unit]) -> None:
    """Raises where what was matched cannot be the same model."""
    if not pairs:
        raise InputError(
            "the models do not correspond", where=f"layer {left[0].name}" if left else "their layers",
            expected="a counterpart", got="no layer in common",
        )  # fmt: skip
    weighted = [p for p in pairs if p.source.family == "linear"]
    strange = [p for p in weighted if p.likeness is not None and p.likeness < _ALIKE]
    missing = [u for u in left if u.family == "linear"]
    if 2 * (len(strange) + len(missing)) <= len(weighted) + len(missing):
        return
    first = min([*(p.source for p in strange), *missing], key=lambda u: u.head.id)
    found = next((p for p in strange if p.source is first), None)
    got = "none" if found is None else f"{found.optimized.name}, whose weights correlate by {found.likeness:.2f}"
    raise InputError(
        "the models do not correspond", where=f"layer {first.name}", expected="a layer with weights like its own",
        got=got, todo="Is the optimized model made from this float model?",
    )  # fmt: skip


class _Aligner:
    """The matching of one pair of subgraphs."""

    def __init__(self, source: Graph, optimized: Graph, a: Side, b: Side, entry: Entry) -> None:
        self.graphs, self.sides = (source, optimized), (a, b)
        self.ins = {p.source: p.optimized for p in entry.inputs}
        self.outs = {a.origin.get(p.source, p.source): b.origin.get(p.optimized, p.optimized) for p in entry.outputs}
        known: dict[object, int] = {}
        self.before = [_through(side) for side in self.sides]
        self.after = [_readers(side, before) for side, before in zip(self.sides, self.before, strict=True)]
        self.past = [self.labels(n, known) for n in (0, 1)]
        self.future = [self.futures(n, known) for n in (0, 1)]
        self.ancestors = [_ancestors(side) for side in self.sides]
        self.image: dict[int, int] = {}
        self.origin: dict[int, int] = {}
        self.how: dict[int, str] = {}
        self.like: dict[tuple[int, int], float | None] = {}
        self.samples: tuple[dict[int, np.ndarray | None], ...] = ({}, {})

    def run(self) -> list[Pair]:
        a, b = self.sides
        classes: dict[object, list[int]] = {}
        for j, unit in enumerate(b.units):
            classes.setdefault(_class(unit), []).append(j)
        queue = [(-self.score(i, j), i, j) for i, u in enumerate(a.units) for j in classes.get(_class(u), ())]
        heapq.heapify(queue)
        while queue:
            score, i, j = heapq.heappop(queue)
            if i in self.image or j in self.origin:
                continue
            now = -self.score(i, j)
            if now > score + 1e-9:  # a neighbour went elsewhere in the meantime
                heapq.heappush(queue, (now, i, j))
            elif now < 0 and not self.crosses(i, j):
                self.take(i, j, self.reason(i, j))
                for near in (0, 1):
                    for x in self.near(0, i, near):
                        for y in self.near(1, j, near):
                            if _class(a.units[x]) == _class(b.units[y]) and x not in self.image:
                                heapq.heappush(queue, (-self.score(x, y), x, y))
        self.leftovers()
        return [Pair(a.units[i], b.units[self.image[i]], self.how[i], self.likeness(i, self.image[i]))
                for i in sorted(self.image)]  # fmt: skip

    def take(self, i: int, j: int, how: str) -> None:
        self.image[i], self.origin[j], self.how[i] = j, i, how

    def leftovers(self) -> None:
        """What is written differently: the only one between the same neighbours, or the only one of a name."""
        a, b = self.sides
        free = [[n for n in range(len(side.units)) if n not in done] for side, done in zip(
            self.sides, (self.image, self.origin), strict=True)]  # fmt: skip
        for i in free[0]:
            unit = a.units[i]
            same = [j for j in free[1] if j not in self.origin and b.units[j].elements == unit.elements]
            same = [j for j in same if (b.units[j].family == "linear") == (unit.family == "linear")]
            between = [j for j in same if self.surrounded(i, j)]
            named = [j for j in same if b.units[j].name == unit.name]
            for found, how in ((between, POSITION), (named, NAME)):
                if len(found) == 1 and not self.crosses(i, found[0]):
                    self.take(i, found[0], how)
                    break

    def surrounded(self, i: int, j: int) -> bool:
        """True where all neighbours of both are matched with each other."""
        ins = [self.partner(x) for x in self.before[0][i]], list(self.before[1][j])
        outs = {self.image.get(x) for x in self.after[0][i]}, set(self.after[1][j])
        ends = self.ends(i, j)
        return bool(ins[0]) and ins[0] == ins[1] and outs[0] == outs[1] and (bool(outs[0]) or ends > 0)

    # -- evidence ------------------------------------------------------------------------------------------------

    def score(self, i: int, j: int) -> float:
        a, b = self.sides[0].units[i], self.sides[1].units[j]
        found = 2.0 * (self.past[0][i] == self.past[1][j]) + 2.0 * (self.future[0][i] == self.future[1][j])
        alike = self.likeness(i, j)
        found += 0.0 if alike is None else 6.0 * (alike - 0.5)
        found += 1.5 * (a.name == b.name)
        found += max(-3.0, min(3.0, self.neighbours(i, j)))
        return found - 0.5 * abs(i / len(self.sides[0].units) - j / len(self.sides[1].units))

    def neighbours(self, i: int, j: int) -> float:
        """Matched neighbours that agree less those that do not."""
        found = self.ends(i, j)
        mine, theirs = self.before[0][i], self.before[1][j]
        for place, source in enumerate(mine):
            partner = self.partner(source)
            if partner is None:
                continue
            same = place < len(theirs) and theirs[place] == partner
            found += 1.0 if same else 0.8 if partner in theirs else -1.0
        for reader in self.after[0][i]:
            if reader in self.image:
                found += 1.0 if self.image[reader] in self.after[1][j] else -1.0
        return found

    def ends(self, i: int, j: int) -> float:
        """1 where both give the same output of the model, -1 where they give different ones."""
        mine = {self.outs[t] for t in self.sides[0].units[i].results if t in self.outs}
        theirs = set(self.sides[1].units[j].results)
        given = theirs & set(self.outs.values())
        return 0.0 if not mine and not given else 1.0 if mine & theirs else -1.0

    def partner(self, source: int | TensorId) -> int | TensorId | None:
        return self.image.get(source) if isinstance(source, int) else self.ins.get(source)

    def likeness(self, i: int, j: int) -> float | None:
        if (i, j) not in self.like:
            self.like[i, j] = likeness(self.sample(0, i), self.sample(1, j))
        return self.like[i, j]

    def sample(self, side: int, number: int) -> np.ndarray | None:
        if number not in self.samples[side]:
            self.samples[side][number] = sample(self.sides[side].units[number])
        return self.samples[side][number]

    def reason(self, i: int, j: int) -> str:
        """What decided for a pair, the strongest first."""
        both = self.past[0][i] == self.past[1][j] and self.future[0][i] == self.future[1][j]
        if both or self.neighbours(i, j) >= 1:
            return STRUCTURE
        alike = self.likeness(i, j)
        if alike is not None and alike > _SURE:
            return WEIGHTS
        return NAME if self.sides[0].units[i].name == self.sides[1].units[j].name else POSITION

    def crosses(self, i: int, j: int) -> bool:
        """True where a matched unit comes before one side and behind the other."""
        up, down = self.ancestors
        return any(
            (up[i] >> x & 1 and down[y] >> j & 1) or (up[x] >> i & 1 and down[j] >> y & 1)
            for x, y in self.image.items()
        )

    def near(self, side: int, number: int, behind: int) -> list[int]:
        found = self.after[side][number] if behind else self.before[side][number]
        return [n for n in found if isinstance(n, int)]

    # -- labels --------------------------------------------------------------------------------------------------

    def local(self, unit: Unit) -> tuple[object, ...]:
        weight = unit.constant.weight.size if unit.family == "linear" and unit.constant and unit.constant.weight else 0
        return (unit.family, unit.shape, weight)

    def labels(self, number: int, known: dict[object, int]) -> list[int]:
        """For each unit a number that stands for all it depends on."""
        side, graph = self.sides[number], self.graphs[number]
        found: list[int] = []
        for unit, sources in zip(side.units, self.before[number], strict=True):
            parts: list[object] = []
            for source in sources:
                shape = graph.tensors[source].shape if isinstance(source, tuple) else ()
                parts.append(found[source] if isinstance(source, int) else tuple(d for d in shape if d not in (1, -1)))
            if unit.family in ("add", "multiply", "maximum", "minimum"):
                parts.sort(key=str)
            found.append(known.setdefault(("past", self.local(unit), *parts), len(known)))
        return found

    def futures(self, number: int, known: dict[object, int]) -> list[int]:
        """For each unit a number that stands for all that depends on it."""
        side, graph = self.sides[number], self.graphs[number]
        outputs = {side.origin.get(t, t) for t in graph.outputs}
        found = [0] * len(side.units)
        for place in range(len(side.units) - 1, -1, -1):
            unit = side.units[place]
            parts = sorted(found[n] for n in self.after[number][place])
            ends = any(t in outputs for t in unit.results)
            found[place] = known.setdefault(("future", self.local(unit), ends, *parts), len(known))
        return found


def _class(unit: Unit) -> tuple[str, int]:
    return unit.family, unit.elements


def _through(side: Side) -> list[tuple[int | TensorId, ...]]:
    """What each unit reads from, units that may be missing elsewhere looked through."""
    found: list[tuple[int | TensorId, ...]] = []
    for unit, sources in zip(side.units, side.before, strict=True):
        seen = []
        for source in sources:
            while isinstance(source, int) and side.units[source].thin and side.before[source] and not unit.thin:
                source = side.before[source][0]
            seen.append(source)
        found.append(tuple(seen))
    return found


def _readers(side: Side, before: Sequence[tuple[int | TensorId, ...]]) -> list[tuple[int, ...]]:
    """The units that read each one, looked through in the same way; for a thin one, those that really read it."""
    found: list[list[int]] = [[] for _ in side.units]
    for number, sources in enumerate(before):
        mine = side.units[number].thin
        thin = [s for s in side.before[number] if isinstance(s, int) and side.units[s].thin]
        for source in (*sources, *thin):
            if isinstance(source, int) and number not in found[source] and (not mine or side.units[source].thin):
                found[source].append(number)
    return [tuple(f) for f in found]


def _ancestors(side: Side) -> list[int]:
    """For each unit the set of those before it, as bits."""
    found: list[int] = []
    for sources in side.before:
        bits = 0
        for source in sources:
            if isinstance(source, int):
                bits |= found[source] | 1 << source
        found.append(bits)
    return found
