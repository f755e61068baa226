"""Ranges of activations before the first step: the data that `attach` gets, run through the model."""

from __future__ import annotations

from itertools import islice
from typing import Any

import keras
import numpy as np

from paring.compress.quantize import Quantize
from paring.errors import InputError
from paring.training.attachment import CALIBRATE, Attachment

SIZE, MOST = 32, 1024  # samples of a batch, and in all; of an iterable so many batches of 32


def batches_of(data: Any) -> tuple[Any, Any]:
    """The first batch of what `attach` takes as data, and all batches; None for none.

    Raises:
      InputError: There is none in it.
    """
    if data is None:
        return None, None
    if isinstance(data, (np.ndarray, list, tuple, dict)) or hasattr(data, "dtype"):
        flat = keras.tree.flatten(data)
        count = len(flat[0])
        parts = [
            keras.tree.map_structure(lambda x, i=i: np.asarray(x[i : i + SIZE]), data)
            for i in range(0, min(count, MOST), SIZE)
        ]
        if not parts:
            raise InputError("cannot calibrate", expected="at least one sample", got="an empty data set")
        return parts[0], parts
    kept = [batch[0] if isinstance(batch, tuple) else batch for batch in islice(data, MOST // SIZE)]
    if not kept:
        raise InputError("cannot calibrate", expected="at least one batch", got="an empty data set")
    return kept[0], kept


def calibrate(attachment: Attachment, batches: Any, how: Quantize) -> None:
    """Runs the model on batches and sets its ranges from what it has seen.

    Args:
      attachment: The model.
      batches: As the model takes them.
      how: Which range of what was seen.

    Raises:
      InputError: The model does not take a batch, or a value is not finite.
    """
    with attachment.working(CALIBRATE):
        run(attachment.model, batches)
    attachment.calibrated(how.range, how.percentile)


def run(model: Any, batches: Any) -> None:
    """Calls a model on batches.

    Raises:
      InputError: It does not take one of them.
    """
    for batch in batches:
        try:
            model(batch, training=False)
        except (ValueError, TypeError) as error:
            shapes = keras.tree.map_structure(lambda x: getattr(x, "shape", type(x).__name__), batch)
            raise InputError(
                "cannot calibrate", where=f"model {model.name}", expected="batches as the model takes them",
                got=str(shapes), todo=str(error).strip().splitlines()[0][:300],
            ) from error  # fmt: skip
