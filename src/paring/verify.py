"""Runs what was written: each operator against its own arithmetic on every path users have, and the whole against the source."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from paring.calibrate import limits
from paring.data import Feed
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.twin import Probe, instrument
from paring.runtime import RunError, Worker

PATHS = ("xnnpack", "builtin")
PATH_NAMES = {"xnnpack": "XNNPACK (default)", "builtin": "builtin kernels"}
SAMPLES = 4


@dataclass
class Finding:
    """One operator on one path: by how much it differs from its arithmetic.

    Attributes:
      quanta: Largest difference in units of the allowed quantum (output quanta; for dynamic operators the share of the
        bound that run-time quantization may use).
      allowed: The bound, in the same units.
    """

    name: str
    native: str
    quanta: float
    allowed: float

    @property
    def right(self) -> bool:
        """Within the bound."""
        return self.quanta <= self.allowed


@dataclass
class Verification:
    """What running the written model showed.

    Attributes:
      findings: By path, one for each quantized operator.
      failed: By path, why it cannot run the output though it runs the input.
      skipped: By path, why nothing could be verified there.
      difference: By output name, the relative difference of the whole model: |optimized - source| / |source| (Frobenius).
      agreement: By output name, the share of samples with the same largest value (outputs of two or more classes).
      nan: Names of outputs with not-a-number values where the source has none.
      samples: Samples the whole models were compared on.
      given: False where the samples were made up.
    """

    findings: dict[str, list[Finding]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    difference: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    nan: list[str] = field(default_factory=list)
    samples: int = 0
    given: bool = True

    def wrong(self, path: str) -> list[Finding]:
        """The operators that a path computes wrongly."""
        return [f for f in self.findings.get(path, []) if not f.right]

    @property
    def unusable(self) -> bool:
        """True where no path that ran the source runs the output rightly."""
        tried = [p for p in PATHS if p in self.findings or p in self.failed]
        return bool(tried) and all(p in self.failed or self.wrong(p) for p in tried)


def verify(
    source: TfliteModel, written: TfliteModel, feeds: Sequence[Feed], *, compare: int = 32, written_path: Path | None = None
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
        for path in PATHS:
            _operators(source, written, feeds, path, paths, Path(folder), result)
        _whole(source, feeds, paths, compare, result)
    return result


def _operators(
    source: TfliteModel,
    written: TfliteModel,
    feeds: Sequence[Feed],
    path: str,
    paths: dict[str, Path],
    folder: Path,
    result: Verification,
) -> None:
    feed = feeds[0]
    samples = feed.head(SAMPLES)
    if not samples or feed.subgraph != 0:
        result.skipped[path] = "no sample for the model's first subgraph"
        return
    try:
        with Worker(limits(source)) as worker:
            worker.load("source", paths["source"], kernels=path)
            worker.run("source", samples[0])
    except RunError as error:
        result.skipped[path] = f"it cannot run the source either: {error}"
        return
    model, probes = instrument(written)
    model.save(folder / "twin.tflite")
    worst: dict[str, Finding] = {}
    try:
        with Worker(limits(model)) as worker:
            worker.load("written", paths["written"], kernels=path)
            worker.load("twin", folder / "twin.tflite", kernels=path)
            for sample in samples:
                fitted = _fit(sample, written)
                worker.run("written", fitted)
                outputs = worker.run("twin", fitted)
                for probe in probes:
                    finding = _measure(probe, outputs)
                    if probe.name not in worst or finding.quanta > worst[probe.name].quanta:
                        worst[probe.name] = finding
    except RunError as error:
        result.failed[path] = str(error)
        return
    result.findings[path] = list(worst.values())


def _measure(probe: Probe, outputs: list[np.ndarray]) -> Finding:
    got, twin = outputs[probe.place], outputs[probe.place + 1]
    if probe.grid is not None:
        scale, zero = float(probe.grid.scale[0]), int(probe.grid.zero_point[0])
        info = np.iinfo(got.dtype)
        wanted = np.clip(np.rint(twin.astype(np.float64) / scale) + zero, info.min, info.max)
        worst = np.abs(got.astype(np.int64) - wanted).max(initial=0)
        return Finding(probe.name, probe.native, float(worst), float(probe.quanta))
    error = np.abs(got.astype(np.float64) - twin)
    slack = 1e-4 * float(np.abs(twin).max(initial=0)) + 1e-6
    if probe.reach is None or probe.source < 0:
        return Finding(probe.name, probe.native, float(error.max(initial=0) / slack), 1.0)
    values = outputs[probe.source]
    quantum = (max(float(values.max(initial=0)), 0.0) - min(float(values.min(initial=0)), 0.0)) / 255
    bound = quantum * probe.reach.astype(np.float64) + slack
    if bound.size > 1 and (not got.ndim or got.shape[-1] != bound.size):
        bound = bound.max()
    return Finding(probe.name, probe.native, float((error / bound).max(initial=0)), 1.0)


def _fit(sample: list[np.ndarray], model: TfliteModel) -> list[np.ndarray]:
    """The source's sample in the types of the written model's inputs."""
    from paring.formats.tflite.constants import quantization_of, type_name

    graph = model.subgraphs[0]
    fitted = []
    for value, index in zip(sample, (int(i) for i in graph.inputs), strict=True):
        tensor = graph.tensors[index]
        grid = quantization_of(model, graph, tensor)
        dtype = type_name(tensor)
        if value.dtype == np.float32 and dtype != "float32" and grid is not None:
            info = np.iinfo(dtype)
            codes = np.rint(value.astype(np.float64) / float(grid.scale[0])) + int(grid.zero_point[0])
            value = np.clip(codes, info.min, info.max).astype(dtype)
        fitted.append(value)
    return fitted


def _real(value: np.ndarray, model: TfliteModel, position: int) -> np.ndarray:
    from paring.formats.tflite.constants import quantization_of

    graph = model.subgraphs[0]
    grid = quantization_of(model, graph, graph.tensors[int(graph.outputs[position])])
    if grid is None or value.dtype.kind not in "iu":
        return value.astype(np.float64)
    return (value.astype(np.float64) - int(grid.zero_point[0])) * float(grid.scale[0])


def _whole(
    source: TfliteModel, feeds: Sequence[Feed], paths: dict[str, Path], compare: int, result: Verification
) -> None:
    feed = feeds[0]
    written = TfliteModel.open(paths["written"])
    path = next((p for p in PATHS if p in result.findings), None)
    if path is None:
        return
    sums = np.zeros((len(feed.outputs), 2))
    same = np.zeros(len(feed.outputs))
    classes = np.zeros(len(feed.outputs), bool)
    count = 0
    try:
        with Worker(limits(source)) as worker:
            for name in ("source", "written"):
                worker.load(name, paths[name], kernels=path)
            for sample in feed.head(compare):
                a = worker.run("source", sample)
                b = worker.run("written", _fit(sample, written))
                count += 1
                for i, (left, right) in enumerate(zip(a, b, strict=True)):
                    x, y = _real(left, source, i), _real(right, written, i)
                    if x.shape != y.shape or x.dtype.kind != "f":
                        continue
                    if np.isnan(y).any() and not np.isnan(x).any() and feed.outputs[i] not in result.nan:
                        result.nan.append(feed.outputs[i])
                    sums[i] += [np.square(y - x).sum(), np.square(x).sum()]
                    classes[i] = x.ndim == 2 and x.shape[0] == 1 and x.shape[1] > 1
                    same[i] += bool(classes[i]) and int(x.argmax()) == int(y.argmax())
    except RunError as error:
        result.failed.setdefault(path, str(error))
        return
    result.samples = count
    for i, name in enumerate(feed.outputs):
        result.difference[name] = float(np.sqrt(sums[i, 0] / sums[i, 1])) if sums[i, 1] else float(np.sqrt(sums[i, 0]))
        if classes[i] and count:
            result.agreement[name] = float(same[i] / count)
