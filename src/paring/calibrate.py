"""Runs a model on samples in the child process and keeps the statistics that solving asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from paring.calibration import Statistics, TensorStatistics
from paring.data import Feed
from paring.errors import InputError, UnsupportedError
from paring.formats.tflite.extract import extract
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.program import bodies, build
from paring.graph import Graph, TensorId
from paring.runtime import Limits, Worker


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
    bounds = limits(model)
    inner = {feed.subgraph: {t for t in wanted if t[0] in bodies(model, feed.subgraph)} for feed in feeds}
    if any(inner.values()):  # loops are followed step by step, which takes longer than running them
        bounds = replace(bounds, seconds=10 * bounds.seconds)
    with tempfile.TemporaryDirectory(prefix="paring-") as folder, Worker(bounds) as worker:
        for feed in feeds:
            here = [t for t in wanted if t[0] == feed.subgraph]
            program = None
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
                extract(model, None, here).save(path)
                worker.load("float", path, kernels=kernels)
            else:
                continue
            asked = True
            worker.watch("float", [wanted[t] for t in here])
            for sample in feed:
                worker.observe("float", sample)
                samples += 1
                if progress is not None:
                    progress(samples)
            for position, found in worker.gather("float").items():
                key = here[position]
                tensors[key] = tensors[key].merge(found) if key in tensors else found
    if asked and not samples:
        raise InputError("cannot calibrate", expected="at least one sample", got="an empty data set")
    return Statistics(tensors, {t: graph.tensors[t].name for t in tensors}, samples, unseen)


def limits(model: TfliteModel) -> Limits:
    """Bounds for running this model in the child."""
    from math import prod

    from paring.formats.tflite.check import storage_bytes
    from paring.formats.tflite.constants import shape_of
    from paring.formats.tflite.schema import NAMES

    activations = 0
    for subgraph in model.subgraphs:
        for tensor in subgraph.tensors or ():
            if not tensor.buffer:
                elements = prod(max(1, d) for d in shape_of(tensor))
                activations += storage_bytes(NAMES["TensorType"][tensor.type], elements) or 0
    return Limits.for_model(len(model.data), activations)
