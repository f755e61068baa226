"""The SavedModels that figures are measured on, what paring writes of them, and the way a user would do it by hand.

TensorFlow and Keras are imported inside the functions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import figures
import numpy as np
import peer


def module(name: str, path: Path) -> Any:
    """A module from a file, whatever else is called alike."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


models = module("models_of_tests", figures.REPOSITORY / "tests" / "saved_models.py")

BLOCKS = {"sparsify": {"sparsity": 0.9, "pattern": "16x1", "allocation": "uniform"}}
QUADS = {"sparsify": {"sparsity": 0.9, "pattern": "16x4", "allocation": "uniform"}}  # what int8 dot products take
# What TensorFlow's tool and the first experiment leave float.
LARGE = [{"quantize": {"weights": "int8", "activations": "float"}}]
EQUAL = "portable weight-only-int8, from 1024 elements on"
# Recipe and runtime of each version that paring writes.
VERSIONS: Mapping[str, tuple[Any, str]] = {
    "portable weight-only-int8": ("weight-only-int8", "portable"),
    "portable bf16-int8": ("bf16-int8", "portable"),
    "native bf16-int8": ("bf16-int8", "native"),
    "native weight-only-int4": ("weight-only-int4", "native"),
    EQUAL: (LARGE, "portable"),
    "native 90 % blocks, float32": ([BLOCKS], "native"),
    "native 90 % blocks, int8": ([QUADS, {"quantize": {"weights": "int8", "activations": "dynamic"}}], "native"),
}


def write(version: str, source: Path, target: Path) -> str | None:
    """Writes one of `VERSIONS` of a SavedModel; gives the reason where there is none. Nothing is run."""
    import paring
    from paring.errors import ParingError

    recipe, runtime = VERSIONS[version]
    if isinstance(recipe, list):
        chosen = {"kind": "*", "min_size": 1024} if recipe is LARGE else {"kind": "dense|matmul|conv2d"}
        recipe = {"version": 1, "rules": [{**chosen, "apply": recipe}]}
    settings: dict[str, Any] = {}
    if runtime == "native":
        if (why := no_operators()) is not None:
            return why
        settings = {"runtime": "native"}
    try:
        paring.optimize(source, recipe, output=target, overwrite=True, verified=False, **settings)
    except ParingError as error:
        return peer.plain(str(error))
    return None


def no_operators() -> str | None:
    """Why nothing can be written for the native runtime and run here."""
    import paring

    if "runtime" not in inspect.signature(paring.optimize).parameters:
        return "this paring writes nothing for the native runtime"
    try:
        import paring.tensorflow
    except Exception as error:
        return f"paring.tensorflow does not import: {peer.plain(str(error))}"
    return None


def variables_bytes(folder: Path) -> int:
    """Bytes of the folder `variables`."""
    return sum(file.stat().st_size for file in (folder / "variables").glob("*"))


def int8_elements(folder: Path, source: Path) -> int:
    """How many weights are int8 in a SavedModel, in variables and constants, each once; `source` is the float model.

    Its shapes count: what is stored may have scales among its bytes.
    """
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    found: dict[Any, int] = {}
    prefix = folder / "variables" / "variables"
    if prefix.with_name("variables.index").is_file():
        reader = tf.train.load_checkpoint(str(prefix))
        types = reader.get_variable_to_dtype_map()
        shapes = reader.get_variable_to_shape_map()
        exact = tf.train.load_checkpoint(str(source / "variables" / "variables")).get_variable_to_shape_map()
        found |= {key: int(np.prod(exact.get(key, shapes[key]))) for key in shapes if types[key] == tf.int8}
    read = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    for meta in read.meta_graphs:
        bodies = [function.node_def for function in meta.graph_def.library.function]
        for node in (node for nodes in (meta.graph_def.node, *bodies) for node in nodes):
            value = node.attr["value"].tensor if node.op == "Const" else None
            if value is not None and value.dtype == tf.int8.as_datatype_enum and len(value.tensor_content) >= 256:
                found[hashlib.sha256(value.tensor_content).digest()] = len(value.tensor_content)
    return sum(found.values())


# -- models --------------------------------------------------------------------------------------------------------


def chain(layers: int, width: int) -> Callable[[Path], None]:
    """Products with square matrices, ReLU between them."""

    def build(folder: Path) -> None:
        import tensorflow as tf

        class Chain(tf.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weights = [tf.Variable(matrix(width, layer), name=f"w{layer}") for layer in range(layers)]

            @tf.function(input_signature=[tf.TensorSpec([None, width], name="x")])
            def run(self, x: Any) -> Any:
                for weight in self.weights:
                    x = tf.nn.relu(tf.matmul(x, weight))
                return {"y": x}

        made = Chain()
        tf.saved_model.save(made, str(folder), signatures={"serving_default": made.run})

    return build


def matrix(width: int, layer: int) -> np.ndarray:
    """Weights of channels of different size, which keep the size of what passes through them; float32 [width, width]."""
    rng = np.random.default_rng(layer)
    values = rng.standard_normal((width, width), np.float32)
    values *= rng.uniform(0.5, 2.0, width).astype(np.float32)
    return values * np.float32((2 / width) ** 0.5)


def constants(folder: Path) -> None:
    """Weights that are constants of the graph."""
    import tensorflow as tf

    class Frozen(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 64], name="x")])
        def run(self, x: Any) -> Any:
            return {"y": tf.matmul(tf.nn.relu(tf.matmul(x, matrix(64, 0))), matrix(64, 1))}

    made = Frozen()
    tf.saved_model.save(made, str(folder), signatures={"serving_default": made.run})


def _keras(make: Callable[[Any, Any], Any]) -> Callable[[Path], Any]:
    """Keras' own export; `build` gives the Keras model."""

    def build(folder: Path) -> Any:
        import keras

        keras.utils.set_random_seed(0)
        model = make(keras, keras.layers)
        model.export(str(folder), verbose=False)
        return model

    return build


def _tests(make: str, **settings: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        import tensorflow as tf

        getattr(models, make)(tf, folder, **settings)

    return build


# Letters are those of the first experiment; the others are edges.
MODELS: Mapping[str, Callable[[Path], Any]] = {
    "a: Keras": _keras(lambda keras, _: models.keras_model(keras, rows=2000, width=64)),
    "b: functions": _tests("functions", width=256),
    "c: TF1": _tests("tf1", resource=True, times=8),
    "c0: TF1, references": _tests("tf1", resource=False, times=8),
    "e: 4 x 4096^2": chain(4, 4096),
    "every operator": _tests("operators"),
    "variables that stay": _tests("kept"),
    "constants": constants,
}
NETWORKS: Mapping[str, Callable[[Path], Any]] = {
    "Dense": _keras(
        lambda keras, ls: keras.Sequential(
            [keras.Input((512,)), ls.Dense(1024, "relu"), ls.Dense(1024, "relu"), ls.Dense(10)]
        )
    ),
    "Conv2D": _keras(
        lambda keras, ls: keras.Sequential(
            [
                keras.Input((32, 32, 64)),
                *(ls.Conv2D(width, 3, padding="same", activation="relu") for width in (128, 256, 256)),
                ls.GlobalAveragePooling2D(),
                ls.Dense(64),
            ]
        )
    ),
    "Embedding": _keras(
        lambda keras, ls: keras.Sequential(
            [keras.Input((16,), dtype="int32"), ls.Embedding(20000, 64), ls.GlobalAveragePooling1D(), ls.Dense(64)]
        )
    ),
    "LSTM": _keras(
        lambda keras, ls: keras.Sequential(
            [keras.Input((16, 64)), ls.LSTM(256, return_sequences=True), ls.LSTM(256), ls.Dense(64)]
        )
    ),
    "all of them": _keras(lambda keras, _: models.keras_model(keras, rows=20000, width=256)),
}


# -- by hand -------------------------------------------------------------------------------------------------------


def by_hand(weight: Any, tf: Any) -> tuple[Any, Any]:
    """A weight as a user would store it: an int8 variable, and a scale for each index of the last dimension."""
    values = np.asarray(weight, np.float32)
    scale = np.maximum(np.abs(values).max(axis=tuple(range(values.ndim - 1))), 1e-12) / np.float32(127)
    return tf.Variable(np.rint(values / scale).astype(np.int8), trainable=False), tf.constant(scale)


def naive_chain(layers: int, width: int, folder: Path) -> None:
    """`chain` by hand: int8 variables, each cast and scaled as a whole before its product."""
    import tensorflow as tf

    class Naive(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pairs = [by_hand(matrix(width, layer), tf) for layer in range(layers)]

        @tf.function(input_signature=[tf.TensorSpec([None, width], name="x")])
        def run(self, x: Any) -> Any:
            for weight in [tf.cast(codes, tf.float32) * scale for codes, scale in self.pairs]:
                x = tf.nn.relu(tf.matmul(x, weight))
            return {"y": x}

    made = Naive()
    tf.saved_model.save(made, str(folder), signatures={"serving_default": made.run})


def naive_keras(model: Any, folder: Path) -> None:
    """A Keras model by hand: its matrices as int8 variables, cast and scaled as a whole, through `stateless_call`."""
    import tensorflow as tf

    others = [v.numpy() for v in model.non_trainable_variables]

    class Naive(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stored = [
                by_hand(v, tf) if len(v.shape) > 1 else (tf.Variable(v), None) for v in model.trainable_variables
            ]

        @tf.function(input_signature=[tf.TensorSpec([None, *model.inputs[0].shape[1:]], model.inputs[0].dtype)])
        def run(self, x: Any) -> Any:
            weights = [v if s is None else tf.cast(v, tf.float32) * s for v, s in self.stored]
            return {"y": model.stateless_call(weights, others, x)[0]}

    made = Naive()
    tf.saved_model.save(made, str(folder), signatures={"serving_default": made.run})
