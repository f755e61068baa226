"""Both models as a whole, sample by sample: their outputs, and which kernels run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from paring.calibrate import limits
from paring.compress.encodings import decode
from paring.data import Feed
from paring.errors import InputError
from paring.findings import fit
from paring.formats.tflite.constants import shape_of
from paring.formats.tflite.extract import extract
from paring.formats.tflite.model import TfliteModel
from paring.graph import Graph, TensorId
from paring.measure.match import Entry, Matching
from paring.measure.noise import Noise, error
from paring.measure.result import Error
from paring.runtime import RunError, Worker

KERNELS = ("xnnpack", "builtin")


@dataclass
class Outcome:
    """What running one entry of both models gave.

    Attributes:
      kernels: Those that run the float and the optimized model.
      errors: By output.
      agreement: By output, the share of rows with the same largest value.
      samples: How many there were.
      notes: Accuracy where labels are known, and what did not run.
    """

    kernels: tuple[str, str]
    errors: dict[str, Error] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class Tally:
    """One output: its error, and how often both models say the same, and the right thing."""

    noise: Noise
    same: int = 0
    right: np.ndarray = field(default_factory=lambda: np.zeros(2))
    rows: int = 0
    labelled: bool = False

    def update(self, x: np.ndarray, y: np.ndarray, labels: np.ndarray | None) -> None:
        """Takes one sample's output of both models into account; `labels` are those of all samples."""
        if x.dtype.kind != "f" or x.size != y.size:
            return
        y = y.reshape(x.shape)
        self.noise.update(x, y)
        if x.ndim != 2 or x.shape[1] < 2:
            return
        told = [x.argmax(1), y.argmax(1)]
        self.same += int((told[0] == told[1]).sum())
        if labels is not None:
            self.labelled = True
            wanted = labels[self.rows : self.rows + len(x)]
            self.right += [(classes[: len(wanted)] == wanted).sum() for classes in told]
        self.rows += len(x)


@dataclass(frozen=True)
class Whole:
    """One entry of both models and its samples."""

    models: tuple[TfliteModel, TfliteModel]
    graphs: tuple[Graph, Graph]
    matching: Matching
    feed: Feed
    entry: Entry

    def samples(self) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
        """Each sample as the float and as the optimized model take it."""
        graph = self.models[1].subgraphs[self.entry.optimized]
        place = {int(i): n for n, i in enumerate(self.models[0].subgraphs[self.entry.source].inputs)}
        order = {p.optimized[1]: place[p.source[1]] for p in self.entry.inputs}
        inputs = [int(i) for i in graph.inputs]
        shapes = [shape_of(graph.tensors[i]) for i in inputs]
        for sample in self.feed:
            theirs = [sample[order[i]] for i in inputs]
            theirs = [v.reshape(s) if v.size == np.prod(s) else v for v, s in zip(theirs, shapes, strict=True)]
            yield sample, fit(theirs, self.models[1], self.entry.optimized)

    def run(self, folder: Path, step: Callable[[], None]) -> Outcome:
        """Runs both models on all samples; `step` is called after each.

        Raises:
          InputError: There is no sample.
          RunError: A model runs on no kernels.
        """
        first = next(iter(self.samples()), None)
        if first is None:
            raise InputError("cannot compare", expected="at least one sample", got="an empty data set")
        origin = self.matching.sides[self.entry.source, self.entry.optimized][1].origin
        grids = [self.graphs[1].tensors[origin.get(p.optimized, p.optimized)].quantization for p in self.entry.outputs]
        tallies = [Tally(Noise(grid)) for grid in grids]
        labels = self.feed.samples.labels if self.feed.given else None
        labels = labels if labels is not None and labels.ndim == 1 else None
        with Worker(limits(*self.models, sample=first[0])) as worker:
            notes: list[str] = []
            outcome = Outcome(
                (self._load(worker, 0, first[0], folder, notes), self._load(worker, 1, first[1], folder, notes))
            )
            for sample, fitted in self.samples():
                a, b = worker.run("source", sample), worker.run("optimized", fitted)
                for tally, port in zip(tallies, self.entry.outputs, strict=True):
                    tally.update(self._value(a, 0, port.source), self._value(b, 1, port.optimized), labels)
                outcome.samples += 1
                step()
        for tally, port in zip(tallies, self.entry.outputs, strict=True):
            found = error([tally.noise])
            if found is not None:
                outcome.errors[port.name] = found
            if tally.rows:
                outcome.agreement[port.name] = tally.same / tally.rows
            if tally.rows and labels is not None:
                before, after = tally.right / tally.rows
                notes.append(f"output {port.name}: {before:.1%} right in float, {after:.1%} optimized")
        outcome.notes = notes
        return outcome

    def _load(self, worker: Worker, which: int, sample: list[np.ndarray], folder: Path, notes: list[str]) -> str:
        """Loads a whole model -> the kernels that run it."""
        model, name = self.models[which], ("source", "optimized")[which]
        number = (self.entry.source, self.entry.optimized)[which]
        path = folder / f"{name}_whole.tflite"
        extract(model, None, [(number, int(i)) for i in model.subgraphs[number].outputs]).save(path)
        refused: list[RunError] = []
        for kernels in KERNELS:
            try:
                worker.load(name, path, kernels=kernels)
                worker.run(name, sample)
                notes += [f"{model.path} was run on builtin kernels: {why}" for why in refused]
                return kernels
            except RunError as why:
                refused.append(why)
        raise RunError(f"cannot run {model.path}", got=str(refused[0]))

    def _value(self, found: list[np.ndarray], which: int, tensor: TensorId) -> np.ndarray:
        """An output, as real numbers where it is on a grid."""
        graph = self.models[which].subgraphs[tensor[0]]
        value = found[[int(i) for i in graph.outputs].index(tensor[1])]
        grid = self.graphs[which].tensors[tensor].quantization
        return value if grid is None or value.dtype.kind not in "iu" else decode(value, grid)
