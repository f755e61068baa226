"""`paring.cluster`: few distinct weights once, after training, so that files compress."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from paring.compress.cluster import Cluster
from paring.optimize import Result, optimize
from paring.recipe import Recipe, Rule


def cluster(
    source: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    clusters: int = 16,
    granularity: str = "channel",
    data: Any = None,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    min_size: int = 0,
    **options: Any,
) -> Result:
    """Gives the weights of a float model few distinct values each; it does not train, and the file itself gets no smaller.

    What gets smaller is an archive of it, or a download: zip and zstd see the same values again and again.

    Args:
      source: A `.tflite`, `.keras` or `.h5` path, a SavedModel folder, bytes of a .tflite file, or a live Keras model.
      output: The .tflite file to write; None to keep it in memory; of a SavedModel also a folder.
      clusters: Distinct values, 2 to 256.
      granularity: Of every output `channel`, or of a whole `tensor`, which compresses better and costs more accuracy.
      data: Samples (see `paring.samples.open_samples`), by which biases are corrected and the result is judged.
      skip: Patterns (name or kind) of operators to leave alone.
      only: Patterns of the only operators to touch.
      min_size: Least number of weights of a layer that is clustered.
      options: Further arguments of `paring.optimize`.

    Raises:
      InputError: Bad model, setting, data or output path, or no layer with float weights; exit code 2.
      BoundError: The result is not-a-number, no runtime path runs it, or a bound was missed; exit code 1.

    >>> from paring.demo import model_path
    >>> made = cluster(model_path(), clusters=8, min_size=1000, verified=False)
    >>> {row.kind: row.became for row in made.report.rows if row.stages}
    {'conv2d': '8 clusters, float', 'dense': '8 clusters, float'}
    """
    return optimize(
        source, recipe(clusters, granularity, min_size), data, output=output, skip=skip, only=only, **options
    )


def recipe(clusters: int, granularity: str, min_size: int) -> Recipe:
    """The recipe that `cluster` applies."""
    return Recipe((Rule((Cluster(clusters, granularity),), min_size=min_size or None),), "cluster")
