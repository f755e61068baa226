"""Kinds of models that train behind attach: nested, shared, subclassed, frozen, with losses of their own, with many inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import paring

# Keras variables predate NumPy 2's `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
keras: Any = None
CHAIN = {"version": 1, "rules": [{"kind": "*", "apply": [
    {"sparsify": {"sparsity": 0.5}}, {"cluster": {"clusters": 4}},
    {"quantize": {"weights": "int8", "activations": "int8"}},
]}]}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _keras(keras_on_tensorflow: ModuleType) -> None:
    global keras
    keras = keras_on_tensorflow
    keras.utils.set_random_seed(0)


def images(count: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 6, 6, 2)).astype(np.float32)


def layers() -> Any:
    return keras.layers


def sequential() -> Any:
    return keras.Sequential([
        keras.Input((6, 6, 2)), layers().Conv2D(4, 3, activation="relu"), layers().Flatten(), layers().Dense(2)
    ])  # fmt: skip


def nested() -> Any:
    inputs = keras.Input((6, 6, 2))
    middle = keras.Input((4, 4, 4))
    inner = keras.Model(middle, layers().Conv2D(4, 3, activation="relu", name="deep")(middle), name="inner")
    return keras.Model(inputs, layers().Dense(2)(layers().Flatten()(inner(layers().Conv2D(4, 3)(inputs)))))


def shared() -> Any:
    inputs = keras.Input((6, 6, 2))
    twice = layers().Conv2D(2, 3, padding="same", activation="relu", name="twice")
    return keras.Model(inputs, layers().Dense(2)(layers().Flatten()(twice(twice(inputs)))))


def subclassed() -> Any:
    class Net(keras.Model):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.conv, self.norm = layers().Conv2D(4, 3), layers().BatchNormalization()
            self.head, self.drop = layers().Dense(2), layers().Dropout(0.1)

        def call(self, x: Any, training: bool = False) -> Any:
            x = keras.ops.relu(self.norm(self.conv(x), training=training))
            return self.head(self.drop(keras.ops.reshape(x, (-1, 64)), training=training))

    model = Net()
    model(images(2))
    return model


def untraceable() -> Any:
    class Net(keras.Model):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.conv, self.head = layers().Conv2D(4, 3), layers().Dense(2)

        def call(self, x: Any, training: bool = False) -> Any:
            x = self.conv(x)
            if training:  # another graph than in evaluation
                x = x + 0.1 * keras.ops.sin(x)
            return self.head(keras.ops.reshape(x, (-1, 64)))

    model = Net()
    model(images(2))
    return model


def own_layer() -> Any:
    class Scaled(layers().Layer):  # type: ignore[name-defined, misc]
        def build(self, shape: Any) -> None:
            self.matrix = self.add_weight(shape=(shape[-1], 6), name="matrix")
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

        def call(self, x: Any) -> Any:
            self.calls.assign_add(1.0)
            self.add_loss(1e-3 * keras.ops.sum(keras.ops.square(self.matrix)))
            return keras.ops.matmul(x, self.matrix)

    inputs = keras.Input((6, 6, 2))
    return keras.Model(inputs, layers().Dense(2)(Scaled(name="own")(layers().Flatten()(inputs))))


def regularized() -> Any:
    inputs = keras.Input((6, 6, 2))
    x = layers().Conv2D(4, 3, kernel_regularizer="l2", activity_regularizer="l2", kernel_constraint="max_norm")(inputs)
    return keras.Model(inputs, layers().Dense(2)(layers().Flatten()(x)))


def transferred() -> Any:
    """A frozen base with batch normalization, called with training=False."""
    inputs, middle = keras.Input((6, 6, 2)), keras.Input((6, 6, 2))
    base = keras.Model(middle, layers().ReLU()(layers().BatchNormalization(name="norm")(layers().Conv2D(4, 3)(middle))))
    base.trainable = False
    x = layers().Flatten()(base(inputs, training=False))
    return keras.Model(inputs, layers().Dense(2)(layers().Dropout(0.2, seed=1)(x)))


def frozen_norm() -> Any:
    inputs = keras.Input((6, 6, 2))
    norm = layers().BatchNormalization(name="norm")
    norm.trainable = False
    return keras.Model(inputs, layers().Dense(2)(layers().Flatten()(norm(layers().Conv2D(4, 3)(inputs)))))


KINDS = (sequential, nested, shared, subclassed, untraceable, own_layer, regularized, transferred, frozen_norm)


@pytest.mark.parametrize("build", KINDS, ids=lambda f: f.__name__)
def test_every_kind_of_model_trains_and_keeps_its_promises(build: Callable[[], Any], tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    model, x = build(), images()
    y = (x[:, 0, 0, 0] > 0).astype(np.int32)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    names, shown = [layer.name for layer in model.layers], []
    model.summary(print_fn=lambda line, **_: shown.append(line))
    fixed = {v.path: np.array(v) for v in model.non_trainable_variables if "seed" not in v.path and v.ndim}
    attachment = paring.attach(model, CHAIN, x)
    behind: list[str] = []
    model.summary(print_fn=lambda line, **_: behind.append(line))
    assert [layer.name for layer in model.layers] == names and shown == behind
    model.fit(x, y, 8, epochs=2, verbose=0)
    loss = model.evaluate(x, y, verbose=0)
    assert np.isfinite(loss)
    # What is frozen stays as it was, the statistics of a frozen batch normalization too.
    frozen = [layer for layer in model._flatten_layers() if not layer.trainable and not layer.name.startswith("paring")]
    held = {v.path for layer in frozen for v in layer.variables if "mask" not in v.path} & set(fixed)
    pruned = {t.part.variable.path for c in attachment.compressed.values() for t in c.targets}
    for variable in model.variables:
        if variable.path in held - pruned:
            assert np.array_equal(fixed[variable.path], np.array(variable)), variable.path
    before = model.predict(x, verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    model.load_weights(tmp_path / "m.weights.h5")
    assert np.array_equal(before, model.predict(x, verbose=0))
    targets = [t for c in attachment.compressed.values() for t in c.targets]
    assert targets
    paring.finalize(model)
    for target in targets:
        matrix = target.part.layout.matrix(np, np.array(target.part.variable))
        assert abs(np.mean(matrix == 0) - 0.5) < 0.1, target.part.variable.path
        assert max(len(np.unique(row)) for row in matrix) <= 4, target.part.variable.path


def test_losses_reach_the_optimizer() -> None:
    """What layers add, regularizers of weights and of activations: the loss of a step is that of the float model."""
    x = images()
    for build in (own_layer, regularized):
        keras.utils.set_random_seed(1)
        model = build()
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
        y = np.zeros(len(x), np.int32)
        wanted = model.evaluate(x, y, len(x), verbose=0)
        sixteen = {"quantize": {"weights": "int8", "activations": "float"}}
        paring.attach(model, {"version": 1, "rules": [{"kind": "*", "apply": sixteen}]})
        assert np.isclose(model.evaluate(x, y, len(x), verbose=0), wanted, rtol=0.02)
        assert np.isclose(model.fit(x, y, len(x), verbose=0).history["loss"][0], wanted, rtol=0.02)


def test_dropout_is_that_of_the_float_model() -> None:
    """Seeds move on as they do without us."""
    x = images()
    found = []
    for attached in (False, True):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6, 6, 2))
        x_ = layers().Dropout(0.5, seed=4)(layers().Flatten()(inputs))
        model = keras.Model(inputs, layers().Dense(2, kernel_initializer="ones")(x_))
        if attached:
            one = {"quantize": {"weights": "float16", "activations": "float"}}
            paring.attach(model, {"version": 1, "rules": [{"kind": "*", "apply": one}]})
        found.append([np.array(model(x, training=True)) for _ in range(2)])
    assert np.allclose(found[0], found[1], rtol=1e-3, atol=1e-3) and not np.allclose(found[0][0], found[0][1])


def test_dicts_lists_and_several_outputs(tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    inputs = {"image": keras.Input((6, 6, 2), name="image"), "more": keras.Input((4,), name="more")}
    x = layers().Flatten()(layers().Conv2D(3, 3, activation="relu")(inputs["image"]))
    x = layers().Concatenate()([x, layers().Dense(6, activation="relu")(inputs["more"])])
    outputs = {"a": layers().Dense(2, name="a")(x), "b": layers().Dense(3, name="b")(x)}
    model = keras.Model(inputs, outputs)
    batch = {"image": images(), "more": images()[:, 0, :2].reshape(16, -1)}
    paring.attach(model, CHAIN, batch)

    def values(found: Any) -> list[Any]:
        return [found["a"], found["b"]]

    for training in (True, False):
        assert [v.shape for v in values(model(batch, training=training))] == [(16, 2), (16, 3)]
    result = paring.export(model, tmp_path / "m.tflite")
    assert result.model is not None and (tmp_path / "m.tflite").exists()


def test_attaching_does_not_run_code_that_writes() -> None:
    class Counted(keras.layers.Layer):  # type: ignore[name-defined, misc]
        def build(self, shape: Any) -> None:
            self.table = self.add_weight(shape=shape[1:], name="table")
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

        def call(self, x: Any) -> Any:
            self.calls.assign_add(1.0)
            return x + self.table

    inputs = keras.Input((8,))
    counted = Counted()
    model = keras.Model(inputs, layers().Dense(2)(counted(inputs)))
    before = float(counted.calls)
    paring.attach(model, {"version": 1, "rules": [{"kind": "*", "apply": {"sparsify": {"sparsity": 0.5}}}]})
    assert float(counted.calls) == before
