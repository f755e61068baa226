"""SavedModels for tests: Keras' export, a tf.Module with all that functions do, one operator of each kind, TensorFlow 1."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

WEIGHTS = {  # of `operators`: shape, and the dimensions whose every index gets a scale
    "a": ((32, 24), (1,)),
    "right": ((20, 24), (0,)),
    "turned": ((24, 20), (0,)),
    "batch": ((4, 24, 20), (0, 2)),
    "kernel": ((3, 3, 4, 16), (3,)),
    "kernel1": ((5, 8, 16), (2,)),
    "kernel3": ((2, 3, 3, 4, 16), (4,)),
    "depth": ((3, 3, 16, 4), (2, 3)),
    "transposed": ((3, 3, 16, 8), (2,)),
    "joined": ((8, 3, 4, 6), (2, 3)),
    "split": ((24, 36), (1,)),
    "table": ((40, 16), (0,)),
    "columns": ((16, 40), (1,)),
    "heads": ((20, 4, 8), (1, 2)),
    "left": ((30, 20), (0,)),
    "invariant": ((20, 20), (1,)),
    "one": ((20, 20), (1,)),
    "two": ((20, 20), (1,)),
}


def scaled(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights of channels of different size."""
    values = random.normal(size=shape) * random.uniform(0.5, 2.0, shape[-1])
    return (values / np.sqrt(shape[0])).astype(np.float32)


def operators(tf: Any, folder: Path) -> Any:
    """One operator of each kind; `body` serves two variables. Gives the module."""
    random = np.random.default_rng(3)

    class Operators(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (shape, _) in WEIGHTS.items():
                setattr(self, name, tf.Variable(scaled(random, *shape), name=name))

        @tf.function
        def body(self, x, w):
            return tf.tanh(tf.matmul(x, w))

        @tf.function(input_signature=[tf.TensorSpec([2, 32], name="x"), tf.TensorSpec([2, 8, 8, 4], name="image")])
        def run(self, x, image):
            short, mid = x[:, :20], x[:, :24]
            conv = tf.nn.conv2d(image, self.kernel, 1, "SAME")
            heads = tf.einsum("bi,ihk->bhk", short, self.heads)
            loop = tf.while_loop(lambda i, z: i < 2, lambda i, z: (i + 1, self.body(z, self.two)), [0, short])
            fixed = tf.convert_to_tensor(self.invariant)
            hoisted = tf.while_loop(lambda i, z: i < 2, lambda i, z: (i + 1, tf.matmul(z, fixed)), [0, short])
            return {
                "dense": tf.matmul(x, self.a),
                "right": tf.matmul(mid, self.right, transpose_b=True),
                "turned": tf.matmul(short, tf.transpose(self.turned)),
                "both": tf.matmul(short, self.turned, transpose_b=True),
                "batch": tf.matmul(tf.tile(mid[None], [4, 1, 1]), self.batch),
                "batch_turned": tf.matmul(tf.tile(short[None], [4, 1, 1]), self.batch, transpose_b=True),
                "conv": conv,
                "conv1d": tf.nn.conv1d(tf.reshape(image, [2, 32, 8]), self.kernel1, 1, "SAME"),
                "conv3d": tf.nn.conv3d(tf.stack([image] * 3, 1), self.kernel3, [1] * 5, "SAME"),
                "depthwise": tf.nn.depthwise_conv2d(conv, self.depth, [1] * 4, "SAME"),
                "transposed": tf.nn.conv2d_transpose(
                    tf.reshape(image, [2, 8, 4, 8]), self.transposed, [2, 16, 8, 16], 2
                ),
                "joined": tf.matmul(mid, tf.reshape(self.joined, [24, 24])),
                "split": tf.matmul(x[:, :9], tf.reshape(self.split, [9, 96])),
                "rows": tf.gather(self.table, [[1, 3], [0, 39]]),
                "columns": tf.gather(tf.identity(self.columns), [1, 3, 3], axis=1),
                "by_batch": tf.gather(self.table, tf.zeros([40, 2], tf.int32), batch_dims=1),
                "heads": heads,
                "back": tf.einsum("...hk,ihk->...i", heads, self.heads),
                "left": tf.matmul(self.left, short, transpose_b=True),
                "one": self.body(short, self.one),
                "two": self.body(short, self.two),
                "product": tf.matmul(self.one, self.two),
                "plain": self.one * short[0],
                "loop": loop[1],
                "hoisted": hoisted[1],
            }

    module = Operators()
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.run})
    return module


def functions(tf: Any, folder: Path, width: int = 32) -> None:
    """Loop, branch, a weight that is shared, two signatures, a table from an asset, text, a counter, a method."""
    random = np.random.default_rng(0)
    words = folder.parent / "words.txt"
    words.write_text("a\nb\nc\n", encoding="utf-8")

    class Functions(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = tf.Variable(scaled(random, width, width), name="shared")
            self.table = tf.Variable(scaled(random, 50, width), name="table")
            self.heads = tf.Variable(scaled(random, width, 4, width // 2), name="heads")
            self.yes = tf.Variable(scaled(random, width, width), name="yes")
            self.no = tf.Variable(scaled(random, width, width), name="no")
            self.fed = tf.Variable(scaled(random, width, width), name="fed")
            self.unread = tf.Variable(scaled(random, width, width), name="unread")
            self.steps = tf.Variable(0, dtype=tf.int64, name="steps")
            self.asset = tf.saved_model.Asset(str(words))
            start = tf.lookup.TextFileInitializer(
                self.asset, tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
            )
            self.lookup = tf.lookup.StaticHashTable(start, 0)

        @tf.function(input_signature=[tf.TensorSpec([None, width])])
        def run(self, x):
            self.steps.assign_add(1)
            _, x = tf.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, tf.tanh(tf.matmul(x, self.shared))), [0, x])
            x = tf.cond(
                tf.reduce_sum(x) > 0, lambda: tf.matmul(x, self.yes), lambda: tf.matmul(x, self.no, transpose_b=True)
            )
            heads = tf.einsum("bi,ihd->bhd", x, self.heads)
            return {
                "y": tf.reshape(heads, [-1, 2 * width]) + tf.tile(tf.matmul(x, self.fed), [1, 2]),
                "n": self.steps.read_value(),
            }

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def words(self, text):
            rows = tf.nn.embedding_lookup(self.table, self.lookup.lookup(text))
            return {"v": tf.matmul(rows, self.shared), "text": tf.strings.join([text, "!"])}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)])
        def embed(self, rows):
            return tf.gather(self.table, rows)

        @tf.function(input_signature=[tf.TensorSpec([width, width])])
        def feed(self, values):
            return self.fed.assign(values)

    module = Functions()
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.run, "words": module.words})


def keras_model(keras: Any, rows: int = 400, width: int = 48) -> Any:
    """Embedding, LSTM, Conv2D, Dense."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    ids = keras.Input((12,), dtype="int32", name="ids")
    x = layers.Embedding(rows, 32)(ids)
    x = layers.LSTM(width, return_sequences=True)(x)
    x = layers.Conv2D(32, 3)(layers.Reshape((12, width, 1))(x))
    x = layers.Dense(10)(layers.Dense(40, activation="relu")(layers.Flatten()(x)))
    return keras.Model(ids, x)


def keras_export(keras: Any, folder: Path) -> None:
    """`keras_model` as Keras exports it."""
    keras_model(keras).export(str(folder), verbose=False)


def tf1(tf: Any, folder: Path, *, resource: bool, times: int = 1) -> None:
    """Variables of TensorFlow 1, four signatures, one of which assigns, and a loop of frames."""
    v1, x40, x48, x32 = tf.compat.v1, 40 * times, 48 * times, 32 * times
    random = np.random.default_rng(0)
    v1.disable_control_flow_v2()
    try:
        with v1.Graph().as_default(), v1.Session() as session:
            x = v1.placeholder(tf.float32, [None, x40], "x")
            first = v1.get_variable("first", initializer=scaled(random, x40, x48), use_resource=resource)
            drawn = v1.get_variable("drawn", shape=(x48, x32), use_resource=resource)
            fed = v1.get_variable("fed", shape=(x48, x32), use_resource=resource)
            square = v1.get_variable("square", initializer=scaled(random, x48, x48), use_resource=resource)
            kernel = v1.get_variable("kernel", shape=(3, 3, 1, 32), use_resource=resource)
            hidden = tf.nn.relu(v1.matmul(x, first))
            y = v1.matmul(hidden, drawn, name="y")
            image = tf.nn.conv2d(tf.reshape(hidden, [-1, 6 * times, 8, 1]), kernel, 1, "SAME", name="z")
            _, turns = v1.while_loop(
                lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(v1.matmul(h, square))), [0, hidden]
            )
            given = v1.placeholder(tf.float32, [x48, x32], "given")
            with tf.control_dependencies([v1.assign(fed, given)]):
                done = tf.reduce_sum(given)
            session.run(v1.global_variables_initializer())
            info = v1.saved_model.build_tensor_info

            def signature(inputs, outputs):
                inputs, outputs = ({k: info(t) for k, t in side.items()} for side in (inputs, outputs))
                return v1.saved_model.build_signature_def(inputs, outputs, "predict")

            builder = v1.saved_model.Builder(str(folder))
            signatures = {
                "serving_default": signature({"x": x}, {"y": y}),
                "image": signature({"x": x}, {"z": image}),
                "turns": signature({"x": x}, {"h": turns}),
                "fed": signature({"x": x}, {"t": v1.matmul(hidden, fed)}),
                "feed": signature({"given": given}, {"done": done}),
            }
            builder.add_meta_graph_and_variables(session, ["serve"], signature_def_map=signatures)
            builder.save()
    finally:
        v1.enable_control_flow_v2()


def kept(tf: Any, folder: Path) -> None:
    """Variables that stay as they are: in parts, returned, bfloat16; and one beside them, behind branches of frames."""
    v1 = tf.compat.v1
    random, seen = np.random.default_rng(0), {}
    v1.disable_control_flow_v2()
    try:
        with v1.Graph().as_default(), v1.Session() as session:
            x = v1.placeholder(tf.float32, [None, 32], "x")
            for name, settings in (
                ("parts", {"partitioner": v1.fixed_size_partitioner(2)}),
                ("shown", {}),
                ("short", {"dtype": tf.bfloat16, "shape": (32, 32)}),
                ("plain", {}),
            ):
                first = {} if "dtype" in settings else {"initializer": tf.constant(scaled(random, 32, 32))}
                if "partitioner" in settings:
                    first = {"shape": (32, 32)}
                seen[name] = v1.get_variable(name, use_resource=True, **first, **settings)
            y = v1.matmul(v1.matmul(x, tf.convert_to_tensor(seen["parts"])), seen["shown"])
            y = tf.cast(v1.matmul(tf.cast(y, tf.bfloat16), seen["short"]), tf.float32)
            y = v1.cond(tf.reduce_sum(x) > 0, lambda: v1.matmul(y, seen["plain"]), lambda: y * 2.0)
            session.run(v1.global_variables_initializer())
            outputs = {"y": y, "w": tf.convert_to_tensor(seen["shown"])}
            v1.saved_model.simple_save(session, str(folder), {"x": x}, outputs)
    finally:
        v1.enable_control_flow_v2()


# -- running -------------------------------------------------------------------------------------------------------


def _drawn(name: str, shape: list[int], dtype: str) -> np.ndarray:
    random = np.random.default_rng([len(name), *name.encode()])
    if dtype == "string":
        return random.choice(np.array([b"a", b"c"], object), shape)
    return random.integers(0, 9, shape).astype(dtype) if "int" in dtype else random.normal(size=shape).astype(dtype)


def run_v2(tf: Any, folder: Path) -> dict[str, np.ndarray]:
    """All outputs of all signatures on fixed inputs, through `tf.saved_model.load`."""
    found = {}
    for key, call in sorted(tf.saved_model.load(str(folder)).signatures.items()):
        specs = call.structured_input_signature[1]
        given = {n: _drawn(n, [d or 3 for d in specs[n].shape], specs[n].dtype.name) for n in sorted(specs)}
        results = call(**{name: tf.constant(value) for name, value in given.items()})
        found |= {f"{key}/{name}": value.numpy() for name, value in results.items()}
    return found


def run_v1(tf: Any, folder: Path) -> dict[str, np.ndarray]:
    """The same in a session of TensorFlow 1, as loaders in C++ do it."""
    v1, found = tf.compat.v1, {}
    with v1.Graph().as_default(), v1.Session() as session:
        meta = v1.saved_model.load(session, ["serve"], str(folder))
        for key, signature in sorted(meta.signature_def.items()):
            if key.startswith("__"):
                continue
            feed = {}
            for name, info in signature.inputs.items():
                shape = [3 if d.size < 0 else d.size for d in info.tensor_shape.dim]
                feed[info.name] = _drawn(name, shape, tf.as_dtype(info.dtype).name)
            outputs = {name: info.name for name, info in signature.outputs.items()}
            found |= {f"{key}/{name}": np.asarray(value) for name, value in session.run(outputs, feed).items()}
    return found


KINDS = ("keras", "functions", "operators", "resource", "reference")


def every_kind(keras: ModuleType, tf: ModuleType, here: Path) -> Path:
    """Writes a model of each of `KINDS` into a folder, and gives it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras_export(keras, here / "keras")
        functions(tf, here / "functions")
        operators(tf, here / "operators")
        tf1(tf, here / "resource", resource=True)
        tf1(tf, here / "reference", resource=False)
    return here
