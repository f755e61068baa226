"""Runs what was written: each operator against its own arithmetic on every path users have, all against the source."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from paring.calibrate import limits
from paring.data import Feed
from paring.errors import UnsupportedError
from paring.findings import Finding, fit, made_up, measure, real
from paring.formats.tflite.extract import extract
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.program import bodies, build
from paring.formats.tflite.twin import Probe, instrument
from paring.piecewise import LARGE, pieces
from paring.runtime import RunError, Worker

PATHS = ("xnnpack", "builtin")
PATH_NAMES = {"xnnpack": "XNNPACK (default)", "builtin": "builtin kernels"}
SAMPLES, SEED = 4, 0


@dataclass
class Verification:
    """What running the written model showed.

    Attributes:
      findings: By path, one for each quantized operator.
      failed: By path, why it cannot run the output though it runs the input.
      skipped: By path, why nothing could be verified there.
      refused: By path, why it does not run the source.
      difference: By output name (with several signatures, behind theirs), the relative difference of the whole model:
        |optimized - source| / |source| (Frobenius).
      agreement: By output name, the share of samples with the same largest value (outputs of two or more classes).
      nan: Names of outputs with not-a-number values where the source has none.
      samples: Samples the whole models were compared on.
      given: False where the samples were made up.
      notes: What was verified on made-up values, or not at all, and why.
    """

    findings: dict[str, list[Finding]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    difference: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    nan: list[str] = field(default_factory=list)
    samples: int = 0
    given: bool = True
    notes: list[str] = field(default_factory=list)

    def wrong(self, path: str) -> list[Finding]:
        """The operators that a path computes wrongly."""
        return [f for f in self.findings.get(path, []) if not f.right]

    @property
    def unusable(self) -> bool:
        """True where no path that ran the source runs the output rightly."""
        tried = [p for p in PATHS if p in self.findings or p in self.failed]
        return bool(tried) and all(p in self.failed or self.wrong(p) for p in tried)


def verify(
    source: TfliteModel,
    written: TfliteModel,
    feeds: Sequence[Feed],
    *,
    compare: int = 32,
    written_path: Path | None = None,
) -> Verification:
    """Verifies a written model.

    Args:
      source: The model it was made from.
      written: The model as read back from its file.
      feeds: Samples for the source's entries.
      compare: At most so many samples for the comparison of the whole.
      written_path: The file, where there is one already.
    """
    result = Verification(given=all(f.given for f in feeds))
    with tempfile.TemporaryDirectory(prefix="paring-") as folder:
        paths = {"source": Path(source.path), "written": written_path or Path(folder) / "written.tflite"}
        if not paths["source"].is_file() or source.folder is not None:
            paths["source"] = Path(folder) / "source.tflite"
            source.save(paths["source"])
        if written_path is None:
            written.save(paths["written"])
        large = len(written.data) > LARGE
        if large:
            for path in PATHS:
                _pieces(written, path, Path(folder), result)
            result.notes.append("a large model: its operators were verified one by one, the whole was not run")
        else:
            for path in PATHS:
                _path(source, written, feeds, path, paths, Path(folder), compare, result)
    result.notes = list(dict.fromkeys(result.notes))
    return result


def alike(one: TfliteModel, other: TfliteModel, feeds: Sequence[Feed], *, compare: int = 4) -> dict[str, float | str]:
    """By path that runs `one`, the largest relative difference of the outputs of `other`, or why it does not run."""
    found: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory(prefix="paring-") as folder:
        paths = {"source": Path(folder) / "source.tflite", "written": Path(folder) / "written.tflite"}
        one.save(paths["source"])
        other.save(paths["written"])
        for path in PATHS:
            result = Verification()
            _path(one, other, feeds, path, paths, Path(folder), compare, result)
            if path in result.failed:
                found[path] = result.failed[path]
            elif path not in result.skipped:
                found[path] = float("nan") if result.nan else max(result.difference.values(), default=0.0)
    return found


def _pieces(written: TfliteModel, path: str, folder: Path, result: Verification) -> None:
    """Every quantized operator alone, so that memory stays bounded by one of them."""
    worst: dict[str, Finding] = {}
    file = folder / "piece.tflite"
    try:
        for piece, probes, sample in pieces(written, file):
            with Worker(limits(piece, sample=sample)) as worker:
                worker.load("piece", file, kernels=path)
                outputs = worker.run("piece", sample)
            for probe in probes:
                finding = measure(probe, outputs)
                if probe.name not in worst or finding.quanta > worst[probe.name].quanta:
                    worst[probe.name] = finding
    except RunError as error:
        result.failed[path] = str(error)
        return
    result.findings[path] = list(worst.values())


def _path(
    source: TfliteModel,
    written: TfliteModel,
    feeds: Sequence[Feed],
    path: str,
    paths: Mapping[str, Path],
    folder: Path,
    compare: int,
    result: Verification,
) -> None:
    """Every quantized operator of every entry and of the bodies it runs, then, on the first right path, the whole.

    One child process does it all: its start is most of the cost of verifying a small model.
    """
    worst: dict[tuple[int, str], Finding] = {}
    whole = not result.findings
    for feed in feeds:
        samples = feed.head(SAMPLES)
        if not samples:
            result.skipped[path] = f"no sample for {feed.signature or 'the model'}"
            return
        numbers = [feed.subgraph, *sorted(bodies(written, feed.subgraph) - {number for number, _ in worst})]
        twins = {number: _twin(written, number, folder) for number in numbers}
        twins = {number: twin for number, twin in twins.items() if twin[1] or number == feed.subgraph}
        models = [written, *([written] if len(twins) > 1 else []), *(model for model, _ in twins.values())]
        bounds = limits(source, *models, sample=samples[0])
        with Worker(bounds) as worker:
            try:
                _load(worker, "source", paths, feed, path)
                worker.run("source", samples[0])
            except RunError as error:
                result.refused[path] = str(error)
                result.skipped[path] = f"it cannot run the source either: {error}"
                return
            try:
                if len(twins) > 1:  # a loop that ends may be followed step by step, which takes longer
                    worker.allow(10 * bounds.seconds)
                _load(worker, "written", paths, feed, path)
                for number in twins:
                    worker.load(f"twin{number}", folder / f"twin{number}.tflite", kernels=path, stream=True)
                for number, inputs in _calls(worker, written, feed, samples, list(twins)[1:], path, folder, result):
                    outputs = worker.run(f"twin{number}", inputs)
                    for probe in twins[number][1]:
                        finding, key = measure(probe, outputs), (number, probe.name)
                        if key not in worst or finding.quanta > worst[key].quanta:
                            worst[key] = finding
                if whole:
                    for name in ("source", "written"):  # anew: what they remember of samples has to be the same
                        _load(worker, name, paths, feed, path)
                    prefix = f"{feed.signature}/" if len(feeds) > 1 else ""
                    for name in ("source", "written"):  # anew: variables still hold what the runs before left in them
                        _load(worker, name, paths, feed, path)
                    _whole(worker, source, written, feed, prefix, compare, result)
            except RunError as error:
                result.failed[path] = str(error)
                return
    result.findings[path] = list(worst.values())


def _load(worker: Worker, name: str, paths: Mapping[str, Path], feed: Feed, kernels: str) -> None:
    """Loads an entry of a file: its first subgraph as it is, another by its signature."""
    worker.load(name, paths[name], kernels=kernels)
    if feed.subgraph:
        worker.enter(name, name, feed.signature, feed.names, feed.outputs)


def _twin(written: TfliteModel, number: int, folder: Path) -> tuple[TfliteModel, list[Probe]]:
    """A subgraph as a model of its own, instrumented and saved."""
    model, probes = instrument(written, number)
    if number:
        model = extract(model, None, [(number, int(i)) for i in model.subgraphs[number].outputs])
    model.save(folder / f"twin{number}.tflite")
    return model, probes


def _calls(
    worker: Worker,
    written: TfliteModel,
    feed: Feed,
    samples: Sequence[list[np.ndarray]],
    inside: list[int],
    path: str,
    folder: Path,
    result: Verification,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """What the entry and the bodies `inside` read: of each body its first and its last call on each sample."""
    why, followed = "no sample reaches it", bool(inside)
    if inside:
        try:
            worker.load_program("program", build(written, feed.subgraph, (), inside, folder), kernels=path)
        except UnsupportedError as error:
            why, followed = str(error), False
    seen = set()
    for sample in samples:
        fitted = fit(sample, written, feed.subgraph)
        worker.run("written", fitted)
        yield feed.subgraph, fitted
        for number, calls in (worker.capture("program", fitted, inside) if followed else {}).items():
            seen |= {number} if calls else set()
            yield from ((number, call) for call in calls)
    for number in (n for n in inside if n not in seen):
        name, invented = written.subgraphs[number].name or f"subgraph {number}", made_up(written, number, SEED)
        how = "its operators were verified on made-up values" if invented else "its operators were not verified"
        result.notes.append(f"{name}: {how}, because {why}")
        if invented:
            yield number, invented


def _whole(
    worker: Worker,
    source: TfliteModel,
    written: TfliteModel,
    feed: Feed,
    prefix: str,
    compare: int,
    result: Verification,
) -> None:
    """The difference of an entry's outputs, between the loaded `source` and `written`."""
    number, names = feed.subgraph, [prefix + name for name in feed.outputs]
    sums = np.zeros((len(names), 2))
    same = np.zeros(len(names))
    classes = np.zeros(len(names), bool)
    count = 0
    for sample in feed.head(compare):
        a = worker.run("source", sample)
        b = worker.run("written", fit(sample, written, number))
        count += 1
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            x, y = real(left, source, number, i), real(right, written, number, i)
            if x.shape != y.shape or x.dtype.kind != "f":
                continue
            if np.isnan(y).any() and not np.isnan(x).any() and names[i] not in result.nan:
                result.nan.append(names[i])
            with np.errstate(invalid="ignore"):  # infinite in both: the difference is not-a-number, and says so
                sums[i] += [np.square(y - x).sum(), np.square(x).sum()]
            classes[i] = x.ndim == 2 and x.shape[0] == 1 and x.shape[1] > 1
            same[i] += bool(classes[i]) and int(x.argmax()) == int(y.argmax())
    result.samples += count
    for i, name in enumerate(names):
        result.difference[name] = float(np.sqrt(sums[i, 0] / sums[i, 1])) if sums[i, 1] else float(np.sqrt(sums[i, 0]))
        if classes[i] and count:
            result.agreement[name] = float(same[i] / count)
