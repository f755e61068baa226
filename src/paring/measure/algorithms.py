"""What `paring bench-algorithms` compares and on what: entries, data sets, the order of samples, figures over seeds.

Framework-free; `paring.training.bench` trains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from paring.compress import Algorithm, Chain
from paring.demo import LEVELS, data_path
from paring.errors import InputError
from paring.formats import load
from paring.measure.result import AlgorithmRow, AlgorithmRun
from paring.measure.sizes import zstd_bytes
from paring.recipe import STAGES, Recipe, Rule, stage_name
from paring.testing import check_algorithm

FLOAT = "float"
DIGITS = "digits"
FOLDS = 3  # of the digits: with three seeds every image is tested on once
_GRADUAL = "schedule: polynomial, end: 0.5, unit: fraction, every: 10"
_INT8 = "quantize{weights: int8, activations: int8}"
BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "sparsify 80 %": f"sparsify{{sparsity: 0.8, {_GRADUAL}}}",
        "cluster 16": "cluster{clusters: 16}",
        "low rank 8": "low_rank{rank: 8}",
        "int8": _INT8,
        "sparsify 50 % + cluster 16 + int8": (
            f"sparsify{{sparsity: 0.5, {_GRADUAL}}}+cluster{{clusters: 16, start: 0.5, unit: fraction}}+{_INT8}"
        ),
    }
)
"""What every run has beside the user's: how it is called, and how `--algorithm` would say it."""
_KEYS = ("x_train", "y_train", "x_test", "y_test")
_BETWEEN = re.compile(r"\+(?![^{]*\})")  # no plus inside of braces
_ENTRY = re.compile(r"\s*([^\s{}]+?)\s*(\{.*\})?\s*", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """An algorithm to compare.

    Attributes:
      label: How it was asked for.
      stages: One or a chain; none for the float twin.
    """

    label: str
    stages: tuple[Algorithm, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """Every layer with weights gets it."""
        return Recipe((Rule(stages=self.stages),), name=self.label)

    @property
    def apply(self) -> tuple[dict[str, Any], ...]:
        """The stages, as a recipe says them."""
        return tuple({stage_name(stage): stage.settings()} for stage in self.stages)


def entry(asked: str | Algorithm) -> Entry:
    """An entry, from text or from an algorithm with its settings.

    Args:
      asked: `name{settings}`, several joined by `+` for a chain; a name is a stage of recipes or `module:Class`.

    Raises:
      InputError: There is no such class, it is no algorithm, or its settings are wrong.

    >>> entry("cluster{clusters: 8}+quantize").stages[0].clusters
    8
    """
    if isinstance(asked, Algorithm):
        stages = asked.stages if isinstance(asked, Chain) else (asked,)
        made = Entry("", stages)
        said = (
            "".join(f"{name}{json.dumps(own) if own else ''}") for stage in made.apply for name, own in stage.items()
        )
        return Entry("+".join(said).replace('"', ""), stages)
    if not isinstance(asked, str):
        expected = "text, or an algorithm with its settings"
        raise InputError("cannot compare", expected=expected, got=repr(asked))
    stages_text = []
    for part in _BETWEEN.split(asked):
        found = _ENTRY.fullmatch(part)
        if found is None:
            raise InputError(
                "cannot read the algorithm", where=asked, expected="name{settings}, several joined by +", got=repr(part),
                todo="Quote it for the shell: --algorithm 'module:Class{rate: 0.5}'",
            )  # fmt: skip
        stages_text.append(f"{{{json.dumps(found[1])}: {found[2] or '{}'}}}")
    text = f"version: 1\nrules: [{{kind: '*', apply: [{', '.join(stages_text)}]}}]"
    return Entry(asked.strip(), Recipe.parse(text, f"algorithm {asked.strip()}").rules[0].stages)


def check(asked: Entry) -> None:
    """Raises InputError where a stage that is not built in breaks the contract, as far as NumPy can tell."""
    for stage in asked.stages:
        if type(stage) in STAGES.values():
            continue
        if type(stage).project is Algorithm.project:
            raise InputError(
                "cannot train with this algorithm", where=asked.label, expected=f"a `project` method of {type(stage).__name__}",
                todo="docs/your-own-algorithm.md shows one",
            )  # fmt: skip
        found = check_algorithm(stage, backends=(), raises=False)
        if not found.ok:
            first = found.failures[0]
            error = InputError(
                "the algorithm breaks the contract", where=f"{asked.label}, {first.check}", got=first.detail,
                todo="paring.testing.check_algorithm shows all that is checked",
            )  # fmt: skip
            error.detail = f"{found}\n"
            raise error


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """Labelled images.

    Attributes:
      name: For reports.
      images: float32 [samples, height, width, channels].
      classes: int64 [samples].
      tested: The same two for testing; None: every third sample is tested on, which third follows from the seed.
    """

    name: str
    images: np.ndarray
    classes: np.ndarray
    tested: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def count(self) -> int:
        """How many classes there are."""
        return int(max(found.max() for found in (self.classes, *(self.tested or ())[1:]))) + 1

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Images and classes to train on, images and classes to test on."""
        if self.tested is not None:
            return self.images, self.classes, *self.tested
        held = np.arange(len(self.images)) % FOLDS == seed % FOLDS
        return self.images[~held], self.classes[~held], self.images[held], self.classes[held]


def data_set(source: str) -> DataSet:
    """The embedded digits, or a `.npz` file.

    Args:
      source: `digits`, or a file with `x_train`, `y_train`, `x_test`, `y_test`: images [samples, height, width] or with
        channels, and one class per image. Integers are divided by their type's largest value, floats taken as they are.

    Raises:
      InputError: The file cannot be read or holds something else.

    >>> [part.shape for part in data_set("digits").split(0)]
    [(399, 8, 8, 1), (399,), (200, 8, 8, 1), (200,)]
    """
    if source == DIGITS:
        with np.load(data_path(), allow_pickle=False) as found:
            images = found["images"][..., None].astype(np.float32) / np.float32(LEVELS)
            return DataSet(DIGITS, images, found["labels"].astype(np.int64))
    try:
        with np.load(source, allow_pickle=False) as file:
            absent = [key for key in _KEYS if key not in file]
            if absent:
                raise InputError(
                    "cannot take the data", where=source, expected=", ".join(_KEYS), got=", ".join(file.files) or "nothing"
                )  # fmt: skip
            x_train, y_train, x_test, y_test = (file[key] for key in _KEYS)
    except (OSError, ValueError, AttributeError, EOFError) as error:  # np.load gives an array for .npy files
        raise InputError("cannot read the data", where=source, expected="a .npz file", got=str(error)) from error
    train = _part(source, "train", x_train, y_train)
    tested = _part(source, "test", x_test, y_test)
    if train[0].shape[1:] != tested[0].shape[1:]:
        expected = f"{'x'.join(map(str, train[0].shape[1:]))} as in x_train"
        got = "x".join(map(str, tested[0].shape[1:]))
        raise InputError("cannot take the data", where=f"x_test of {source}", expected=expected, got=got)
    return DataSet(Path(source).stem, *train, tested)


def _part(source: str, name: str, images: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    where = f"x_{name} of {source}"
    if images.ndim not in (3, 4) or not len(images) or images.dtype.kind not in "uif":
        got = f"{images.dtype} {list(images.shape)}"
        raise InputError(
            "cannot take the data", where=where, expected="images [samples, height, width(, channels)]", got=got
        )
    classes = classes.reshape(-1) if classes.ndim == 2 and classes.shape[1] == 1 else classes
    if classes.shape != (len(images),) or classes.dtype.kind not in "ui" or classes.min() < 0:
        got = f"{classes.dtype} {list(classes.shape)}"
        expected = f"{len(images)} classes, whole numbers from 0"
        raise InputError("cannot take the data", where=f"y_{name} of {source}", expected=expected, got=got)
    top = np.float32(np.iinfo(images.dtype).max) if images.dtype.kind in "ui" else np.float32(1)
    values = (images if images.ndim == 4 else images[..., None]).astype(np.float32) / top
    if not np.isfinite(values).all():
        raise InputError("cannot take the data", where=where, expected="finite values", got="infinity or not-a-number")
    return values, classes.astype(np.int64)


def order(count: int, batch: int, steps: int, seed: tuple[int, ...]) -> np.ndarray:
    """Which samples each step sees: every one once before any a second time.

    Returns:
      int64 [steps, batch].

    >>> sorted(order(6, 2, 3, (0, 0)).reshape(-1).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(count) for _ in range(-(-steps * batch // count))]
    return np.concatenate(rounds)[: steps * batch].reshape(steps, batch)


# -- figures -----------------------------------------------------------------------------------------------------------


def judged(path: Path) -> dict[str, Any]:
    """Of a written file: bytes, bytes after zstd, share of zeros, and most different values in a channel of a weight."""
    graph = load(path).graph
    zeros = total = distinct = 0
    for op in graph.ops:
        for use, tensor in graph.weights_of(op):
            if tensor.weight is None:
                continue
            values = tensor.weight.read()
            lead = np.moveaxis(values, use.axis, 0) if use.axis is not None else values[None]
            rows = lead.reshape(len(lead), -1)
            if rows.shape[1] == 1:  # one factor per channel: a normalization that was not folded
                continue
            zeros, total = zeros + int((rows == 0).sum()), total + rows.size
            distinct = max(distinct, *(len(np.unique(row)) for row in rows))
    return {
        "bytes": path.stat().st_size,
        "zstd": zstd_bytes(path),
        "zeros": zeros / total if total else 0.0,
        "distinct": distinct,
    }


def summary(asked: Entry, runs: Sequence[AlgorithmRun], steps: Sequence[float], notes: Sequence[str]) -> AlgorithmRow:
    """One row from the runs of all seeds.

    Args:
      asked: What ran.
      runs: One per seed.
      steps: Processor time over the float twin's, of every round.
      notes: What to know; each is said once.
    """
    low, middle, high = np.percentile(steps, (25, 50, 75)).tolist() if len(steps) else (None, None, None)
    scores, changes = [run.score for run in runs], [run.change for run in runs]
    return AlgorithmRow(
        label=asked.label,
        apply=asked.apply,
        score=float(np.mean(scores)),
        score_sd=_deviation(scores),
        change=float(np.mean(changes)),
        change_sd=_deviation(changes),
        bytes=_mean([run.bytes for run in runs]),
        zstd=_mean([run.zstd for run in runs]),
        zeros=min((run.zeros for run in runs if run.zeros is not None), default=None),
        distinct=max((run.distinct for run in runs if run.distinct is not None), default=None),
        step=middle,
        step_low=low,
        step_high=high,
        runs=tuple(runs),
        notes=tuple(dict.fromkeys(notes)),
    )


def _mean(sizes: Sequence[int | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return float(np.mean(known)) if len(known) == len(sizes) else None


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


__all__ = [
    "BUILT_IN",
    "DIGITS",
    "FLOAT",
    "DataSet",
    "Entry",
    "check",
    "data_set",
    "entry",
    "judged",
    "order",
    "summary",
]
