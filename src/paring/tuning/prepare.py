"""What a search works on, made once: samples split and stored, statistics for every scheme, the float model's outputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from paring.calibrate import calibrate
from paring.compress.quantize import Quantize
from paring.data import Feed, feeds
from paring.errors import InputError, UnsupportedError
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.sink import sink
from paring.formats.tflite.view import view
from paring.graph import Graph, TensorId
from paring.measure.evaluate import Evaluation, evaluate
from paring.measure.metrics import Metric, find_metric
from paring.optimize import VERSION
from paring.plan import plan
from paring.recipe import Recipe, Rule
from paring.solve import requests
from paring.tuning import trial as trials
from paring.tuning.pool import Pool
from paring.tuning.schemes import choices
from paring.tuning.store import SampleFile, stored
from paring.tuning.trial import Outcome, Trial

MARK, JOURNAL = "of.txt", "journal.jsonl"
_OURS = re.compile(
    r"[0-9a-f]{32}\.tflite|float\.tflite|(calibration|measuring)\.samples(\.json|\.labels\.npy)?|(statistics|reference)\.npz"
    r"|of\.txt|journal\.jsonl|\..*\.part"
)
CALIBRATE, FEW = 256, 64  # samples: to calibrate on; so few in all that both parts use all of them


@dataclass
class Run:
    """What a search works on: all of it lies in `folder` too, for the trials."""

    model: TfliteModel
    graph: Graph
    folder: Path
    metric: Metric
    before: Evaluation
    layers: Mapping[str, Mapping[str, Quantize]]
    samples: tuple[int, int]
    notes: tuple[str, ...]
    pool: Pool | None = None
    report: Callable[[str, int, int], None] | None = None
    stage: tuple[str, int] = ("", 0)
    done: int = 0

    @classmethod
    def prepare(
        cls,
        model: TfliteModel,
        data: Any,
        folder: Path,
        metric: str | None,
        labels: Any,
        limit: int | None,
        image_range: Any,
        offered: Mapping[str, Quantize],
        skip: Sequence[str],
    ) -> Run:
        """Splits the samples, calibrates once for all schemes, runs the float model."""
        if len(model.root.signature_defs or ()) > 1:
            raise UnsupportedError("cannot tune a model with several signatures", where=model.path, expected="one")
        if metric is not None:
            find_metric(metric)
        model = sink(model)
        (given,) = feeds(model, data, labels=labels, image_range=image_range, limit=limit)
        _own(folder)
        model.save(folder / trials.FLOAT)
        counts, notes = _split(given, folder)
        _fresh(folder, {"skip": list(skip)})
        graph = view(model, fold_ranges=True)
        layers = choices(graph, offered, skip)
        if not layers:
            raise InputError("there is nothing to tune", where=model.path, got="no layer with weights to quantize")
        _calibrate(model, graph, folder, offered, skip)
        (feed,) = feeds(model, stored(folder / trials.MEASURING))
        before = evaluate(model, feed, None if metric is None else find_metric(metric), path=folder / trials.FLOAT)
        outputs: dict[str, Any] = dict(before.outputs)
        np.savez(folder / trials.REFERENCE, **outputs)
        return cls(model, graph, folder, before.metric, before, layers, counts, notes)

    def clean(self) -> None:
        """Removes what was kept, and the folder if nothing else is in it."""
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def try_all(self, stage: str, recipes: Sequence[Recipe], *, scored: bool) -> list[Outcome]:
        """The outcome of each recipe."""
        assert self.pool is not None
        self.stage, self.done = (stage, len(recipes)), 0
        return self.pool.run([self.trial(recipe, scored=scored) for recipe in recipes])

    def trial(self, recipe: Recipe, *, scored: bool) -> Trial:
        """A recipe as a trial."""
        name = self.metric.name if scored else ""
        return Trial(str(self.folder.absolute()), recipe.to_data(), name, self.model.path)

    def step(self) -> None:
        """Says that a trial is done."""
        self.done += 1
        if self.report is not None:
            self.report(self.stage[0], self.done, self.stage[1])


def _own(folder: Path) -> None:
    """Makes the folder; one that holds something else is not touched."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        other = [path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name)]
    except OSError as error:
        raise InputError("cannot keep measurements", where=str(folder), got=error.strerror or str(error)) from error
    if other:
        raise InputError(
            "cannot keep measurements", where=str(folder), expected="a folder of their own",
            got=f"one that holds {', '.join(sorted(other)[:3])}", todo="Name another with --work",
        )  # fmt: skip


def _split(given: Feed, folder: Path) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Writes the samples: every fourth to calibrate on, the others to measure on; few go to both."""
    reader = iter(given)
    head = list(islice(reader, FEW))
    if not head:
        raise InputError("cannot tune", expected="at least one sample", got="an empty data set")
    files = [SampleFile(folder / name, given.names) for name in (trials.CALIBRATION, trials.MEASURING)]
    few = len(head) < FEW
    for number, sample in enumerate(chain(head, reader)):
        calibrating = number % 4 == 0 and len(files[0].rows) < CALIBRATE
        for file in files if few else [files[0 if calibrating else 1]]:
            file.add(sample)
    labels, notes = given.samples.labels, tuple(given.samples.notes)
    if few:
        notes = (*notes, f"{len(head)} samples are few: the same ones were calibrated and measured on")
    elif labels is not None:
        labels = labels[_measured_rows(files[0].rows, files[1].rows)]
    files[0].finish(None)
    files[1].finish(labels)
    return (len(files[0].rows), len(files[1].rows)), notes


def _measured_rows(calibrating: Sequence[int], measuring: Sequence[int]) -> np.ndarray:
    """Which rows of the data went into the measuring part, bool [rows]."""
    found: list[np.ndarray] = []
    a, b = iter(calibrating), iter(measuring)
    for number in range(len(calibrating) + len(measuring)):
        mine = number % 4 == 0 and number // 4 < len(calibrating)
        found.append(np.full(next(a if mine else b), not mine))
    return np.concatenate(found)


def _fresh(folder: Path, more: Mapping[str, Any]) -> None:
    """Forgets measurements that were made of another model, other samples or by another version."""
    digest = hashlib.sha256(json.dumps({"version": VERSION, **more}, sort_keys=True).encode())
    for name in (trials.FLOAT, trials.CALIBRATION, trials.MEASURING, f"{trials.MEASURING}.labels.npy"):
        path = folder / name
        if path.exists():
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    mark = folder / MARK
    if not mark.exists() or mark.read_text(encoding="utf-8") != digest.hexdigest():
        (folder / JOURNAL).unlink(missing_ok=True)
        mark.write_text(digest.hexdigest(), encoding="utf-8")


def _calibrate(
    model: TfliteModel, graph: Graph, folder: Path, offered: Mapping[str, Quantize], skip: Sequence[str]
) -> None:
    """Statistics for every scheme on every layer, in one pass."""
    wanted: dict[TensorId, set[str]] = {}
    for settings in offered.values():
        made = plan(graph, Recipe((Rule(settings, kind="*"),), "all").restricted(skip))
        for tensor, parts in requests(made).items():
            wanted.setdefault(tensor, set()).update(parts)
    if wanted:
        found = calibrate(model, graph, wanted, feeds(model, stored(folder / trials.CALIBRATION)))
        found.save(folder / trials.STATISTICS)
