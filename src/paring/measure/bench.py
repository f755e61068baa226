"""Models side by side: size, latency, memory, accuracy, and what runs their operators; every ratio is to the first."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paring.errors import InputError
from paring.formats.tflite.program import bodies
from paring.measure.evaluate import Evaluation, collect, score
from paring.measure.metrics import Metric, find_metric
from paring.measure.pace import combine, measure
from paring.measure.result import Bench, BenchModel, Figure, Timing
from paring.measure.sizes import stored_bytes, zip_bytes, zstd_bytes
from paring.measure.store import environment
from paring.measure.subject import Child, Subject, align, open_subject
from paring.runtime import RunError, Worker
from paring.runtime.native import delegate_path
from paring.samples import Samples, open_samples, seeded

LEAST, ENOUGH = 3, 5
"""Launches at least, unless fewer are asked for; and those from which on narrow intervals are believed."""

_NARROW = 0.015  # half a ratio's 95% interval, relative to it, that is good enough
_SEEDED = 8  # samples to make up where none are given


@dataclass(frozen=True)
class _Settings:
    threads: tuple[int, ...]
    rounds: int
    launches: int
    seconds: float
    progress: Callable[[str], None]


def bench(
    models: Sequence[str | os.PathLike[str]],
    data: Any = None,
    *,
    metric: str | Metric | None = None,
    labels: Any = None,
    output: str | None = None,
    threads: int | None = None,
    rounds: int = 100,
    launches: int = 30,
    seconds: float = 60.0,
    limit: int | None = None,
    image_range: Any = None,
    sparse_kernels: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Bench:
    """Measures models side by side, each as it is: nothing is converted.

    Every model runs in processes of its own, which take turns round by round, and which are started anew until the
    ratios of latency are known to 1.5% or the time is used up. LiteRT models run on the default kernels (XNNPACK),
    SavedModels in TensorFlow by a signature, Keras files by `predict_on_batch`.

    Args:
      models: `.tflite`, `.keras` or `.h5` files and SavedModel folders; all ratios are to the first.
      data: Samples with labels (see `paring.samples.open_samples`), in the first model's input names; made up where None.
      metric: A metric or its name (see `paring.measure.metrics.find_metric`). Without one: top1 where the labels are
        class numbers, else the mean square difference from the first model's outputs.
      labels: `.npy` file or array; wins over labels in the data.
      output: Name of the output to score; the first where None. Where a model has no output of that name, its output at
        the same place.
      threads: The larger number of threads to time; one for each core where None.
      rounds: Rounds in each launch.
      launches: At most so many launches of each model.
      seconds: No launch is begun after so many seconds of timing, but for the first three.
      limit: At most so many samples.
      image_range: For a folder of images and a float input: the values of pixels 0 and 255.
      sparse_kernels: Run every `.tflite` model but the first with paring's delegate; a model by itself, too.
      progress: Called with what is being done.

    Raises:
      NativeError: The delegate is wanted, and paring was installed without it.
      InputError: Bad models, data or metric; inputs differ between the models.
      UnsupportedError: TensorFlow is missing for a SavedModel or Keras model.
      RunError: A model cannot be run; it is named.

    >>> from paring.demo import load_digits, model_path
    >>> _, images, labels = load_digits()
    >>> found = bench([model_path()] * 2, (images[:50], labels[:50]), threads=1, rounds=5, launches=1)
    >>> found.metric, found.models[1].score.ratio, found.models[0].paths["xnnpack"]["CONV_2D"]
    ('top1', 1.0, 2)
    """
    paths = [Path(path) for path in models]
    if not paths:
        raise InputError("nothing to measure", expected="at least one model", got="none")
    for what, value in (("rounds", rounds), ("launches", launches), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise InputError(f"bad number of {what}", expected="at least 1", got=str(value))
    chosen = find_metric(metric) if isinstance(metric, str) else metric
    most = threads or os.cpu_count() or 1
    settings = _Settings(tuple(sorted({1, most})), rounds, launches, seconds, progress or (lambda _: None))
    with ExitStack() as stack:
        opened = _open(paths, stack, settings)
        common, sources = align([subject for subject, _ in opened])
        subjects = [replace(subject, sources=names) for (subject, _), names in zip(opened, sources, strict=True)]
        if sparse_kernels:
            delegate_path()
            plain = subjects[: len(subjects) > 1]
            subjects = plain + [replace(subject, kernels="sparse") for subject in subjects[len(plain) :]]
        if data is None:
            if image_range is not None or labels is not None:
                raise InputError("labels and image ranges are of no use", expected="samples (--data)")
            samples = seeded(common, min(limit or _SEEDED, _SEEDED))
        else:
            samples = open_samples(data, common, labels=labels, image_range=image_range, limit=limit)
        fed = [_Fed(subject, samples, subjects[0]) for subject in subjects]
        found = _run(fed, [child for _, child in opened], chosen, output, settings)
    return _result(fed, data is not None, found, settings)


@dataclass(frozen=True)
class _Fed:
    """A model with the samples for it."""

    subject: Subject
    samples: Samples
    first: Subject

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        for sample in self.samples:
            given = {n: g for n, g in self.first.grids.items() if sample[n].dtype == g.dtype}
            yield self.subject.adapt(sample, given)

    def head(self) -> list[np.ndarray]:
        return next(iter(self))


@contextlib.contextmanager
def _naming(subject: Subject) -> Iterator[None]:
    """Says which model could not be run."""
    try:
        yield
    except RunError as error:
        raise RunError("cannot run the model", where=str(subject.path), got=str(error).rstrip(".")) from error


def _open(paths: Sequence[Path], stack: ExitStack, settings: _Settings) -> list[tuple[Subject, Child | None]]:
    found = []
    for path in paths:
        settings.progress(f"opening {path.name}")
        subject, child = open_subject(path)
        if child is not None:
            stack.callback(child.worker.close)
        found.append((subject, child))
    return found


@dataclass
class _Found:
    """What running the models gave; lists are by model."""

    peaks: list[list[int]]
    added: list[list[int]]
    scored: list[Evaluation]
    operators: list[dict[str, dict[str, int]]]
    timings: list[list[Timing]]


def _run(
    fed: Sequence[_Fed], opened: Sequence[Child | None], metric: Metric | None, output: str | None, settings: _Settings
) -> _Found:
    """Launches all models side by side until the ratios are known; the first launch also scores them."""
    found = _Found([[] for _ in fed], [[] for _ in fed], [], [], [])
    times: dict[int, list[np.ndarray]] = {threads: [] for threads in settings.threads}
    begin = time.monotonic()
    spare: Sequence[Child | None] = opened
    for number in range(settings.launches):
        calls = {}
        for threads in settings.threads:
            with ExitStack() as stack:
                settings.progress(f"launch {number + 1}, {threads} thread{'s' if threads > 1 else ''}")
                children = _launch(fed, spare, threads, stack)
                spare = [None] * len(fed)
                for place, (model, child) in enumerate(zip(fed, children, strict=True)):
                    with _naming(model.subject):
                        child.worker.run("model", model.head())
                        peak = child.worker.memory()[1]
                    if threads == 1:
                        found.peaks[place].append(peak)
                        found.added[place].append(peak - child.idle)
                if not found.scored:
                    _score(fed, children, metric, output, found, settings)
                    begin = time.monotonic()
                share = settings.seconds / (LEAST * len(settings.threads))
                workers = [child.worker for child in children]
                rounds, calls[threads] = measure(workers, rounds=settings.rounds, seconds=share, seed=number)
                times[threads].append(rounds)
        found.timings = [combine(rounds, threads, calls[threads]) for threads, rounds in times.items()]
        narrow = all(t.error is not None and t.error <= _NARROW * t.ratio for row in found.timings for t in row)
        late = time.monotonic() - begin > settings.seconds
        if (narrow and number + 1 >= ENOUGH) or (late and number + 1 >= LEAST):
            break
    return found


def _launch(fed: Sequence[_Fed], spare: Sequence[Child | None], threads: int, stack: ExitStack) -> list[Child]:
    """A child for each model, those that are there already included; they start together and load in turn."""
    started: list[Worker | None] = []
    for model, child in zip(fed, spare, strict=True):
        worker = model.subject.start(threads, model.head()) if child is None else None
        started.append(worker)
        stack.callback((worker or child.worker).close)  # type: ignore[union-attr]
    found = []
    for model, child, worker in zip(fed, spare, started, strict=True):
        with _naming(model.subject):
            found.append(child if child is not None else model.subject.load(worker))  # type: ignore[arg-type]
    return found


def _score(
    fed: Sequence[_Fed],
    children: Sequence[Child],
    metric: Metric | None,
    output: str | None,
    found: _Found,
    settings: _Settings,
) -> None:
    """Runs all samples through each model; the first one's outputs are the reference of the others."""
    reference: Mapping[str, np.ndarray] | None = None
    first = fed[0].subject
    wanted = output or min(first.outputs, key=first.place)
    for model, child in zip(fed, children, strict=True):
        subject = model.subject
        settings.progress(f"running {subject.path.name}")
        with _naming(subject):
            outputs = collect(child.worker, "model", model, subject.outputs, subject.read)
            child.worker.run("model", model.head())  # what is timed is the same sample in every launch
            found.operators.append(_operators(subject, child.worker))
        name = subject.counterpart(wanted, first)
        labels = model.samples.labels
        found.scored.append(score(outputs, labels, metric, reference=reference, output=name, name=str(subject.path)))
        metric, reference = found.scored[0].metric, found.scored[0].outputs


def _operators(subject: Subject, worker: Worker) -> dict[str, dict[str, int]]:
    """The operators by runtime path; the runtime says nothing of those in loops and branches."""
    paths = {path: Counter(natives) for path, natives in worker.paths("model").items()}
    if subject.model is not None:
        inside = [op for number in bodies(subject.model, 0) for op in subject.model.subgraphs[number].operators]
        paths["unseen"] = paths.get("unseen", Counter()) + Counter(subject.model.native(op) for op in inside)
    return {path: dict(count.most_common()) for path, count in paths.items() if count}


def _result(fed: Sequence[_Fed], given: bool, found: _Found, settings: _Settings) -> Bench:
    settings.progress("compressing")
    sizes = [[size(model.subject.path) for size in (stored_bytes, zip_bytes, zstd_bytes)] for model in fed]
    peaks = [float(np.median(values)) or None for values in found.peaks]
    first, rows = found.scored[0], []
    for place, (model, scored) in enumerate(zip(fed, found.scored, strict=True)):
        drop, error = first.drop(scored)
        stored, zipped, zstd = (_figure(mine, other) for mine, other in zip(sizes[place], sizes[0], strict=True))
        rows.append(
            BenchModel(
                path=str(model.subject.path),
                kind=model.subject.kind,
                bytes=stored,
                zip=zipped,
                zstd=zstd,
                memory=_figure(peaks[place], peaks[0]),
                added=float(np.median(found.added[place])) if peaks[place] else None,
                latency=tuple(timings[place] for timings in found.timings),
                score=_figure(scored.score, first.score),
                drop=drop,
                drop_error=error,
                paths=found.operators[place],
                notes=model.subject.notes,
            )
        )
    metric, samples = first.metric, fed[0].samples
    return Bench(
        environment=environment(),
        metric=metric.name,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        against=first.against,
        samples=first.samples,
        given=given,
        models=tuple(rows),
        notes=samples.notes,
    )


def _figure(value: float | None, first: float | None) -> Figure:
    if value is None or first is None:
        return Figure(value)
    if value == first:
        return Figure(value, 1.0)
    return Figure(value, value / first if first else None)


__all__ = ["bench"]
