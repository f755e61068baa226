"""bench_algorithms: compression algorithms trained side by side on fixed models and data, with equal budgets."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import keras
import numpy as np

from paring.compress.base import Algorithm
from paring.compress.chain import chain
from paring.errors import InputError, ParingError
from paring.formats import keras as keras_format
from paring.formats.convert import convert_all, to_tflite
from paring.measure.algorithms import (
    BUILT_IN,
    DIGITS,
    FLOAT,
    DataSet,
    Entry,
    check,
    data_set,
    entry,
    judged,
    order,
    summary,
)
from paring.measure.result import AlgorithmBench, AlgorithmRun, AlgorithmTable
from paring.named import find
from paring.runtime import Worker
from paring.testing import broken
from paring.training.attaching import attach, attachment_of
from paring.training.exporting import export, from_marked, save_marked

RATE = 2e-3  # Adam's, of training in float and again of what follows; falls to zero by half a cosine
ROUNDS = 10  # in which the models take turns; the first one compiles, and is not timed
CALIBRATION = 256
Build = Callable[[tuple[int, ...], int], Any]


def cnn(shape: tuple[int, ...], classes: int) -> Any:
    """Two convolutions with batch normalization and a dense layer.

    Args:
      shape: Height, width, channels.
      classes: How many.

    Returns:
      A Keras model that gives probabilities.
    """
    layers = keras.layers
    inputs = x = keras.Input(shape)
    for width in (16, 32):
        x = layers.Conv2D(width, 3, strides=2 if width > 16 or shape[0] > 16 else 1, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    return keras.Model(inputs, layers.Dense(classes, activation="softmax")(layers.Flatten()(x)), name="cnn")


def mlp(shape: tuple[int, ...], classes: int) -> Any:
    """Two dense layers with as many hidden units as the images have pixels, 128 at most; else as `cnn`."""
    layers = keras.layers
    inputs = keras.Input(shape)
    x = layers.Dense(128, activation="relu")(layers.Flatten()(inputs))
    return keras.Model(inputs, layers.Dense(classes, activation="softmax")(x), name="mlp")


MODELS: Mapping[str, Build] = MappingProxyType({"cnn": cnn, "mlp": mlp})


@dataclass(eq=False)
class _Member:
    """One model in training: with a seed, and with an algorithm or none."""

    entry: Entry
    seed: int
    model: Any
    seconds: list[float] = field(default_factory=list)
    file: Path | None = None
    notes: list[str] = field(default_factory=list)


def bench_algorithms(
    algorithms: Sequence[str | Algorithm] = (),
    *,
    data: Sequence[str] = (DIGITS,),
    models: Sequence[str] = tuple(MODELS),
    seeds: int = 3,
    steps: int = 200,
    batch: int = 32,
    built_in: bool = True,
    progress: Callable[[str], None] | None = None,
) -> AlgorithmBench:
    """Trains compression algorithms side by side and measures accuracy, size and what a training step takes.

    For every data set, model and seed a model is trained in float; each algorithm and a float twin go on from there, with the
    same samples in the same order, the same optimizer and as many steps. They take turns, so that the times of their steps
    compare. Accuracy and sizes are those of the `.tflite` files that are written; where none can be, the deployed form in Keras
    is judged, and a note says why.

    Args:
      algorithms: `module:Class{settings}`, names of recipe stages, chains joined by `+`, or algorithms with their settings.
      data: `digits`, or `.npz` files with `x_train`, `y_train`, `x_test`, `y_test`.
      models: `cnn`, `mlp`, or `module:function` of (image shape, number of classes) that gives a built Keras model which makes
        probabilities.
      seeds: How many.
      steps: Of training in float, and of what follows.
      batch: Samples in a step.
      built_in: Whether the built-in algorithms run beside.
      progress: Called with what is being done.

    Raises:
      InputError: An algorithm breaks the contract or fails in training; bad data, model or number.
    """
    started = time.perf_counter()
    for name, value, least in (("seeds", seeds, 1), ("steps", steps, 1), ("batch", batch, 1)):
        if type(value) is not int or value < least:
            raise InputError(f"bad {name}", expected=f"a whole number from {least}", got=repr(value))
    own = [entry(asked) for asked in algorithms]
    known = [Entry(label, entry(text).stages) for label, text in BUILT_IN.items()] if built_in else []
    entries = [Entry(FLOAT), *known, *own]
    labels = [e.label for e in entries]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise InputError("two algorithms have one name", where=", ".join(sorted(twice)), expected="each of them once")
    for asked in own:
        check(asked)
    sets = [data_set(source) for source in data]
    builds = {name: MODELS[name] if name in MODELS else find(name) for name in models}
    tell = progress or (lambda _: None)
    tables = []
    with tempfile.TemporaryDirectory(prefix="paring-") as folder:
        for number, found in enumerate(sets):
            for place, (name, build) in enumerate(builds.items()):
                work = Path(folder) / f"{number}-{place}"
                work.mkdir()
                tables.append(_table(found, name, build, entries, range(seeds), steps, batch, work, tell))
    notes = () if seeds >= 3 else ("with fewer than three seeds the spread says little",)
    seconds = time.perf_counter() - started
    return AlgorithmBench(keras.backend.backend(), steps, batch, seeds, tuple(tables), seconds, notes)


def _table(
    data: DataSet, name: str, build: Build, entries: Sequence[Entry], seeds: Sequence[int], steps: int, batch: int, work: Path,
    tell: Callable[[str], None],
) -> AlgorithmTable:  # fmt: skip
    members = [m for seed in seeds for m in _trained(data, name, build, entries, seed, steps, batch, tell)]
    tell(f"{data.name}, {name}: writing {len(members)} files")
    _write(members, work)
    with Worker(threads=1) as worker:
        results = {id(m): _judged(m, data, worker) for m in members}
    twins = {m.seed: m for m in members if not m.entry.stages}
    rows = []
    for asked in entries:
        mine = [m for m in members if m.entry is asked]
        runs = []
        for m in mine:
            found, twin = results[id(m)], results[id(twins[m.seed])]
            runs.append(AlgorithmRun(m.seed, change=100 * (found["score"] - twin["score"]), **found))
        rounds = [s / t for m in mine for s, t in zip(m.seconds, twins[m.seed].seconds, strict=True)]
        rows.append(summary(asked, runs, rounds, [note for m in mine for note in m.notes]))
    train, _, tested, _ = data.split(0)
    return AlgorithmTable(data.name, name, members[0].model.count_params(), (len(train), len(tested)), tuple(rows))


# -- training ----------------------------------------------------------------------------------------------------------


def _trained(
    data: DataSet, name: str, build: Build, entries: Sequence[Entry], seed: int, steps: int, batch: int,
    tell: Callable[[str], None],
) -> list[_Member]:  # fmt: skip
    """All algorithms with one seed, trained in turns."""
    images, classes, _, _ = data.split(seed)
    tell(f"{data.name}, {name}, seed {seed}: training in float")
    members: list[_Member] = []
    for asked in entries:
        model = _built(name, build, data, seed)
        if members:
            model.set_weights(members[0].model.get_weights())
        if asked.stages:
            with _blaming(asked):
                attach(model, asked.recipe, images[:CALIBRATION], steps_per_epoch=steps, epochs=1)
        schedule = keras.optimizers.schedules.CosineDecay(RATE, steps)
        # Without XLA: compiling takes longer than all steps of a small model.
        model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", jit_compile=False)
        if not members:  # the float twin
            for chosen in order(len(images), batch, steps, (seed, 0)):
                model.train_on_batch(images[chosen], classes[chosen])
            for variable in model.optimizer.variables:  # it begins again, as the others do
                variable.assign(np.zeros(variable.shape, variable.dtype))
        members.append(_Member(asked, seed, model))
    rounds = np.array_split(order(len(images), batch, steps, (seed, 1)), min(ROUNDS, steps))
    for number, chosen in enumerate(rounds):
        tell(f"{data.name}, {name}, seed {seed}: {len(entries)} models in turns, {number + 1} of {len(rounds)}")
        for place in range(len(members)):
            member = members[(number + place) % len(members)]
            begin = time.process_time()
            with _blaming(member.entry):
                for one in chosen:
                    member.model.train_on_batch(images[one], classes[one])
            if number:
                member.seconds.append(time.process_time() - begin)
    for member in members:
        if member.entry.stages:
            attachment_of(member.model).forget()
            member.notes += _unkept(member)
    return members


def _built(name: str, build: Build, data: DataSet, seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    made = build(data.images.shape[1:], data.count)
    if not isinstance(made, keras.Model) or not made.built or len(made.outputs or ()) != 1:
        raise InputError(
            "cannot train the model", where=name, expected="a built Keras model with one output", got=repr(made)[:100],
            todo="Write a function of (image shape, number of classes) that gives one",
        )  # fmt: skip
    if tuple(made.outputs[0].shape[1:]) != (data.count,):
        got = str(list(made.outputs[0].shape))
        raise InputError(
            "cannot train the model", where=name, expected=f"{data.count} probabilities per image", got=got
        )
    return made


@contextmanager
def _blaming(asked: Entry) -> Iterator[None]:
    """Around what an algorithm may break: errors say which one it was."""
    try:
        with warnings.catch_warnings():
            # Of weights that an algorithm trains something else in place of.
            warnings.filterwarnings("ignore", "Gradients do not exist")
            yield
    except Exception as error:
        if not asked.stages:
            raise
        got = str(error) if isinstance(error, ParingError) else f"{type(error).__name__}: {error}"
        todo = "paring.testing.check_algorithm tells more"
        raise InputError("the algorithm cannot be trained", where=asked.label, got=got, todo=todo) from error


def _unkept(member: _Member) -> list[str]:
    """What the algorithm promised and the trained weights do not hold."""
    found = []
    for compressed in attachment_of(member.model).compressed.values():
        for target in compressed.targets:
            weight = np.asarray(keras.ops.convert_to_numpy(target.matrix(training=False, step=None)), np.float32)
            where = target.context.name
            if not np.isfinite(weight).all():
                found.append(f"seed {member.seed}: the weights of {where} are not finite")
                continue
            whole = chain(*member.entry.stages)
            unmet = whole.unmet(weight, None, target.context)
            try:
                broken(whole.stages, unmet)
            except AssertionError as error:
                found.append(f"{where}: {error}")
    return found


# -- what comes out ----------------------------------------------------------------------------------------------------


def _write(members: Sequence[_Member], work: Path) -> None:
    """Writes the files of all members, with one start of the converter for all; those that cannot be written get a note."""
    jobs: list[tuple[_Member, Path, Path]] = []
    for number, m in enumerate(members):
        source, out = work / f"{number}", work / f"{number}-marked.tflite"
        try:
            if m.entry.stages:
                save_marked(attachment_of(m.model), source, work, static_batch=False)
            elif keras.backend.backend() == "tensorflow":
                keras_format.export_saved_model(m.model, source)
            else:
                source = source.with_suffix(".keras")
                m.model.save(source)
            jobs.append((m, source, out))
        except ParingError as error:
            m.notes.append(f"no file was written: {error}")
    outcomes = convert_all([(source, out) for _, source, out in jobs], work) if jobs else []
    for (m, source, out), outcome in zip(jobs, outcomes, strict=True):
        target = work / f"{source.stem}.tflite"
        try:
            if not m.entry.stages and outcome.error is None:
                target = out
            elif not m.entry.stages:  # a model with loops needs a fixed batch
                to_tflite(m.model, target)
            elif outcome.error is not None:  # likewise
                export(m.model, target, verified=False)
            else:
                from_marked(attachment_of(m.model), out, notes=outcome.notes, output=target, verified=False)
            m.file = target
        except ParingError as error:
            m.notes.append(f"no file was written: {error}")


def _judged(member: _Member, data: DataSet, worker: Worker) -> dict[str, Any]:
    """Score and sizes: of the file, or of the deployed form in Keras."""
    _, _, images, classes = data.split(member.seed)
    if member.file is None:
        said = np.asarray(member.model.predict(images, verbose=0))
        figures: dict[str, Any] = dict.fromkeys(("bytes", "zstd", "zeros", "distinct"))
    else:
        worker.load("model", member.file)
        said = np.concatenate([found[0] for found in worker.run_many("model", ([image[None]] for image in images))])
        worker.drop("model")
        figures = judged(member.file)
    return {"score": float((said.reshape(len(images), -1).argmax(-1) == classes).mean()), **figures}


__all__ = ["MODELS", "bench_algorithms", "cnn", "mlp"]
