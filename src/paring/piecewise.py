"""Verifies a large model operator by operator: each alone, cut out, on made-up values; never the whole in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from paring.findings import made_up
from paring.formats.tflite.extract import extract
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.operators import TABLE
from paring.formats.tflite.twin import Probe, instrument

LARGE = 100_000_000  # bytes: above, a model is verified in pieces


def pieces(model: TfliteModel, path: Path) -> Iterator[tuple[TfliteModel, list[Probe], list[np.ndarray]]]:
    """Each quantized operator as a model of its own with its twin, saved to `path` until the next one.

    Args:
      model: The quantized model.
      path: The file that every piece is written to.

    Yields:
      The piece, its probes, one seeded sample.
    """
    for number, subgraph in enumerate(model.subgraphs):
        for position, operator in enumerate(subgraph.operators or ()):
            if model.native(operator) not in TABLE:
                continue
            reads = [i for i in map(int, operator.inputs) if i >= 0 and model.constant(subgraph.tensors[i]) is None]
            reads = list(dict.fromkeys(i for i in reads if not subgraph.tensors[i].is_variable))
            if not reads:
                continue
            alone = extract(model, [(number, i) for i in reads], [(number, int(i)) for i in operator.outputs])
            piece, probes = instrument(alone)
            for index in piece.subgraphs[0].inputs:
                piece.subgraphs[0].tensors[int(index)].__dict__.pop("shape_signature", None)
            sample = made_up(piece, 0, position)
            if probes and sample is not None:
                piece.save(path)
                yield piece, probes, sample
