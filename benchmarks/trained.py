"""Networks trained in minutes, for figures about training: their data, and the float model behind `float_model`.

Trained once and kept in `$PARING_CACHE` (else a folder among the system's temporary files). All give logits.
TensorFlow and Keras are imported inside the functions.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar
import figures
import numpy as np

CACHE = Path(os.environ.get("PARING_CACHE", Path(tempfile.gettempdir()) / "paring-benchmarks"))


@dataclass(frozen=True)
class Network:
    """One network and how it is trained.

    Attributes:
      build: Gives the model, with a seed set before.
      data: `mnist32` (32x32x1), `mnist` (28 rows of 28) or `cifar` (32x32x3).
      low: Value of a black pixel.
      high: Value of a white one.
      images: Training images that it sees in an epoch.
      epochs: How often. 0: it comes trained.
      rate: Peak learning rate of Adam, which falls to zero along a cosine.
      accuracy: What it must reach on 2,000 test images for figures to mean something.
    """

    build: Callable[[], Any]
    data: str
    low: float
    high: float
    images: int = 12000
    epochs: int = 2
    rate: float = 2e-3
    accuracy: float = 0.85


def float_model(name: str) -> Any:
    """The trained float model, from the cache where it is there."""
    import keras

    network = NETWORKS[name]
    path = CACHE / f"{name}.keras"
    if path.is_file():
        return keras.models.load_model(path, compile=False, custom_objects={"Positions": positions()})
    keras.utils.set_random_seed(1)
    model = network.build()
    if network.epochs:
        _train(model, name, network)
    reached = accuracy(logits(model, samples(name, "test", 2000)[0]), samples(name, "test", 2000)[1])
    if reached < network.accuracy:
        raise SystemExit(f"training failed for {name}: expected an accuracy of {network.accuracy}, got {reached:.3f}.")
    CACHE.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    model.save(part)
    os.replace(part, path)
    return keras.models.load_model(path, compile=False, custom_objects={"Positions": positions()})


def samples(name: str, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` images of `train` or `test`, float32 as the network wants them, and their classes."""
    network = NETWORKS[name]
    if network.data == "cifar":
        x, y = cifar.images(part, count), cifar.labels(part, count)
    else:
        with np.load(figures.SHARED / "data" / "mnist.npz") as data:
            x, y = data[f"x_{part}"][:count].astype(np.float32), data[f"y_{part}"][:count].astype(np.int64)
        if network.data == "mnist32":
            x = np.pad(x, ((0, 0), (2, 2), (2, 2)))[..., None]
    return (network.low + x * np.float32((network.high - network.low) / 255)).astype(np.float32), y


def logits(model: Any, x: np.ndarray, batch: int = 100) -> np.ndarray:
    """What `model.predict` gives, float32 [count, classes]."""
    return np.asarray(model.predict(x, batch_size=batch, verbose=0), np.float32)


def accuracy(scores: np.ndarray, classes: np.ndarray) -> float:
    """Share of the images whose highest score is that of their class."""
    return float((scores.argmax(-1) == classes).mean())


def compiled(model: Any, steps: int, rate: float) -> None:
    """Compiles for logits, with Adam along a cosine to zero."""
    import keras

    schedule = keras.optimizers.schedules.CosineDecay(rate, steps, warmup_target=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss, metrics=["accuracy"])


def _train(model: Any, name: str, network: Network, batch: int = 64) -> None:
    import keras

    x, y = samples(name, "train", network.images)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # a few hundred steps: the usual 0.99 would still hold what it began with
    compiled(model, network.epochs * -(-len(x) // batch), network.rate)
    model.fit(x, y, batch_size=batch, epochs=network.epochs, verbose=0)


def positions() -> Any:
    """The class of a layer that adds a learned vector to each position: a layer of a user's own."""
    import keras

    @keras.saving.register_keras_serializable("paring-benchmarks")
    class Positions(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.table = self.add_weight(shape=shape[1:], initializer="random_normal", name="table")

        def call(self, x: Any) -> Any:
            return x + self.table

    return Positions


def transformer(rows: int = 28, width: int = 64, blocks: int = 2, heads: int = 4, classes: int = 10) -> Any:
    """An encoder whose tokens are the rows of an image; normalization before attention and before the MLP."""
    import keras
    from keras import layers

    inputs = keras.Input((rows, rows))
    x = positions()(name="positions")(layers.Dense(width)(inputs))
    for _ in range(blocks):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x = layers.Add()([x, layers.MultiHeadAttention(heads, width // heads)(y, y)])
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x = layers.Add()([x, layers.Dense(width)(layers.Dense(2 * width, activation="gelu")(y))])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization(epsilon=1e-6)(x))
    return keras.Model(inputs, layers.Dense(classes)(x), name="transformer")


def _resnet8() -> Any:
    """MLPerf Tiny's ResNet8 up to its logits."""
    import keras

    model = keras.models.load_model(figures.SHARED / "models" / "pretrainedResnet.h5", compile=False)
    model.layers[-1].activation = keras.activations.linear
    return keras.Model(model.input, model.output, name="resnet8")


def _application(name: str, channels: int, **settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        import keras

        shape = (32, 32, channels)
        settings_ = {"weights": None, "input_shape": shape, "classes": 10, "classifier_activation": None, **settings}
        return getattr(keras.applications, name)(**settings_)

    return build


NETWORKS: dict[str, Network] = {
    "ResNet8": Network(_resnet8, "cifar", 0, 255, epochs=0, accuracy=0.7),
    "MobileNetV2": Network(_application("MobileNetV2", 1, alpha=0.35), "mnist32", -1, 1, epochs=4),
    "MobileNetV3Small": Network(_application("MobileNetV3Small", 1), "mnist32", 0, 255, epochs=4),
    "EfficientNetB0": Network(_application("EfficientNetB0", 1), "mnist32", 0, 255, epochs=4),
    "transformer": Network(transformer, "mnist", 0, 1, epochs=4, accuracy=0.9),
}


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for wanted in sys.argv[1:] or NETWORKS:
        begun = time.time()
        made = float_model(wanted)
        x, y = samples(wanted, "test", 2000)
        print(f"{wanted}: accuracy {accuracy(logits(made, x), y):.4f}, {time.time() - begun:.0f} s", flush=True)
