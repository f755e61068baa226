"""Verifies a large model operator by operator: each alone, cut out, on seeded values; never the whole in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from paring.formats.tflite.constants import quantization_of, shape_of, type_name
from paring.formats.tflite.extract import extract
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.operators import TABLE
from paring.formats.tflite.twin import Probe, instrument

LARGE = 100 * 2**20  # bytes: above, a model is verified in pieces


def pieces(model: TfliteModel, folder: Path) -> Iterator[tuple[Path, list[Probe], list[np.ndarray]]]:
    """Each quantized operator as a model of its own with its twin: file, probes, one seeded sample.

    The file is overwritten by the next piece. Integer inputs are drawn around their zero point, a few dozen codes wide, so
    that results stay inside the calibrated range instead of saturating.
    """
    path = folder / "piece.tflite"
    for number, subgraph in enumerate(model.subgraphs):
        for position, operator in enumerate(subgraph.operators or ()):
            if model.native(operator) not in TABLE or not _is_quantized(model, subgraph, operator):
                continue
            reads = [int(i) for i in operator.inputs if i >= 0 and model.constant(subgraph.tensors[i]) is None]
            reads = list(dict.fromkeys(i for i in reads if not subgraph.tensors[i].is_variable))
            writes = [(number, int(i)) for i in operator.outputs]
            piece, probes = instrument(extract(model, [(number, i) for i in reads], writes))
            if not probes or not reads:
                continue
            piece.save(path)
            random = np.random.default_rng(position)
            yield path, probes, [_draw(model, subgraph, subgraph.tensors[i], random) for i in reads]


def _is_quantized(model: TfliteModel, subgraph: object, operator: object) -> bool:
    tensors = [subgraph.tensors[i] for i in operator.inputs if i >= 0]  # type: ignore[attr-defined]
    return any(quantization_of(model, subgraph, t) is not None for t in tensors)  # type: ignore[arg-type]


def _draw(model: TfliteModel, subgraph: object, tensor: object, random: np.random.Generator) -> np.ndarray:
    shape = tuple(max(1, d) for d in shape_of(tensor))  # type: ignore[arg-type]
    dtype = type_name(tensor)  # type: ignore[arg-type]
    if dtype == "float32":
        return random.normal(size=shape).astype(np.float32)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    grid = quantization_of(model, subgraph, tensor)  # type: ignore[arg-type]
    if grid is None:
        return np.zeros(shape, dtype)
    info = np.iinfo(dtype)
    wide = 24 if dtype != "int16" else 6000
    codes = np.rint(random.normal(0, wide, shape)) + int(grid.zero_point[0])
    return np.asarray(np.clip(codes, info.min, info.max), dtype)
