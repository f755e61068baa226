"""Models side by side: opened as they are, their inputs matched, one sample in the types of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from paring.calibrate import limits
from paring.data import specs
from paring.errors import InputError
from paring.findings import real
from paring.formats import SUFFIXES
from paring.formats.convert import QUIET, check_file, check_installed
from paring.formats.run_child import program
from paring.formats.tflite.constants import quantization_of
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.view import entries
from paring.graph import Quantization
from paring.measure.evaluate import output_names
from paring.runtime import Limits, Worker
from paring.samples import Sample, TensorSpec

TFLITE, SAVED_MODEL, KERAS = "tflite", "SavedModel", "Keras"
_SECONDS = 600.0  # for one request to TensorFlow: its first run may compile for minutes


@dataclass(frozen=True)
class Subject:
    """One model to measure.

    Attributes:
      path: Its file or folder.
      kind: `tflite`, `SavedModel` or `Keras`.
      model: The model, where paring reads it itself.
      inputs: In the model's order.
      outputs: Names in the model's order.
      grids: Of integer inputs that stand for real numbers.
      sources: For each input the name that samples know it by.
      notes: What to know of it.
      kernels: What runs a LiteRT model: `xnnpack`, what users run, or `sparse`, paring's delegate before it.
    """

    path: Path
    kind: str
    model: TfliteModel | None = field(repr=False)
    inputs: dict[str, TensorSpec]
    outputs: tuple[str, ...]
    grids: dict[str, Quantization] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kernels: str = "xnnpack"

    def start(self, threads: int, sample: Sequence[np.ndarray]) -> Worker:
        """A fresh child for the model, which is not loaded yet."""
        if self.model is not None:
            return Worker(limits(self.model, sample=sample), threads=threads)
        return start_framework(self.path, threads)

    def load(self, worker: Worker) -> Child:
        """Loads the model in a child, as `model`."""
        idle = worker.memory()[0]
        if self.model is None:
            worker.load("model", self.path)
        else:
            worker.load("model", self.path, kernels=self.kernels)
        return Child(worker, idle)

    def adapt(self, sample: Sample, given: dict[str, Quantization]) -> list[np.ndarray]:
        """A sample in the order, the types and on the grids of this model's inputs; `given`: grids of the sample."""
        found = []
        for (name, spec), source in zip(self.inputs.items(), self.sources, strict=True):
            value, own, grid = sample[source], given.get(source), self.grids.get(name)
            same = grid is None if own is None else own.same_grid(grid)
            if not same or value.dtype != spec.dtype:
                if own is not None:
                    value = (value.astype(np.float64) - int(own.zero_point[0])) * float(own.scale[0])
                if grid is not None:
                    info = np.iinfo(spec.dtype)
                    codes = np.rint(value.astype(np.float64) / float(grid.scale[0])) + int(grid.zero_point[0])
                    value = np.clip(codes, info.min, info.max)
                value = value.astype(spec.dtype)
            found.append(value)
        return found

    def place(self, output: str) -> int:
        """Where an output stands among all: by the number in names such as `output_1`, else in the model's order."""
        numbers = [re.fullmatch(r"output_(\d+)", name) for name in self.outputs]
        if all(numbers):
            ordered = sorted(self.outputs, key=lambda name: int(name.removeprefix("output_")))
            return ordered.index(output)
        return self.outputs.index(output)

    def counterpart(self, output: str, first: Subject) -> str:
        """This model's output for one of the first model's: of the same name, else at the same place."""
        if output in self.outputs or output not in first.outputs:
            return output
        place = first.place(output)
        return next((name for name in self.outputs if self.place(name) == place), output)

    def read(self, value: np.ndarray, place: int) -> np.ndarray:
        """An output as real numbers."""
        return value if self.model is None else real(value, self.model, 0, place)


@dataclass(frozen=True)
class Child:
    """A process that has loaded a model as `model`; `idle`: bytes of memory it had before."""

    worker: Worker
    idle: int


def open_subject(path: Path) -> tuple[Subject, Child | None]:
    """Opens a model as it is; nothing is converted.

    Returns:
      The model, and for a SavedModel or Keras model the child (one thread, the model loaded) that it was opened in.

    Raises:
      InputError: The path is no model, or a broken one.
      UnsupportedError: TensorFlow or Keras is not installed.
    """
    if not path.exists():
        raise InputError("no such model", where=str(path))
    if path.is_file() and path.suffix not in SUFFIXES[1:]:
        return _tflite(path, TfliteModel.open(path)), None
    check_file(path)
    check_installed("tensorflow", *([] if path.is_dir() else ["keras"]), purpose=f"running {path.name} as it is")
    worker = start_framework(path, 1)
    try:
        idle = worker.memory()[0]
        worker.load("model", path)
        found = worker.describe("model")
    except BaseException:
        worker.close()
        raise
    inputs = {name: TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in found["inputs"]}
    kind = SAVED_MODEL if path.is_dir() else KERAS
    return Subject(path, kind, None, inputs, tuple(found["outputs"])), Child(worker, idle)


def start_framework(path: Path, threads: int) -> Worker:
    """A child for TensorFlow or Keras."""
    counts = {f"TF_NUM_{pool}_THREADS": str(threads) for pool in ("INTRAOP", "INTEROP")}
    variables = {**QUIET, **counts, "OMP_NUM_THREADS": str(threads)}
    return Worker(Limits(_SECONDS), threads=threads, program=program(path), variables=variables)


def _tflite(path: Path, model: TfliteModel) -> Subject:
    found = entries(model)
    key, (number, inputs, _) = next((item for item in found.items() if item[1][0] == 0), ("", (0, {}, {})))
    taken, graph = specs(model, number, inputs), model.subgraphs[0]
    grids = {}
    for name, index in zip(taken, (int(i) for i in graph.inputs), strict=True):
        grid = quantization_of(model, graph, graph.tensors[index])
        if grid is not None and taken[name].dtype in ("int8", "uint8", "int16"):
            grids[name] = grid
    notes = (f"only the signature {key or '(the first subgraph)'} was measured",) if len(found) > 1 else ()
    return Subject(path, TFLITE, model, taken, output_names(model, 0), grids, (), notes)


def align(subjects: Sequence[Subject]) -> tuple[dict[str, TensorSpec], list[tuple[str, ...]]]:
    """What samples for all models look like, in the first one's names; and for each model the names of its inputs there.

    Raises:
      InputError: Inputs differ; names them and their models.
    """
    first = subjects[0]
    common, sources = dict(first.inputs), []
    for subject in subjects:
        names = _matched(first, subject)
        for (own, spec), name in zip(subject.inputs.items(), names, strict=True):
            joined = _joined(common[name], spec, name in first.grids, own in subject.grids)
            if joined is None:
                raise _differ(first, subject, _shown(first.inputs[name]), _shown(spec))
            common[name] = joined
        sources.append(names)
    return common, sources


def _matched(first: Subject, other: Subject) -> tuple[str, ...]:
    """The first model's name for each input of another; a single input needs no name."""
    if len(first.inputs) == len(other.inputs) == 1:
        return tuple(first.inputs)
    right = {_short(name): name for name in first.inputs}
    names = tuple(right.get(_short(name), "") for name in other.inputs)
    if len(set(names)) != len(right) or "" in names or len(names) != len(right):
        raise _differ(first, other, ", ".join(first.inputs), ", ".join(other.inputs) or "none")
    return names


def _short(name: str) -> str:
    return re.sub(r"^serving_default_|:\d+$", "", name)


def _joined(a: TensorSpec, b: TensorSpec, a_grid: bool, b_grid: bool) -> TensorSpec | None:
    """What serves both inputs, None where nothing does."""
    if len(a.shape) != len(b.shape) or any(x != y and min(x, y) >= 0 for x, y in zip(a.shape, b.shape, strict=True)):
        return None
    shape = tuple(max(x, y) for x, y in zip(a.shape, b.shape, strict=True))
    kinds = ["real" if grid or "float" in s.dtype else s.dtype for s, grid in ((a, a_grid), (b, b_grid))]
    if a.dtype == b.dtype or kinds == ["real", "real"]:
        dtype = a.dtype if a.dtype == b.dtype or "float" not in a.dtype + b.dtype else "float32"
    elif set(kinds) == {"int32", "int64"}:
        dtype = "int32"
    else:
        return None
    return TensorSpec(a.name, shape, dtype)


def _shown(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype} [{', '.join('any' if d < 0 else str(d) for d in spec.shape)}]"


def _differ(first: Subject, other: Subject, expected: str, got: str) -> InputError:
    return InputError(
        "the inputs of the models differ", where=str(other.path), expected=f"{expected} as {first.path} has", got=got,
        todo="Measure models that take the same samples",
    )  # fmt: skip


__all__ = ["Child", "Subject", "align", "open_subject"]
