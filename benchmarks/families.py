"""One small model for each family and each kind of layer, for `coverage.py`. Random weights, no downloads.

Keras and KerasHub are imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

COUNT = 12  # samples: three steps of four
MOMENTUM = 0.5  # of batch normalization and of ranges: in three steps the usual 0.99 would forget nothing


@dataclass(frozen=True)
class Case:
    """A model that can be trained.

    Attributes:
      model: Built, and compiled where `loss` is None.
      x: Inputs, an array or arrays by name; `COUNT` samples.
      y: Targets.
      loss: What to compile with.
    """

    model: Any
    x: Any = field(repr=False)
    y: Any = field(repr=False)
    loss: Any = None


def build(name: str) -> Case:
    """The case of a family; the same name gives the same weights and data.

    Batch normalization has the statistics of the data, as in a network that was trained, and follows quickly from there.
    """
    import keras

    keras.utils.set_random_seed(1)
    case = FAMILIES[name][1]()
    norms = [layer for layer in case.model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    for norm in norms:
        norm.momentum = 0.0
    if norms:
        case.model(case.x, training=True)
    for norm in norms:
        norm.momentum = MOMENTUM
    return case


def group(name: str) -> str:
    """`keras.applications`, `KerasHub` or `layers`."""
    return FAMILIES[name][0]


def images(size: int, count: int = COUNT, low: float = 0.0, high: float = 255.0, channels: int = 3) -> np.ndarray:
    """Smooth random images, float32 [count, size, size, channels]."""
    rng = np.random.default_rng(0)
    at = np.linspace(0, 1, size)
    found = np.zeros((count, size, size, channels))
    for _ in range(4):
        x, y, phase = (rng.uniform(-4, 4, (count, 1, 1, channels)) for _ in range(3))
        found += np.sin(2 * np.pi * (x * at[None, :, None, None] + y * at[None, None, :, None] + phase))
    found += 0.2 * rng.normal(size=found.shape)
    return (low + (high - low) * (np.tanh(found / 2) + 1) / 2).astype(np.float32)


# -- keras.applications --------------------------------------------------------------------------------------------


def _application(name: str, size: int = 32, low: float = -1.0, high: float = 1.0, **settings: Any) -> Any:
    def made() -> Case:
        import keras

        chosen = {"weights": None, "input_shape": (size, size, 3), "classes": 10, "classifier_activation": None}
        return _classifier(getattr(keras.applications, name)(**chosen, **settings), images(size, COUNT, low, high))

    return made


def _classifier(model: Any, x: Any) -> Case:
    import keras

    y = np.random.default_rng(1).integers(0, model.output_shape[-1], COUNT)
    return Case(model, x, y, keras.losses.SparseCategoricalCrossentropy(from_logits=True))


# -- KerasHub ------------------------------------------------------------------------------------------------------


def _hub_resnet(size: int, stages: int) -> Any:
    import keras_hub

    return keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 16, 16, 16][:stages],
        stackwise_num_blocks=[1] * stages,
        stackwise_num_strides=[1, 2, 2, 2][:stages],
        block_type="basic_block",
        image_shape=(size, size, 3),
    )


def _hub_classifier() -> Case:
    import keras_hub

    model = keras_hub.models.ResNetImageClassifier(backbone=_hub_resnet(32, 3), num_classes=10, preprocessor=None)
    return Case(model, images(32, low=0, high=1), np.arange(COUNT) % 10)


def _hub_vit() -> Case:
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3), patch_size=(8, 8), num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
    )
    model = keras_hub.models.ViTImageClassifier(backbone=backbone, num_classes=10, preprocessor=None)
    return Case(model, images(32, low=-1, high=1), np.arange(COUNT) % 10)


def _hub_bert() -> Case:
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=64, num_layers=2, num_heads=2, hidden_dim=32, intermediate_dim=64, max_sequence_length=16
    )
    model = keras_hub.models.BertTextClassifier(backbone=backbone, num_classes=4, preprocessor=None)
    ids = np.random.default_rng(0).integers(0, 64, (COUNT, 16)).astype(np.int32)
    x = {"token_ids": ids, "segment_ids": ids // 33, "padding_mask": np.ones_like(ids)}
    return Case(model, x, np.arange(COUNT) % 4)


def _hub_retinanet() -> Case:
    import keras_hub

    backbone = keras_hub.models.RetinaNetBackbone(
        image_encoder=_hub_resnet(64, 4), min_level=3, max_level=5, use_p5=False, image_shape=(64, 64, 3)
    )
    model = keras_hub.models.RetinaNetObjectDetector(
        backbone, num_classes=3, bounding_box_format="yxyx", preprocessor=None, pre_logits_num_conv_layers=1
    )
    boxes = np.tile(np.array([[[4, 4, 40, 40]]], np.float32), (COUNT, 1, 1))
    return Case(model, images(64, low=-1, high=1), {"boxes": boxes, "labels": np.arange(COUNT)[:, None] % 3})


def _hub_deeplab() -> Case:
    import keras_hub

    backbone = keras_hub.models.DeepLabV3Backbone(
        image_encoder=_hub_resnet(64, 4),
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P4",
        upsampling_size=4,
        dilation_rates=[2, 4],
        low_level_projection_filters=8,
        image_shape=(64, 64, 3),
    )
    model = keras_hub.models.DeepLabV3ImageSegmenter(backbone=backbone, num_classes=3, preprocessor=None)
    classes = np.eye(3, dtype=np.float32)[np.random.default_rng(1).integers(0, 3, (COUNT, 64, 64))]
    return Case(model, images(64, low=-1, high=1), classes)


# -- layers --------------------------------------------------------------------------------------------------------


def _sequence(make: Callable[[Any, Any], list[Any]], steps: int = 12, features: int = 8) -> Callable[[], Case]:
    """A model of layers on [steps, features] that ends in a classifier."""

    def made() -> Case:
        import keras

        x = np.random.default_rng(0).normal(size=(COUNT, steps, features)).astype(np.float32)
        return _classifier(
            keras.Sequential([keras.Input((steps, features)), *make(keras.layers, keras), keras.layers.Dense(4)]), x
        )

    return made


def _vision(make: Callable[[Any], list[Any]], size: int = 16) -> Callable[[], Case]:
    """A model of layers on images that ends in a classifier."""

    def made() -> Case:
        import keras

        pooled = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)]
        model = keras.Sequential([keras.Input((size, size, 3)), *make(keras.layers), *pooled])
        return _classifier(model, images(size, low=-1, high=1))

    return made


def _attention(kind: str, **settings: Any) -> Callable[[], Case]:
    def made() -> Case:
        import keras
        from keras import layers

        inputs = keras.Input((12, 8))
        x = layers.Dense(16)(inputs)
        x = layers.LayerNormalization()(layers.Add()([x, getattr(layers, kind)(**settings)(x, x)]))
        x = layers.GlobalAveragePooling1D()(x)
        data = np.random.default_rng(0).normal(size=(COUNT, 12, 8)).astype(np.float32)
        return _classifier(keras.Model(inputs, layers.Dense(4)(x)), data)

    return made


def _conv3d() -> Case:
    """Without pooling, for which LiteRT has no operator in three dimensions."""
    import keras
    from keras import layers

    parts = [
        layers.Conv3D(8, 3, padding="same", activation="relu"), layers.Conv3D(8, 2, strides=2),
        layers.GlobalAveragePooling3D(), layers.Dense(4),
    ]  # fmt: skip
    x = np.random.default_rng(0).normal(size=(COUNT, 6, 8, 8, 2)).astype(np.float32)
    return _classifier(keras.Sequential([keras.Input((6, 8, 8, 2)), *parts]), x)


def _embedding() -> Case:
    import keras
    from keras import layers

    parts = [layers.Embedding(32, 16), layers.Conv1D(16, 3, activation="relu"), layers.GlobalMaxPooling1D()]
    ids = np.random.default_rng(0).integers(0, 32, (COUNT, 10)).astype(np.int32)
    return _classifier(keras.Sequential([keras.Input((10,), dtype="int32"), *parts, layers.Dense(4)]), ids)


def _einsum() -> Case:
    import keras
    from keras import layers

    parts = [layers.EinsumDense("abc,cd->abd", output_shape=(12, 16), bias_axes="d", activation="relu")]
    parts += [layers.EinsumDense("abc,bcd->ad", output_shape=(8,), bias_axes="d")]
    x = np.random.default_rng(0).normal(size=(COUNT, 12, 8)).astype(np.float32)
    return _classifier(keras.Sequential([keras.Input((12, 8)), *parts, layers.Dense(4)]), x)


def _nested() -> Case:
    import keras
    from keras import layers

    convolve = [layers.Conv2D(8, 3, padding="same"), layers.BatchNormalization(), layers.ReLU()]
    inner = keras.Sequential([keras.Input((16, 16, 8)), *convolve], name="inner")
    start = keras.Input((16, 16, 8))
    middle = keras.Model(start, layers.Add()([start, inner(start), start]), name="middle")
    inputs = keras.Input((16, 16, 3))
    x = middle(layers.Conv2D(8, 3, padding="same", activation="relu")(inputs))
    x = layers.Dense(4)(layers.GlobalAveragePooling2D()(x))
    return _classifier(keras.Model(inputs, x), images(16, low=-1, high=1))


def _shared() -> Case:
    import keras
    from keras import layers

    inputs = keras.Input((16, 16, 3))
    twice = layers.Conv2D(8, 3, padding="same", activation="relu", name="twice")
    x = layers.Conv2D(8, 1)(inputs)
    x = layers.Concatenate()([twice(x), twice(layers.MaxPooling2D(3, 1, "same")(x))])
    x = layers.Dense(4)(layers.GlobalAveragePooling2D()(x))
    return _classifier(keras.Model(inputs, x), images(16, low=-1, high=1))


def _subclassed() -> Case:
    import keras
    from keras import layers, ops

    @keras.saving.register_keras_serializable("paring-coverage")
    class Residual(keras.Model):
        """Calls `keras.ops` between its layers."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.first = layers.Conv2D(8, 3, padding="same")
            self.norm = layers.BatchNormalization()
            self.second = layers.Conv2D(8, 3, padding="same")
            self.head = layers.Dense(4)

        def call(self, x: Any, training: bool | None = None) -> Any:
            x = ops.relu(self.norm(self.first(x), training=training))
            x = ops.concatenate([x + self.second(x), x], axis=-1)
            return self.head(ops.mean(x, axis=(1, 2)))

        def compute_output_shape(self, shape: Any) -> Any:
            return (shape[0], 4)

    model, x = Residual(), images(16, low=-1, high=1)
    model(x[:1])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Case(model, x, np.arange(COUNT) % 4, loss)


def _custom() -> Case:
    import keras
    from keras import layers, ops

    @keras.saving.register_keras_serializable("paring-coverage")
    class Gated(keras.layers.Layer):
        """Two matrices of its own and a vector."""

        def __init__(self, units: int = 16, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.units = units

        def build(self, shape: Any) -> None:
            self.value = self.add_weight(shape=(shape[-1], self.units), name="value")
            self.gate = self.add_weight(shape=(shape[-1], self.units), name="gate")
            self.shift = self.add_weight(shape=(self.units,), initializer="zeros", name="shift")

        def call(self, x: Any) -> Any:
            return ops.matmul(x, self.value) * ops.sigmoid(ops.matmul(x, self.gate) + self.shift)

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "units": self.units}

    x = np.random.default_rng(0).normal(size=(COUNT, 12)).astype(np.float32)
    return _classifier(keras.Sequential([keras.Input((12,)), Gated(), layers.ReLU(), layers.Dense(4)]), x)


FAMILIES: dict[str, tuple[str, Callable[[], Case]]] = {
    "VGG16": ("keras.applications", _application("VGG16")),
    "ResNet50": ("keras.applications", _application("ResNet50")),
    "ResNet50V2": ("keras.applications", _application("ResNet50V2")),
    "InceptionV3": ("keras.applications", _application("InceptionV3", 75)),
    "InceptionResNetV2": ("keras.applications", _application("InceptionResNetV2", 75)),
    "Xception": ("keras.applications", _application("Xception", 71)),
    "MobileNet": ("keras.applications", _application("MobileNet", alpha=0.25)),
    "MobileNetV2": ("keras.applications", _application("MobileNetV2", alpha=0.35)),
    "MobileNetV3Small": ("keras.applications", _application("MobileNetV3Small", low=0, high=255)),
    "DenseNet121": ("keras.applications", _application("DenseNet121")),
    "NASNetMobile": ("keras.applications", _application("NASNetMobile")),
    "EfficientNetB0": ("keras.applications", _application("EfficientNetB0", low=0, high=255)),
    "EfficientNetV2B0": ("keras.applications", _application("EfficientNetV2B0", low=0, high=255)),
    "ConvNeXtTiny": ("keras.applications", _application("ConvNeXtTiny", low=0, high=255)),
    "ResNet": ("KerasHub", _hub_classifier),
    "ViT": ("KerasHub", _hub_vit),
    "BERT": ("KerasHub", _hub_bert),
    "RetinaNet": ("KerasHub", _hub_retinanet),
    "DeepLabV3+": ("KerasHub", _hub_deeplab),
    "LSTM": ("layers", _sequence(lambda ls, _: [ls.LSTM(8, return_sequences=True), ls.LSTM(8)])),
    "GRU": ("layers", _sequence(lambda ls, _: [ls.GRU(8)])),
    "SimpleRNN": ("layers", _sequence(lambda ls, _: [ls.SimpleRNN(8)])),
    "Bidirectional": ("layers", _sequence(lambda ls, _: [ls.Bidirectional(ls.LSTM(8))])),
    "MultiHeadAttention": ("layers", _attention("MultiHeadAttention", num_heads=2, key_dim=8)),
    "GroupQueryAttention": (
        "layers",
        _attention("GroupQueryAttention", head_dim=8, num_query_heads=4, num_key_value_heads=2),
    ),
    "Conv1D": (
        "layers",
        _sequence(
            lambda ls, _: [
                ls.Conv1D(16, 3, padding="causal", activation="relu"),
                ls.SeparableConv1D(16, 3, padding="same"),
                ls.BatchNormalization(),
                ls.ReLU(),
                ls.Flatten(),
            ]
        ),
    ),
    "Conv3D": ("layers", _conv3d),
    "Conv2DTranspose": (
        "layers",
        _vision(
            lambda ls: [
                ls.Conv2D(8, 3, strides=2, padding="same", activation="relu"),
                ls.Conv2DTranspose(8, 3, strides=2, padding="same"),
                ls.BatchNormalization(),
                ls.ReLU(),
            ]
        ),
    ),
    "SeparableConv2D": (
        "layers",
        _vision(
            lambda ls: [
                ls.SeparableConv2D(8, 3, activation="relu"),
                ls.DepthwiseConv2D(3),
                ls.BatchNormalization(),
                ls.ReLU(),
            ]
        ),
    ),
    "GroupedConv": (
        "layers",
        _vision(lambda ls: [ls.Conv2D(8, 3), ls.Conv2D(16, 3, groups=4, activation="relu")]),
    ),
    "Embedding": ("layers", _embedding),
    "EinsumDense": ("layers", _einsum),
    "nested": ("layers", _nested),
    "shared": ("layers", _shared),
    "subclassed": ("layers", _subclassed),
    "custom": ("layers", _custom),
}
