"""The exported file against the model that was evaluated, number by number, and against TensorFlow's own converter."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import paring
from paring.formats.tflite.view import view

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
keras: Any = None


@pytest.fixture(autouse=True, scope="module")
def _keras(keras_on_tensorflow: ModuleType) -> None:
    global keras
    keras = keras_on_tensorflow


def network() -> Any:
    """All that has an exact form: folded, depthwise, added, averaged, gated, gathered, dense on two and three dimensions."""
    layers = keras.layers
    keras.utils.set_random_seed(1)
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(x)))
    y = layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x))
    y = layers.BatchNormalization()(layers.Conv2D(8, 1, use_bias=False)(layers.ReLU(6.0)(y)))
    x = layers.AveragePooling2D(2)(layers.Add()([x, y]))
    x = layers.Activation("hard_silu")(x)
    gate = layers.Conv2D(8, 1)(layers.GlobalAveragePooling2D(keepdims=True)(x))
    gate = layers.ReLU(6.0)(layers.GlobalAveragePooling2D(keepdims=True)(gate) + 3.0) * (1 / 6)
    x = layers.Multiply()([x, gate])
    x = layers.Dense(16, activation="relu")(layers.Reshape((16, 8))(x))
    return keras.Model(inputs, layers.Dense(4)(layers.Flatten()(x)))


@pytest.fixture(scope="module")
def trained(_keras: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, np.ndarray, Path]:
    x = np.random.default_rng(0).standard_normal((64, 8, 8, 3)).astype(np.float32)
    y = (4 * (x.mean((1, 2, 3)) - x.mean((1, 2, 3)).min())).astype(np.int32) % 4
    model = network()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=2, verbose=0)
    paring.attach(model, "int8", x)
    model.fit(x, y, epochs=1, verbose=0)
    out = tmp_path_factory.mktemp("export") / "model.tflite"
    paring.export(model, out)
    return model, x, out


def test_the_file_gives_what_predict_gave_bit_for_bit(trained: tuple[Any, np.ndarray, Path]):
    from ai_edge_litert.interpreter import Interpreter

    model, x, out = trained
    shown = model.predict(x, verbose=0)
    interpreter = Interpreter(str(out), num_threads=1)
    interpreter.allocate_tensors()
    (taken,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    for sample, wanted in zip(x, shown, strict=True):
        interpreter.set_tensor(taken["index"], sample[None])
        interpreter.invoke()
        np.testing.assert_array_equal(interpreter.get_tensor(made["index"])[0], wanted)
    assert len(np.unique(shown)) > 20  # not a constant


def positions() -> Any:
    class Positions(keras.layers.Layer):  # type: ignore[name-defined, misc]
        def build(self, shape: Any) -> None:
            self.table = self.add_weight(shape=shape[1:], initializer="random_normal", name="table")

        def call(self, x: Any) -> Any:
            return x + self.table

    return Positions(name="positions")


def test_affine_layers_separable_convolutions_lone_normalization_and_pools_beside_each_other(tmp_path: Path):
    from ai_edge_litert.interpreter import Interpreter

    layers = keras.layers
    keras.utils.set_random_seed(2)
    inputs = keras.Input((8, 8, 3))
    x = layers.Normalization(mean=[0.5, -0.4, 0.3], variance=[1.5, 2.0, 0.7])(layers.Rescaling(0.9)(inputs))
    x = layers.Normalization(mean=[0.0, 0.0, 0.0], variance=[1.0, 1.0, 1.0])(x)  # does nothing
    x = layers.ReLU()(positions()(layers.Conv2D(8, 3)(x)))  # read twice: its grid is not that of the averages on it
    y = layers.BatchNormalization()(layers.SeparableConv2D(8, 3, padding="same", use_bias=False, depth_multiplier=2)(x))
    x = layers.Add()([layers.AveragePooling2D(3, 1, "same")(x), y])
    x = layers.Concatenate()([layers.Activation("relu")(layers.BatchNormalization()(x)), layers.Activation("relu")(x)])
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
    data = np.random.default_rng(0).standard_normal((32, 8, 8, 3)).astype(np.float32)
    attachment = paring.attach(model, "int8", data)
    (pooled,) = [s for o, (s, *_) in attachment.sites.outputs.items() if type(o).__name__ == "AveragePooling2D"]
    before = attachment.range(pooled.root())
    model.compile("sgd", "mse")
    model.fit(data, np.zeros((32, 3)), epochs=3, verbose=0)
    after = attachment.range(pooled.root())
    assert (
        after[1] != before[1] and after[1] > 0.9 * before[1]
    )  # moved by what the convolution makes, not by averages of it
    out = tmp_path / "model.tflite"
    paring.export(model, out)
    shown = model.predict(data, verbose=0)
    interpreter = Interpreter(str(out), num_threads=1)
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], data.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], data)
    interpreter.invoke()
    np.testing.assert_array_equal(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]), shown)


def test_a_float_file_of_a_pruned_model_with_normalization(tmp_path: Path):
    layers = keras.layers
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2DTranspose(4, 3)(layers.BatchNormalization()(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.ReLU()(x))))
    data = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    paring.attach(model, {"version": 1, "rules": [{"kind": "*", "apply": {"sparsify": {"sparsity": 0.5}}}]}, data)
    paring.export(model, tmp_path / "model.tflite")
    graph = view(paring.load(tmp_path / "model.tflite"))
    used = [t for op in graph.ops for _, t in graph.weights_of(op) if t.weight is not None and len(t.shape) > 1]
    shares = [float((t.weight.read() == 0).mean()) for t in used if t.weight is not None and np.prod(t.shape) > 100]
    assert len(shares) == 2 and min(shares) >= 0.49


def test_it_holds_the_numbers_that_the_converter_makes_of_the_same_marks(
    trained: tuple[Any, np.ndarray, Path], tmp_path: Path, tensorflow: Any
):
    from paring.training.attaching import attachment_of
    from paring.training.exporting import write_marked

    model, _, out = trained
    write_marked(attachment_of(model), tmp_path / "marked", static_batch=True)
    converter = tensorflow.lite.TFLiteConverter.from_saved_model(str(tmp_path / "marked"))
    converter.optimizations = [tensorflow.lite.Optimize.DEFAULT]  # integers from the fake quantization in the graph
    theirs, ours = paring.load(converter.convert()), paring.load(out)

    def constants(model: Any) -> list[tuple[str, list[np.ndarray]]]:
        graph = view(model)
        found = []
        for op in graph.ops:
            if op.kind in ("conv2d", "depthwise_conv2d", "dense"):
                weights = [graph.tensors[t] for t in op.inputs if t is not None and graph.tensors[t].weight is not None]
                arrays = [np.asarray(t.weight.read()) for t in weights if t.weight is not None]
                found.append((op.kind, [*arrays, *(t.quantization.scale for t in weights if t.quantization)]))
        return found

    mine, other = constants(ours), constants(theirs)
    assert len(mine) == 6 and [kind for kind, _ in mine] == [kind for kind, _ in other]
    for (_, here), (_, there) in zip(mine, other, strict=True):
        for a, b in zip(here, there, strict=True):
            if a.dtype.kind == "i":
                np.testing.assert_array_equal(a, b)
            else:
                np.testing.assert_allclose(a, b, rtol=1e-6)
