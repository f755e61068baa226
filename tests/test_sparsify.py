"""Pruning: patterns, the exact share, the optimum for given zeros, zeros that later stages keep, files that run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import LAYERS, PRUNED, network, outputs, rules, weights
from models import Net

import paring
from paring import BoundError, InputError, Recipe, load, optimize, pruning
from paring.compress.allocate import allocate
from paring.compress.base import Context
from paring.compress.gram import Gram, GramSum
from paring.compress.pattern import USUAL, Pattern
from paring.compress.quantize import Quantize
from paring.compress.sparsify import Sparsify
from paring.compress.support import fit, supports
from paring.compress.unfold import Unfolding
from paring.demo import load_digits, model_path
from paring.formats.tflite.constants import constant_weight, shape_of
from paring.formats.tflite.sparse import encode, store_sparse
from paring.graph import Quantization


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs `paring ...` in an empty folder -> (exit code, stdout, stderr)."""
    from paring.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paring", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def correlated(inputs: int, rows: int, seed: int, rank: int = 8) -> tuple[np.ndarray, Gram]:
    """Weights of a dense layer and the moments of inputs of about the given rank."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * inputs, rank)) @ rng.normal(size=(rank, inputs)) + 0.3 * rng.normal(
        size=(4 * inputs, inputs)
    )
    weight = (rng.normal(size=(rows, inputs)) / np.sqrt(inputs)).astype(np.float32)
    total = GramSum(Unfolding.plain(weight.shape), 10**6, 0)
    total.update(x.astype(np.float32), x.astype(np.float32))
    found = total.finish()
    assert found is not None
    return weight, found


def relative(weight: np.ndarray, pruned: np.ndarray, gram: Gram) -> float:
    return float(gram.loss(weight - pruned).sum() / gram.loss(weight).sum())


# -- patterns --------------------------------------------------------------------------------------------------------


def in_blocks(kept: np.ndarray, pattern: Pattern) -> bool:
    """True where every block of [groups, rows, taps, inputs] is all kept or all zero."""
    for r in range(0, kept.shape[1], pattern.outputs):
        for c in range(0, kept.shape[3], pattern.inputs):
            block = kept[:, r : r + pattern.outputs, :, c : c + pattern.inputs]
            if (block.any(axis=(1, 3)) != block.all(axis=(1, 3))).any():
                return False
    return True


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([*USUAL, "1x4", "3x5", "1:4", "5:7"]),
    rows=st.integers(1, 37),
    taps=st.integers(1, 3),
    inputs=st.integers(1, 19),
    groups=st.integers(1, 2),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_zeros_lie_in_the_pattern_at_the_share_with_tails_of_any_size(name, rows, taps, inputs, groups, share, seed):
    pattern, score = Pattern.parse(name), np.random.default_rng(seed).random((groups, rows, taps, inputs))
    kept = pattern.kept(score, np.ones(score.shape, bool), share)
    if pattern.of:
        for start in range(0, inputs, pattern.of):
            part, scores = kept[..., start : start + pattern.of], score[..., start : start + pattern.of]
            left = -(-part.shape[-1] * pattern.keep // pattern.of)
            assert (part.sum(axis=-1) == left).all()
            least = np.where(part, scores, np.inf).min(axis=-1)
            assert (np.where(part, -np.inf, scores).max(axis=-1) <= least).all()
    else:
        assert in_blocks(kept, pattern)
        assert abs((~kept).sum() - share * kept.size) <= pattern.outputs * pattern.inputs / 2 + 1e-6


def test_the_weakest_blocks_go_first_and_each_weight_of_a_small_block_counts_as_much():
    score = np.array([[[[9.0, 1.0, 2.0]], [[9.0, 1.0, 2.0]], [[1.5, 1.5, 9.0]]]])  # rows 0-1 and the tail, row 2
    kept = Pattern.parse("2x1").kept(score, np.ones(score.shape, bool), 4 / 9)
    assert kept[0, :, 0].tolist() == [[True, False, True], [True, False, True], [False, False, True]]


@pytest.mark.parametrize("name", ["banana", "16", "0x4", "4x0", "65x1", "2:2", "3:2", "0:4", "16x1 ", "", 4])
def test_an_unknown_pattern_is_named_with_the_known_ones(name):
    with pytest.raises(InputError, match=r"unknown sparsity pattern .* expected one of unstructured, 4x1"):
        Pattern.parse(name)


def test_a_pattern_that_yaml_read_as_seconds_is_explained():
    with pytest.raises(InputError, match="needs quotes"):
        Recipe.parse("rules: [{kind: '*', apply: {sparsify: {pattern: 2:4}}}]")
    assert Recipe.parse("rules: [{kind: '*', apply: {sparsify: {pattern: '2:4'}}}]").rules[0].prune.share == 0.5


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"sparsity": 0.0}, "above 0, below 1, got 0.0"),
        ({"sparsity": 1.0}, "above 0, below 1, got 1.0"),
        ({"sparsity": "most"}, "got 'most'"),
        ({"sparsity": True}, "got True"),
        ({}, "the share of zeros"),
        ({"sparsity": 0.9, "pattern": "2:4"}, "expected 0.5, which pattern 2:4 makes, got 0.9"),
        ({"sparsity": 0.9, "storage": "csr"}, "dense, sparse"),
        ({"sparsity": 0.9, "allocation": "fair"}, "uniform, error"),
        ({"sparsity": 0.9, "damping": 0}, "sparsify.damping"),
        ({"sparsity": 0.9, "mend": "no"}, "sparsify.mend"),
        ({"sparsity": 0.9, "min_size": -1}, "sparsify.min_size"),
        ({"sparsity": 0.9, "target": 3}, "sparsify.target"),
    ],
)
def test_settings_that_are_wrong_are_refused(said, words):
    with pytest.raises(InputError, match=words):
        Sparsify(**said)
    with pytest.raises(InputError, match=words):
        Recipe.load(rules({"sparsify": said}))


# -- numbers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 9),
    inputs=st.integers(1, 24),
    share=st.floats(0, 1),
    shared=st.booleans(),
    seed=st.integers(0, 9),
)
def test_what_stays_is_the_optimum_for_the_zeros(rows, inputs, share, shared, seed):
    """On its support, the gradient of the output error is zero: nothing that stays could be moved to any use."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, 4 * inputs, inputs))
    second = np.swapaxes(x, -1, -2) @ x
    wanted, kept = rng.normal(size=(3, rows, inputs)), rng.random((3, 1 if shared else rows, inputs)) >= share
    kept = np.broadcast_to(kept, wanted.shape).copy()
    found = fit(wanted, second, kept)
    assert not found[~kept].any()
    gradient = (found - wanted) @ second
    assert np.abs(gradient[kept]).max(initial=0) < 1e-8 * np.abs(wanted @ second).max()


def test_every_row_with_something_left_is_in_one_support():
    rng = np.random.default_rng(0)
    kept = rng.random((2, 40, 30)) < 0.3
    kept[0, 3], kept[1, 8:20] = False, kept[1, 8]
    seen = np.zeros(kept.shape, int)
    for part in supports(kept):
        part.put(part.take(seen) + 1, seen)
    np.testing.assert_array_equal(seen, kept)


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "16x1", "4x4", "2:4"])
def test_the_error_is_far_below_that_of_magnitude_on_correlated_inputs(pattern):
    weight, gram = correlated(96, 48, seed=1)
    said = Sparsify(None if ":" in pattern else 0.6, pattern)
    ours = said.encode(weight, Context("layer", 0, gram=gram)).values
    plain = said.encode(weight, Context("layer", 0)).values
    assert abs((ours == 0).mean() - said.share) < 0.01
    assert ((plain == 0) | (plain == weight)).all()
    assert relative(weight, ours, gram) < 0.1 * relative(weight, plain, gram)
    # Better than the same zeros as magnitude's with the others at their optimum: the choice itself is by data.
    alone = fit(weight[None].astype(float), gram.damped(0.01), (plain != 0)[None])[0]
    assert relative(weight, ours, gram) < relative(weight, alone, gram)


def test_the_choice_is_near_the_best_of_all_choices():
    import itertools

    for seed in range(4):
        weight, gram = correlated(10, 1, seed, rank=4)
        second = gram.damped(0.01)
        best = np.inf
        for chosen in itertools.combinations(range(10), 4):
            kept = np.zeros((1, 1, 10), bool)
            kept[..., list(chosen)] = True
            best = min(best, relative(weight, fit(weight[None].astype(float), second, kept)[0], gram))
        ours = relative(weight, Sparsify(0.6).encode(weight, Context("layer", 0, gram=gram)).values, gram)
        assert best * 0.999 <= ours <= 1.5 * best + 1e-6


def test_zeros_of_an_earlier_pruning_stay_and_count():
    weight, gram = correlated(64, 32, seed=2)
    weight[np.random.default_rng(0).random(weight.shape) < 0.5] = 0
    for context in (Context("layer", 0), Context("layer", 0, gram=gram)):
        found = Sparsify(0.7).encode(weight, context).values
        assert not found[weight == 0].any()
        assert abs((found == 0).mean() - 0.7) < 1e-3


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="finite values"):
        Sparsify(0.5).encode(np.array([[1.0, np.inf]], np.float32), Context("layer", 0))


def test_rows_wider_than_moments_are_kept_for_are_pruned_in_parts(monkeypatch):
    from paring.compress import unfold

    monkeypatch.setattr(unfold, "WIDEST", 32)
    model, data = network()
    made = optimize(model, rules({"sparsify": {"sparsity": 0.5, "pattern": "4x4"}}), data, verified=False)
    for name in PRUNED:
        found = weights(made.model)[name]
        kept = (found != 0).reshape(1, found.shape[0], -1, found.shape[-1])
        assert in_blocks(kept, Pattern.parse("4x4"))
        assert abs((~kept).mean() - 0.5) < 8 / kept.size + 1e-6


def test_shares_go_where_zeros_cost_least():
    shares = np.array([0.0, 0.5, 0.9])
    cheap, dear = np.array([0.0, 0.01, 0.1]), np.array([0.0, 0.2, 0.8])
    found = allocate([300, 100], shares, np.stack([dear, cheap]), 0.3)
    np.testing.assert_allclose(
        found * [300, 100], [70, 50]
    )  # the last zeros of the cheap layer cost more than the dear one's
    np.testing.assert_allclose(allocate([300, 100], shares[1:], np.stack([dear, cheap])[:, 1:], 0.6), [0.5, 0.9])
    np.testing.assert_allclose(allocate([10, 30], shares, np.stack([cheap, cheap]), 0.9), 0.9)
    dented = allocate([100], shares, np.array([[0.0, 0.5, 0.6]]), 0.2)  # under the hull, not along the curve
    assert dented == pytest.approx(0.2)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "16x4", "2:4"])
def test_every_layer_has_its_pattern_and_share_and_the_report_says_so(pattern):
    model, data = network()
    said = {"pattern": pattern} if ":" in pattern else {"pattern": pattern, "sparsity": 0.75}
    made = optimize(model, rules({"sparsify": said}), data)
    rows = {row.name: row for row in made.report.rows}
    share = Sparsify(**said).share
    for name in PRUNED:
        found = weights(made.model)[name]
        kept = (found != 0).reshape(1, found.shape[0], -1, found.shape[-1])
        assert in_blocks(kept, Pattern.parse(pattern)) or ":" in pattern
        block = max(1, Pattern.parse(pattern).outputs * Pattern.parse(pattern).inputs)
        assert abs((~kept).mean() - share) <= block / 2 / kept.size + 1e-9
        assert (rows[name].sparsity, rows[name].pattern) == (pytest.approx((~kept).mean()), pattern)
        assert 0 < rows[name].lost < 1
    assert rows["depthwise"].sparsity is None and "depthwise" in rows["depthwise"].pruning
    assert rows["flat"].pruning == ""
    assert made.report.verification.difference["head"] < 1


def test_data_beats_magnitude_and_mending_beats_leaving_alone(tmp_path):
    model, data = network()
    wanted = outputs(model, data, tmp_path / "model.tflite")

    def error(samples: object, **more: object) -> float:
        said = rules({"sparsify": {"sparsity": 0.7, "min_size": 10**6, **more}})  # these are fitted at most
        said["rules"] += rules({"sparsify": {"sparsity": 0.7, "pattern": "4x1"}}, name="first")["rules"]
        made = optimize(model, said, samples, verified=False)
        return float(np.linalg.norm(outputs(made.model, data, tmp_path / "pruned.tflite") - wanted))

    plain, alone, ours = error(None), error(data, mend=False), error(data)
    assert alone < 0.5 * plain
    assert ours < 0.9 * alone


def test_layers_outside_the_rule_are_not_mended():
    model, data = network()
    made = optimize(model, rules({"sparsify": {"sparsity": 0.6}}, kind="conv2d", min_size=1000), data, verified=False)
    before, after = weights(model), weights(made.model)
    assert [name for name in LAYERS if not np.array_equal(before[name], after[name])] == ["first"]


def test_the_target_decides_pattern_and_layers_and_the_others_are_fitted_to_what_they_read_now(monkeypatch):
    def choice(target, op, shape, positions, dtype):
        asked[op.name] = (target, shape, positions, dtype)
        return ("8x1", "it pays") if op.name in paying else (None, "too few weights")

    monkeypatch.setattr(pruning, "sparse_choice", choice)
    (model, data), asked, paying = network(), {}, ()
    said = {"sparsify": {"sparsity": 0.6, "target": "abacus"}}, {"quantize": QUANTIZED["nearest"]}
    with pytest.raises(InputError, match=r"no layer can be pruned .* too few weights"):
        optimize(model, rules(*said), data)
    assert asked["first"] == ("abacus", (32, 3, 3, 8), 36, "dynamic-int8")
    assert asked["head"] == ("abacus", (24, 180), 1, "dynamic-int8")
    paying = ("first",)
    made = optimize(model, rules(said[0]), data, verified=False)
    rows = {row.name: row for row in made.report.rows}
    assert (rows["first"].pattern, rows["first"].pruning) == ("8x1", "it pays")
    assert rows["head"].pruning == "too few weights; fitted to what it reads now"
    assert np.count_nonzero(weights(made.model)["head"]) == weights(made.model)["head"].size
    own = {"sparsify": {"sparsity": 0.6, "target": "abacus", "pattern": "4x1"}}
    assert {row.pattern for row in optimize(model, rules(own), data, verified=False).report.rows} == {"4x1", ""}
    paying = ("first", "head")  # kernels look at no layer with too few zeros, so that none gets less than they ask for
    shared = {"sparsify": {"sparsity": 0.7, "target": "abacus", "allocation": "error"}}
    shares = [row.sparsity for row in optimize(model, rules(shared), data, verified=False).report.rows if row.sparsity]
    assert len(shares) == 2 and min(shares) >= pruning.THRESHOLD


def test_shares_by_error_meet_the_common_share():
    model, data = network()
    made = optimize(model, rules({"sparsify": {"sparsity": 0.7, "allocation": "error"}}), data, verified=False)
    found = {name: weights(made.model)[name] for name in PRUNED}
    zeros = sum((w == 0).sum() for w in found.values())
    assert zeros / sum(w.size for w in found.values()) == pytest.approx(0.7, abs=2e-3)
    assert len({round(float((w == 0).mean()), 2) for w in found.values()}) > 1
    with pytest.raises(InputError, match=r"sparsify\.allocation"):
        optimize(model, rules({"sparsify": {"sparsity": 0.7, "allocation": "error"}}), verified=False)


def test_layers_that_share_weights_share_zeros():
    rng, net = np.random.default_rng(0), Net()
    a, b = net.input((1, 24), name="a"), net.input((1, 24), name="b")
    shared, dense = net.constant(rng.normal(size=(16, 24)).astype(np.float32)), ("FullyConnectedOptions", {})
    for name, x in (("left", a), ("right", b)):
        net.outputs.append(net.then("FULLY_CONNECTED", [x, shared, -1], (1, 16), dense, name))
    model = net.finish()
    data = {name: rng.normal(size=(20, 24)).astype(np.float32) for name in "ab"}
    made = optimize(model, rules({"sparsify": {"sparsity": 0.5}}), data, verified=False)
    found = weights(made.model)
    np.testing.assert_array_equal(found["left"], found["right"])
    assert (found["left"] == 0).mean() == 0.5
    assert len(made.model.to_bytes()) <= len(model.to_bytes()) + 1000  # the record; not a second copy of the weights


def test_a_layer_that_is_spared_is_named(monkeypatch):
    monkeypatch.setattr(pruning, "allocate", lambda sizes, *_: np.eye(len(sizes))[0] * 0.9)
    model, data = network()
    made = optimize(model, rules({"sparsify": {"sparsity": 0.3, "allocation": "error"}}), data, verified=False)
    rows = {row.name: row for row in made.report.rows}
    assert rows["first"].sparsity == pytest.approx(0.9, abs=1e-3)
    assert (
        rows["point"].pruning == rows["head"].pruning == "zeros cost less in other layers; fitted to what it reads now"
    )


# -- zeros are a promise ---------------------------------------------------------------------------------------------

QUANTIZED = {
    "nearest": {"weights": "int8", "activations": "dynamic"},
    "static": {"weights": "int8", "activations": "int8", "bias_correction": True},
    "mse": {"weights": "int4", "activations": "float", "range": "mse"},
    "gptq": {"weights": "int4", "activations": "float", "rounding": "gptq", "bias_correction": True},
    "gptq static": {"weights": "int8", "activations": "int8", "rounding": "gptq"},
    "adaround": {"weights": "int4", "activations": "dynamic", "rounding": "adaround", "iterations": 30},
    "float16": {"weights": "float16", "activations": "float"},
}


@pytest.mark.parametrize("how", QUANTIZED)
def test_zeros_survive_quantization_in_the_same_recipe_and_in_a_second_run(how):
    model, data = network()
    prune, quantize = {"sparsify": {"sparsity": 0.6, "pattern": "4x1"}}, {"quantize": QUANTIZED[how]}
    pruned = optimize(model, rules(prune), data, verified=False).model
    zeros = {name: weights(pruned)[name] == 0 for name in PRUNED}
    both = optimize(model, rules(prune, quantize), data, verified=how == "gptq static")
    later = optimize(pruned, rules(quantize), data, verified=False)
    for made in (both, later):
        modes = {row.name: row.mode for row in made.report.rows}
        for name in PRUNED:
            assert modes[name] != "float"
            found = weights(made.model)[name]
            assert not found[zeros[name]].any()
            assert found[~zeros[name]].any()
    assert {row.name for row in both.report.rows if row.sparsity is not None} == set(PRUNED)


def test_few_zeros_survive_where_the_recipe_made_them():
    model, data = network()
    prune, quantize = {"sparsify": {"sparsity": 0.1}}, {"quantize": QUANTIZED["gptq"]}
    zeros = weights(optimize(model, rules(prune), data, verified=False).model)["head"] == 0
    assert 0 < zeros.mean() < 0.2
    both = optimize(model, rules(prune, quantize), data, verified=False)
    assert not weights(both.model)["head"][zeros].any()


def test_equalization_before_pruning_keeps_the_share():
    model, data = network()
    said = rules({"sparsify": {"sparsity": 0.6}}, {"quantize": QUANTIZED["nearest"]}) | {"equalize": True}
    found = weights(optimize(model, said, data, verified=False).model)
    assert all((found[name] == 0).mean() >= 0.599 for name in PRUNED)


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_rounding_around_zeros_is_better_than_to_nearest(rounding):
    weight, gram = correlated(64, 24, seed=3)
    pruned = Sparsify(0.6, "4x1").encode(weight, Context("layer", 0, gram=gram)).values
    nearest, ours = (Quantize("int4", "float", rounding=how) for how in ("nearest", rounding))
    errors = []
    for algorithm in (nearest, ours):
        encoded = algorithm.encode(pruned, Context("layer", 0, gram=gram))
        decoded = algorithm.decode(encoded)
        assert not decoded[pruned == 0].any()
        errors.append(relative(pruned, decoded, gram))
    assert errors[1] < 0.7 * errors[0]


def test_a_recipe_with_both_stages_reads_back_and_a_wrong_order_is_refused():
    prune, quantize = {"sparsify": {"sparsity": 0.9, "pattern": "16x1"}}, {"quantize": {"weights": "int8"}}
    recipe = Recipe.load(rules(prune, quantize))
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert Recipe.parse(Recipe.load(rules(prune)).to_yaml()).rules[0].apply is None
    for wrong in ([quantize, prune], [prune, prune]):
        with pytest.raises(InputError, match="each stage at most once, quantize last"):
            Recipe.load({"rules": [{"kind": "*", "apply": wrong}]})


# -- sparse storage --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    share=st.floats(0, 1),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 9),
)
def test_the_sparse_encoding_reads_back(shape, share, dtype, seed):
    rng, net = np.random.default_rng(seed), Net()
    values = rng.normal(size=shape).astype(dtype) * (rng.random(shape) >= share)
    index = net.constant(values.astype(dtype))
    tensor = net.graph.tensors[index]
    tensor.sparsity, stored = encode(values)
    tensor.buffer = net.draft.buffer(stored)
    net.outputs.append(net.tensor(shape, dtype))
    net.op("DENSIFY", [index], net.outputs)
    model = net.finish()
    found = model.subgraphs[0].tensors[0]
    assert shape_of(found) == tuple(shape)
    weight = constant_weight(model, found, densify=True)
    np.testing.assert_array_equal(np.asarray(weight.read()), values)


def test_wide_rows_take_wide_indices():
    values = np.ones((2, 300), np.float16)
    sparsity, stored = encode(values)
    last = sparsity.dim_metadata[-1]
    assert (last.array_indices.values.dtype, last.array_segments.values.dtype) == (np.uint16, np.uint16)
    assert stored.size == 600


@pytest.mark.parametrize("half", [False, True])
def test_sparse_storage_is_smaller_runs_the_same_and_opens_again(half, tmp_path):
    model, data = network()
    stages = [{"sparsify": {"sparsity": 0.8, "pattern": "4x1", "storage": "sparse"}}]
    stages += [{"quantize": QUANTIZED["float16"]}] if half else []
    sparse = optimize(model, rules(*stages), data)
    stages[0] = {"sparsify": {"sparsity": 0.8, "pattern": "4x1"}}
    dense = optimize(model, rules(*stages), data, verified=False)
    assert sparse.report.output_bytes < (0.75 if half else 0.6) * dense.report.output_bytes
    a, b = (outputs(made.model, data[:8], tmp_path / "model.tflite") for made in (sparse, dense))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for name, found in weights(sparse.model).items():
        np.testing.assert_array_equal(found, weights(dense.model)[name])
    again = optimize(sparse.model, rules({"sparsify": {"sparsity": 0.9}}), data, verified=False)
    assert all(row.sparsity > 0.89 for row in again.report.rows if row.sparsity is not None)


def test_a_layer_with_too_few_zeros_is_stored_dense_and_named():
    model, data = network()
    said = rules({"sparsify": {"sparsity": 0.05, "storage": "sparse"}}, kind="dense")
    made = optimize(model, said, data, verified=False)
    assert any("stored dense" in note for note in made.report.notes)
    assert not any(t.sparsity is not None for t in made.model.subgraphs[0].tensors)


def test_integers_are_not_stored_sparsely():
    with pytest.raises(InputError, match=r"cannot store zeros sparsely .* int8 weights, which stock LiteRT"):
        Recipe.load(rules({"sparsify": {"sparsity": 0.9, "storage": "sparse"}}, {"quantize": {"weights": "int8"}}))


def test_a_runtime_that_reads_sparse_weights_wrongly_stops_the_write(monkeypatch, tmp_path):
    def spoiled(model, chosen, floors=()):
        made, count = store_sparse(model, chosen, floors)
        for tensor in made.subgraphs[0].tensors:
            if tensor.sparsity is not None:
                made.root.buffers[tensor.buffer].data = np.asarray(made.root.buffers[tensor.buffer].data)[::-1].copy()
        return made, count

    monkeypatch.setattr(sys.modules[optimize.__module__], "store_sparse", spoiled)
    model, data = network()
    with pytest.raises(BoundError, match="sparse weights are not read rightly"):
        optimize(model, rules({"sparsify": {"sparsity": 0.8, "storage": "sparse"}}), data, output=tmp_path / "o.tflite")
    assert list(tmp_path.iterdir()) == []


def test_a_sparse_float16_model_shows_its_weights_and_can_be_pruned_further(shared, call):
    path = shared / "models" / "face_detection_full_range_sparse.tflite"
    source = weights(load(path))
    zeros = {name: w == 0 for name, w in source.items() if (w == 0).mean() > 0.5}
    assert len(zeros) >= 44
    _, out, _ = call("inspect", path, "--json")
    rows = [row for row in json.loads(out)["operators"] if row["kind"] == "conv2d"]
    assert all(row["parameters"] and row["macs"] for row in rows)
    assert sum(row["zeros"] > 0.5 for row in rows) >= 44
    said = rules({"sparsify": {"sparsity": 0.8, "storage": "sparse"}}, kind="conv2d", min_size=4000)
    made = optimize(path, said, verified=False)
    found = weights(made.model)
    rows = [row for row in made.report.rows if row.sparsity is not None]
    assert rows and all(row.sparsity == pytest.approx(0.8, abs=1e-3) for row in rows)
    assert all(not found[row.name][zeros[row.name]].any() for row in rows if row.name in zeros)
    assert made.report.output_bytes < made.report.source_bytes


# -- front doors -----------------------------------------------------------------------------------------------------


def test_the_command_prunes_writes_and_says_what_and_why(call):
    code, out, err = call(
        "sparsify", model_path(), "-o", "o.tflite", "--sparsity", 0.8, "--pattern", "4x1", "--target", ""
    )
    assert code == 0, err
    assert "pruned layers" in out and "4x1" in out and "wrote o.tflite" in out
    assert "no data was given" in out
    shares = [(w == 0).mean() for name, w in weights(load("o.tflite")).items()]
    assert sum(abs(share - 0.8) < 0.02 for share in shares) >= 3
    again = ("-s", 0.8, "--pattern", "4x1", "--target", "", "--json", "--overwrite")
    code, out, err = call("sparsify", model_path(), "-o", "o.tflite", *again)
    rows = [row for row in json.loads(out)["rows"] if row["sparsity"]]
    assert rows and all(row["pattern"] == "4x1" and row["pruning"] for row in rows)


def test_the_python_call_takes_data_and_a_target(tmp_path):
    model, data = network()
    made = paring.sparsify(model, tmp_path / "o.tflite", sparsity=0.7, target="", data=data)
    assert (tmp_path / "o.tflite").stat().st_size == made.report.output_bytes
    assert made.report.recipe == "sparsify"
    entry = next(e for e in made.model.root.metadata if e.name == "paring")
    record = json.loads(bytes(made.model.root.buffers[entry.buffer].data))
    assert record["recipe"]["rules"][0]["apply"]["sparsify"]["sparsity"] == 0.7


def test_what_cannot_be_pruned_ends_with_exit_code_2_and_writes_nothing(call, tmp_path):
    quantized = tmp_path / "int8.tflite"
    optimize(model_path(), "int8", load_digits()[0][:20], output=quantized, verified=False)
    before = sorted(Path().iterdir())
    for words, *arguments in (
        ("above 0, below 1", model_path(), "--sparsity", 1.5),
        ("unknown sparsity pattern", model_path(), "--sparsity", 0.9, "--pattern", "banana"),
        ("abacus", model_path(), "--sparsity", 0.9, "--target", "abacus"),
        ("fewer than 1000000000", model_path(), "--sparsity", 0.9, "--min-size", 10**9),
        ("the share of zeros", model_path()),
        ("cannot prune a quantized model", quantized, "--sparsity", 0.9, "--target", ""),
        ("dense, sparse", model_path(), "--sparsity", 0.9, "--storage", "zip"),
    ):
        code, _, err = call("sparsify", *arguments, "-o", "o.tflite")
        assert (code, words in err) == (2, True), err
        assert sorted(Path().iterdir()) == before


def test_a_grid_from_elsewhere_is_no_place_for_pruning():
    """Codes of a file that was quantized elsewhere are kept as they are, zeros among them."""
    weight = np.array([[0.5, 0.0, -0.25, 0.0]], np.float32)
    grid = Quantization(np.array([0.25], np.float32), np.array([0]), "int8", None)
    assert Quantize().encode(weight, Context("layer", 0, grid=grid)).values.tolist() == [[2, 0, -1, 0]]
