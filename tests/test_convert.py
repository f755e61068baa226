"""Conversion to `.tflite`: what comes out runs and agrees; what cannot come out says why."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from paring.errors import InputError, UnsupportedError
from paring.formats import convert

INSTALLED = all(importlib.util.find_spec(name) for name in ("tensorflow", "keras"))
needs_tensorflow = pytest.mark.skipif(not INSTALLED, reason="TensorFlow and Keras are not installed")

# One child builds every model and writes what it predicts; another converts them all. Each start costs seconds.
BUILD = """
import os, sys
os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")
import keras, numpy as np, tensorflow as tf
from paring.formats.convert import to_tflite
L, here, rng = keras.layers, sys.argv[1], np.random.default_rng(0)

def sequence(layer):
    return keras.Sequential([keras.Input((5, 3), name="steps"), layer, L.Dense(2)])

def keep(name, model, file, *inputs):
    model.save(f"{here}/{file}") if "." in file else model.export(f"{here}/{file}", verbose=False)
    feed = list(inputs) if len(inputs) > 1 else inputs[0]
    outputs = keras.tree.flatten(model(feed, training=False))
    np.savez(f"{here}/{name}.npz", *inputs, **{f"out_{i}": np.asarray(o) for i, o in enumerate(outputs)})

def floats(*shape):
    return rng.normal(size=shape).astype("float32")

keras.utils.set_random_seed(0)
dense = keras.Sequential([keras.Input((4,), name="features"), L.Dense(3, activation="relu"), L.Dense(2)])
keep("dense", dense, "dense.keras", floats(3, 4))
keep("legacy", dense, "legacy.h5", floats(3, 4))
dense.save_weights(f"{here}/only.weights.h5")
conv = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(4, 3), L.BatchNormalization(), L.Flatten(), L.Dense(2)])
keep("conv", conv, "conv.keras", floats(3, 8, 8, 3))
keep("lstm", sequence(L.LSTM(4)), "lstm.keras", floats(1, 5, 3))
keep("gru", sequence(L.GRU(4, return_sequences=True)), "gru.keras", floats(1, 5, 3))
nested = keras.Sequential([keras.Input((5, 3)), L.Bidirectional(L.LSTM(4))])
keep("bidirectional", sequence(nested), "bidirectional.keras", floats(1, 5, 3))
left, right = keras.Input((4,), name="left"), keras.Input((3,), dtype="int32", name="right")
joined = L.Concatenate()([L.Dense(2)(left), L.Flatten()(L.Embedding(9, 2)(right))])
keep("two", keras.Model([left, right], [L.Dense(2)(joined), joined]), "two.keras", floats(3, 4),
     rng.integers(0, 9, (3, 3)).astype("int32"))

class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = L.Dense(2)
    def call(self, x):
        return self.head(tf.nn.relu(x))

own = Own()
own(floats(1, 4))
keep("own", own, "own", floats(3, 4))
own.save(f"{here}/own.keras")
keep("lstm_folder", sequence(L.LSTM(4)), "lstm_folder", floats(1, 5, 3))
unsafe = keras.Sequential([keras.Input((4,)), L.Lambda(lambda x: x + 1)])
unsafe.save(f"{here}/lambda.keras")

class Coder(tf.Module):
    def __init__(self):
        super().__init__()
        self.w = tf.Variable(tf.ones([4, 2]))
    @tf.function(input_signature=[tf.TensorSpec([None, 4], name="x")])
    def encode(self, x):
        return {"code": x @ self.w}
    @tf.function(input_signature=[tf.TensorSpec([None, 2], name="z")])
    def decode(self, z):
        return {"back": z @ tf.transpose(self.w)}
    @tf.function(input_signature=[tf.TensorSpec([None, 4], name="x")])
    def odd(self, x):
        return {"y": tf.math.digamma(x), "u": tf.linalg.svd(x)[0]}

coder = Coder()
tf.saved_model.save(coder, f"{here}/coder", signatures={"encode": coder.encode, "decode": coder.decode})
tf.saved_model.save(coder, f"{here}/flex", signatures={"odd": coder.odd})

os.mkdir(f"{here}/live")
assert to_tflite(own, f"{here}/live/live.tflite") == ()
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(convert.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, convert.Outcome]]:
    """A folder of models, their `.tflite` files, and what `convert_all` said of each."""
    here = tmp_path_factory.mktemp("models")
    done = run(BUILD, str(here))
    assert done.returncode == 0, done.stderr[-3000:]
    coder = (here / "coder" / "saved_model.pb").read_bytes()
    for name, payload in (("broken", b"\xff\x00" + coder[:100]), ("bare", coder)):
        (here / name).mkdir()
        (here / name / "saved_model.pb").write_bytes(payload)
    with zipfile.ZipFile(here / "hollow.keras", "w") as archive:
        for member in ("config.json", "metadata.json", "model.weights.h5"):
            archive.writestr(member, "{}")
    sources = [
        *here.glob("*.keras"),
        *here.glob("*.h5"),
        *(path for path in here.iterdir() if path.is_dir() and path.name != "live"),
    ]
    jobs = [(source, here / f"{source.name}.tflite") for source in sources]
    outcomes = convert.convert_all(jobs, here)
    return here, {source.name: outcome for source, outcome in zip(sources, outcomes, strict=True)}


def predict(path: Path, inputs: list[np.ndarray]) -> list[np.ndarray]:
    interpreter = Interpreter(model_path=str(path))
    details = interpreter.get_input_details()
    for detail, value in zip(details, inputs, strict=True):
        interpreter.resize_tensor_input(detail["index"], value.shape)
    interpreter.allocate_tensors()
    for detail, value in zip(details, inputs, strict=True):
        interpreter.set_tensor(detail["index"], value)
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]


@needs_tensorflow
@pytest.mark.parametrize(
    ("file", "data", "names", "batch"),
    [
        ("dense.keras", "dense", ["features"], -1),
        ("legacy.h5", "legacy", ["features"], -1),
        ("conv.keras", "conv", None, -1),
        ("lstm.keras", "lstm", ["steps"], 1),
        ("gru.keras", "gru", ["steps"], 1),
        ("bidirectional.keras", "bidirectional", ["steps"], 1),
        ("two.keras", "two", ["left", "right"], -1),
        ("own", "own", None, -1),
        ("live/live", "own", None, -1),
    ],
)
def test_the_result_predicts_what_keras_does(built, file, data, names, batch):
    here, outcomes = built
    if file in outcomes:
        assert outcomes[file].error is None
        assert bool(outcomes[file].notes) == (batch == 1)
    with np.load(here / f"{data}.npz") as kept:
        inputs = [kept[key] for key in kept.files if key.startswith("arr_")]
        wanted = [kept[key] for key in kept.files if key.startswith("out_")]
    path = here / f"{file}.tflite"
    interpreter = Interpreter(model_path=str(path))
    signature = interpreter.get_signature_list()["serving_default"]
    assert names is None or sorted(signature["inputs"]) == names
    assert {detail["shape_signature"][0] for detail in interpreter.get_input_details()} == {batch}
    got = {value.shape: value for value in predict(path, inputs)}
    for value in wanted:
        np.testing.assert_allclose(got[value.shape], value, rtol=1e-4, atol=1e-5)


@needs_tensorflow
def test_weights_are_constants_not_variables(built):
    """A weight in a resource variable could not be quantized."""
    here, _ = built
    for path in here.glob("*.tflite"):
        interpreter = Interpreter(model_path=str(path))
        native = {op["op_name"] for op in interpreter._get_ops_details()}
        assert not native & {"VAR_HANDLE", "READ_VARIABLE"}, path
        assert "Flex" not in " ".join(native)


@needs_tensorflow
def test_every_signature_is_kept(built):
    here, outcomes = built
    assert outcomes["coder"].error is None
    signatures = Interpreter(model_path=str(here / "coder.tflite")).get_signature_list()
    assert signatures == {
        "encode": {"inputs": ["x"], "outputs": ["code"]},
        "decode": {"inputs": ["z"], "outputs": ["back"]},
    }


@needs_tensorflow
@pytest.mark.parametrize(
    ("file", "kind", "words"),
    [
        ("flex", UnsupportedError, ["builtin operators", "Digamma", "Svd"]),
        ("lstm_folder", UnsupportedError, ["recurrent loops with a static batch", "batch size 1", ".keras"]),
        ("own.keras", UnsupportedError, ["custom class Own", "PYTHONPATH"]),
        ("lambda.keras", UnsupportedError, ["Lambda", "live model"]),
        ("hollow.keras", InputError, ["cannot load the model for hollow.keras"]),
        ("only.weights.h5", InputError, ["only.weights.h5", "model config"]),
        ("broken", InputError, ["cannot load the SavedModel for broken"]),
        ("bare", InputError, ["cannot load the SavedModel for bare", "variables"]),
    ],
)
def test_what_cannot_be_converted_says_why_in_one_line(built, file, kind, words):
    here, outcomes = built
    error = outcomes[file].error
    assert type(error) is kind
    assert "\n" not in str(error)
    assert len(str(error)) < 700
    for word in words:
        assert word in str(error)
    assert not (here / f"{file}.tflite").exists()


@needs_tensorflow
def test_a_live_model_leaves_nothing_but_its_file(built):
    here, _ = built
    assert [path.name for path in (here / "live").iterdir()] == ["live.tflite"]


def test_a_failed_conversion_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    source, out = tmp_path / "saved", tmp_path / "out" / "m.tflite"
    for folder in (source, out.parent):
        folder.mkdir()
    (source / "saved_model.pb").write_bytes(b"")
    out.write_bytes(b"old")

    def fail(jobs, work):
        jobs[0][1].write_bytes(b"half")
        return [convert.Outcome(InputError("no luck"))]

    monkeypatch.setattr(convert, "convert_all", fail)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(InputError, match="no luck"):
        convert.to_tflite(source, out)
    assert [path.read_bytes() for path in out.parent.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("junk.keras", b"hello", ["a .keras archive", "no ZIP"]),
        ("junk.h5", b"hello", ["an HDF5 file"]),
        ("junk.onnx", b"hello", ["got a .onnx file", "SavedModel folder"]),
        ("absent.keras", None, ["no such model", "absent.keras"]),
        ("folder", "folder", ["saved_model.pb"]),
        ("random.keras", "zip", ["a ZIP without config.json, model.weights.h5"]),
    ],
)
def test_a_broken_file_is_refused_before_tensorflow_starts(tmp_path, monkeypatch, name, content, words):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "hi")
    elif content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(InputError) as caught:
        convert.to_tflite(path, tmp_path / "out.tflite")
    for word in words:
        assert word in str(caught.value)


def test_something_else_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"a live Keras 3 model, got builtins\.dict"):
        convert.to_tflite({}, tmp_path / "out.tflite")
    with pytest.raises(InputError, match="an existing folder"):
        convert.to_tflite("a.keras", tmp_path / "absent" / "out.tflite")


def test_without_tensorflow_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "saved_model.pb").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UnsupportedError, match=r'tensorflow is not installed.*pip install "paring\[tf\]" tensorflow-cpu'
    ):
        convert.to_tflite(tmp_path, tmp_path / "out.tflite")


def test_the_parent_survives_an_abort_and_repeats_the_last_words(tmp_path, monkeypatch):
    child = tmp_path / "child.sh"
    child.write_text("#!/bin/sh\necho noise; echo 'F0000 lite.cc:12] Check failed: x' >&2; kill -ABRT $$\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    (outcome,) = convert.convert_all([(tmp_path / "m.keras", tmp_path / "o.tflite")], tmp_path)
    assert "the converter died with signal 6 (F0000 lite.cc:12] Check failed: x)" in str(outcome.error)


class Live:
    """Stands for a Keras model that saves, but that the child cannot load."""

    __module__ = "keras.src"
    name = "mine"

    def __init__(self, fails=False):
        self.fails = fails

    def save(self, path):
        if self.fails:
            raise ValueError("unsaveable")

    def export(self, path):
        raise NotImplementedError


@pytest.mark.parametrize("fails", [False, True])
def test_a_live_model_that_cannot_be_loaded_again_is_exported_with_a_static_batch_if_need_be(
    tmp_path, monkeypatch, fails
):
    steps = []

    def convert_all(jobs, work):
        ((source, out),) = jobs
        steps.append(source.name)
        if source.suffix == ".keras":
            return [convert.Outcome(UnsupportedError("cannot load the custom class Own"))]
        if steps.count(source.name) == 1:
            return [convert.Outcome(UnsupportedError("FlexTensorList"))]
        out.write_bytes(b"done")
        return [convert.Outcome()]

    def export(model, folder, *, static_batch=False):
        folder.mkdir()
        steps.append(static_batch)

    monkeypatch.setattr(convert, "convert_all", convert_all)
    monkeypatch.setattr("paring.formats.keras.export_saved_model", export)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (note,) = convert.to_tflite(Live(fails), tmp_path / "m.tflite")
    assert "batch is fixed" in note
    assert steps == [*(["mine.keras"] if not fails else []), False, "mine", True, "mine"]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"done"]


def test_importing_converts_nothing_and_loads_no_framework():
    script = (
        "import sys, json, paring.formats.convert, paring.formats.keras, paring.formats.saved_model.litert;"
        "print(json.dumps(sorted({'keras', 'tensorflow'} & set(sys.modules))))"
    )
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
