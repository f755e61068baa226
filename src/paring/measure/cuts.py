"""Where to cut both models so that one layer runs alone on either side, fed with what the float model gives it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from paring.graph import Graph, Op, Tensor, TensorId
from paring.measure.match import Matching, Pair, Port
from paring.measure.units import Unit

_CLOSED = ("resource", "variant", "string")


@dataclass(frozen=True, eq=False)
class Cut:
    """One layer between the values it reads and those it gives, in both models.

    Attributes:
      pair: The layer; None for an input of the model that the optimized one stores on a grid.
      name: Name of the layer, or of the input.
      place: The subgraphs, float and optimized.
      results: Tensors to compare, (float, optimized).
      feeds: Where the optimized layer begins: (optimized tensor, its float counterpart).
      starts: Where the float layer begins.
      alone: Whether the layer can be run alone.
      note: Why not.
    """

    pair: Pair | None
    name: str
    place: tuple[int, int]
    results: tuple[tuple[TensorId, TensorId], ...]
    feeds: tuple[tuple[TensorId, TensorId], ...] = ()
    starts: tuple[TensorId, ...] = ()
    alone: bool = False
    note: str = ""


@dataclass
class Cutter:
    """Finds the cuts of two matched models.

    Attributes:
      known: By subgraphs, each optimized tensor whose float counterpart is known.
      given: Inputs of subgraphs, float and optimized: what nothing gives and is none of these is a variable.
    """

    source: Graph
    optimized: Graph
    matching: Matching
    known: dict[tuple[int, int], dict[TensorId, TensorId]] = field(default_factory=dict)
    given: tuple[set[TensorId], set[TensorId]] = field(default_factory=lambda: (set(), set()))

    def inputs(self, place: tuple[int, int], ports: Sequence[Port], *, entry: bool) -> list[Cut]:
        """Tells which inputs belong together -> those of an entry that are stored on a grid, as cuts."""
        known = self.known.setdefault(place, {})
        found = []
        for port in ports:
            ours, theirs = port.source, port.optimized
            known[theirs] = ours
            tensor = self.optimized.tensors[theirs]
            stored = [theirs] if tensor.quantization is not None else [
                op.outputs[0] for op in self.optimized.ops if op.kind == "quantize" and op.inputs[0] == theirs
            ]  # fmt: skip
            known.update(dict.fromkeys(stored, ours))
            if entry and stored and real(self.source.tensors[ours]):
                found.append(Cut(None, port.name, place, tuple((ours, t) for t in stored)))
        return found

    def layers(self, followed: Collection[tuple[int, int]]) -> list[Cut]:
        """The cuts of all matched layers.

        Args:
          followed: Subgraphs that values can be seen of; a loop or branch that leads to one is not run as a whole.
        """
        for pair in self.matching.pairs:
            known = self.known.setdefault(_place(pair), {})
            for ours, theirs in _results(pair):
                if not _clash(self.source.tensors[ours].shape, self.optimized.tensors[theirs].shape):
                    known[theirs] = ours
        makers = self.source.producers(), self.optimized.producers()
        return [self._layer(pair, makers, followed) for pair in self.matching.pairs]

    def _layer(
        self, pair: Pair, makers: tuple[Mapping[TensorId, Op], ...], followed: Collection[tuple[int, int]]
    ) -> Cut:
        place = _place(pair)
        known = self.known[place]
        graphs = self.source, self.optimized
        results = tuple(
            (a, b)
            for a, b in _results(pair)
            if known.get(b) == a and real(graphs[0].tensors[a]) and real(graphs[1].tensors[b])
        )
        cut = Cut(pair, pair.source.name, place, results)
        if not results:
            return _because(cut, "it gives no real numbers")
        if any(number in {b for _, b in followed} for number in pair.optimized.regions):
            return _because(cut, "its own layers are compared instead")
        mine, theirs = {a for a, _ in results}, {b for _, b in results}
        end = _walk(graphs[1], makers[1], list(theirs), known.keys() - theirs, self.given[1])
        if end is None:
            return _because(cut, "what it reads has no counterpart in the float model")
        begin = _walk(graphs[0], makers[0], list(mine), set(known.values()) - mine, self.given[0])
        if begin is None:
            return _because(cut, "what it reads has no counterpart in the optimized model")
        if not end and not begin:
            return _because(cut, "it reads constants only")
        if any(graphs[0].tensors[t].dtype in _CLOSED for t in (*begin, *(known[b] for b in end))):
            return _because(cut, "it reads values that cannot be passed on")
        return Cut(
            pair, cut.name, place, results, tuple((b, known[b]) for b in end), tuple(begin), True
        )  # fmt: skip


def real(tensor: Tensor) -> bool:
    """True for a tensor of real numbers, float or on a grid."""
    return tensor.dtype in ("float32", "float16") or (tensor.quantization is not None and tensor.dtype != "int64")


def unit_form(graph: Graph, unit: Unit) -> str:
    """What a layer computes with: `int8`, `int8 x int4`, `float32 x int8`, `float32`."""
    dtype = graph.tensors[unit.results[0]].dtype if unit.results else ""
    stored = {t.weight.stored for op in unit.ops for _, t in graph.weights_of(op) if t.weight is not None}
    return f"{dtype} x {'/'.join(sorted(stored))}" if stored - {dtype} else dtype


def _place(pair: Pair) -> tuple[int, int]:
    return pair.source.head.id[0], pair.optimized.head.id[0]


def _results(pair: Pair) -> list[tuple[TensorId, TensorId]]:
    return list(zip(pair.source.results, pair.optimized.results, strict=False))


def _because(cut: Cut, why: str) -> Cut:
    return Cut(cut.pair, cut.name, cut.place, cut.results, note=why)


def _clash(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return -1 not in (*a, *b) and [d for d in a if d != 1] != [d for d in b if d != 1]


def _walk(
    graph: Graph,
    makers: Mapping[TensorId, Op],
    ends: Sequence[TensorId],
    stops: Collection[TensorId],
    given: Collection[TensorId],
) -> list[TensorId] | None:
    """Backwards from `ends` -> the tensors of `stops` that are met first; None where one of `given` is met before."""
    found: dict[TensorId, None] = {}
    seen: set[TensorId] = set()
    todo = list(ends)
    while todo:
        maker = makers.get(todo.pop(0))
        for source in maker.inputs if maker is not None else ():
            if source is None or source in seen:
                continue
            seen.add(source)
            if source in stops:
                found[source] = None
            elif source in makers:
                todo.append(source)
            elif source in given:
                return None
    return list(found)
