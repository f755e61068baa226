"""Trains the demo's digit reader and writes `src/paring/demo/digits.tflite` and `digits.npz`.

A digit reader of the classic shape (convolutions and pooling, then dense layers that hold most of the weights, as in
LeNet-5) on scikit-learn's digits, two thirds to train and one third held out. Seeded, on one core. Needs TensorFlow,
Keras 3 and scikit-learn:

    python tools/train_digits.py
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

# Before Keras and TensorFlow load: both read these when imported.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from sklearn.datasets import load_digits

from paring.demo import LEVELS, SIZE, data_path, model_path, upscale

SEED = 7
EPOCHS = 24
BATCH = 32
PEAK_RATE = 4e-3
CALIBRATION = 200
MIN_ACCURACY = 0.97
MAX_SHIFT = 3
"""Pixels of the upscaled image by which training moves a digit, at most."""

WIDTH, HIDDEN = 16, 256
"""Channels of the convolutions, and units of the hidden dense layer."""


def split_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, held-out images and labels; images uint8 [N, 8, 8]."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    if images.min() < 0 or images.max() != LEVELS:
        raise ValueError(f"cannot use the digits: expected values 0 to {LEVELS}, got up to {images.max()}.")
    order = np.random.default_rng(SEED).permutation(len(images))
    held, train = np.split(order, [len(order) // 3])
    images, labels = images.astype(np.uint8), labels.astype(np.uint8)
    return images[train], labels[train], images[held], labels[held]


def conv_bn(x: keras.KerasTensor, layer: keras.Layer) -> keras.KerasTensor:
    """A convolution without bias, its batch normalization and ReLU6."""
    # momentum 0.9: training is under a thousand steps, too few for the default 0.99 to settle.
    x = keras.layers.BatchNormalization(momentum=0.9, name=f"{layer.name}_bn")(layer(x))
    return keras.layers.ReLU(6.0, name=f"{layer.name}_relu6")(x)


def build() -> keras.Model:
    """The network: image [N, 32, 32, 1] in, probabilities [N, 10] out."""
    image = keras.Input((SIZE, SIZE, 1), name="image")
    x = conv_bn(image, keras.layers.Conv2D(WIDTH, 3, strides=2, padding="same", use_bias=False, name="conv1"))
    x = keras.layers.MaxPooling2D(name="pool1")(x)
    x = conv_bn(x, keras.layers.Conv2D(WIDTH, 3, padding="same", use_bias=False, name="conv2"))
    x = keras.layers.Flatten(name="flat")(x)
    x = keras.layers.Dense(HIDDEN, activation="relu", name="hidden")(x)
    return keras.Model(image, keras.layers.Dense(10, activation="softmax", name="digit")(x), name="digits")


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image moved by up to MAX_SHIFT pixels both ways, empty paper coming in at the edge."""
    m = MAX_SHIFT
    padded = np.pad(images, ((0, 0), (m, m), (m, m), (0, 0)))
    corners = rng.integers(0, 2 * m + 1, (len(images), 2))
    return np.stack([image[y : y + SIZE, x : x + SIZE] for image, (y, x) in zip(padded, corners, strict=True)])


def train(images: np.ndarray, labels: np.ndarray) -> keras.Model:
    """Fits the network to upscaled images; the last, partial batch of an epoch is left out."""
    model = build()
    steps = len(images) // BATCH
    rate = keras.optimizers.schedules.CosineDecay(
        PEAK_RATE / 10, EPOCHS * steps - 2 * steps, warmup_target=PEAK_RATE, warmup_steps=2 * steps
    )
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=1e-2),
        keras.losses.CategoricalCrossentropy(label_smoothing=0.05),
        metrics=["accuracy"],
    )
    rng = np.random.default_rng(SEED)
    targets = np.eye(10, dtype=np.float32)[labels]
    for epoch in range(EPOCHS):
        order = rng.permutation(len(images))[: steps * BATCH]
        logs = model.fit(shifted(images[order], rng), targets[order], BATCH, shuffle=False, verbose=0).history
        print(f"epoch {epoch + 1:2d}: loss {logs['loss'][0]:.4f}, training accuracy {logs['accuracy'][0]:.4f}")
    return model


def convert(model: keras.Model) -> bytes:
    """The float32 `.tflite` file: batch 1, signature `serving_default` with `image` in and `probabilities` out."""

    # Keras' own archive: a tf.Module or a concrete function around a Keras 3 model converts to unset variables.
    archive = keras.export.ExportArchive()
    archive.track(model)
    image = tf.TensorSpec((1, SIZE, SIZE, 1), tf.float32, name="image")
    archive.add_endpoint("serving_default", lambda image: {"probabilities": model(image, training=False)}, [image])
    with tempfile.TemporaryDirectory() as folder:
        archive.write_out(folder, verbose=False)
        return tf.lite.TFLiteConverter.from_saved_model(folder).convert()


def accuracy(content: bytes, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers of the `.tflite` file, in LiteRT."""
    interpreter = Interpreter(model_content=content, num_threads=1)
    run = interpreter.get_signature_runner("serving_default")
    answers = [run(image=image[np.newaxis])["probabilities"].argmax() for image in images]
    return float(np.mean(answers == labels))


def write(path: Path, content: bytes) -> None:
    """Writes beside `path`, then renames."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def main() -> None:
    """Trains, converts, writes, and says what came out."""
    start = time.perf_counter()
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(SEED)
    images, labels, held_images, held_labels = split_digits()
    content = convert(train(upscale(images), labels))
    share = accuracy(content, upscale(held_images), held_labels)
    print(f"{model_path().name}: {len(content):,} bytes, accuracy {share:.4f} on {len(held_labels)} held-out images")
    if share < MIN_ACCURACY:
        raise SystemExit(f"digits.tflite was not written: expected an accuracy of {MIN_ACCURACY}, got {share:.4f}.")
    write(model_path(), content)
    with tempfile.TemporaryFile() as buffer:
        np.savez_compressed(buffer, images=held_images, labels=held_labels, calibration=images[:CALIBRATION])
        buffer.seek(0)
        write(data_path(), buffer.read())
    print(f"{data_path().name}: {data_path().stat().st_size:,} bytes")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
