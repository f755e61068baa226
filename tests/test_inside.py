"""Seeing inside SavedModels: every execution of every layer, in functions, branches and loops, of both models in step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import saved_models as models
from test_cli import call  # noqa: F401  (a fixture)

import paring
from paring.compress.encodings import up_to_bfloat16
from paring.compress.quantize import Quantize
from paring.errors import InputError
from paring.formats.saved_model.model import SavedModel
from paring.measure.compare import compare
from paring.measure.result import Comparison, Layer
from paring.recipe import Recipe, Rule


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """TensorFlow deprecates what its own loaders call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tensorflow: ModuleType) -> Path:
    """Float models, and as `NAME-small` what `bf16-int8` makes of them."""
    here = tmp_path_factory.mktemp("inside")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models.functions(tensorflow, here / "functions")
        models.tf1(tensorflow, here / "reference", resource=False)
        shared(tensorflow, here / "shared")
    for kind in ("functions", "reference", "shared"):
        optimized(here / kind, here / f"{kind}-small", "bf16-int8")
    return here


def shared(tf: Any, folder: Path) -> None:
    """One body for three variables, called in a loop, in a branch and beside it; one of the variables stays float."""
    random = np.random.default_rng(0)

    class Shared(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("one", "two", "kept", "tail"):
                setattr(self, name, tf.Variable(models.scaled(random, 24, 24), name=name))

        @tf.function
        def body(self, x, w):
            return tf.tanh(tf.matmul(x, w))

        @tf.function(input_signature=[tf.TensorSpec([2, 24], name="x")])
        def run(self, x):
            _, y = tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, self.body(y, self.one)), [0, x])
            z = self.body(x, self.two) + self.body(x, self.kept)
            z = tf.cond(tf.reduce_sum(x) > 0, lambda: self.body(z, self.one), lambda: z)
            return {"y": tf.matmul(y + z, self.tail)}

        @tf.function(input_signature=[tf.TensorSpec([24, 24], name="values")])
        def feed(self, values):
            return {"values": self.kept.assign(values)}

    module = Shared()
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.run, "feed": module.feed})


def optimized(source: Path, out: Path, recipe: object, **settings: object) -> paring.Result:
    return paring.optimize(source, recipe, output=out, verified=False, **settings)  # type: ignore[arg-type]


def by_weight(found: Comparison) -> dict[str, Layer]:
    return {layer.name.split(":")[-1]: layer for layer in found.layers if layer.own is not None}


def snr(exact: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(got - exact).sum()))


def short(values: np.ndarray, tf: Any) -> np.ndarray:
    """Rounded to bfloat16."""
    return np.asarray(tf.cast(tf.cast(values, tf.bfloat16), tf.float32))


def stored(weight: np.ndarray) -> np.ndarray:
    """What int8 codes with a scale per column stand for."""
    scale = up_to_bfloat16(np.abs(weight).max(axis=0) / np.float32(127))
    return np.rint(weight / scale) * scale


def test_own_and_accumulated_error_are_those_of_the_written_arithmetic(tmp_path: Path, tensorflow: ModuleType):
    """A loop of three turns whose weight is read in every one, and a layer behind it."""
    tf, random = tensorflow, np.random.default_rng(1)
    turned, last = models.scaled(random, 24, 24), models.scaled(random, 24, 16)

    class Loop(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned, self.last = tf.Variable(turned, name="turned"), tf.Variable(last, name="last")

        @tf.function(input_signature=[tf.TensorSpec([None, 24], name="x")])
        def run(self, x):
            body = lambda i, x: (i + 1, tf.tanh(tf.matmul(x, self.turned)))  # noqa: E731
            _, x = tf.while_loop(lambda i, x: i < 3, body, [0, x])
            return {"y": tf.matmul(x, self.last)}

    module = Loop()
    tf.saved_model.save(module, str(tmp_path / "net"), signatures=module.run)
    optimized(tmp_path / "net", tmp_path / "small", "bf16-int8")
    data = random.normal(size=(6, 24)).astype(np.float32)
    layers = by_weight(compare(tmp_path / "net", tmp_path / "small", data))

    exact, got, inputs = [], [], [data]
    rough = data
    for _ in range(3):
        exact.append(inputs[-1] @ turned)
        got.append(short(rough, tf) @ stored(turned))
        inputs.append(np.tanh(exact[-1]))
        rough = np.tanh(got[-1])
    alone = [short(x, tf) @ stored(turned) for x in inputs[:3]]
    assert layers["turned"].own is not None and layers["turned"].accumulated is not None
    assert layers["turned"].own.snr_db == pytest.approx(snr(np.stack(exact), np.stack(alone)), abs=0.02)
    assert layers["turned"].accumulated.snr_db == pytest.approx(snr(np.stack(exact), np.stack(got)), abs=0.02)
    assert layers["last"].own is not None and layers["last"].accumulated is not None
    end = inputs[-1] @ last
    assert layers["last"].own.snr_db == pytest.approx(snr(end, short(inputs[-1], tf) @ stored(last)), abs=0.02)
    assert layers["last"].accumulated.snr_db == pytest.approx(snr(end, short(rough, tf) @ stored(last)), abs=0.02)
    assert layers["last"].form == layers["turned"].form == "bf16-int8"
    assert layers["last"].weight_db == pytest.approx(snr(last, stored(last)), abs=0.02)


def test_a_body_that_serves_several_variables_is_seen_call_by_call(folder: Path):
    data = {
        "serving_default/x": np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32),
        "feed/values": np.eye(24, dtype=np.float32),
    }
    copies = {s for s in SavedModel.open(folder / "shared-small").flow.scopes if "_copy" in s}
    assert copies  # or this tests nothing
    found = compare(folder / "shared", folder / "shared-small", data)
    body = next(layer for layer in found.layers if layer.name.startswith("body"))
    # Were executions of different calls mixed up, the error would be as large as the values.
    assert body.own is not None and body.accumulated is not None
    assert body.own.snr_db > 35 and body.accumulated.snr_db > 30 and "ran" not in body.note


@pytest.mark.parametrize("kind", ["functions", "reference"])
def test_functions_branches_text_and_tensorflow_1(kind: str, folder: Path):
    found = compare(folder / kind, folder / f"{kind}-small")
    layers = by_weight(found)
    assert all(layer.blame > 35 for layer in layers.values() if layer.blame is not None)
    if kind == "functions":
        assert {"shared", "table", "heads", "yes", "fed"} <= {*layers}
        assert layers["fed"].blame == 200 and layers["fed"].form == "float32"  # what Python assigns to stays as it is
        assert layers["table"].form == "int8" and layers["shared"].form == "bf16-int8"
        assert sorted(found.outputs) == ["serving_default/y", "words/v"]
        assert [layer.note for layer in found.layers if layer.name.startswith("embed")] == ["no sample ran it"]
    else:
        loop = layers["square"]
        assert loop.own is not None and loop.accumulated is not None
        assert loop.own.snr_db > loop.accumulated.snr_db + 3  # the error of three turns adds up
    assert found.notes[0].startswith("the samples were made up") and not found.culprits


def test_the_culprit_is_named_with_lines_that_exempt_it(call: Any, tmp_path: Path, tensorflow: ModuleType):  # noqa: F811
    tf, random = tensorflow, np.random.default_rng(2)

    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            first = models.scaled(random, 24, 24)
            first[:, 3] *= 500
            self.weights = [tf.Variable(first, name="loud")]
            self.weights += [tf.Variable(models.scaled(random, 24, 24), name=f"w{n}") for n in range(4)]

        @tf.function(input_signature=[tf.TensorSpec([None, 24], name="x")])
        def run(self, x):
            for weight in self.weights:
                x = tf.tanh(tf.matmul(x, weight))
            return {"y": x}

    net = Net()
    tf.saved_model.save(net, str(tmp_path / "net"), signatures=net.run)
    np.savez(tmp_path / "data.npz", x=random.normal(size=(8, 24)).astype(np.float32))
    np.save(tmp_path / "labels.npy", np.arange(8) % 24)
    plain = Quantize("int8", "float")
    tensor = replace(plain, granularity="tensor")
    rules = Recipe((Rule((plain,), kind="*"), Rule((tensor,), name="loud")), "loud")
    optimized(tmp_path / "net", tmp_path / "small", rules)
    asked = ("debug", tmp_path / "net", tmp_path / "small", "-d", tmp_path / "data.npz")
    code, out, err = call(*asked, "--labels", tmp_path / "labels.npy", "--html", "page.html", "--results", "r.json")
    assert code == 0, err
    first = next(line for line in out.splitlines() if "run/MatMul" in line)
    assert "loud" in first and "culprit: run/MatMul:loud (MatMul, int8): its stored weights keep only" in out
    assert "right in float" in out and Path("page.html").stat().st_size > 10_000
    lines = [line for line in out.splitlines() if line.startswith("  - {")]
    more = Recipe.parse("rules:\n" + "\n".join(lines)).rules
    again = Recipe((*rules.rules, *more), "again")
    optimized(tmp_path / "net", tmp_path / "mended", again)
    layers = by_weight(compare(tmp_path / "net", tmp_path / "mended", tmp_path / "data.npz"))
    assert layers["loud"].blame == 200 and layers["loud"].rule == 2
    assert [rule.name for rule in more] == [r"^run/MatMul:loud$"] and isinstance(more[0], Rule)


def test_what_was_loaded_and_saved_again_is_matched_too(folder: Path, tmp_path: Path, tensorflow: ModuleType):
    loaded = tensorflow.saved_model.load(str(folder / "functions-small"))
    tensorflow.saved_model.save(loaded, str(tmp_path / "again"), signatures=loaded.signatures)
    names = [{*SavedModel.open(path).flow.scopes} for path in (folder / "functions-small", tmp_path / "again")]
    assert names[0] != names[1]  # or this tests nothing
    layers = by_weight(compare(folder / "functions", tmp_path / "again"))
    assert layers["heads"].form == "bf16-int8" and (layers["heads"].blame or 0) > 35


def test_models_that_do_not_belong_together(folder: Path, tmp_path: Path, tensorflow: ModuleType):
    class Other(tensorflow.Module):
        @tensorflow.function(input_signature=[tensorflow.TensorSpec([2, 24], name="x")])
        def run(self, x):
            return {"y": x}

    other = Other()
    tensorflow.saved_model.save(other, str(tmp_path / "other"), signatures=other.run)
    with pytest.raises(InputError, match="do not correspond for signature feed: expected the same signature"):
        compare(folder / "shared", tmp_path / "other")
    both = {"serving_default": other.run, "feed": other.run}
    tensorflow.saved_model.save(other, str(tmp_path / "named"), signatures=both)
    with pytest.raises(InputError, match="expected operators named as in the float model"):
        compare(folder / "shared", tmp_path / "named")
    with pytest.raises(InputError, match="expected keys `signature/input` for each of feed, serving_default"):
        compare(folder / "shared", folder / "shared-small", np.zeros((2, 24), np.float32))


def test_a_table_whose_rows_end_in_their_scales_keeps_its_form_and_error(tmp_path: Path, tensorflow: ModuleType):
    tf = tensorflow
    values = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)

    class Table(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ids = tf.Variable(values, name="ids")

        @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, name="x")])
        def run(self, x):
            return {"y": tf.gather(self.ids, x)}

    made = Table()
    tf.saved_model.save(made, str(tmp_path / "net"), signatures={"serving_default": made.run})
    optimized(tmp_path / "net", tmp_path / "out", "weight-only-int8")
    np.save(tmp_path / "x.npy", np.arange(300, dtype=np.int32))
    layer = by_weight(paring.compare(tmp_path / "net", tmp_path / "out", data=tmp_path / "x.npy"))["ids"]
    kept = snr(values, stored(values.T).T)
    assert layer.form == "int8" and layer.own is not None and layer.weight_db is not None
    assert abs(layer.weight_db - kept) < 0.02
