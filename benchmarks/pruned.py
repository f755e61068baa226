"""Models with zeros in their weights, placed at random: good for speed, of no use for accuracy."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Block = tuple[int, int]
"""Outputs and inputs that share a zero."""


def mask(rng: np.random.Generator, inputs: int, outputs: int, zeros: float, block: Block) -> np.ndarray:
    """What to keep of an [inputs, outputs] kernel."""
    high, wide = block
    keep = rng.random((-(-inputs // wide), -(-outputs // high))) >= zeros
    return np.kron(keep, np.ones((wide, high)))[:inputs, :outputs].astype(np.float32)


def prune(weights: np.ndarray, zeros: float, block: Block, rng: np.random.Generator) -> np.ndarray:
    """Random weights of the shape of a Keras kernel [..., inputs, outputs], with zeros, scaled for relu."""
    *taps, inputs, outputs = weights.shape
    count = int(np.prod(taps))
    keep = np.stack([mask(rng, inputs, outputs, zeros, block) for _ in range(count)]).reshape(weights.shape)
    deviation = np.sqrt(2 / (count * inputs * (1 - zeros)))
    return (rng.standard_normal(weights.shape) * deviation * keep).astype(np.float32)


def chain(kernel: int, size: int, zeros: float, block: Block, image: int = 28, depth: int = 4) -> Any:
    """`depth` equal layers with relu, batch 1: convolutions, or dense layers where `kernel` is 0."""
    import keras

    rng = np.random.default_rng(0)
    shape = (image, image, size) if kernel else (size,)
    layers = [
        keras.layers.Conv2D(size, kernel, padding="same", activation="relu")
        if kernel
        else keras.layers.Dense(size, activation="relu")
        for _ in range(depth)
    ]
    model = keras.Sequential([keras.Input(shape, batch_size=1), *layers])
    for layer in layers:
        weights, bias = layer.get_weights()
        layer.set_weights([prune(weights, zeros, block, rng), rng.standard_normal(bias.shape).astype(np.float32) * 0.1])
    return model


def heavy(model: Any) -> Iterator[Any]:
    """Layers that pruning is for: dense ones and convolutions, but the first and depthwise ones."""
    import keras

    kinds = (keras.layers.Conv2D, keras.layers.Dense, keras.layers.EinsumDense)
    found = [layer for layer in layers_of(model) if isinstance(layer, kinds)]
    yield from (
        layer for layer in found if not isinstance(layer, keras.layers.DepthwiseConv2D) and layer.kernel.shape[-2] > 3
    )


def layers_of(layer: Any) -> Iterator[Any]:
    """A layer and all that are inside."""
    yield from layer._flatten_layers(include_self=False, recursive=True)


def network(name: str, zeros: float, block: Block) -> Any:
    """A whole network with random weights, pruned at random: `mobilenet`, `resnet50` or `transformer`."""
    import keras

    keras.utils.set_random_seed(1)
    if name == "transformer":
        model = encoder()
    else:
        make = keras.applications.MobileNet if name == "mobilenet" else keras.applications.ResNet50
        made = make(weights=None)
        inputs = keras.Input((224, 224, 3), batch_size=1)
        model = keras.Model(inputs, made(inputs))
    rng = np.random.default_rng(0)
    for layer in heavy(model):
        weights = np.asarray(layer.kernel)
        if isinstance(layer, keras.layers.EinsumDense):  # [width, heads, size] or [heads, size, width]
            inputs = weights.shape[0] if weights.shape[0] == 384 else int(np.prod(weights.shape[:-1]))
            flat = prune(weights.reshape(inputs, -1), zeros, block, rng)
            layer.kernel.assign(flat.reshape(weights.shape))
        else:
            layer.kernel.assign(prune(weights, zeros, block, rng))
    return model


def encoder(layers: int = 6, width: int = 384, tokens: int = 128, heads: int = 6) -> Any:
    """A transformer encoder as Keras writes it."""
    import keras

    inputs = x = keras.Input((tokens, width), batch_size=1)
    for _ in range(layers):
        attention = keras.layers.MultiHeadAttention(heads, width // heads)(x, x)
        x = keras.layers.LayerNormalization()(keras.layers.Add()([x, attention]))
        inner = keras.layers.Dense(4 * width, activation="relu")(x)
        x = keras.layers.LayerNormalization()(keras.layers.Add()([x, keras.layers.Dense(width)(inner)]))
    return keras.Model(inputs, x)


def export(model: Any, path: Path) -> Path:
    """As a float32 `.tflite`."""
    model.export(str(path), format="litert", verbose=False)
    return path
