"""Stages before quantization on .tflite: chains, promises in the written file, operators that become two, own algorithms."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from layers import network, outputs, rules, weights
from models import Net

import paring
from paring import InputError, Recipe, load, optimize
from paring.compress.base import Algorithm
from paring.compress.low_rank import LowRank
from paring.compress.quantize import Quantize
from paring.compress.weights import shelved
from paring.demo import load_digits, model_path
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.view import entries, view
from paring.measure.store import finite
from paring.recipe import Rule
from paring.report.page import render
from paring.runtime import Worker

INT8 = {"quantize": {"weights": "int8", "activations": "int8"}}
SPARSE = {"sparsify": {"sparsity": 0.5, "pattern": "2x1"}}
OWN = '''
from dataclasses import dataclass
import numpy as np
from paring.compress.base import Algorithm, Encoded

@dataclass(frozen=True)
class Ternary(Algorithm):
    """Minus one, nothing or plus one, times the mean of what is left."""

    threshold: float = 0.7

    def encode(self, weight, context):
        size = np.abs(weight)
        kept = size > self.threshold * size.mean()
        return Encoded((np.sign(weight) * kept * size[kept].mean()).astype(np.float32), "float32", None)

    def decode(self, encoded):
        return encoded.values

@dataclass(frozen=True)
class Broken(Algorithm):
    how: str = "raise"

    def encode(self, weight, context):
        if self.how == "raise":
            raise KeyError("nothing here")
        return Encoded(weight[1:] if self.how == "shape" else weight * np.float32(np.nan), "float32", None)

    def decode(self, encoded):
        return encoded.values

class Forgot(Algorithm):
    """No dataclass."""

other = 5
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the working folder."""
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def codes(model: TfliteModel) -> dict[str, np.ndarray]:
    """What is stored of each layer's weights: rows are output channels."""
    graph, found = view(model), {}
    for op in graph.ops:
        for use, tensor in graph.weights_of(op) if not op.constant else ():
            stored = model.subgraphs[0].tensors[tensor.id[1]]
            raw = np.asarray(tensor.weight.read())
            name = op.name.removesuffix("_int8")
            found[name] = np.moveaxis(raw, use.axis, 0).reshape(raw.shape[use.axis], -1)
            assert stored.type is not None
    return found


def most(rows: np.ndarray) -> int:
    """The largest number of distinct values in a row."""
    return max(len(np.unique(row)) for row in rows)


# -- chains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_chain_keeps_zeros_and_clusters_in_the_written_file(bits, rounding, tmp_path):
    model, data = network()
    last = {"quantize": {"weights": bits, "activations": "int8", "rounding": rounding}}
    pruned = weights(optimize(model, rules(SPARSE), data, verified=False).model)
    path = tmp_path / "o.tflite"
    made = optimize(model, rules(SPARSE, {"cluster": {"clusters": 8}}, last), data, output=path)
    stored, rows = codes(load(path)), {row.name: row for row in made.report.rows}
    for name in ("first", "point", "head"):
        zeros = (pruned[name] == 0).reshape(len(pruned[name]), -1)
        assert stored[name].dtype == np.int8
        assert not stored[name][zeros].any()
        assert stored[name][~zeros].any(axis=None)
        assert most(stored[name]) <= 8
        assert most(pruned[name].reshape(len(pruned[name]), -1)) > 8
        assert rows[name].became.startswith("50.0% zeros (2x1), 8 clusters, static ")
        assert ("rounded to nearest, not by gptq" in rows[name].reason) == (rounding == "gptq")
    assert rows["depthwise"].stages == ("8 clusters",)  # the recipe prunes none of them, and says why
    assert "depthwise" in rows["depthwise"].pruning
    assert not any("gives up" in note for note in made.report.notes)
    entry = next(e for e in load(path).root.metadata if e.name == "paring")
    record = json.loads(bytes(load(path).root.buffers[entry.buffer].data))
    assert [list(stage) for stage in record["recipe"]["rules"][0]["apply"]] == [["sparsify"], ["cluster"], ["quantize"]]


def test_what_a_later_stage_gives_up_is_said():
    model, data = network()
    made = optimize(
        model, rules({"cluster": {"clusters": 8}}, SPARSE), data, verified=False
    )  # the others are fitted anew
    assert any(
        "cluster gives up: " in note and "distinct values" in note and "(first" in note for note in made.report.notes
    )
    per_tensor = {"cluster": {"clusters": 4, "granularity": "tensor"}}
    given_up = optimize(model, rules(per_tensor, {"quantize": {}}), verified=False)
    assert any("cluster gives up: the tensor has" in note for note in given_up.report.notes)
    kept = optimize(model, rules(per_tensor, {"quantize": {"granularity": "tensor"}}), verified=False)
    assert most(codes(kept.model)["head"].reshape(1, -1)) <= 4
    assert all("gives up" not in note or "head" not in note for note in kept.report.notes)


def test_clusters_of_layers_that_share_weights_are_shared_and_half_precision_stays():
    rng, net = np.random.default_rng(0), Net()
    x, dense = net.input((1, 24), name="x"), ("FullyConnectedOptions", {})
    shared = net.constant(rng.normal(size=(16, 24)).astype(np.float32))
    for name in ("left", "right"):
        net.outputs.append(net.then("FULLY_CONNECTED", [x, shared, -1], (1, 16), dense, name))
    half = optimize(
        net.finish(), {"rules": [{"kind": "*", "apply": {"quantize": {"weights": "float16", "activations": "float"}}}]}
    )
    made = optimize(half.model, rules({"cluster": {"clusters": 4}}))
    found = weights(made.model)
    np.testing.assert_array_equal(found["left"], found["right"])
    assert most(found["left"]) == 4
    assert len(made.model.to_bytes()) <= len(half.model.to_bytes()) + 1000
    again = optimize(half.model, rules({"low_rank": {"rank": 2}}))
    assert {w.dtype.name for w in weights(again.model).values()} == {"float32"}  # as it is seen
    assert {t.type for t in again.model.subgraphs[0].tensors if t.buffer and len(t.shape) == 2} == {
        1
    }  # as it is stored


@pytest.mark.parametrize("stage", [{"cluster": {"clusters": 4}}, {"low_rank": {"rank": 2}}])
def test_a_quantized_model_is_refused(stage):
    data = load_digits()[0][:20]
    quantized = optimize(model_path(), "int8", data, verified=False).model
    with pytest.raises(InputError, match=r"touches no layer .* weights are int8: compress the float model"):
        optimize(quantized, rules(stage))


@pytest.mark.parametrize("applied", [{"quantize": {}}, {"cluster": {}}, [{"cluster": {}}, {"quantize": {}}]])
def test_a_recipe_whose_layers_have_no_weights_is_refused(applied, tmp_path):
    with pytest.raises(InputError, match=r"the recipe touches no layer .* RESHAPE"):
        optimize(network()[0], {"rules": [{"kind": "reshape", "apply": applied}]}, output=tmp_path / "o.tflite")
    assert list(tmp_path.iterdir()) == []


def test_large_weights_of_a_new_model_lie_in_files(monkeypatch):
    from paring.compress import weights as module

    large, small = np.zeros((1024, 512), np.float32), np.zeros(3)
    assert isinstance(shelved(large), np.memmap) and shelved(small) is small
    monkeypatch.setattr(module, "CHUNK", 8)
    model, data = network()
    a = optimize(model, rules(SPARSE, {"cluster": {}}), data, verified=False).model.to_bytes()
    monkeypatch.undo()
    assert a == optimize(model, rules(SPARSE, {"cluster": {}}), data, verified=False).model.to_bytes()


# -- low rank --------------------------------------------------------------------------------------------------------


def thin(rng: np.random.Generator, *shape: int, rank: int = 3) -> np.ndarray:
    left, right = rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, int(np.prod(shape[1:]))))
    return ((left @ right) / np.sqrt(right.shape[1])).reshape(shape).astype(np.float32)


def low_rank_network(*, keep: bool) -> tuple[TfliteModel, np.ndarray]:
    """A strided 3x3, a 1x1 and dense layers, all of rank 3, with fused activations, a dynamic batch and a signature."""
    rng, net = np.random.default_rng(1), Net()

    def weights_of(*shape: int) -> list[int]:
        return [net.constant(thin(rng, *shape)), net.constant(np.ones(shape[0], np.float32))]

    y = net.input((1, 9, 9, 4), name="x")
    conv = ("Conv2DOptions", {"stride_h": 2, "stride_w": 2, "fused_activation_function": 1})
    y = net.then("CONV_2D", [y, *weights_of(24, 3, 3, 4)], (1, 5, 5, 24), conv, "wide")
    y = net.then("CONV_2D", [y, *weights_of(32, 1, 1, 24)], (1, 3, 3, 32), conv, "point")
    shape = (1, 3, 3, 40) if keep else (9, 40)
    dense = ("FullyConnectedOptions", {"keep_num_dims": keep, "fused_activation_function": 1})
    y = net.then("FULLY_CONNECTED", [y, *weights_of(40, 32)], shape, dense, "dense")
    y = net.then("FULLY_CONNECTED", [y, weights_of(5, 40)[0], -1], (*shape[:-1], 5), dense, "head")
    net.outputs.append(y)
    for tensor in net.graph.tensors if keep else ():
        if len(tensor.shape) == 4 and not tensor.buffer:
            tensor.shape_signature = np.array([-1, *tensor.shape[1:]], np.int32)
    return net.finish(), rng.normal(size=(6, 9, 9, 4)).astype(np.float32)


@pytest.mark.parametrize("keep", [False, True])
def test_an_operator_becomes_two_that_compute_the_same(keep, tmp_path):
    model, data = low_rank_network(keep=keep)
    path = tmp_path / "o.tflite"
    made = optimize(model, rules({"low_rank": {"energy": 0.9999}}), data, output=path)
    rows = {row.name: row for row in made.report.rows}
    assert {name for name in rows if "/" in name} == {f"{name}/low_rank" for name in ("wide", "point", "dense", "head")}
    assert rows["wide"].stages == rows["wide/low_rank"].stages == ("rank 3 of 24",)
    wanted, got = outputs(model, data, tmp_path / "a.tflite"), outputs(made.model, data, tmp_path / "b.tflite")
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)
    before, after = view(model), view(load(path))
    assert [after.tensors[t].name for t in after.outputs] == [before.tensors[t].name for t in before.outputs]
    assert [after.tensors[t].shape for t in after.outputs] == [before.tensors[t].shape for t in before.outputs]
    middle = {t.name: t.shape for t in after.tensors.values() if t.name.endswith("/low_rank")}
    assert middle["wide/low_rank"] == (-1 if keep else 1, 5, 5, 3)
    assert made.report.output_bytes < len(model.to_bytes())
    if keep:
        with Worker() as worker:  # any batch
            worker.load("model", path)
            batch = worker.run("model", [data])[0]
        np.testing.assert_allclose(batch, got, rtol=1e-4, atol=1e-5)


def test_signatures_survive_a_split(shared):
    path = shared / "models" / "pretrainedResnet.tflite"
    made = optimize(path, {"rules": [{"kind": "conv2d", "apply": {"low_rank": {"energy": 0.7}}}]})
    source, found = load(path), made.model
    assert {k: (list(i), list(o)) for k, (_, i, o) in entries(found).items()} == {
        k: (list(i), list(o)) for k, (_, i, o) in entries(source).items()
    }
    assert sum(row.name.endswith("/low_rank") for row in made.report.rows) >= 4


def test_stages_behind_low_rank_work_on_the_factors(tmp_path):
    model, data = low_rank_network(keep=True)
    stages = ({"low_rank": {"rank": 3}}, {"cluster": {"clusters": 8}}, INT8)
    made = optimize(model, rules(*stages), data, output=tmp_path / "o.tflite")
    rows = {row.name: row for row in made.report.rows}
    for name in ("wide", "wide/low_rank", "dense", "dense/low_rank"):
        assert rows[name].became == f"rank 3 of {24 if 'wide' in name else 32}, 8 clusters, static int8"
    assert {most(rows) <= 8 for rows in codes(made.model).values()} == {True}
    assert made.report.verification.difference["head"] < 0.2


def test_a_rank_that_does_not_pay_is_left_and_named():
    model, _ = network()
    made = optimize(model, rules({"low_rank": {"rank": 16}}), verified=False)
    rows = {row.name: row for row in made.report.rows}
    assert rows["first"].stages == rows["first/low_rank"].stages == ("rank 16 of 32",)
    assert (
        rows["point"].stages == () and "no low_rank: rank 16 is no less work than 20x32 weights" in rows["point"].reason
    )
    assert "DEPTHWISE_CONV_2D of this form" in rows["depthwise"].reason
    with pytest.raises(InputError, match=r"touches no layer .* no less work"):
        optimize(model, rules({"low_rank": {"rank": 200}}), verified=False)
    both = optimize(model, rules({"low_rank": {"rank": 200}}, {"quantize": {}}), verified=False)  # the rest goes on
    assert {row.became for row in both.report.rows if row.name == "head"} == {"dynamic int8"}


def test_selectors_are_those_of_the_model_that_came_in():
    model, data = low_rank_network(keep=True)
    wide = {"name": "^wide$", "apply": [{"low_rank": {"rank": 2}}, INT8]}
    said = {"rules": [wide, {"position": "last", "apply": {"cluster": {"clusters": 2}}}]}
    rows = {row.name: row.became for row in optimize(model, said, data, verified=False).report.rows}
    assert rows["wide"] == rows["wide/low_rank"] == "rank 2 of 24, static int8"
    assert rows["head"] == "2 clusters, float" and rows["dense"] == "float"


# -- a user's own ----------------------------------------------------------------------------------------------------


def test_an_algorithm_of_the_users_own_runs_in_a_chain(own):
    stages = "[{sparsify: {sparsity: 0.3}}, {'mine:Ternary': {threshold: 0.5}}, {quantize: {activations: int8}}]"
    recipe = f"rules:\n- {{kind: dense|conv2d, apply: {stages}}}\n"
    (own / "chain.yaml").write_text(recipe, encoding="utf-8")
    model, data = network()
    made = optimize(model, own / "chain.yaml", data, output=own / "o.tflite")
    stored, rows = codes(load(own / "o.tflite")), {row.name: row for row in made.report.rows}
    for name in ("first", "point", "head"):
        assert most(stored[name]) <= 3
        assert set(np.unique(stored[name])) <= {-127, 0, 127}
        assert rows[name].became == "30.0% zeros (unstructured), Ternary(threshold=0.5), static int8"
    assert rows["depthwise"].stages == ()
    chain = Recipe.load(own / "chain.yaml")
    assert Recipe.parse(chain.to_yaml()) == chain
    assert chain.rules[0].stages[1].threshold == 0.5


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"mine:Ternari": {}}, "Did you mean mine:Ternary?"),
        ({"mein:Ternary": {}}, "no such module for mein:Ternary"),
        ({"mine:other": {}}, "expected a dataclass derived from paring.compress.base.Algorithm, got 5"),
        ({"mine:Forgot": {}}, "expected a dataclass derived from"),
        ({"paring.compress.base:Algorithm": {}}, "expected a dataclass derived from"),
        ({"mine:Ternary": {"treshold": 1}}, "Did you mean 'threshold'?"),
        ({"mine:Broken": {}}, "mine:Broken failed for layer first: got KeyError: 'nothing here'"),
        ({"mine:Broken": {"how": "shape"}}, "expected finite values 32x3x3x8, got 31x3x3x8"),
        ({"mine:Broken": {"how": "nan"}}, "got infinity or not-a-number"),
        ({"clusters": {}}, "expected sparsify, cluster, low_rank, quantize or a module:Class of your own"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_own_algorithm_is_said_and_nothing_is_written(stage, words, own, call):
    network()[0].save(own / "m.tflite")
    (own / "r.json").write_text(json.dumps(rules(stage)), encoding="utf-8")
    code, _, err = call("optimize", "m.tflite", "-o", "o.tflite", "--recipe", "r.json")
    assert (code, words in err) == (2, True), err
    assert not Path("o.tflite").exists()


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs `paring ...` in the working folder -> (exit code, stdout, stderr)."""
    from paring.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paring", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_a_rule_takes_stages_in_any_order_once_and_quantize_last():
    everything = [{"low_rank": {"rank": 4}}, {"cluster": {}}, SPARSE, INT8]
    recipe = Recipe.load(rules(*everything))
    assert Recipe.parse(recipe.to_yaml()) == recipe
    [rule] = recipe.rules
    assert (rule.apply, rule.before, rule.prune) == (rule.stages[3], rule.stages[:3], rule.stages[2])
    assert recipe.changes and not Recipe.load(rules(INT8)).changes
    changed = recipe.with_settings(rounding="gptq").rules[0]
    assert (changed.before, changed.apply.rounding) == (rule.before, "gptq")
    for wrong in ((Quantize(), LowRank(1)), (LowRank(1), LowRank(2))):
        with pytest.raises(InputError, match=r"each stage at most once, quantize last, got (quantize, )?low_rank"):
            Rule(wrong)
    with pytest.raises(InputError, match="a tuple of algorithms"):
        Rule(Quantize())
    assert Rule((Algorithm(),)).apply is None


# -- front doors -----------------------------------------------------------------------------------------------------


def test_the_command_clusters_writes_and_says_so(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("cluster", model_path(), "-o", "o.tflite", "--clusters", 8, "--skip", "digit_1/")
    assert code == 0, err
    assert "8 clusters, float" in out and "wrote o.tflite" in out and "pruned" not in out
    found = weights(load("o.tflite"))
    few = [name for name, w in found.items() if len(np.unique(w.reshape(len(w), -1)[0])) <= 8 < w[0].size]
    assert len(few) >= 2
    code, out, _ = call("cluster", model_path(), "-o", "p.tflite", "--granularity", "tensor", "--json")
    assert code == 0 and ["16 clusters per tensor"] in [row["stages"] for row in json.loads(out)["rows"]]
    for arguments, words in (
        (("--clusters", 1), "2 to 256"),
        (("--granularity", "block"), "channel, tensor"),
        (("--min-size", 10**9), "min_size: 1000000000"),
    ):
        code, _, err = call("cluster", model_path(), "-o", "q.tflite", *arguments)
        assert (code, words in err) == (2, True), err
    assert not Path("q.tflite").exists()


def test_the_python_call_clusters(tmp_path):
    model, _ = network()
    made = paring.cluster(model, tmp_path / "o.tflite", clusters=4, only=["dense"])
    assert [row.name for row in made.report.rows if row.stages] == ["head"]
    assert most(weights(load(tmp_path / "o.tflite"))["head"]) == 4


def test_a_comparison_sees_zeros_and_clusters_in_the_file_and_its_page_shows_them(tmp_path):
    model, data = network()
    made = optimize(model, rules(SPARSE, {"cluster": {"clusters": 8}}, INT8), data, verified=False)
    found = paring.compare(model, made.model, data)
    layers = {layer.name: layer for layer in found.layers}
    assert layers["head"].became == "50% zeros, 8 values per channel, int8"
    page = render({"comparison": finite(asdict(found))})
    assert '<td class="k">50% zeros, 8 values per channel, int8</td>' in page
    assert {layer.shared for layer in paring.compare(model, model, data).layers} == {""}


@pytest.mark.parametrize("allocation", ["global", "erk"])
def test_budgets_of_training_hold_without_training(allocation):
    model, _ = network()
    stage = {"sparsify": {"sparsity": 0.6, "allocation": allocation}}
    made = optimize(model, rules(stage), verified=False)
    found = [weights(made.model)[name] for name in ("first", "point", "head")]
    assert sum((w == 0).sum() for w in found) / sum(w.size for w in found) == pytest.approx(0.6, abs=0.01)
    assert len({round(float((w == 0).mean()), 2) for w in found}) > 1


def test_what_only_training_knows_is_refused():
    said = rules({"quantize": {"weights": "int8", "activations": "bfloat16"}})
    with pytest.raises(
        InputError, match=r"cannot quantize after training .* got bfloat16\. Take this recipe to paring"
    ):
        optimize(network()[0], said)
