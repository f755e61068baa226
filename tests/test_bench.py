"""`paring bench`: what it measures, what it refuses. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import needs
from models import Net

import paring
from paring.demo import load_digits, model_path
from paring.graph import Quantization
from paring.measure import store
from paring.measure.bench import bench
from paring.measure.metrics import find_metric
from paring.measure.pace import combine
from paring.measure.sizes import stored_bytes, zip_bytes, zstd_bytes
from paring.measure.subject import open_subject
from paring.runtime import RunError, Worker

QUICK = {"threads": 1, "rounds": 4, "launches": 1}


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    _, images, labels = load_digits()
    return images[:60], labels[:60]


@pytest.fixture(scope="module")
def int8(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "digits-int8.tflite"
    recipe = {"version": 1, "inputs": "int8", "outputs": "int8", "rules": [
        {"kind": "*", "apply": {"quantize": {"weights": "int8", "activations": "int8"}}}]}  # fmt: skip
    paring.optimize(model_path(), recipe, load_digits()[0][:20], output=path, verified=False)
    return path


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs `paring bench ...` in an empty folder -> (exit code, stdout, stderr)."""
    from paring.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    _, images, labels = load_digits()
    np.savez("test.npz", image=images[:60], labels=labels[:60])

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paring", "bench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def tanh(path: Path, shapes: dict[str, tuple[int, ...]], **versions: int) -> Path:
    """A model that gives the tanh of each of its inputs."""
    net = Net()
    inputs = {name: net.input(shape, name=name) for name, shape in shapes.items()}
    net.outputs = [net.tensor(shape, name=f"{name}_tanh") for name, shape in shapes.items()]
    for source, result in zip(inputs.values(), net.outputs, strict=True):
        net.op("TANH", [source], [result], version=versions.get("version", 0))
    net.finish().save(path)
    return path


# -- what it measures ------------------------------------------------------------------------------------------------


def test_a_float_model_beside_its_int8_form(data, int8):
    found = bench([model_path(), int8], data, **QUICK)
    assert (found.metric, found.unit, found.against, found.samples, found.given) == (
        "top1", "points", "labels", 60, True)  # fmt: skip
    first, second = found.models
    assert first.bytes.value == model_path().stat().st_size
    assert second.bytes.ratio == int8.stat().st_size / first.bytes.value
    assert 0.2 < second.zip.ratio < 0.35
    assert 0.2 < second.zstd.ratio < 0.35
    assert all(f.ratio == 1.0 for f in (first.bytes, first.zip, first.zstd, first.memory, first.score))
    assert first.memory.value > first.added > first.bytes.value  # weights are unpacked and packed again
    assert first.added > second.added > 0
    assert first.score.value > 95
    assert abs(second.drop) <= 5
    assert second.drop_error is not None
    [timing] = second.latency
    assert (timing.threads, timing.launches, timing.rounds, timing.error) == (1, 1, 4, None)
    assert timing.median_ms > 0
    assert timing.ratio > 0


def test_operators_are_counted_where_they_ran(data, int8):
    first, second = bench([model_path(), int8], data, **QUICK).models
    assert first.paths == {
        "xnnpack": {"CONV_2D": 2, "FULLY_CONNECTED": 2, "MAX_POOL_2D": 1, "RESHAPE": 1, "SOFTMAX": 1}
    }
    assert second.paths["builtin"] == {"SOFTMAX": 1}  # XNNPACK has none for int8
    assert second.paths["xnnpack"]["CONV_2D"] == 2


def test_paths_of_the_builtin_kernels_name_no_delegate():
    image = load_digits()[1][:1]
    with Worker(threads=1) as worker:
        worker.load("model", model_path(), kernels="builtin")
        worker.run("model", [image])
        found = worker.paths("model")
    assert (found["xnnpack"], len(found["builtin"]), found["unseen"]) == ([], 7, [])


def test_operators_between_two_delegated_parts_are_told_apart(tmp_path):
    net = Net()
    x = net.input((1, 8), name="x")
    early = net.then("TANH", [x], (1, 8))
    middle = net.then("LOG_SOFTMAX", [early], (1, 8), ("LogSoftmaxOptions", {}))  # no kernel in XNNPACK
    net.outputs = [net.then("ADD", [middle, early], (1, 8), ("AddOptions", {}))]
    net.finish().save(tmp_path / "m.tflite")
    [model] = bench([tmp_path / "m.tflite"], **QUICK).models
    assert model.paths == {"xnnpack": {"TANH": 1, "ADD": 1}, "builtin": {"LOG_SOFTMAX": 1}}


def test_without_data_samples_are_made_up_and_models_compared(int8):
    found = bench([model_path(), int8], **QUICK)
    assert (found.given, found.metric, found.against) == (False, "mse", "the first model")
    assert found.models[0].score.value == 0.0
    assert found.models[1].score.ratio is None  # times nothing
    assert found.models[1].drop > 0


def test_inputs_are_matched_by_name_and_outputs_too(tmp_path):
    a = tanh(tmp_path / "a.tflite", {"p": (1, 4), "q": (1, 3)})
    b = tanh(tmp_path / "b.tflite", {"q": (1, 3), "p": (1, 4)})
    rng = np.random.default_rng(0)
    found = bench([a, b], {"p": rng.normal(size=(9, 4)), "q": rng.normal(size=(9, 3))}, output="q_tanh", **QUICK)
    assert [m.score.value for m in found.models] == [0.0, 0.0]


def test_integer_inputs_with_different_grids_get_the_same_reals(tmp_path):
    paths = []
    for dtype, scale, zero in (("int8", 0.5, 3), ("uint8", 0.25, 128)):
        net = Net()
        grid = Quantization(np.array([scale], np.float32), np.array([zero]), dtype)
        x = net.tensor((1, 4), dtype, "x", grid=grid)
        net.inputs, net.outputs = [x], [net.then("DEQUANTIZE", [x], (1, 4), ("DequantizeOptions", {}), "y")]
        paths.append(tmp_path / f"{dtype}.tflite")
        net.finish().save(paths[-1])
    codes = np.arange(-12, 12, dtype=np.int8).reshape(6, 4)
    found = bench(paths, (codes, (codes - 3.0) / 2), metric="mse", **QUICK)
    assert (found.against, [m.score.value for m in found.models]) == ("labels", [0.0, 0.0])


def test_several_launches_and_threads(data):
    [model] = bench([model_path()], data, threads=2, rounds=3, launches=2, seconds=0).models
    assert [(t.threads, t.launches, t.rounds) for t in model.latency] == [(1, 2, 6), (2, 2, 6)]


def test_a_metric_object_serves(data):
    assert bench([model_path()], data, metric=find_metric("auc"), **QUICK).models[0].score.value > 95


# -- SavedModel and Keras --------------------------------------------------------------------------------------------


BUILD = """
import os, sys
os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
import keras, numpy as np
L, here = keras.layers, sys.argv[1]
a, b = keras.Input((8, 8, 1), name="a"), keras.Input((3,), name="b")
flat = L.Flatten()(L.Conv2D(4, 3, activation="relu")(a))
model = keras.Model({"b": b, "a": a}, [L.Dense(3)(L.Concatenate()([flat, b])), L.Dense(2)(b)])
model.save(f"{here}/m.keras")
model.export(f"{here}/saved", verbose=False)
rng = np.random.default_rng(0)
data = {"a": rng.normal(size=(12, 8, 8, 1)).astype("float32"), "b": rng.normal(size=(12, 3)).astype("float32")}
np.savez(f"{here}/data.npz", **data, labels=np.asarray(model.predict_on_batch(data)[0]))
"""


@pytest.fixture(scope="module")
def framework(tmp_path_factory) -> Path:
    """A folder with a Keras file, the same as SavedModel, and data with the answers of the first output."""
    if not all(importlib.util.find_spec(name) for name in ("tensorflow", "keras")):
        needs("tensorflow", "TensorFlow or Keras is not installed; `pip install tensorflow-cpu keras`")
    folder = tmp_path_factory.mktemp("framework")
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.timeout(240)
def test_saved_models_and_keras_files_are_measured_as_they_are(framework):
    models, data = [framework / "saved", framework / "m.keras"], framework / "data.npz"
    found = bench(models, data, metric="mse", **QUICK)
    saved, keras_file = found.models
    assert (saved.kind, keras_file.kind, found.against) == ("SavedModel", "Keras", "labels")
    assert saved.score.value < 1e-9
    assert keras_file.score.value < 1e-9
    assert saved.bytes.value == sum(f.stat().st_size for f in (framework / "saved").rglob("*") if f.is_file())
    assert saved.paths["TensorFlow"]["Conv2D"] == 1
    assert saved.paths["TensorFlow"]["MatMul"] == 2
    assert keras_file.paths["Keras (tensorflow)"]["Dense"] == 2
    assert saved.memory.value > saved.added > 0
    assert saved.latency[0].median_ms > 0


def test_without_tensorflow_a_saved_model_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else found(name))
    with pytest.raises(
        paring.UnsupportedError, match=r"tensorflow is not installed: running saved as it is needs it\. I"
    ):
        bench([model_path(), tmp_path / "saved"], **QUICK)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_one_table_and_writes_the_results(call, int8):
    code, out, err = call(model_path(), int8, "--data", "test.npz", "--threads", 1, "--rounds", 4, "--launches", 2)
    assert (code, err) == (0, "")
    assert all(word in out for word in ("1 thread", "top1 (%)", "7 XNNPACK", "1 builtin", "not in XNNPACK: SOFTMAX"))
    assert "on 60 rows, against labels; higher is better" in out
    assert out.rstrip().endswith("wrote results.json")
    facts = json.loads(Path("results.json").read_text(encoding="utf-8"))
    assert (facts["paring"], facts["command"]) == (paring.__version__, "bench")
    assert facts["environment"]["numpy"] == np.__version__
    assert [model["path"] for model in facts["models"]] == [str(model_path()), str(int8)]
    assert facts["models"][0]["latency"][0]["launches"] == 2


def test_json_prints_what_the_file_holds_and_later_results_replace_earlier(call):
    quick = ("--threads", 1, "--rounds", 2, "--launches", 1)
    for _ in range(2):
        code, out, _ = call(model_path(), "--json", "--results", "mine.json", *quick)
        assert code == 0
        assert json.loads(out) == json.loads(Path("mine.json").read_text(encoding="utf-8"))
    assert sorted(p.name for p in Path().iterdir()) == ["mine.json", "test.npz"]


def test_labels_come_from_a_file_and_a_limit_holds(call):
    np.save("wrong.npy", (load_digits()[2][:60] + 1) % 10)
    quick = ("--threads", 1, "--rounds", 2, "--launches", 1, "--json")
    facts = json.loads(call(model_path(), "-d", "test.npz", "--labels", "wrong.npy", "--limit", 30, *quick)[1])
    assert (facts["samples"], facts["models"][0]["score"]["value"] < 10) == (30, True)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_metric_that_raises_shows_its_own_traceback_and_the_model(call):
    Path("mine.py").write_text("def f(outputs, labels):\n    return labels['no such thing']\n", encoding="utf-8")
    code, out, err = call(model_path(), "-d", "test.npz", "--metric", "mine:f")
    assert (code, out) == (2, "")
    *trace, line = err.splitlines()
    assert line.startswith(f"paring: the metric failed for mine:f on {model_path()}: got IndexError")
    assert trace[0].startswith("Traceback")
    assert any("return labels['no such thing']" in part for part in trace)
    assert not any("paring/measure" in part for part in trace)
    assert not Path("results.json").exists()


@pytest.mark.parametrize("text", ["{}", "not json", '{"paring": "0", "command": "debug"}', "[1]"])
def test_another_file_is_not_overwritten(call, text):
    Path("results.json").write_text(text, encoding="utf-8")
    code, out, err = call(model_path())
    assert (code, out) == (2, "")
    assert "the file is not overwritten for results.json" in err
    assert Path("results.json").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.tflite",), "no such model for absent.tflite"),
        ((model_path(), "--metric", "top2"), "no such metric for top2"),
        ((model_path(), "--metric", "top1"), "top1 needs labels"),
        ((model_path(), "--labels", "x.npy"), "of no use"),
        ((model_path(), "--data", "test.npz", "--score-output", "x"), "no such output for x: expected probabilities"),
        ((model_path(), "--results", "none/r.json"), "cannot write the results"),
    ],
)
def test_bad_usage_is_one_line(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("shapes", "got"),
    [({"x": (1, 5)}, r"x: float32 \[1, 5\]"), ({"x": (1, 4), "y": (1, 4)}, "got x, y"), ({"x": (4,)}, r"\[4\]")],
)
def test_models_whose_inputs_differ_are_named(tmp_path, shapes, got):
    a, b = tanh(tmp_path / "a.tflite", {"x": (1, 4)}), tanh(tmp_path / "b.tflite", shapes)
    with pytest.raises(paring.InputError, match=r"inputs of the models differ for .*b\.tflite: .* as .*a\.tflite") as e:
        bench([a, b], **QUICK)
    import re

    assert re.search(got, str(e.value))


def test_a_model_that_cannot_run_is_named(tmp_path):
    a, b = tanh(tmp_path / "a.tflite", {"x": (1, 4)}), tanh(tmp_path / "b.tflite", {"x": (1, 4)}, version=99)
    with pytest.raises(RunError, match=r"cannot run the model for .*b\.tflite: got the runtime refuses"):
        bench([a, b], **QUICK)


def test_outputs_that_do_not_correspond_are_named(tmp_path):
    net = Net()
    net.outputs = [net.then("RESHAPE", [net.input((1, 4), name="x"), net.constant(np.array([2, 2], np.int32))], (2, 2))]
    net.finish().save(tmp_path / "b.tflite")
    a = tanh(tmp_path / "a.tflite", {"x": (1, 4)})
    with pytest.raises(paring.InputError, match=r"mse has nothing to compare with for .*b\.tflite"):
        bench([a, tmp_path / "b.tflite"], **QUICK)


# -- the parts -------------------------------------------------------------------------------------------------------


def launches(*ratios: float) -> list[np.ndarray]:
    """Launches of two models in which the second takes `ratio` times as long, while the machine slows down."""
    pace = np.linspace(1.0, 3.0, 9)[:, None, None]
    return [pace * np.array([[1e-3, 1e-3], [ratio * 1e-3, ratio * 1e-3]]) for ratio in ratios]


def test_a_ratio_is_the_median_over_launches_of_paired_rounds():
    first, second = combine(launches(1.0, 1.02, 1.5), 1, [7, 8])
    assert (first.ratio, first.error) == (1.0, 0.0)
    assert second.ratio == pytest.approx(1.02)
    assert second.error > 0.3  # one launch is far off, and three are few
    assert (second.rounds, second.launches, second.calls) == (27, 3, 8)
    assert first.median_ms == pytest.approx(2.0)


def test_from_six_launches_on_one_that_is_off_does_not_widen_the_interval():
    _, second = combine(launches(1.0, 1.0, 1.01, 1.01, 1.02, 1.02, 1.02, 1.03, 9.0), 1, [1, 1])
    assert second.ratio == pytest.approx(1.02)
    assert second.error == pytest.approx(0.015, abs=2e-3)  # half of what lies between the second and the eighth


def test_one_thread_is_compared_by_cpu_time_and_several_by_wall_time():
    times = np.ones((4, 2, 2))
    times[:, 1] = [3.0, 2.0]  # wall, CPU
    assert combine([times], 1, [1, 1])[1].ratio == pytest.approx(2.0)
    assert combine([times], 2, [1, 1])[1].ratio == pytest.approx(3.0)


def test_sizes_of_files_and_folders(tmp_path):
    (tmp_path / "m" / "variables").mkdir(parents=True)
    (tmp_path / "m" / "a.pb").write_bytes(bytes(5000))
    (tmp_path / "m" / "variables" / "b").write_bytes(np.random.default_rng(0).bytes(3000))
    assert stored_bytes(tmp_path / "m") == 8000
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in ("m/a.pb", "m/variables/b"):
            archive.write(tmp_path / file, file)
    assert abs(zip_bytes(tmp_path / "m") - (tmp_path / "z.zip").stat().st_size) < 100
    assert 3000 < zstd_bytes(tmp_path / "m") < 3100


def test_results_hold_no_number_that_json_has_no_word_for(tmp_path):
    found = store.as_data("bench", {"models": [float("inf"), {"x": (float("nan"), 1.0)}]})
    store.write(tmp_path / "r.json", found)
    read = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"), parse_constant=lambda _: pytest.fail())
    assert read["models"] == [None, {"x": [None, 1.0]}]


def test_memory_of_a_child_grows_with_what_it_holds():
    with Worker(threads=1) as worker:
        now, peak = worker.memory()
        worker.load("model", model_path())
        worker.run("model", [load_digits()[1][:1]])
        assert worker.memory()[1] > peak >= now > 10e6


REFUSING = """
from paring.errors import UnsupportedError
from paring.runtime.worker import Server, serve

class Refusing(Server):
    def limit(self, extra, threads):
        return {}
    def load(self, **_):
        raise UnsupportedError("cannot load the custom class Own", where="m.keras")

serve(Refusing())
"""


def test_what_the_child_finds_wrong_comes_as_the_same_error():
    with Worker(threads=1, program=REFUSING) as worker:
        with pytest.raises(paring.UnsupportedError, match=r"^cannot load the custom class Own for m\.keras\.$"):
            worker.load("model", "m.keras")
        assert worker.memory()[0] > 0


def test_a_broken_model_is_refused_when_it_is_opened(tmp_path):
    (tmp_path / "m.tflite").write_bytes(b"nothing")
    (tmp_path / "m.keras").write_bytes(b"nothing")
    for name in ("m.tflite", "m.keras"):
        with pytest.raises(paring.InputError, match=f"m\\.{name[2:]}"):
            open_subject(tmp_path / name)
