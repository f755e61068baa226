"""Second moments of what layers read, for algorithms that begin with data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import keras
from keras import ops

from paring.compress.gram import Gram, GramSum
from paring.compress.unfold import WIDEST, Unfolding
from paring.training.calibrating import run
from paring.training.layouts import name_of

ROWS = 40_000  # output positions in all: several for each input of the widest rows


def grams(model: Any, layers: Sequence[Any], batches: Any) -> dict[Any, Gram]:
    """Covariances of the rows that weights meet, in the model as it is; layers whose input is not seen are left out.

    A bias, or the batch normalization behind, takes up what changes in the mean.

    Args:
      model: A Keras model in which nothing is attached yet.
      layers: Of which it is asked.
      batches: As the model takes them.

    Raises:
      InputError: The model does not take a batch.
    """
    unfoldings = {layer: found for layer in layers if (found := unfolding_of(layer)) is not None}
    count = sum(len(keras.tree.flatten(batch)[0]) for batch in batches)
    sums = {layer: GramSum(found, 1, number) for number, (layer, found) in enumerate(unfoldings.items())}

    hidden: set[Any] = set()

    def see(layer: Any, x: Any) -> None:
        if layer in hidden:
            return
        try:
            values = ops.convert_to_numpy(ops.cast(x, "float32"))
        except (TypeError, NotImplementedError, AttributeError):  # inside a loop that the backend compiles
            hidden.add(layer)
            return
        if name_of(layer) == "Conv1D":
            values = values[:, None]
        sums[layer].positions = max(1, ROWS * len(values) // max(1, count))
        sums[layer].update(values, values)

    with _watched(sums, see):
        run(model, batches)
    means = {layer: total.finish() for layer, total in sums.items() if layer not in hidden}
    return {layer: gram.centered() for layer, gram in means.items() if gram is not None}


def unfolding_of(layer: Any) -> Unfolding | None:
    """How a layer's kernel, turned as in a .tflite file, meets its input; None where that is not known."""
    name = name_of(layer)
    if name == "Dense":
        inputs, outputs = layer.kernel.shape
        return _in_parts(Unfolding("dense", (int(outputs), int(inputs))))
    if name not in ("Conv1D", "Conv2D") or layer.data_format != "channels_last" or layer.padding == "causal":
        return None
    one = [1] if name == "Conv1D" else []
    *taps, inputs, outputs = (int(d) for d in layer.kernel.shape)
    height, width = (*one, *taps)
    params: dict[str, Any] = {"padding": int(layer.padding == "valid")}
    for side, stride, dilation in zip("hw", (*one, *layer.strides), (*one, *layer.dilation_rate), strict=True):
        params |= {f"stride_{side}": int(stride), f"dilation_{side}_factor": int(dilation)}
    return _in_parts(Unfolding("conv2d", (outputs, height, width, inputs), layer.groups, 1, params))


def _in_parts(found: Unfolding) -> Unfolding | None:
    inputs = prod(found.shape[1:])
    parts = next(n for n in range(1, inputs + 1) if inputs % n == 0 and inputs // n <= WIDEST)
    return replace(found, parts=parts) if parts == 1 or found.groups == 1 else None


@contextmanager
def _watched(layers: Mapping[Any, Any], see: Any) -> Iterator[None]:
    """Inside, `see` gets what each layer is called with."""
    before = {layer: layer.__dict__.get("call") for layer in layers}
    for layer in layers:

        def call(x: Any, *args: Any, _layer: Any = layer, _call: Any = layer.call, **kwargs: Any) -> Any:
            see(_layer, x)
            return _call(x, *args, **kwargs)

        layer.call = call
    try:
        yield
    finally:
        for layer in layers:
            del layer.call
            if before[layer] is not None:
                layer.call = before[layer]
