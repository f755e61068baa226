"""Runs a model on samples in the child process and keeps the statistics that solving asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from paring.calibration import Statistics, TensorStatistics
from paring.data import Feed
from paring.errors import InputError, UnsupportedError
from paring.formats.tflite.check import storage_bytes
from paring.formats.tflite.constants import shape_of
from paring.formats.tflite.extract import extract
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.program import bodies, build
from paring.formats.tflite.schema import NAMES
from paring.graph import Graph, TensorId
from paring.runtime import Limits, OutOfTime, RunError, Worker


def calibrate(
    model: TfliteModel,
    graph: Graph,
    wanted: Mapping[TensorId, set[str]],
    feeds: list[Feed],
    *,
    kernels: str = "xnnpack",
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Statistics of the wanted tensors over all samples, in one pass; nothing is kept of a sample.

    A model whose operators remember what they saw is run twice on each sample: as if it were the first, and as the next
    of a stream, for nobody says which it is.

    Args:
      model: The float model.
      graph: Its graph.
      wanted: What to keep, by tensor.
      feeds: Samples for each entry.
      kernels: `xnnpack`, or `builtin` to calibrate on the kernels that TensorFlow's converter uses.
      progress: Called with the number of samples done.

    Raises:
      InputError: The data set is empty.
      RunError: The model cannot be run.
    """
    tensors: dict[TensorId, TensorStatistics] = {}
    unseen: dict[int, str] = {}
    samples, asked = 0, False
    bounds = limits(model, sample=next(iter(feeds[0].head(1)), ()) if feeds else ())
    inner = {feed.subgraph: {t for t in wanted if t[0] in bodies(model, feed.subgraph)} for feed in feeds}
    if any(inner.values()):  # loops are followed step by step, which takes longer than running them
        _check_that_it_ends(model, feeds, bounds, kernels)
        bounds = replace(bounds, seconds=10 * bounds.seconds)
    with tempfile.TemporaryDirectory(prefix="paring-") as folder, Worker(bounds) as worker:
        for feed in feeds:
            here = [t for t in wanted if t[0] == feed.subgraph]
            program, sessions = None, ["float"]
            if inner[feed.subgraph]:
                inside = {number for number, _ in inner[feed.subgraph]}
                try:
                    program = build(model, feed.subgraph, [*here, *inner[feed.subgraph]], inside, Path(folder))
                except UnsupportedError as error:
                    unseen.update(dict.fromkeys(inside, str(error)))
            if program is not None:
                here = list(program.watched)
                worker.load_program("float", program, kernels=kernels)
            elif here:
                path = Path(folder) / f"{feed.subgraph}.tflite"
                sliced = extract(model, None, here)
                sliced.save(path)
                worker.load("float", path, kernels=kernels)
                if any(t.is_variable for t in sliced.subgraphs[0].tensors):
                    worker.load("stream", path, kernels=kernels, stream=True)
                    sessions.append("stream")
            else:
                continue
            asked = True
            for session in sessions:
                worker.watch(session, [wanted[t] for t in here])
            for sample in feed:
                for session in sessions:
                    worker.observe(session, sample)
                samples += 1
                if progress is not None:
                    progress(samples)
            for position, found in (item for session in sessions for item in worker.gather(session).items()):
                key = here[position]
                tensors[key] = tensors[key].merge(found) if key in tensors else found
    if asked and not samples:
        raise InputError("cannot calibrate", expected="at least one sample", got="an empty data set")
    return Statistics(tensors, {t: graph.tensors[t].name for t in tensors}, samples, unseen)


def _check_that_it_ends(model: TfliteModel, feeds: list[Feed], bounds: Limits, kernels: str) -> None:
    """Raises OutOfTime for a loop without end, at once rather than after the longer time that following it may take."""
    sample = next((s for feed in feeds if feed.subgraph == 0 for s in feed.head(1)), None)
    if sample is None:
        return
    with tempfile.TemporaryDirectory(prefix="paring-") as folder, Worker(bounds) as worker:
        path = Path(folder) / "whole.tflite"
        model.save(path)
        try:
            worker.load("whole", path, kernels=kernels)
            worker.run("whole", sample)
        except OutOfTime:
            raise
        except RunError:
            pass  # what keeps the whole from running is found, and said, where its parts run


def limits(*models: TfliteModel, sample: Sequence[np.ndarray] = ()) -> Limits:
    """Bounds for running these models side by side in one child.

    Args:
      models: What it loads.
      sample: A sample of the first subgraph, where inputs are larger than the shapes in the file say (dynamic ones).
    """
    weights, activations, work = 0, 0.0, 0.0
    for model in models:
        growth = _growth(model, sample)
        weights += sum(payload.nbytes for b in model.root.buffers if (payload := model.payload(b)) is not None)
        for subgraph in model.subgraphs:
            sizes = [_elements(tensor) for tensor in subgraph.tensors]
            for tensor, size in zip(subgraph.tensors, sizes, strict=True):
                if model.constant(tensor) is None:
                    activations += growth * (storage_bytes(NAMES["TensorType"][tensor.type], size) or 0)
            for operator in subgraph.operators:
                work += growth * _work(model, subgraph, operator, sizes)
    return Limits.for_model(weights, int(activations), work)


def _elements(tensor: Table) -> int:
    """Elements of a tensor, a dynamic dimension counted as 1, whatever the file puts in its place."""
    signature = tensor.shape_signature
    return prod(max(1, int(d)) for d in (shape_of(tensor) if signature is None or not signature.size else signature))


def _growth(model: TfliteModel, sample: Sequence[np.ndarray]) -> float:
    """How many times larger than declared the inputs are."""
    graph = model.subgraphs[0]
    declared = [_elements(graph.tensors[i]) for i in graph.inputs]
    return max([1.0, *(value.size / max(1, size) for value, size in zip(sample, declared, strict=False))])


def _work(model: TfliteModel, subgraph: Table, operator: Table, sizes: list[int]) -> float:
    """Multiply-adds of an operator with weights, roughly: each output sums over one channel of them."""
    ins = [int(i) for i in operator.inputs[:3] if i >= 0]
    weights = max((sizes[i] for i in ins if model.constant(subgraph.tensors[i]) is not None), default=0)
    if not operator.outputs.size or weights < 2:
        return 0.0
    out = int(operator.outputs[0])
    shape = shape_of(subgraph.tensors[out])
    return sizes[out] * weights / max(1, shape[-1] if shape else 1)
