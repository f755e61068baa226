"""Runs a model over labelled samples and says what its outputs are worth by a metric."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from paring.calibrate import limits
from paring.data import Feed
from paring.errors import InputError
from paring.findings import fit, real
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.view import entries
from paring.measure.metrics import Metric, default_metric
from paring.runtime import RunError, Worker

SPOOL = 256 * 2**20
"""Bytes of outputs beyond which they are kept in a temporary file and mapped."""


@dataclass(frozen=True)
class Evaluation:
    """What a model scores.

    Attributes:
      metric: The metric.
      score: In the metric's unit.
      values: float64 [n], the score of each sample; None where the metric has none.
      outputs: Real numbers [n, ...] by output name, the scored one first; mapped from a file where they are large.
      against: `labels`, or `the first model` where that gave the right answers.
      samples: How many were run.
    """

    metric: Metric
    score: float
    values: np.ndarray | None = field(repr=False)
    outputs: Mapping[str, np.ndarray] = field(repr=False)
    against: str
    samples: int

    def drop(self, after: Evaluation) -> tuple[float, float | None]:
        """How much worse `after` is on the same samples, and the standard error of that; None where it has none."""
        lost = self.metric.drop(self.score, after.score)
        if self.values is None or after.values is None or len(self.values) != len(after.values):
            return lost, None
        return lost, float((self.values - after.values).std() / max(1, len(self.values)) ** 0.5)


def evaluate(
    model: TfliteModel,
    feed: Feed,
    metric: Metric | None = None,
    *,
    reference: Mapping[str, np.ndarray] | None = None,
    path: Path | None = None,
    output: str | None = None,
    threads: int | None = None,
    kernels: str = "xnnpack",
    name: str = "",
) -> Evaluation:
    """Runs one entry of a model over samples, in a child process with limits, and scores what comes out.

    Args:
      model: The model.
      feed: Samples with their labels, for this model or for the one it was made from: real numbers are put on the grid
        of an integer input, and integer outputs are read as real numbers.
      metric: How to score; `default_metric` where None.
      reference: The first model's outputs, for metrics without labels; None where this is the first.
      path: The model's file, where there is one, which saves writing it.
      output: Name of the output to score; the first where None.
      threads: How many; as many as a model of this size gains from where None.
      kernels: `xnnpack`, what users run, or `builtin`.
      name: What errors call the model.

    Raises:
      RunError: The model cannot be run, or not in time.
      InputError: The metric does not fit, or there are no labels for it.

    >>> from paring.data import feeds
    >>> from paring.demo import load_digits, model_path
    >>> from paring.formats import load
    >>> _, images, labels = load_digits()
    >>> model = load(model_path())
    >>> round(evaluate(model, feeds(model, (images[:50], labels[:50]))[0]).score)
    100
    """
    name = name or model.path
    with tempfile.TemporaryDirectory(prefix="paring-") as folder:
        file = path or Path(folder) / "model.tflite"
        if path is None:
            model.save(file)
        try:
            with Worker(limits(model, sample=next(iter(feed.head(1)), ())), threads=threads) as worker:
                worker.load("model", file, kernels=kernels)
                if feed.subgraph:
                    worker.enter("model", "model", feed.signature, feed.names, feed.outputs)
                samples = (fit(sample, model, feed.subgraph) for sample in feed)
                names, number = output_names(model, feed.subgraph), feed.subgraph
                outputs = collect(worker, "model", samples, names, lambda v, place: real(v, model, number, place))
        except RunError as error:
            raise RunError("cannot run the model", where=name, got=str(error).rstrip(".")) from error
    return score(outputs, feed.samples.labels, metric, reference=reference, output=output, name=name)


def collect(
    worker: Worker,
    session: str,
    samples: Iterable[list[np.ndarray]],
    names: Sequence[str],
    read: Callable[[np.ndarray, int], np.ndarray],
) -> dict[str, np.ndarray]:
    """The outputs of a loaded model over samples: float32 [n, ...] by name.

    Args:
      worker: The child.
      session: The model's name there.
      samples: Inputs in the model's order.
      names: Of the outputs, in the model's order.
      read: (output, its position) -> real numbers.
    """
    rows: list[int] = []
    kept = {name: Kept(name) for name in names}

    def counted() -> Iterator[list[np.ndarray]]:
        for sample in samples:
            rows.append(next((len(array) for array in sample if array.ndim), 1))
            yield sample

    for number, outputs in enumerate(worker.run_many(session, counted())):
        for place, (name, value) in enumerate(zip(names, outputs, strict=True)):
            kept[name].add(read(value, place), rows[number])
    return {name: found.array() for name, found in kept.items()}


def score(
    outputs: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    metric: Metric | None = None,
    *,
    reference: Mapping[str, np.ndarray] | None = None,
    output: str | None = None,
    name: str = "",
) -> Evaluation:
    """Scores outputs that were collected before; the arguments are those of `evaluate`."""
    if output is not None and output not in outputs:
        raise InputError("no such output", where=output, expected=", ".join(outputs), todo="Name one of those")
    first = output or next(iter(outputs), "")
    ordered = {key: outputs[key] for key in (first, *(key for key in outputs if key != first)) if key in outputs}
    if not ordered or not next(iter(ordered.values())).size:
        raise InputError("the model gives nothing to score", where=name)
    chosen = metric or default_metric(ordered, labels)
    target = ordered if reference is None else reference
    found, values = chosen.measure(ordered, labels, target, name)
    against = "labels" if chosen.uses_labels(ordered, labels) else "the first model"
    return Evaluation(chosen, found, values, ordered, against, len(next(iter(ordered.values()))))


def output_names(model: TfliteModel, subgraph: int) -> tuple[str, ...]:
    """The names of an entry's outputs, in the subgraph's order."""
    named = next((outputs for number, _, outputs in entries(model).values() if number == subgraph), {})
    names = {index: name for name, index in named.items()}
    return tuple(names.get(int(i), f"output{n}") for n, i in enumerate(model.subgraphs[subgraph].outputs))


class Kept:
    """One output of all samples, one row after the other; beyond `SPOOL` bytes in a temporary file."""

    def __init__(self, name: str) -> None:
        """Starts without any; `name` is what errors call it."""
        self._name = name
        self._parts: list[np.ndarray] = []
        self._bytes = self._rows = 0
        self._file: IO[bytes] | None = None

    def add(self, value: np.ndarray, rows: int) -> None:
        """Takes the output of one sample of `rows` rows: [rows, ...], or anything else as a whole."""
        part = np.ascontiguousarray(value, np.float32)
        part = part if value.ndim and len(value) == rows else part.reshape(1, *value.shape)
        if self._parts and part.shape[1:] != self._parts[0].shape[1:]:
            raise InputError(
                "outputs differ in shape from sample to sample", where=self._name, expected=str(list(self._parts[0].shape[1:])),
                got=str(list(part.shape[1:])), todo="Give samples of one shape",
            )  # fmt: skip
        self._bytes, self._rows = self._bytes + part.nbytes, self._rows + len(part)
        if self._file is None and self._bytes > SPOOL:
            self._file = tempfile.TemporaryFile(prefix="paring-")  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            for earlier in self._parts:
                self._file.write(earlier.tobytes())
            del self._parts[1:]
        if self._file is not None:
            self._file.write(part.tobytes())
        else:
            self._parts.append(part)

    def array(self) -> np.ndarray:
        """float32 [n, ...]; what is in the file is mapped."""
        if self._file is None:
            return np.concatenate(self._parts) if self._parts else np.zeros(0, np.float32)
        self._file.flush()
        return np.memmap(self._file, np.float32, "r", shape=(self._rows, *self._parts[0].shape[1:]))


__all__ = ["Evaluation", "Kept", "collect", "evaluate", "output_names", "score"]
