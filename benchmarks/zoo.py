"""Ten networks, their data and TensorFlow's own conversion of them: what the static int8 quantizer is measured against.

Every network is deterministic and takes seconds to build. Those without trained weights get random ones, and batch
normalization gets the statistics of real activations, disturbed, so that folding it is a real test and no layer dies.
TensorFlow and Keras are imported inside the functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHARED = Path(os.environ.get("PARING_SHARED", Path(__file__).resolve().parents[2] / "shared"))
RESNET8 = SHARED / "models" / "pretrainedResnet.h5"

# Input shape without the batch, lowest and highest input value. ResNet8 and two that rescale inside take pixels.
INPUTS: dict[str, tuple[tuple[int, ...], float, float]] = {
    "resnet8": ((32, 32, 3), 0.0, 255.0),
    "mobilenet": ((96, 96, 3), -1.0, 1.0),
    "mobilenet_v2": ((96, 96, 3), -1.0, 1.0),
    "mobilenet_v3_small": ((96, 96, 3), 0.0, 255.0),
    "efficientnet_b0": ((96, 96, 3), 0.0, 255.0),
    "densenet121": ((96, 96, 3), -2.1, 2.6),
    "autoencoder": ((640,), -3.0, 4.0),
    "ds_cnn": ((49, 10, 1), -4.0, 6.0),
    "conv1d": ((128, 6), -2.0, 2.0),
    "unet": ((64, 64, 3), 0.0, 1.0),
}
NAMES = tuple(INPUTS)


def build(name: str) -> Any:
    """Return the network as a Keras model. The same name gives the same weights."""
    import keras

    seed = NAMES.index(name) + 1
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    if name == "resnet8":
        return keras.models.load_model(RESNET8, compile=False)
    model = _ARCHITECTURES[name]()
    disturb(model, samples(name, 16), np.random.default_rng(seed))
    return model


def samples(name: str, count: int) -> np.ndarray:
    """Return `count` smooth float32 inputs [count, ...], the first ones the same for every `count`."""
    shape, low, high = INPUTS[name]
    return np.stack([_smooth(shape, low, high, np.random.default_rng([NAMES.index(name), i])) for i in range(count)])


def convert_float(model: Any) -> bytes:
    """Return the float32 .tflite file of TensorFlow's converter, without optimizations."""
    import tensorflow as tf

    return tf.lite.TFLiteConverter.from_keras_model(model).convert()


def convert_int8(model: Any, samples: np.ndarray, io: str = "float32") -> bytes:
    """Return the int8 .tflite file of TensorFlow's converter, calibrated on `samples` one at a time.

    Args:
        model: a Keras model with one input.
        samples: [count, ...] float32.
        io: type of the file's input and output, "float32" or "int8".
    """
    import tensorflow as tf

    converter = int8_converter(model, samples)
    converter.inference_input_type = converter.inference_output_type = tf.dtypes.as_dtype(io)
    return converter.convert()


def int8_converter(model: Any, samples: np.ndarray) -> Any:
    """Return the converter that `convert_int8` runs, for those who want to turn its other knobs."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return converter


def _smooth(shape: tuple[int, ...], low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """A few random waves over the axes, mixed into the channels, with a little noise. No value sits on a grid."""
    grids = np.meshgrid(*(np.linspace(0, 1, n) for n in shape[:-1] or shape), indexing="ij")
    channels = shape[-1] if len(shape) > 1 else 1
    image = np.zeros((*grids[0].shape, channels))
    for _ in range(6):
        phase = sum(rng.uniform(-4, 4) * g for g in grids) + rng.uniform()
        image += np.sin(2 * np.pi * phase)[..., None] * rng.normal(size=channels)
    image = image.reshape(shape) + 0.1 * rng.normal(size=shape)
    spread = np.tanh(image * rng.uniform(0.2, 0.6) + rng.normal(scale=0.3))
    return (low + (high - low) * (spread + 1) / 2).astype(np.float32)


def disturb(model: Any, data: np.ndarray, rng: np.random.Generator) -> None:
    """Give biases and batch normalization non-trivial values, the latter near the statistics of `data`."""
    import keras

    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            width = layer.moving_mean.shape
            if layer.scale:
                layer.gamma.assign(rng.uniform(0.4, 1.1, width) * rng.choice([1, 1, 1, 1, -1], width))
            if layer.center:
                layer.beta.assign(rng.normal(scale=0.3, size=width))
        elif getattr(layer, "bias", None) is not None:
            layer.bias.assign(rng.normal(scale=0.1, size=layer.bias.shape))
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    model(data, training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        mean, variance = np.asarray(layer.moving_mean), np.asarray(layer.moving_variance)
        layer.moving_mean.assign(mean + 0.2 * np.sqrt(variance) * rng.normal(size=mean.shape))
        layer.moving_variance.assign(variance * rng.uniform(0.7, 1.5, mean.shape) + 1e-3)
    # A deep random network answers every image with nearly the same numbers: centre and widen what its head says.
    head = next(layer for layer in reversed(model.layers) if getattr(layer, "bias", None) is not None)
    activation, head.activation = head.activation, keras.activations.linear
    outputs = np.asarray(model(data, training=False)).reshape(-1, head.bias.shape[0])
    head.activation = activation
    gain = 1 / outputs.std(axis=0).mean()
    head.kernel.assign(np.asarray(head.kernel) * gain)
    bias = np.asarray(head.bias)
    head.bias.assign(gain * (bias - outputs.mean(axis=0)) + 0.3 * rng.normal(size=bias.shape))


def _application(name: str, **settings: Any) -> Any:
    import keras

    shape = (96, 96, 3)
    return getattr(keras.applications, name)(
        weights=None, input_shape=shape, classes=100, classifier_activation=None, **settings
    )


def _autoencoder() -> Any:
    import keras
    from keras import layers

    x = inputs = keras.Input((640,))
    for width in (128, 128, 128, 128, 8, 128, 128, 128, 128):
        x = layers.ReLU()(layers.BatchNormalization()(layers.Dense(width)(x)))
    return keras.Model(inputs, layers.Dense(640)(x))


def _ds_cnn() -> Any:
    import keras
    from keras import layers

    x = inputs = keras.Input((49, 10, 1))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(64, (10, 4), strides=2, padding="same")(x)))
    for _ in range(4):
        x = layers.ReLU()(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(x)))
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(64, 1)(x)))
    x = layers.Flatten()(layers.AveragePooling2D((25, 5))(x))
    return keras.Model(inputs, layers.Dense(12, activation="softmax")(x))


def _conv1d() -> Any:
    import keras
    from keras import layers

    x = inputs = keras.Input((128, 6))
    x = layers.BatchNormalization()(layers.Conv1D(24, 5, padding="same", activation="relu")(x))
    x = layers.MaxPooling1D(2)(x)
    x = layers.Conv1D(32, 3, padding="causal", dilation_rate=2, activation="tanh")(x)
    x = layers.LeakyReLU(0.2)(layers.BatchNormalization()(layers.Conv1D(32, 3, strides=2)(x)))
    x = layers.Conv1D(48, 3, padding="same", activation="relu")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(5, activation="sigmoid")(layers.Dense(32, activation="relu")(x)))


def _unet() -> Any:
    import keras
    from keras import layers

    def double(x: Any, width: int) -> Any:
        for _ in range(2):
            x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(x)))
        return x

    x = inputs = keras.Input((64, 64, 3))
    skips = []
    for width in (12, 24, 48):
        x = double(x, width)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = double(x, 64)
    for width, skip in zip((48, 24), (skips[2], skips[1]), strict=True):
        x = layers.Conv2DTranspose(width, 3 if width == 24 else 2, strides=2, padding="same")(x)
        x = double(layers.Concatenate()([x, skip]), width)
    x = layers.UpSampling2D(interpolation="bilinear")(x)
    x = double(layers.Concatenate()([x, skips[0]]), 12)
    return keras.Model(inputs, layers.Conv2D(2, 1, activation="sigmoid")(x))


_ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "mobilenet": lambda: _application("MobileNet", alpha=0.5, dropout=0.0),
    "mobilenet_v2": lambda: _application("MobileNetV2", alpha=0.5),
    "mobilenet_v3_small": lambda: _application("MobileNetV3Small", dropout_rate=0.0),
    "efficientnet_b0": lambda: _application("EfficientNetB0"),
    "densenet121": lambda: _application("DenseNet121"),
    "autoencoder": _autoencoder,
    "ds_cnn": _ds_cnn,
    "conv1d": _conv1d,
    "unet": _unet,
}
