"""What an operator reads behind the operators that are quantized already, beside what it reads in the float model.

The model is walked once in topological order. Between two operators that ask, only the values that are still needed are
kept, of both models and of every sample, in a file: what lies before is not run again.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat, tee
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from paring.calibrate import limits
from paring.compress.encodings import decode
from paring.compress.gram import Gram, GramSum
from paring.compress.unfold import Unfolding
from paring.data import Feed
from paring.edits import Edit
from paring.errors import UnsupportedError
from paring.findings import fit
from paring.formats.tflite.apply import apply
from paring.formats.tflite.constants import quantization_of
from paring.formats.tflite.extract import extract
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.program import bodies, build
from paring.graph import Graph, Op, OpId, Quantization, TensorId
from paring.grids import LEVELS
from paring.runtime import Worker
from paring.runtime.wire import receive, send

SAMPLES = 512  # what second moments gain from more is small
ROWS = 40_000  # output positions in all: several for each input of the widest rows
STORE = 4 << 30  # bytes of kept values: beyond, fewer samples are taken

Values = list[np.ndarray]


@dataclass
class _Frontier:
    """The values that operators from here on read, of every sample: tensors, and a file for either model."""

    tensors: list[TensorId]
    files: tuple[BinaryIO, BinaryIO]
    samples: int = 0

    def read(self, side: int) -> Iterator[Values]:
        """The values of one model, sample by sample: 0 the float one, 1 the changed one."""
        self.files[side].seek(0)
        for _ in range(self.samples):
            yield receive(self.files[side])[1]

    def close(self) -> None:
        for file in self.files:
            file.close()


@dataclass
class _Walk:
    """Where the walk through one entry of the model has come to."""

    feed: Feed
    last: int
    start: _Frontier | None = None
    frontier: _Frontier | None = None
    place: int = 0


class Replay:
    """Walks a model; use it as a context manager. `gram` must be asked in the order of the operators."""

    def __init__(
        self,
        model: TfliteModel,
        graph: Graph,
        asking: Collection[OpId],
        feeds: Sequence[Feed],
        *,
        samples: int = SAMPLES,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Nothing is run yet.

        Args:
          model: The float model.
          graph: Its graph, as planned on.
          asking: The operators that may be asked for.
          feeds: Samples for each entry.
          samples: At most so many of them.
          progress: Called with the number of operators done.
        """
        self.model, self.graph, self.samples, self.progress = model, graph, samples, progress
        self.walks = {
            feed.subgraph: _Walk(feed, max((p for s, p in asking if s == feed.subgraph), default=-1)) for feed in feeds
        }
        self.makers = {tensor: op.id[1] for op in graph.ops for tensor in op.outputs}
        self.remembering = {tensor.id[0] for tensor in graph.tensors.values() if tensor.dtype == "resource"}
        self.done = 0
        self._folder, self._files = tempfile.TemporaryDirectory(prefix="paring-"), contextlib.ExitStack()
        self._worker: Worker | None = None

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()
        self._files.close()
        self._folder.cleanup()

    def gram(
        self,
        op: Op,
        unfolding: Unfolding,
        edits: Sequence[Edit],
        borders: Mapping[TensorId, Quantization],
        grid: Quantization | None,
    ) -> Gram | None:
        """Moments of an operator's input; None where no sample reaches it or its values cannot be seen.

        Args:
          op: The operator.
          unfolding: How its weights meet the input.
          edits: Those of the operators solved so far.
          borders: Integer grids of the graph's inputs and outputs.
          grid: The integer grid that the operator reads its input on; None for float.
        """
        source = op.inputs[op.demands.data[0]] if op.demands is not None else None
        if source is None:
            return None
        changed = apply(self.model, self.graph, tuple(edits), borders)
        if op.id[0] in self.walks:
            walk = self.walks[op.id[0]]
            self._advance(walk, op.id[1], changed)
            pairs = self._entry_values(walk, source)
        else:
            pairs = self._inner_values(source, changed)
        made = _grid(changed, _placed(changed, source))
        total = GramSum(unfolding, max(1, ROWS // max(1, self._count(op.id[0]))), op.id[1])
        for before, after in pairs:
            total.update(before, _read(after, made, grid))
        self.done += 1
        if self.progress is not None:
            self.progress(self.done)
        return total.finish()

    # -- the entry: a frontier that moves on -----------------------------------------------------------------------

    def _advance(self, walk: _Walk, position: int, changed: TfliteModel) -> None:
        """Moves the frontier to before operator `position`, running what lies between.

        Where variables are written and read, a slice from the middle would not know what they hold: it begins at the inputs.
        """
        number = walk.feed.subgraph
        if walk.start is None or walk.frontier is None:
            walk.start = walk.frontier = self._start(walk, changed)
        if position == walk.place:
            return
        whole = number in self.remembering
        old = walk.start if whole else walk.frontier
        wanted = self._live(number, position, position if whole else walk.last)
        made = [t for t in wanted if t not in old.tensors]
        kept = [old.tensors.index(t) for t in wanted if t in old.tensors]
        new = self._open([*made, *(t for t in wanted if t in old.tensors)], old.samples)
        if made:
            slices = (
                extract(self.model, old.tensors, made),
                extract(changed, [_placed(changed, t) for t in old.tensors], [_placed(changed, t) for t in made]),
            )
            worker = self._started(slices, old)
            for name, sliced in zip(("float", "changed"), slices, strict=True):
                path = Path(self._folder.name) / f"{name}.tflite"
                sliced.save(path)
                worker.load(name, path)
        for side, name in enumerate(("float", "changed")):
            given, again = tee(old.read(side))
            results = worker.run_many(name, given) if made else repeat([])
            for found, values in zip(results, again, strict=False):
                send(new.files[side], {}, [*found, *(values[i] for i in kept)])
        if not whole or walk.frontier is not walk.start:
            walk.frontier.close()
        walk.frontier, walk.place = new, position

    def _start(self, walk: _Walk, changed: TfliteModel) -> _Frontier:
        """The model's inputs. An integer border is read on its grid, as it will be."""
        number = walk.feed.subgraph
        inputs = [(number, int(i)) for i in self.model.subgraphs[number].inputs]
        grids = [_grid(changed, _placed(changed, tensor)) for tensor in inputs]
        frontier = self._open(inputs, 0)
        size = 0
        for sample in walk.feed:
            send(frontier.files[0], {}, sample)
            send(frontier.files[1], {}, [_codes(x, grid) for x, grid in zip(sample, grids, strict=True)])
            frontier.samples += 1
            size = size or self._size(number, sample)
            if frontier.samples >= min(self.samples, max(8, STORE // max(1, size))):
                break
        return frontier

    def _size(self, number: int, sample: Values) -> int:
        """Bytes that one sample's values may take at the widest place, of both models."""
        tensors = [t for t in self.graph.tensors.values() if t.id[0] == number and t.weight is None]
        sizes = sorted((4 * int(np.prod([max(1, d) for d in t.shape], dtype=np.int64)) for t in tensors), reverse=True)
        return 2 * (sum(sizes[:3]) + sum(value.nbytes for value in sample))

    def _open(self, tensors: list[TensorId], samples: int) -> _Frontier:
        files = [tempfile.TemporaryFile(dir=self._folder.name) for _ in range(2)]  # noqa: SIM115
        for file in files:
            self._files.enter_context(file)  # closed at the end, whatever happens on the way
        return _Frontier(tensors, cast("tuple[BinaryIO, BinaryIO]", tuple(files)), samples)

    def _live(self, number: int, position: int, last: int) -> list[TensorId]:
        """What operators from `position` to `last` read and no one among them makes."""
        found: dict[TensorId, None] = {}
        for op in self.graph.ops:
            if op.id[0] == number and position <= op.id[1] <= last:
                reads = [t for t in op.inputs if t is not None and self.graph.tensors[t].weight is None]
                reads = [t for t in reads if self.makers.get(t, -1) < position and self._given(t)]
                found.update(dict.fromkeys(reads))
        return list(found)

    def _given(self, tensor: TensorId) -> bool:
        """False for variables and for tensors without elements: nothing makes them, and slices bring them along."""
        inputs = {int(i) for i in self.model.subgraphs[tensor[0]].inputs}
        return tensor in self.makers or tensor[1] in inputs

    def _entry_values(self, walk: _Walk, source: TensorId) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        assert walk.frontier is not None
        place = walk.frontier.tensors.index(source)
        for before, after in zip(walk.frontier.read(0), walk.frontier.read(1), strict=True):
            yield before[place], after[place]

    def _started(self, slices: Sequence[TfliteModel], frontier: _Frontier) -> Worker:
        """A child with room for these slices; the one before is kept while its bounds are wide enough."""
        sample: Values = next(frontier.read(0), [])
        bounds = limits(*slices, sample=sample)
        if self._worker is not None:
            have = self._worker.limits
            if have.seconds >= bounds.seconds and have.memory >= bounds.memory:
                return self._worker
            self._worker.close()
            bounds = replace(bounds, seconds=max(have.seconds, bounds.seconds), memory=max(have.memory, bounds.memory))
        self._worker = Worker(bounds)
        return self._worker

    # -- loops and branches: from the start each time --------------------------------------------------------------

    def _inner_values(self, source: TensorId, changed: TfliteModel) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Values inside a loop or branch, every iteration; they are paired as long as both models go the same way."""
        walk = next((w for n, w in self.walks.items() if source[0] in bodies(self.model, n)), None)
        if walk is None:
            return
        number, folder = walk.feed.subgraph, Path(self._folder.name)
        target = _placed(changed, source)
        models = {"float": (self.model, source), "changed": (changed, target)}
        try:
            programs = {}
            for name, (model, tensor) in models.items():
                (folder / name).mkdir(exist_ok=True)
                programs[name] = build(model, number, [tensor], {tensor[0]}, folder / name)
        except UnsupportedError:
            return
        bounds = limits(self.model, changed, sample=next(iter(walk.feed.head(1)), []))
        with Worker(replace(bounds, seconds=10 * bounds.seconds)) as worker:
            for name, program in programs.items():
                worker.load_program(name, program)
            for sample in walk.feed.head(self._count(source[0])):
                before = worker.collect("float", sample)
                after = worker.collect("changed", fit(sample, changed, number))
                for x, seen in zip(before[0], after[0], strict=False):
                    if x.shape == seen.shape:
                        yield x, seen

    def _count(self, number: int) -> int:
        """Samples that an entry gives, at most."""
        walk = self.walks.get(number)
        return walk.frontier.samples if walk is not None and walk.frontier is not None else min(64, self.samples)


def _placed(changed: TfliteModel, tensor: TensorId) -> TensorId:
    """Where a tensor of the source is in the changed model."""
    return tensor[0], changed.places[tensor[0]][tensor[1]]


def _grid(model: TfliteModel, tensor: TensorId) -> Quantization | None:
    graph = model.subgraphs[tensor[0]]
    return quantization_of(model, graph, graph.tensors[tensor[1]])


def _read(values: np.ndarray, made: Quantization | None, grid: Quantization | None) -> np.ndarray:
    """A value as the operator reads it: from the form it is made in, onto the operator's own grid."""
    if values.dtype.kind in "iu" and made is not None:
        values = decode(values, made)
        if grid is None or grid.same_grid(made):
            return values
    if grid is None:
        return np.asarray(values, np.float32)
    return decode(_codes(values, grid), grid)


def _codes(values: np.ndarray, grid: Quantization | None) -> np.ndarray:
    """Real numbers on a grid; without one, and what is no real number, as they are."""
    if grid is None or values.dtype.kind != "f":
        return values
    low, high = LEVELS[grid.dtype]
    codes = np.rint(values.astype(np.float64) / float(grid.scale[0])) + int(grid.zero_point[0])
    return np.clip(codes, low, high).astype(grid.dtype)


__all__ = ["Replay"]
