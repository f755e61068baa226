"""Runs both models and their layers side by side on samples, and sums up the errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np

from paring.calibrate import limits
from paring.compress.encodings import decode
from paring.errors import InputError, UnsupportedError
from paring.formats.tflite.extract import extract, islands
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.program import build
from paring.graph import Graph, Quantization, TensorId
from paring.measure.cuts import Cut
from paring.measure.noise import Growing, Noise
from paring.runtime import RunError, Worker

BUDGET = 256e6  # bytes of activations, and of the weights of layers run alone, that are held at a time
Values = dict[TensorId, list[np.ndarray]]


@dataclass
class Seen:
    """What was measured of one layer.

    Attributes:
      accumulated: By result, its error inside the whole optimized model.
      own: Of the layer alone, fed with the float values put on the grids of its inputs, against the float result.
      blame: Of the same against the float layer fed with the same values.
      rounding: Of the float result put on the result's grid: what the grid alone costs.
      activation: Histogram of the first float result.
      note: What kept it from being run alone, or in step.
    """

    accumulated: list[Noise]
    own: list[Noise]
    blame: list[Noise]
    rounding: list[Noise]
    activation: Growing = field(default_factory=Growing)
    note: str = ""


@dataclass(frozen=True)
class Side:
    """One of the two models as it is run: its graph, the subgraph that samples enter, the kernels it runs on."""

    model: TfliteModel
    graph: Graph
    entry: int
    kernels: str


class Watcher:
    """Measures cuts of one entry of both models."""

    def __init__(
        self, source: Side, optimized: Side, samples: Callable[[], Iterator[tuple[list[np.ndarray], list[np.ndarray]]]],
        folder: Path, step: Callable[[], None],
    ) -> None:  # fmt: skip
        """Takes pairs of samples, for the float and for the optimized model; `step` is called after each."""
        self.sides = (source, optimized)
        self.samples, self.folder, self.step = samples, folder, step

    def measure(self, cuts: Sequence[Cut]) -> dict[Cut, Seen]:
        """Measures all cuts, some at a time so that memory stays bounded."""
        found: dict[Cut, Seen] = {}
        by_place: dict[tuple[int, int], list[Cut]] = {}
        for cut in cuts:
            if cut.results:
                by_place.setdefault(cut.place, []).append(cut)
        for same in by_place.values():
            for part in self._parts(same):
                found.update(self._run(part))
        return found

    def _parts(self, cuts: Sequence[Cut]) -> Iterator[list[Cut]]:
        part: list[Cut] = []
        size = 0.0
        for cut in cuts:
            graph = self.sides[0].graph
            tensors = [*(a for a, _ in cut.results), *(a for _, a in cut.feeds), *cut.starts]
            mine = 12.0 * sum(prod(max(1, d) for d in graph.tensors[t].shape) for t in tensors)
            if cut.pair is not None:  # alone, a layer brings its weights once more
                constants = [graph.tensors[t].weight for op in cut.pair.source.ops for t in op.inputs if t is not None]
                mine += 4.0 * sum(weight.size for weight in constants if weight is not None)
            if part and size + mine > BUDGET:
                yield part
                part, size = [], 0.0
            part.append(cut)
            size += mine
        if part:
            yield part

    def _run(self, cuts: list[Cut]) -> dict[Cut, Seen]:
        """Measures these cuts in one child; where layers cannot be run alone, finds out which and does without."""
        try:
            return self._together(cuts)
        except _NotAlone as error:
            if len(cuts) > 1:
                half = len(cuts) // 2
                return self._run(cuts[:half]) | self._run(cuts[half:])
            [cut] = cuts
            [seen] = self._together([replace(cut, alone=False)]).values()
            return {cut: replace(seen, note=f"it does not run alone: {error}")}

    def _together(self, cuts: list[Cut]) -> dict[Cut, Seen]:
        alone = [cut for cut in cuts if cut.alone and cut.pair is not None]
        ours = [a for cut in cuts for a in (*(a for a, _ in cut.results), *(a for _, a in cut.feeds), *cut.starts)]
        theirs = [b for cut in cuts for _, b in cut.results]
        found = {cut: self._nothing(cut) for cut in cuts}
        place = cuts[0].place
        with _Session(self, place) as session:
            for name, side, number, wanted in (("source", 0, place[0], ours), ("optimized", 1, place[1], theirs)):
                session.watch(name, side, number, wanted)
            if alone:
                session.cut(
                    "layers", 1, place[1], [([b for b, _ in c.feeds], [b for _, b in c.results]) for c in alone]
                )
                session.cut("floats", 0, place[0], [(c.starts, [a for a, _ in c.results]) for c in alone])
            for mine, fitted in self.samples():
                exact, got = session.values("source", mine), session.values("optimized", fitted)
                for cut in cuts:
                    self._compare(cut, found[cut], exact, got)
                for turn in range(_turns(exact, ours) if alone else 0):
                    self._alone(session, alone, found, exact, turn)
                self.step()
        return found

    def _nothing(self, cut: Cut) -> Seen:
        grids = [self.sides[1].graph.tensors[b].quantization for _, b in cut.results]
        parts = [[Noise(grid) for grid in grids] for _ in range(4)]
        return Seen(parts[0], parts[1], parts[2], parts[3])

    def _compare(self, cut: Cut, seen: Seen, exact: Values, got: Values) -> None:
        """The accumulated error, and what the grid alone costs."""
        for place, (a, b) in enumerate(cut.results):
            grid = self.sides[1].graph.tensors[b].quantization
            if len(exact[a]) != len(got[b]):
                turns = f"{len(got[b])} times and {len(exact[a])} times in the float model"
                seen.note = f"it ran {turns}; the first ones were compared"
            for x, y in zip(exact[a], got[b], strict=False):
                if x.size != y.size:
                    seen.note = f"its result has {y.size} elements and {x.size} in the float model"
                    continue
                x = np.asarray(x, np.float32)
                seen.accumulated[place].update(x, _real(y, grid).reshape(x.shape))
                if place == 0:
                    seen.activation.update(x)
                if grid is not None and grid.scale.size == 1:
                    rounded = _real(_stored(x, grid), grid)
                    seen.rounding[place].update(x, rounded)
                    if cut.pair is None:  # an input of the model: its grid is all there is to it
                        seen.own[place].update(x, rounded)
                        seen.blame[place].update(x, rounded)

    def _alone(self, session: _Session, cuts: list[Cut], found: dict[Cut, Seen], exact: Values, turn: int) -> None:
        """One run of every layer alone, on both sides."""
        tensors = self.sides[1].graph.tensors
        given, floats = [], []
        for cut in cuts:
            rounded: dict[TensorId, np.ndarray] = {}
            for b, a in cut.feeds:
                value, grid = exact[a][turn], tensors[b].quantization
                if value.dtype.kind == "f" and grid is not None and tensors[b].dtype != "float32":
                    value = _stored(np.asarray(value, np.float32), grid)
                    rounded[a] = _real(value, grid)
                shape = tensors[b].shape
                given.append(value if -1 in shape or prod(shape) != value.size else value.reshape(shape))
            floats += [rounded.get(a, exact[a][turn]) for a in cut.starts]
        got, right = session.run("layers", given), session.run("floats", floats)
        number = 0
        for cut in cuts:
            for place, (a, b) in enumerate(cut.results):
                x = np.asarray(exact[a][turn], np.float32)
                y = _real(got[number], tensors[b].quantization)
                z = np.asarray(right[number], np.float32)
                number += 1
                if x.size == y.size == z.size:
                    found[cut].own[place].update(x, y.reshape(x.shape))
                    found[cut].blame[place].update(z.reshape(x.shape), y.reshape(x.shape))


class _NotAlone(Exception):
    """Layers cut out of a model that does run do not run."""


class _Session:
    """A child with the models of one part, and what of them is watched."""

    def __init__(self, watcher: Watcher, place: tuple[int, int]) -> None:
        self.watcher, self.place = watcher, place
        self.wanted: dict[str, list[TensorId]] = {}
        self.inputs: dict[str, dict[TensorId, int]] = {}
        self.models: dict[str, tuple[TfliteModel, str]] = {}
        self.followed = False
        self.worker: Worker | None = None

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self.worker is not None:
            self.worker.close()

    def watch(self, name: str, which: int, number: int, wanted: Sequence[TensorId]) -> None:
        """Notes a whole model of which these tensors of a subgraph are wanted."""
        side = self.watcher.sides[which]
        entry = [(side.entry, int(i)) for i in side.model.subgraphs[side.entry].inputs]
        self.inputs[name] = {t: i for i, t in enumerate(entry)}
        constant = {t for t in wanted if side.graph.tensors[t].weight is not None}
        self.wanted[name] = [t for t in dict.fromkeys(wanted) if t not in self.inputs[name] and t not in constant]
        self.followed |= number != side.entry
        if number == side.entry and self.wanted[name]:
            self.models[name] = extract(side.model, None, self.wanted[name]), side.kernels
        elif number != side.entry:
            self.models[name] = side.model, side.kernels

    def cut(
        self, name: str, which: int, number: int, cuts: Sequence[tuple[Sequence[TensorId], Sequence[TensorId]]]
    ) -> None:
        """Notes layers to be run alone."""
        side = self.watcher.sides[which]
        try:
            plain = [([i for _, i in starts], [i for _, i in ends]) for starts, ends in cuts]
            self.models[name] = islands(side.model, number, plain), side.kernels
        except InputError as error:
            raise _NotAlone(str(error)) from error

    def start(self, sample: Sequence[np.ndarray]) -> Worker:
        """The child, with everything loaded; its limits need a sample."""
        bounds = limits(*(model for model, _ in self.models.values()), sample=sample)
        if self.followed:  # step by step takes longer than as a whole
            bounds = replace(bounds, seconds=10 * bounds.seconds)
        self.worker = worker = Worker(bounds)
        for which, name in enumerate(("source", "optimized")):
            if name not in self.models:
                continue
            model, kernels = self.models[name]
            side = self.watcher.sides[which]
            if self.place[which] == side.entry:
                self.load(name, model, kernels)
            else:
                folder = self.watcher.folder / name
                folder.mkdir(exist_ok=True)
                program = build(side.model, side.entry, self.wanted[name], {self.place[which]}, folder)
                worker.load_program(name, program, kernels=kernels)
                self.wanted[name] = list(program.watched)
        for name in self.models.keys() - {"source", "optimized"}:
            try:
                self.load(name, *self.models[name])
            except RunError as error:
                raise _NotAlone(str(error)) from error
        return worker

    def load(self, name: str, model: TfliteModel, kernels: str) -> None:
        path = self.watcher.folder / f"{name}.tflite"
        model.save(path)
        assert self.worker is not None
        self.worker.load(name, path, kernels=kernels)

    def values(self, name: str, sample: list[np.ndarray]) -> Values:
        """Runs a whole model -> all values of the watched tensors."""
        worker = self.worker or self.start(sample)
        which = int(name == "optimized")
        given: Values = {t: [sample[i]] for t, i in self.inputs[name].items()}
        if name not in self.models:
            return given
        if self.place[which] == self.watcher.sides[which].entry:
            found = [[value] for value in worker.run(name, sample)]
        else:
            found = worker.collect(name, sample)
        return given | dict(zip(self.wanted[name], found, strict=True))

    def run(self, name: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Runs the layers."""
        assert self.worker is not None
        try:
            return self.worker.run(name, arrays)
        except RunError as error:
            raise _NotAlone(str(error)) from error


def _turns(values: Values, wanted: Sequence[TensorId]) -> int:
    """How often the layers ran on this sample."""
    return min((len(values[t]) for t in wanted if t in values), default=0)


def _real(value: np.ndarray, grid: Quantization | None) -> np.ndarray:
    """What is stored, as real numbers in float32."""
    return np.asarray(value, np.float32) if grid is None or value.dtype.kind == "f" else decode(value, grid)


def _stored(value: np.ndarray, grid: Quantization) -> np.ndarray:
    """Real numbers as the nearest codes of a per-tensor grid."""
    info = np.iinfo(grid.dtype)
    codes = np.rint(value.astype(np.float64) / float(grid.scale[0])) + int(grid.zero_point[0])
    return np.clip(np.nan_to_num(codes), info.min, info.max).astype(grid.dtype)


def followable(side: Side, numbers: set[int], folder: Path) -> str:
    """Why the bodies of loops and branches cannot be seen into; empty where they can."""
    try:
        build(side.model, side.entry, (), numbers, folder)
    except (UnsupportedError, InputError) as error:
        return str(error)
    return ""
