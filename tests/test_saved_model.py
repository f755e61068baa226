"""SavedModels: written back unchanged, stored in fewer bits, run by both loaders; and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import saved_models as models

import paring
from paring.cli import main
from paring.compress.encodings import up_to_bfloat16
from paring.errors import BoundError, InputError, UnsupportedError
from paring.formats.saved_model.bundle import Bundle, write
from paring.formats.saved_model.model import SavedModel
from paring.formats.saved_model.session import Session
from paring.formats.saved_model.view import view

KINDS = models.KINDS


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """TensorFlow deprecates what its own loaders call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, keras_on_tensorflow: ModuleType, tensorflow: ModuleType) -> Path:
    """A folder with a model of each of `KINDS`."""
    return models.every_kind(keras_on_tensorflow, tensorflow, tmp_path_factory.mktemp("saved"))


def optimized(source: Path, out: Path, recipe: object = "weight-only-int8", **settings: object) -> paring.Result:
    """Without running it in children: the tests run it themselves."""
    return paring.optimize(source, recipe, output=out, verified=False, **settings)  # type: ignore[arg-type]


def rows(result: paring.Result) -> dict[str, tuple[str, str]]:
    return {row.name: (row.became, row.reason) for row in result.report.rows}


def gaps(expected: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> dict[str, float]:
    """The relative difference of each output; text and integers have to be the same."""
    assert expected.keys() == got.keys()
    found = {}
    for name, value in expected.items():
        if value.dtype.kind != "f":
            np.testing.assert_array_equal(value, got[name])
        else:
            found[name] = float(np.linalg.norm(got[name] - value) / np.linalg.norm(value))
    return found


LOADERS = {"v2": models.run_v2, "v1": models.run_v1}


# -- unchanged -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_back_unchanged_behaves_the_same(kind: str, folder: Path, tmp_path: Path, tensorflow):
    SavedModel.open(folder / kind).save(tmp_path / "out")
    for run in LOADERS.values():
        assert set(gaps(run(tensorflow, folder / kind), run(tensorflow, tmp_path / "out")).values()) == {0.0}


def test_the_same_input_and_recipe_give_the_same_bytes(folder: Path, tmp_path: Path):
    for name in ("one", "two"):
        optimized(folder / "functions", tmp_path / name)
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    record = json.loads((tmp_path / "one" / "assets.extra" / "paring.json").read_text(encoding="utf-8"))
    assert paring.Recipe.load(record["recipe"]) == paring.Recipe.named("weight-only-int8")


def test_large_models_are_written_in_shards(tmp_path: Path, tensorflow):
    values = {f"v{n}": np.full((8, 8), n, np.float32) for n in range(5)}
    (tmp_path / "variables").mkdir()
    prefix = tmp_path / "variables" / "variables"
    write(prefix, {k: lambda v=v: v for k, v in values.items()}, dict.fromkeys(values, 256), shard=600)
    assert sorted(file.name for file in prefix.parent.iterdir()) == [
        *(f"variables.data-{n:05}-of-00003" for n in range(3)),
        "variables.index",
    ]
    bundle = Bundle(prefix, "model")
    assert all(np.array_equal(bundle.read(key), value) for key, value in values.items())


# -- int8 ----------------------------------------------------------------------------------------------------------


def decoded(name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The int8 codes of a weight of `models.WEIGHTS`, with scales of its channels' largest values, and what they stand for."""
    summed = tuple(d for d in range(values.ndim) if d not in models.WEIGHTS[name][1])
    scale = up_to_bfloat16(np.abs(values).max(axis=summed, keepdims=True) / np.float32(127))
    codes = np.rint(values / scale)
    return codes.astype(np.int8), (codes * scale).astype(np.float32)


@pytest.fixture
def operators(tmp_path: Path, tensorflow: ModuleType):
    return models.operators(tensorflow, tmp_path / "operators")


@pytest.mark.parametrize("loader", LOADERS)
def test_every_operator_computes_with_its_decoded_weights(loader: str, operators, tmp_path: Path, tensorflow):
    optimized(tmp_path / "operators", tmp_path / "out")
    bundle = Bundle(tmp_path / "out" / "variables" / "variables", "out")
    for name in models.WEIGHTS:
        codes, values = decoded(name, getattr(operators, name).numpy())
        written = bundle.read(f"{name}/.ATTRIBUTES/VARIABLE_VALUE")
        assert written.dtype == np.int8
        assert np.abs(written.astype(int) - codes).max() <= 1  # half-way between two codes, in another float32
        assert (written != codes).mean() < 0.01
        getattr(operators, name).assign(values)
    tensorflow.saved_model.save(operators, str(tmp_path / "decoded"), signatures={"serving_default": operators.run})
    expected = models.run_v2(tensorflow, tmp_path / "decoded")
    found = gaps(expected, LOADERS[loader](tensorflow, tmp_path / "out"))
    assert max(found.values()) < 2e-4, found


def test_what_meets_the_weights_is_rounded_to_bfloat16(operators, tmp_path: Path, tensorflow):
    result = optimized(tmp_path / "operators", tmp_path / "out", "bf16-int8")
    x = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    image = np.zeros((2, 8, 8, 4), np.float32)
    call = tensorflow.saved_model.load(str(tmp_path / "out")).signatures["serving_default"]
    found = call(x=tensorflow.constant(x), image=tensorflow.constant(image))
    rounded = tensorflow.cast(tensorflow.cast(x, tensorflow.bfloat16), tensorflow.float32).numpy()
    _, values = decoded("a", operators.a.numpy())
    exact, plain = rounded @ values, x @ values
    gap = np.abs(found["dense"].numpy() - exact).max()
    assert gap < 1e-5 < 10 * gap + np.abs(plain - exact).max() / 10
    assert rows(result)["run/MatMul:a"] == ("weight-only bf16-int8", "rule 1")
    picked = next(row for name, row in rows(result).items() if name.endswith(":columns"))
    assert picked == ("weight-only int8", "rule 1")  # nothing meets the rows that it picks


@pytest.mark.parametrize("recipe", ["bfloat16", "float16"])
def test_half_the_bits(recipe: str, operators, tmp_path: Path, tensorflow):
    optimized(tmp_path / "operators", tmp_path / "out", recipe)
    dtype = tensorflow.as_dtype(recipe)
    for name in models.WEIGHTS:
        variable = getattr(operators, name)
        variable.assign(tensorflow.cast(tensorflow.cast(variable, dtype), tensorflow.float32))
    tensorflow.saved_model.save(operators, str(tmp_path / "decoded"), signatures={"serving_default": operators.run})
    found = gaps(models.run_v2(tensorflow, tmp_path / "decoded"), models.run_v2(tensorflow, tmp_path / "out"))
    assert max(found.values()) < 1e-6, found
    sizes = [sum(f.stat().st_size for f in (tmp_path / p / "variables").iterdir()) for p in ("operators", "out")]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["weight-only-int8", "bf16-int8"])
def test_int8_models_are_close_in_both_loaders(kind: str, recipe: str, folder: Path, tmp_path: Path, tensorflow):
    optimized(folder / kind, tmp_path / "out", recipe)
    for run in LOADERS.values():
        found = gaps(run(tensorflow, folder / kind), run(tensorflow, tmp_path / "out"))
        assert 0 < max(found.values()) < 0.03, found


def test_keras_doubled_variables_are_stored_once(folder: Path, tmp_path: Path, tensorflow):
    result = optimized(folder / "keras", tmp_path / "out")
    model = SavedModel.open(folder / "keras")
    once = sum(source.size for source in view(model).sources.values() for source in source[:1])
    written = sum(file.stat().st_size for file in (tmp_path / "out" / "variables").iterdir())
    assert written < 0.26 * 4 * once + 8000  # beside them: biases, the object graph
    grown = [(path / "saved_model.pb").stat().st_size for path in (tmp_path / "out", folder / "keras")]
    assert grown[0] <= 1.2 * grown[1]
    assert any("stored twice" in note for note in result.report.notes)
    loaded = tensorflow.saved_model.load(str(tmp_path / "out"))
    assert {v.dtype.name for v in loaded.variables if np.prod(v.shape) >= 256} == {"int8"}


def test_variables_that_are_equal_by_chance_stay_apart(tmp_path: Path, tensorflow):
    tf = tensorflow

    class Net(tf.Module):
        def __init__(self):
            super().__init__()
            self.head = tf.Variable(tf.random.normal([32, 32]), name="head")
            self.one, self.other, self.unread = (tf.Variable(tf.zeros([32, 32]), name="shift") for _ in range(3))

        @tf.function(input_signature=[tf.TensorSpec([None, 32], name="x")])
        def __call__(self, x):
            return {"y": self.add(self.add(tf.matmul(x, self.head), self.one), self.other)}

        @tf.function
        def add(self, x, shift):
            return x + tf.reduce_sum(shift)

    net = Net()
    tf.saved_model.save(net, str(tmp_path / "net"), signatures=net.__call__)
    result = optimized(tmp_path / "net", tmp_path / "small")
    assert not any("stored twice" in note for note in result.report.notes)
    loaded = tf.saved_model.load(str(tmp_path / "small"))
    loaded.one.assign(tf.ones([32, 32]))
    assert not loaded.other.numpy().any()
    assert not loaded.unread.numpy().any()


def test_python_finds_all_that_it_had(folder: Path, tmp_path: Path, tensorflow):
    optimized(folder / "functions", tmp_path / "out")
    before, after = (tensorflow.saved_model.load(str(path)) for path in (folder / "functions", tmp_path / "out"))
    rows = tensorflow.constant([3, 49])
    assert np.abs(before.embed(rows) - after.embed(rows)).max() < 0.02
    assert [int(after.run(tensorflow.ones([1, 32]))["n"]) for _ in range(2)] == [1, 2]
    assert after.unread.dtype == tensorflow.float32 and after.shared.dtype == tensorflow.int8
    fresh = np.eye(32, dtype=np.float32)
    assert np.array_equal(after.feed(tensorflow.constant(fresh)), fresh)


@pytest.mark.parametrize("kind", ["resource", "reference"])
def test_a_variable_that_is_assigned_stays_float(kind: str, folder: Path, tmp_path: Path, tensorflow):
    result = optimized(folder / kind, tmp_path / "out")
    became, why = rows(result)["MatMul_1:fed"]
    assert (became, "assigns to it" in why) == ("float", True)
    assert result.report.output_bytes < result.report.source_bytes
    outputs = models.run_v1(tensorflow, tmp_path / "out")
    assert np.allclose(outputs["feed/done"], models.run_v1(tensorflow, folder / kind)["feed/done"])


def test_variables_that_have_to_stay_as_they_are(tmp_path: Path, tensorflow):
    """A partitioned one, one that a signature returns, one of bfloat16; and one beside them, behind branches of frames."""
    tf = tensorflow
    models.kept(tf, tmp_path / "model")
    result = optimized(tmp_path / "model", tmp_path / "out")
    why = {name.split(":")[-1]: row for name, row in rows(result).items() if ":" in name}
    assert why["shown"] == ("float", "a signature returns the weights themselves")
    assert why["short"][0] != "weight-only int8" and why["plain"] == ("weight-only int8", "rule 1")
    for run in LOADERS.values():
        found = gaps(run(tf, tmp_path / "model"), run(tf, tmp_path / "out"))
        assert found["serving_default/w"] == 0 and found["serving_default/y"] < 0.02


def test_first_values_are_no_floats_either(folder: Path, tmp_path: Path):
    optimized(folder / "resource", tmp_path / "out")
    sizes = [(path / "saved_model.pb").stat().st_size for path in (tmp_path / "out", folder / "resource")]
    assert sizes[0] < sizes[1]  # two weights stood in the graph once more


def test_a_weight_that_a_rule_leaves_float_stays_so_for_all_its_readers(folder: Path, tmp_path: Path):
    result = optimized(folder / "functions", tmp_path / "out", skip=["^words/MatMul:"])
    found = rows(result)
    loop = next(name for name in found if name.endswith("/while/MatMul:shared"))
    assert found["words/MatMul:shared"] == ("float", "skipped by request")
    assert found[loop] == ("float", "shares its weights with words/MatMul:shared, which stays float")
    assert found["words/embedding_lookup:table"] == ("weight-only int8", "rule 1")


def test_a_body_that_serves_variables_of_different_fates_is_copied(tmp_path: Path, tensorflow):
    class Shared(tensorflow.Module):
        def __init__(self) -> None:
            super().__init__()
            random = np.random.default_rng(0)
            self.kept = tensorflow.Variable(models.scaled(random, 32, 32), name="kept")
            self.small = tensorflow.Variable(models.scaled(random, 32, 32), name="small")

        @tensorflow.function
        def inner(self, x, w):
            return tensorflow.matmul(x, w)

        @tensorflow.function
        def body(self, x, w):
            return self.inner(x, w) + 1.0

        @tensorflow.function(input_signature=[tensorflow.TensorSpec([1, 32])])
        def run(self, x):
            return {"kept": self.body(x, self.kept), "small": self.body(x, self.small)}

        @tensorflow.function(input_signature=[tensorflow.TensorSpec([32, 32])])
        def feed(self, values):
            self.kept.assign(values)
            return values

    module = Shared()
    signatures = {"serving_default": module.run, "feed": module.feed}
    tensorflow.saved_model.save(module, str(tmp_path / "shared"), signatures=signatures)
    result = optimized(tmp_path / "shared", tmp_path / "out")
    found = gaps(models.run_v2(tensorflow, tmp_path / "shared"), models.run_v2(tensorflow, tmp_path / "out"))
    # "feed" comes first and sets `kept`, which is why it must not be int8
    assert found["serving_default/kept"] == 0 < found["serving_default/small"] < 0.02
    became, why = next(row for name, row in rows(result).items() if "but kept" in row[1])
    assert became == "weight-only int8" and "but kept stays float: " in why and "assigns to it" in why


def test_constants_are_weights_too(tmp_path: Path, tensorflow):
    weights = models.scaled(np.random.default_rng(0), 64, 48)

    class Frozen(tensorflow.Module):
        @tensorflow.function(input_signature=[tensorflow.TensorSpec([None, 64])])
        def run(self, x):
            return {"y": tensorflow.matmul(x, weights)}

    module = Frozen()
    tensorflow.saved_model.save(module, str(tmp_path / "frozen"), signatures={"serving_default": module.run})
    result = optimized(tmp_path / "frozen", tmp_path / "out")
    for run in LOADERS.values():
        found = gaps(run(tensorflow, tmp_path / "frozen"), run(tensorflow, tmp_path / "out"))
        assert 0 < max(found.values()) < 0.02
    assert result.report.output_bytes < result.report.source_bytes - 2 * weights.size


def casts(path: Path) -> list[tuple[object, object]]:
    """(function or graph, node) of every conversion of int8 weights."""
    model = SavedModel.open(path)
    return [(s, n) for s in model.flow.scopes.values() for n in s.nodes if n.op == "Cast" and n.attr["SrcT"].type == 6]


def test_conversions_wait_for_the_other_operand(tmp_path: Path, tensorflow):
    class Deep(tensorflow.Module):
        def __init__(self) -> None:
            super().__init__()
            random = np.random.default_rng(0)
            self.layers = [tensorflow.Variable(models.scaled(random, 32, 32)) for _ in range(3)]

        @tensorflow.function(input_signature=[tensorflow.TensorSpec([None, 32])])
        def run(self, x):
            for layer in self.layers:
                x = tensorflow.nn.relu(tensorflow.matmul(x, layer))
            return {"y": x}

    module = Deep()
    tensorflow.saved_model.save(module, str(tmp_path / "deep"), signatures={"serving_default": module.run})
    optimized(tmp_path / "deep", tmp_path / "out")
    waits = {node.name: [i for i in node.input if i.startswith("^")] for _, node in casts(tmp_path / "out")}
    assert waits == {"MatMul/float": [], "MatMul_1/float": ["^Relu"], "MatMul_2/float": ["^Relu_1"]}


def test_rows_are_picked_before_they_are_converted(folder: Path, tmp_path: Path):
    optimized(folder / "keras", tmp_path / "out", only=["gather"])
    ((scope, node),) = casts(tmp_path / "out")
    parts, _ = scope.maker(node.input[0])
    assert (parts.op, scope.maker(parts.input[0])[0].op) == ("SplitV", "GatherV2")


def test_loops_convert_once_and_before(folder: Path, tmp_path: Path):
    """The kernels of a recurrent layer are read in its loop's body."""
    before = optimized(folder / "keras", tmp_path / "out")
    loop = [name for name in rows(before) if "/while/" in name and "MatMul" in name]
    assert [rows(before)[name][0] for name in loop] == ["weight-only int8"] * 2
    flow = SavedModel.open(tmp_path / "out").flow
    (body,) = [scope for scope in flow.scopes.values() if "_while_body_" in scope.name]
    assert not any(node.op == "Cast" for node in body.nodes)
    assert [name for name in body.arguments if name.startswith("carried_weight")] == [
        "carried_weight",
        "carried_weight_1",
    ]


@pytest.mark.parametrize("recipe", ["weight-only-int8", "bf16-int8"])
def test_loops_in_loops_branches_and_cases(recipe: str, tmp_path: Path, tensorflow):
    tf, random = tensorflow, np.random.default_rng(0)

    class Nested(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.batch = tf.Variable(models.scaled(random, 4, 32, 16), name="batch")
            self.one = tf.Variable(models.scaled(random, 24, 24), name="one")
            self.two = tf.Variable(models.scaled(random, 24, 24), name="two")

        @tf.function(input_signature=[tf.TensorSpec([4, 3, 32], name="x"), tf.TensorSpec([2, 24], name="h")])
        def run(self, x, h):
            def outer(i, h):
                _, h = tf.while_loop(lambda j, h: j < 2, lambda j, h: (j + 1, tf.tanh(h @ self.one)), [0, h])
                return i + 1, tf.cond(i > 0, lambda: h @ self.two, lambda: h @ self.one)

            _, h = tf.while_loop(lambda i, h: i < 3, outer, [0, h])
            chosen = tf.switch_case(tf.cast(x[0, 0, 0] > 9, tf.int32), [lambda: h @ self.one, lambda: h @ self.two])
            sizes = tf.shape_n([self.batch.read_value(), x])[0]
            return {"y": tf.raw_ops.BatchMatMulV3(x=x, y=self.batch, Tout=tf.float32), "h": chosen, "n": sizes}

    module = Nested()
    tf.saved_model.save(module, str(tmp_path / "nested"), signatures={"serving_default": module.run})
    optimized(tmp_path / "nested", tmp_path / "out", recipe)
    for run in LOADERS.values():
        found = gaps(run(tf, tmp_path / "nested"), run(tf, tmp_path / "out"))
        assert 0 < min(found.values()) <= max(found.values()) < 0.04, found


def test_other_ways_into_tensorflow(folder: Path, tmp_path: Path, tensorflow, keras_on_tensorflow):
    """Keras' layer for SavedModels, saving it again, XLA, and the converter to LiteRT."""
    tf, out = tensorflow, tmp_path / "out"
    optimized(folder / "keras", out)
    ids = tf.constant(np.random.default_rng(0).integers(0, 400, (1, 12)), tf.int32)
    loaded = tf.saved_model.load(str(out))
    expected = loaded.signatures["serving_default"](ids=ids)["output_0"]
    layer = keras_on_tensorflow.layers.TFSMLayer(str(out), call_endpoint="serve")
    np.testing.assert_allclose(layer(ids), expected, rtol=1e-5, atol=1e-6)
    compiled = tf.function(loaded.signatures["serving_default"], jit_compile=True)
    np.testing.assert_allclose(compiled(ids=ids)["output_0"], expected, rtol=1e-4, atol=1e-5)
    tf.saved_model.save(loaded, str(tmp_path / "again"), signatures=loaded.signatures)
    again = tf.saved_model.load(str(tmp_path / "again")).signatures["serving_default"](ids=ids)["output_0"]
    np.testing.assert_array_equal(again, expected)
    optimized(folder / "operators", tmp_path / "plain")
    assert len(tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "plain")).convert()) > 10_000


# -- the whole way -------------------------------------------------------------------------------------------------


def test_what_is_written_was_run(folder: Path, tmp_path: Path):
    result = paring.optimize(folder / "functions", "weight-only-int8", output=tmp_path / "out")
    found = result.report.verification
    assert found is not None and not found.given
    assert found.difference["serving_default/n"] == found.difference["words/text"] == 0
    assert 0 < found.difference["serving_default/y"] < 0.03 and 0 < found.difference["words/v"] < 0.03
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"assets", "assets.extra", "fingerprint.pb", "saved_model.pb", "variables"}


def test_a_result_that_does_not_run_is_not_kept(folder: Path, tmp_path: Path, monkeypatch):
    whole = paring.folders.optimize.apply

    def broken(*arguments: object) -> SavedModel:
        model = whole(*arguments)
        for function in model.meta.graph_def.library.function:
            for node in function.node_def:
                if node.op == "Mul" and node.name.endswith("MatMul"):
                    node.attr["T"].type = 2
        return model

    monkeypatch.setattr("paring.folders.optimize.apply", broken)
    with pytest.raises(BoundError, match=r"^TensorFlow does not load the result .* Nothing was written\.$"):
        paring.optimize(folder / "functions", "weight-only-int8", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def call(capsys, monkeypatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["paring", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_command_line(folder: Path, tmp_path: Path, capsys, monkeypatch):
    np.savez(tmp_path / "data.npz", ids=np.random.default_rng(0).integers(0, 400, (6, 12)))
    source, out, data = folder / "keras", tmp_path / "out", tmp_path / "data.npz"
    words = ("quantize", source, "-o", out, "-r", "bf16-int8", "--data", data)
    code, _, err = call(capsys, monkeypatch, *words, "--max-error", 1e-6)
    assert code == 1 and "the result differs too much for output serve/output_0" in err and not out.exists()
    code, text, err = call(capsys, monkeypatch, *words, "--json")
    assert (code, err) == (0, "")
    report = json.loads(text)
    assert report["kind"] == "SavedModel" and report["verification"]["samples"] == 6
    assert report["verification"]["difference"]["serve/output_0"] < 0.03
    code, _, err = call(capsys, monkeypatch, *words)
    assert (code, err) == (2, f"paring: the output exists for {out}. Say --overwrite to replace it.\n")
    code, text, _ = call(capsys, monkeypatch, "quantize", source, "-o", out, "--no-verify", "--overwrite")
    assert code == 0 and "runs in stock TensorFlow" in text and "not verified" in text
    assert not list(tmp_path.glob(".*"))


def test_data_by_signature_and_text(folder: Path, tmp_path: Path):
    data = {
        "serving_default/x": np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32),
        "words/text": np.array(["a", "c", "nobody"]),
    }
    found = paring.optimize(folder / "functions", "bfloat16", data, output=tmp_path / "out").report.verification
    assert found is not None and (found.given, found.samples) == (True, 3)
    assert found.difference["words/text"] == 0 < found.difference["words/v"] < 0.01
    data["other/x"] = data.pop("serving_default/x")
    with pytest.raises(InputError, match="serving_default"):
        paring.optimize(folder / "functions", "bfloat16", data, output=tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_inspect(folder: Path, capsys, monkeypatch):
    code, text, _ = call(capsys, monkeypatch, "inspect", folder / "functions", "--json")
    facts = json.loads(text)
    assert (code, facts["signatures"]) == (0, ["serving_default", "words"])
    einsum = next(row for row in facts["operators"] if row["kind"] == "einsum")
    assert (einsum["parameters"], einsum["shape"], einsum["macs"]) == (2048, [-1, 4, 16], 2048)
    code, text, _ = call(capsys, monkeypatch, "inspect", folder / "keras")
    assert code == 0 and "LSTM" not in text and "signature serve: ids -> output_0" in text


# -- what is refused -----------------------------------------------------------------------------------------------


def _unregistered(path: Path) -> None:
    model = SavedModel.open(path)
    model.meta.graph_def.node.add(name="odd", op="NobodyKnowsThis")
    (path / "saved_model.pb").write_bytes(model.proto.SerializeToString())


def _doubled(path: Path) -> None:
    model = SavedModel.open(path)
    model.proto.meta_graphs.add().meta_info_def.tags.append("train")
    (path / "saved_model.pb").write_bytes(model.proto.SerializeToString())


def _cut(path: Path) -> None:
    (data,) = (path / "variables").glob("*.data-*")
    data.write_bytes(data.read_bytes()[:-2000])


def _unwired(path: Path) -> None:
    model = SavedModel.open(path)
    next(f for f in model.meta.graph_def.library.function if "words" in f.signature.name).node_def[-1].input[0] = (
        "gone:0"
    )
    (path / "saved_model.pb").write_bytes(model.proto.SerializeToString())


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no pb": (lambda p: (p / "saved_model.pb").unlink(), "not a SavedModel"),
    "junk": (lambda p: (p / "saved_model.pb").write_bytes(b"\xff" * 99), "cannot read the SavedModel"),
    "empty": (lambda p: (p / "saved_model.pb").write_bytes(b""), "expected one graph, got none"),
    "chunked": (lambda p: (p / "saved_model.cpb").write_bytes(b""), "a graph stored in chunks"),
    "two graphs": (_doubled, r"expected one graph, got 2 \(serve; train\)"),
    "truncated": (_cut, "cannot read the variables .* expected at least"),
    "no shard": (lambda p: next((p / "variables").glob("*.data*")).unlink(), "cannot read the variables"),
    "no index": (lambda p: (p / "variables" / "variables.index").unlink(), "no variables.index"),
    "bad index": (lambda p: (p / "variables" / "variables.index").write_bytes(b"x" * 99), "cannot read the variables"),
    "unwired": (_unwired, "expected the values that it reads, got no gone"),
    "unregistered": (_unregistered, "not registered .* got NobodyKnowsThis"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders_give_one_clear_error(kind: str, folder: Path, tmp_path: Path):
    breaks, message = BROKEN[kind]
    shutil.copytree(folder / "functions", tmp_path / "model")
    breaks(tmp_path / "model")
    with pytest.raises(InputError, match=message) as caught:
        optimized(tmp_path / "model", tmp_path / "out")
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bytes_turned_at_random_give_a_clear_error_or_a_model(folder: Path, tmp_path: Path):
    random, refused = np.random.default_rng(0), 0
    shutil.copytree(folder / "functions", tmp_path / "model")
    whole = (tmp_path / "model" / "saved_model.pb").read_bytes()
    for turn in range(300):
        turned = bytearray(whole)
        for place in random.integers(len(turned), size=1 + turn % 3):
            turned[place] = random.integers(256)
        (tmp_path / "model" / "saved_model.pb").write_bytes(bytes(turned))
        try:
            optimized(tmp_path / "model", tmp_path / "out", overwrite=True)
        except InputError:
            refused += 1
    assert 100 < refused < 300


def test_a_missing_signature_is_told_with_those_there_are(folder: Path):
    with pytest.raises(
        InputError, match=r"no such signature for functions: expected one of its .*: serving_default, words"
    ):
        Session(folder / "functions", "other")


@pytest.mark.parametrize(
    ("more", "got"),
    [({"equalize": True}, "equalize"), ({"inputs": "int8", "outputs": "int8"}, "integer inputs and outputs")],
)
def test_what_savedmodels_cannot_do_is_refused(more: dict[str, object], got: str, folder: Path, tmp_path: Path):
    rule = {"kind": "*", "apply": {"quantize": {"weights": "int8", "activations": "float"}}}
    with pytest.raises(UnsupportedError, match=f"cannot apply the recipe to a SavedModel .* got {got}"):
        optimized(folder / "functions", tmp_path / "out", {"version": 1, "rules": [rule], **more})
    assert not list(tmp_path.iterdir())


def test_a_bound_on_what_is_not_run_is_not_met_in_silence(folder: Path, tmp_path: Path, tensorflow):
    tf = tensorflow

    class Net(tf.Module):
        def __init__(self):
            super().__init__()
            self.head = tf.Variable(tf.random.normal([32, 32]), name="head")

        @tf.function(input_signature=[tf.TensorSpec(None, name="x")])
        def __call__(self, x):
            return {"y": tf.matmul(tf.reshape(x, [-1, 32]), self.head)}

        @tf.function(input_signature=[tf.TensorSpec([None, 32], name="x")])
        def known(self, x):
            return {"y": tf.matmul(x, self.head)}

    net = Net()
    signatures = {"serving_default": net.__call__, "known": net.known}
    tf.saved_model.save(net, str(tmp_path / "net"), signatures=signatures)
    with pytest.raises(BoundError, match=r"nobody knows whether the bound holds.* no known rank"):
        paring.optimize(tmp_path / "net", "weight-only-int8", output=tmp_path / "out", max_error=0.5)
    with pytest.raises(InputError, match=r"cannot hold the bound for --max-error:"):
        optimized(folder / "functions", tmp_path / "out", max_error=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    result = optimized(folder / "functions", tmp_path / "out", data="absent.npz")
    assert any(note.startswith("the data was not read") for note in result.report.notes)


def test_a_mistyped_folder_is_named_before_the_output(tmp_path: Path):
    with pytest.raises(InputError, match=r"no such model for .*absent"):
        paring.optimize(tmp_path / "absent", "weight-only-int8", output=tmp_path / "out")


def test_bfloat16_weights_are_refused_for_tflite(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot quantize to \.tflite .* got bfloat16, which LiteRT lacks"):
        paring.optimize(paring.demo.model_path(), "bfloat16", output=tmp_path / "out.tflite")


def test_int4_becomes_int8_and_static_activations_stay_float(folder: Path, tmp_path: Path):
    result = optimized(folder / "functions", tmp_path / "out", "weight-only-int4")
    assert "no data was given: no bias correction" in result.report.notes
    assert rows(result)["words/MatMul:shared"] == (
        "weight-only int8",
        "rule 1; stock TensorFlow multiplies no int4 weights, int8 instead",
    )
    static = {"version": 1, "rules": [{"kind": "*", "apply": {"quantize": {"weights": "int8", "activations": "int8"}}}]}
    result = optimized(folder / "functions", tmp_path / "static", static)
    assert rows(result)["words/MatMul:shared"] == ("float", "no int8 kernel for MatMul")
    assert any(note.startswith("nothing became smaller") for note in result.report.notes)


def test_only_savedmodels_are_replaced(folder: Path, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("all of it", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot replace the folder .* expected a SavedModel"):
        optimized(folder / "functions", tmp_path / "precious", overwrite=True)
    shutil.copytree(folder / "functions", tmp_path / "model")
    with pytest.raises(InputError, match="the model's own folder"):
        optimized(tmp_path / "model", tmp_path / "model", overwrite=True)
    with pytest.raises(InputError, match="the model's own folder"):
        optimized(tmp_path / "model", tmp_path / "model" / "small")
    assert (tmp_path / "precious" / "thesis.txt").read_text(encoding="utf-8") == "all of it"


# -- scales --------------------------------------------------------------------------------------------------------


def graph_bytes(folder: Path) -> int:
    return (folder / "saved_model.pb").stat().st_size


def test_scales_are_two_bytes_each_and_once_in_a_function(tmp_path: Path, tensorflow):
    tf, wide = tensorflow, 4096

    class Twice(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(np.random.default_rng(0).normal(size=(8, wide)).astype(np.float32))

        @tf.function(input_signature=[tf.TensorSpec([None, 8], name="x")])
        def run(self, x):
            return {"y": tf.matmul(x, self.w), "z": tf.matmul(x + 1, self.w)}

    tf.saved_model.save(Twice(), str(tmp_path / "net"))
    optimized(tmp_path / "net", tmp_path / "out")
    assert graph_bytes(tmp_path / "out") - graph_bytes(tmp_path / "net") < 2 * wide + 1500


@pytest.fixture
def tables(tmp_path: Path, tensorflow):
    """Tables that are picked from, in a function and in a loop; `narrow` and `cube` are none whose rows hold a scale."""
    tf, random = tensorflow, np.random.default_rng(0)

    class Tables(tf.Module):
        def __init__(self):
            super().__init__()
            for name, shape in {"ids": (500, 64), "turns": (300, 16), "narrow": (300, 8), "cube": (100, 4, 16)}.items():
                values = random.normal(size=shape) * random.uniform(0.1, 3, (shape[0], *[1] * (len(shape) - 1)))
                setattr(self, name, tf.Variable(values.astype(np.float32), name=name))
            keys = tf.lookup.KeyValueTensorInitializer(["a", "b"], tf.constant([1, 7], tf.int64))
            self.words = tf.lookup.StaticHashTable(keys, 0)

        @tf.function(input_signature=[tf.TensorSpec([2, 20], tf.int32, name="x")])
        def run(self, x):
            total = tf.zeros([2, 16])
            for turn in tf.range(3):
                total += tf.gather(self.turns, x[:, turn])
            whole = tf.gather(tf.convert_to_tensor(self.ids), x[0])
            long = tf.cast(x, tf.int64)
            return {
                "rows": tf.gather(self.ids, x), "whole": whole, "long": tf.gather(self.ids, long), "turns": total,
                "narrow": tf.gather(self.narrow, x), "cube": tf.gather(self.cube, x),
            }  # fmt: skip

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
        def read(self, text):
            return {"v": tf.gather(self.ids, self.words.lookup(text))}

    made = Tables()
    tf.saved_model.save(made, str(tmp_path / "tables"), signatures={"run": made.run, "words": made.read})
    return made


def test_rows_end_in_their_scales(tables, tmp_path: Path, tensorflow):
    optimized(tmp_path / "tables", tmp_path / "out")
    loaded = tensorflow.saved_model.load(str(tmp_path / "out"))
    shapes = {name: tuple(getattr(loaded, name).shape) for name in ("ids", "turns", "narrow", "cube")}
    assert shapes == {"ids": (500, 66), "turns": (300, 18), "narrow": (300, 8), "cube": (100, 4, 16)}
    exact = tables.ids.numpy()
    scale = up_to_bfloat16(np.abs(exact).max(axis=1, keepdims=True) / np.float32(127))
    x = tensorflow.constant(np.random.default_rng(1).integers(0, 100, (2, 20)), tensorflow.int32)
    found = loaded.signatures["run"](x=x)
    assert (np.abs(found["rows"] - exact[x]) <= 0.5001 * scale[x]).all()
    np.testing.assert_array_equal(found["whole"], found["rows"][0])
    np.testing.assert_array_equal(found["long"], found["rows"])
    assert set(np.unique(found["rows"] / scale[x] % 1)) == {0.0}
    expected = tables.run(x)
    assert all(np.linalg.norm(found[k] - v) < 0.02 * np.linalg.norm(v) for k, v in expected.items())
    words = loaded.signatures["words"](text=tensorflow.constant(["b", "a"]))["v"]
    assert np.abs(words - exact[[7, 1]]).max() < 0.05
    compiled = tensorflow.function(loaded.signatures["run"], jit_compile=True)(x=x)
    assert all(np.allclose(compiled[k], found[k], atol=1e-6) for k in found)
    for run in LOADERS.values():
        gap = gaps(run(tensorflow, tmp_path / "tables"), run(tensorflow, tmp_path / "out"))
        assert 0 < max(gap.values()) < 0.02, gap


def test_tables_whose_rows_end_in_scales_become_litert_models_that_run(tmp_path: Path, tensorflow):
    tf = tensorflow

    class Table(tf.Module):
        def __init__(self):
            super().__init__()
            self.ids = tf.Variable(np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32))

        @tf.function(input_signature=[tf.TensorSpec([2, 20], tf.int32, name="x")])
        def run(self, x):
            return {"y": tf.gather(self.ids, x)}

    made = Table()
    tf.saved_model.save(made, str(tmp_path / "table"), signatures={"serving_default": made.run})
    optimized(tmp_path / "table", tmp_path / "out")
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")
    content = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "out")).convert()
    interpreter = litert.Interpreter(model_content=content)
    x = np.random.default_rng(1).integers(0, 500, (2, 20)).astype(np.int32)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    got = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    want = tf.saved_model.load(str(tmp_path / "out")).signatures["serving_default"](x=tf.constant(x))["y"]
    np.testing.assert_allclose(got, want, rtol=1e-6)
