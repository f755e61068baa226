"""`paring.sparsify`: prune a model once, after training, for the runtime that it will run on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from paring.compress.sparsify import Sparsify
from paring.formats.saved_model.model import writes_folder
from paring.optimize import Result, optimize
from paring.recipe import Recipe, Rule

TARGET = "x86-avx512"


def sparsify(
    source: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    target: str = TARGET,
    sparsity: float | None = None,
    pattern: str = "",
    data: Any = None,
    storage: str = "dense",
    allocation: str = "",
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    min_size: int = 0,
    **options: Any,
) -> Result:
    """Prunes a float model where a target gains from it, so that outputs suffer least; it does not train.

    Args:
      source: A `.tflite`, `.keras` or `.h5` path, a SavedModel folder, bytes of a .tflite file, or a live Keras model.
      output: The .tflite file to write; None to keep it in memory; of a SavedModel also a folder. There the smallest weights
        go: data only compares the outputs.
      target: The runtime that has to gain: it decides which layers are pruned and in which pattern. Empty: all layers.
      sparsity: Share of zeros over all pruned layers, above 0 and below 1; not needed with a pattern such as `2:4`.
      pattern: Instead of the target's own.
      data: Samples (see `paring.samples.open_samples`). Without them the smallest weights go, which costs far more accuracy.
      storage: `dense`, or `sparse` where stock runtimes read it right.
      allocation: `uniform` or `error`, see `paring.compress.sparsify.Sparsify`; empty: `error` with data.
      skip: Patterns (name or kind) of operators to leave alone.
      only: Patterns of the only operators to touch.
      min_size: Least number of weights of a layer that is pruned.
      options: Further arguments of `paring.optimize`.

    Raises:
      InputError: Bad model, setting, data or output path, or no layer that pays; exit code 2.
      BoundError: The result is not-a-number, no runtime path runs it, or a bound was missed; exit code 1.

    >>> from paring.demo import model_path
    >>> made = sparsify(model_path(), sparsity=0.75, target="", pattern="4x1", verified=False)
    >>> [row.kind for row in made.report.rows if row.sparsity]
    ['conv2d', 'conv2d', 'dense', 'dense']
    """
    given = data is not None and not writes_folder(source, output)
    return optimize(
        source, recipe(target, sparsity, pattern, storage, allocation, min_size, given=given), data,
        output=output, skip=skip, only=only, **options,
    )  # fmt: skip


def recipe(
    target: str, sparsity: float | None, pattern: str, storage: str, allocation: str, min_size: int, *, given: bool
) -> Recipe:
    """The recipe that `sparsify` applies; `given`: with data, by which zeros can be shared out."""
    allocation = allocation or ("error" if given else "uniform")
    settings = Sparsify(sparsity, pattern, target, storage, allocation, min_size=min_size)
    return Recipe((Rule((settings,)),), "sparsify")
