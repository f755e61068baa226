"""What a search works on, made once: samples split and stored, statistics for every scheme, the float model's outputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from paring.compress.quantize import Quantize
from paring.data import Feed
from paring.errors import InputError
from paring.measure.evaluate import Evaluation
from paring.measure.metrics import Metric, find_metric
from paring.outcome import VERSION
from paring.recipe import Recipe
from paring.tuning import trial as trials
from paring.tuning.pool import Pool
from paring.tuning.store import SampleFile, stored
from paring.tuning.subject import CALIBRATION, Subject
from paring.tuning.trial import Outcome, Trial

MARK, JOURNAL = "of.txt", "journal.jsonl"  # what the measurements are of, and they themselves
_OURS = re.compile(
    r"[0-9a-f]{32}(\.tflite)?|float(\.tflite)?|(calibration|measuring)\.samples(\.json|\.labels\.npy)?|(statistics|reference)\.npz"
    r"|of\.txt|journal\.jsonl|\..*\.part|\.[0-9a-f]{32}\..*"
)
CALIBRATE, FEW = 256, 64  # samples: to calibrate on; so few in all that both parts use all of them


@dataclass
class Run:
    """What a search works on: all of it lies in `folder` too, for the trials."""

    subject: Subject
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
        subject: Subject,
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
        if metric is not None:
            find_metric(metric)
        given = subject.feed(data, labels=labels, image_range=image_range, limit=limit)
        subject.save(folder)
        counts, notes = _split(given, folder)
        layers = subject.layers(offered, skip)
        if not layers:
            raise InputError("there is nothing to tune", where=subject.path, got="no layer with weights to quantize")
        subject.calibrate(folder, offered, skip)
        feed = subject.feed(stored(folder / trials.MEASURING))
        before = subject.evaluate(folder / subject.kept, feed, None if metric is None else find_metric(metric))
        if not np.isfinite(before.score):
            got = str(before.score)
            raise InputError("cannot tune", where=subject.path, expected=f"a number from {before.metric.name}", got=got)
        # The score stands for the metric: a function that was changed since gives another one.
        more = {} if subject.suffix else {"offered": {name: str(settings) for name, settings in offered.items()}}
        _fresh(folder, subject.kept, {"skip": list(skip), "score": f"{before.score:.6g}", **more})
        outputs: dict[str, Any] = dict(before.outputs)
        np.savez(folder / trials.REFERENCE, **outputs)
        return cls(subject, folder, before.metric, before, layers, counts, notes)

    def try_all(self, stage: str, recipes: Sequence[Recipe], *, scored: bool) -> list[Outcome]:
        """The outcome of each recipe."""
        assert self.pool is not None
        self.stage, self.done = (stage, len(recipes)), 0
        return self.pool.run([self.trial(recipe, scored=scored) for recipe in recipes])

    def trial(self, recipe: Recipe, *, scored: bool) -> Trial:
        """A recipe as a trial."""
        name = self.metric.name if scored else ""
        runtime = getattr(self.subject, "runtime", "portable")
        return Trial(str(self.folder.absolute()), recipe.to_data(), name, self.subject.path, runtime)

    def step(self) -> None:
        """Says that a trial is done."""
        self.done += 1
        if self.report is not None:
            self.report(self.stage[0], self.done, self.stage[1])


def clean(folder: Path) -> None:
    """Removes what a search kept, and the folder if nothing else is in it."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)
        elif _OURS.fullmatch(path.name):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def claim(folder: Path) -> None:
    """Makes the folder of a search, or takes over that of one which was interrupted.

    Raises:
      InputError: It cannot be written, or holds something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / MARK).exists():
            raise InputError(
                "cannot keep measurements", where=str(folder), expected="a new folder, or that of an interrupted search",
                got="a folder with other files in it", todo="Name another with --work",
            )  # fmt: skip
        (folder / MARK).touch()
    except OSError as error:
        raise InputError("cannot keep measurements", where=str(folder), got=error.strerror or str(error)) from error


def _split(given: Feed, folder: Path) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Writes the samples: every fourth to calibrate on, the others to measure on; few go to both."""
    reader = iter(given)
    head = list(islice(reader, FEW))
    if not head:
        raise InputError("cannot tune", expected="at least one sample", got="an empty data set")
    few, rows, measured = len(head) < FEW, list[int](), list[bool]()
    with contextlib.ExitStack() as stack:
        names = (CALIBRATION, trials.MEASURING)
        files = [stack.enter_context(contextlib.closing(SampleFile(folder / name, given.names))) for name in names]
        for number, sample in enumerate(chain(head, reader)):
            measured.append(few or number % 4 != 0 or len(files[0].rows) >= CALIBRATE)
            for file in files if few else [files[measured[-1]]]:
                file.add(sample)
            rows.append(file.rows[-1])
        labels, notes = given.samples.labels, tuple(given.samples.notes)
        if labels is not None:
            chosen = np.repeat(measured, rows) if len(labels) == sum(rows) else np.array(measured)
            if len(labels) != len(chosen):
                expected = f"{len(rows)} labels, one per sample" + (
                    f", or {sum(rows)}" if sum(rows) > len(rows) else ""
                )
                raise InputError(
                    "labels do not match", where=given.samples.source, expected=expected, got=str(len(labels))
                )
            labels = labels[chosen]
        if few:
            notes = (*notes, f"{len(head)} samples are few: the same ones were calibrated and measured on")
        files[0].finish(None)
        files[1].finish(labels)
    return (len(files[0].rows), len(files[1].rows)), notes


def _fresh(folder: Path, kept: str, more: Mapping[str, Any]) -> None:
    """Forgets measurements that were made of another model, other samples or by another version."""
    digest = hashlib.sha256(json.dumps({"version": VERSION, **more}, sort_keys=True).encode())
    names = (kept, CALIBRATION, trials.MEASURING, f"{trials.MEASURING}.labels.npy")
    for path in (folder / name for name in names):
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for part in (file for file in files if file.exists()):
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    mark = folder / MARK
    if mark.read_text(encoding="utf-8") != digest.hexdigest():
        (folder / JOURNAL).unlink(missing_ok=True)
        mark.write_text(digest.hexdigest(), encoding="utf-8")
