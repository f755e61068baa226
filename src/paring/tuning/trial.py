"""One measurement of the search, as something that another process can do: a recipe in, size and score out.

All that trials share lies in a folder, which every process must see: the float model, its outputs, samples, statistics.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paring.errors import MetricError, ParingError
from paring.measure.evaluate import score
from paring.measure.metrics import Metric, find_metric
from paring.tuning.journal import key_of
from paring.tuning.store import first, stored
from paring.tuning.subject import Subject, bytes_of, open_kept

MEASURING, REFERENCE = "measuring.samples", "reference.npz"
QUICK = 256  # samples of the sensitivity sweep
FLOOR, BROKEN = 1e-12, 1e12  # noise of float arithmetic, and of outputs that are not finite


@dataclass(frozen=True)
class Trial:
    """One recipe to try.

    Attributes:
      folder: What all trials of a run share.
      recipe: The recipe, as data.
      metric: Name of the metric; empty to measure only the output's noise, on fewer samples.
      name: The model's name, for messages.
      runtime: Of a SavedModel: `portable` or `native`.
    """

    folder: str
    recipe: Mapping[str, Any]
    metric: str = ""
    name: str = ""
    runtime: str = "portable"

    def request(self) -> dict[str, Any]:
        """What identifies it in a journal."""
        return {"recipe": self.recipe, "metric": self.metric}

    def file(self, suffix: str) -> Path:
        """Where the model of a scored trial is kept."""
        return Path(self.folder) / f"{key_of(self.request())}{suffix}"


@dataclass(frozen=True)
class Outcome:
    """What a trial measured.

    Attributes:
      bytes: Size of the file.
      noise: Power of the outputs' difference over their power, the mean over outputs.
      score: Of the metric; None without one.
      drop: How much worse than the float model, in the metric's unit.
      spread: Standard error of the drop; None where the metric has no value per sample.
      seconds: What it took.
      failed: Why there is no such model; the other numbers mean nothing then.
    """

    bytes: int = 0
    noise: float = 0.0
    score: float | None = None
    drop: float | None = None
    spread: float | None = None
    seconds: float = 0.0
    failed: str = ""


def run(trial: Trial) -> dict[str, Any]:
    """Makes the model and measures it -> an `Outcome` as data.

    Raises:
      MetricError: The user's metric failed: no other recipe would mend that.
    """
    started = time.perf_counter()
    folder = Path(trial.folder)
    subject = open_kept(folder, trial.name, trial.runtime)
    part = folder / f".{key_of(trial.request())}.{os.getpid()}{subject.suffix}"
    try:
        subject.make(folder, trial.recipe, part)
        metric = find_metric(trial.metric) if trial.metric else None
        outcome = _measured(part, subject, metric, folder, trial.name)
        if metric is not None and not outcome.failed:
            _remove(trial.file(subject.suffix))
            os.replace(part, trial.file(subject.suffix))
    except MetricError:
        raise
    except ParingError as error:
        outcome = Outcome(failed=str(error))
    finally:
        _remove(part)
    return {**asdict(outcome), "seconds": time.perf_counter() - started}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


_APART = "from paring.tuning.trial import main; main()"
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run_apart(trial: Trial) -> dict[str, Any]:
    """`run` in a process of its own, its arithmetic on one thread: several of them share the cores.

    Raises:
      MetricError: As `run` does.
      RuntimeError: The process died.
    """
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, **dict.fromkeys(_THREADS, "1")}
    done = subprocess.run(
        [sys.executable, "-c", _APART], input=json.dumps(asdict(trial)), capture_output=True, text=True, env=environment
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"the process of a trial ended ({last[0]})") from None
    if "metric_failed" in found:
        raise MetricError(found["metric_failed"], detail=found["detail"])
    return found


def main() -> None:
    """One trial from standard input, its outcome to standard output, both as JSON."""
    trial = Trial(**json.loads(sys.stdin.read()))
    out, sys.stdout = sys.stdout, sys.stderr  # what the user's metric prints is no answer
    try:
        found = run(trial)
    except MetricError as error:
        found = {"metric_failed": str(error), "detail": error.detail}
    print(json.dumps(found), file=out)


def _measured(file: Path, subject: Subject, metric: Metric | None, folder: Path, name: str) -> Outcome:
    samples, count = folder / MEASURING, None if metric else QUICK
    with np.load(folder / REFERENCE, allow_pickle=False) as kept:
        reference = {output: first(kept[output], samples, count) for output in kept.files}
    feed = subject.feed(stored(samples, count))
    found = subject.evaluate(file, feed, metric or find_metric("mse"), reference)
    size, noise = bytes_of(file), _noise(found.outputs, reference)
    if metric is None:
        return Outcome(size, noise)
    lost, spread = score(reference, feed.samples.labels, metric, name=name).drop(found)
    if not np.isfinite(lost):
        return Outcome(failed=f"{metric.name} gives {found.score} for {name}")
    return Outcome(size, noise, found.score, lost, spread)


def _noise(outputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    found = []
    for name, before in reference.items():
        power = float(np.square(before, dtype=np.float64).sum())
        with np.errstate(all="ignore"):
            lost = float(np.square(np.asarray(outputs[name], np.float64) - before).sum())
        found.append(lost / max(power, float(np.finfo(np.float32).tiny)))
    mean = float(np.mean(found)) if found else 0.0
    return min(max(mean, FLOOR), BROKEN) if np.isfinite(mean) else BROKEN
