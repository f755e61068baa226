"""Comparing models layer by layer: figures against arithmetic, blame where it belongs, loops, and files of other tools."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net
from test_control_flow import accumulator, branches, recurrent, two_entries

import paring
from paring import InputError, compare, load, optimize
from paring.calibration import Statistics
from paring.compress.encodings import decode
from paring.demo import load_digits, model_path
from paring.formats.tflite.extract import islands
from paring.formats.tflite.model import TfliteModel
from paring.graph import Quantization
from paring.measure import watch
from paring.measure.noise import Growing, Noise, channel_db, error
from paring.measure.result import Comparison, Layer
from paring.recipe import Recipe
from paring.runtime import Worker

RNG = np.random.default_rng(5)
WIDTH = 24
RELU = ("FullyConnectedOptions", {"fused_activation_function": 1})


def network(loud: float = 1.0, layers: int = 4, seed: int = 0) -> TfliteModel:
    """Dense layers with RELU; one channel of the second is `loud` times as loud and read `loud` times as quietly."""
    rng, net = np.random.default_rng(seed), Net()
    h = net.input((1, WIDTH), name="x")
    for number in range(layers):
        w = rng.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)).astype(np.float32)
        b = rng.normal(0, 0.3, WIDTH).astype(np.float32)
        if number == 1:
            b[3] = 0.5
            w[3], b[3] = w[3] * loud, b[3] * loud
        if number == 2:
            w[:, 3] /= loud
        constants = [net.constant(w, f"w{number}"), net.constant(b, f"b{number}")]
        h = net.then("FULLY_CONNECTED", [h, *constants], (1, WIDTH), RELU, f"dense{number}")
    net.outputs = [h]
    return net.finish()


def samples(count: int = 32, shape: Sequence[int] = (1, WIDTH)) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)}


def int8(model: Any, data: Any = None, statistics: Statistics | None = None, recipe: Any = "int8") -> TfliteModel:
    return optimize(model, recipe, data, statistics=statistics, verified=False).model


def statistics_of(model: TfliteModel, data: Any) -> Statistics:
    found = optimize(model, "int8", data, verified=False).statistics
    assert found is not None
    return found


def by_name(found: Comparison) -> dict[str, Layer]:
    return {layer.name: layer for layer in found.layers}


def worst(found: Comparison) -> str:
    return found.layers[found.ranking[0]].name


# -- sums ------------------------------------------------------------------------------------------------------------


def test_an_error_is_what_its_definition_says_over_any_split_of_the_samples():
    grid = Quantization(np.array([0.25], np.float32), np.array([-128]), "int8")
    x = RNG.normal(0, 20, (40, 6)).astype(np.float32)
    y = np.clip(np.round(x / 0.25) * 0.25, 0, 255 * 0.25).astype(np.float32)
    whole, parts = Noise(grid), Noise(grid)
    whole.update(x, y)
    for rows in np.array_split(np.arange(40), 7):
        parts.update(x[rows], y[rows])
    for noise in (whole, parts):
        found = error([noise])
        assert found is not None
        assert found.snr_db == pytest.approx(10 * math.log10((x**2).sum() / ((y - x) ** 2).sum()), abs=1e-4)
        ratios = 10 * np.log10((x**2).sum(0) / ((y - x) ** 2).sum(0))
        assert found.channel_db == pytest.approx(float(np.median(ratios)), abs=1e-4)
        assert found.mse == pytest.approx(float(((y - x) ** 2).mean()) / 0.25**2, rel=1e-5)
        assert found.cosine == pytest.approx(float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)), rel=1e-5)
        assert found.clipped == pytest.approx(float(((x < -0.125) | (x > 63.875)).mean()))


def test_channels_that_carry_nothing_do_not_count_and_equal_tensors_are_exact():
    assert channel_db(np.array([0.0, 0.0, 0.0, 4.0]), np.array([1.0, 0.0, 0.0, 0.04])) == pytest.approx(20.0)
    nothing = Noise()
    nothing.update(np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32))
    found = error([nothing])
    assert found is not None and (found.snr_db, found.channel_db, found.cosine) == (200.0, 200.0, 1.0)
    assert error([Noise()]) is None


def test_what_is_not_a_number_is_as_bad_as_can_be_and_masks_are_left_out():
    broken, masked = Noise(), Noise()
    broken.update(np.ones((2, 2), np.float32), np.array([[1, np.nan], [1, 1]], np.float32))
    masked.update(np.array([[1, -np.inf]], np.float32), np.array([[1, -1e30]], np.float32))
    found, fine = error([broken]), error([masked])
    assert found is not None and found.snr_db == -200.0
    assert fine is not None and fine.snr_db == 200.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-6, 6), st.floats(-1e5, 1e5), st.integers(1, 60)), min_size=1, max_size=5))
def test_a_growing_histogram_counts_as_one_that_knew_the_range(parts: list[tuple[float, float, int]]):
    rng, growing = np.random.default_rng(0), Growing()
    values = [(rng.normal(size=count) * 10**size + shift).astype(np.float32) for size, shift, count in parts]
    for part in values:
        growing.update(part)
    found, every = growing.histogram(None), np.concatenate(values).astype(np.float64)
    assert found is not None and len(found.counts) == 64
    assert found.low <= every.min() and every.max() <= found.high
    wanted = np.histogram(every, np.linspace(found.low, found.high, 65))[0]
    assert np.abs(wanted - found.counts).sum() <= 2  # a value on an edge may fall on either side


# -- figures ---------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_layer_are_those_of_its_arithmetic():
    model, data = network(), samples()
    made = int8(model, data)
    found = by_name(compare(model, made, data))
    graph, x = made.graph, data["x"].reshape(32, WIDTH).astype(np.float64)
    op = next(op for op in graph.ops if op.name == "dense0")
    tensors = [graph.tensors[t] for t in (*op.inputs, *op.outputs) if t is not None]
    weights, bias = (decode(np.array(t.weight.read()), t.quantization).astype(np.float64) for t in tensors[1:3])

    def on(grid: Quantization, values: np.ndarray) -> np.ndarray:
        codes = np.clip(np.rint(values / grid.scale[0]) + grid.zero_point[0], -128, 127)
        return (codes - grid.zero_point[0]) * float(grid.scale[0])

    def db(exact: np.ndarray, got: np.ndarray) -> float:
        return 10 * math.log10((exact**2).sum() / ((got - exact) ** 2).sum())

    source = model.graph
    floats = [np.array(source.tensors[t].weight.read(), np.float64) for t in source.ops[0].inputs[1:]]  # type: ignore
    rounded = on(tensors[0].quantization, x)
    got = on(tensors[3].quantization, np.maximum(rounded @ weights.T + bias, 0))
    exact, alone = (np.maximum(v @ floats[0].T + floats[1], 0) for v in (x, rounded))
    layer = found["dense0"]
    assert layer.own is not None and layer.accumulated is not None and layer.own.mse is not None
    assert layer.own.snr_db == pytest.approx(db(exact, got), abs=0.05)
    assert layer.accumulated.snr_db == pytest.approx(db(exact, got), abs=0.05)  # the first layer's own error is all
    assert layer.own.mse == pytest.approx(((got - exact) ** 2).mean() / tensors[3].quantization.scale[0] ** 2, rel=0.02)
    median = float(np.median(10 * np.log10((alone**2).sum(0) / ((got - alone) ** 2).sum(0))))
    assert layer.blame == pytest.approx(min(db(alone, got), median), abs=0.1)
    assert layer.weight_db == pytest.approx(db(floats[0], weights), abs=0.01)
    assert found["x"].blame == pytest.approx(db(x, rounded), abs=1.0)


def test_errors_add_up_along_the_model_and_a_float_copy_has_none():
    model, data = network(), samples()
    found = compare(model, int8(model, data), data)
    ends = [by_name(found)[f"dense{n}"].accumulated for n in range(4)]
    assert ends[0].snr_db > ends[3].snr_db
    assert found.outputs["dense3"].snr_db == pytest.approx(ends[3].snr_db, abs=0.01)
    copy = compare(model, model, data)
    assert all(layer.blame == 200.0 for layer in copy.layers) and not copy.culprits and not copy.exempt


def test_histograms_hold_every_value_and_the_grid():
    model, data = network(), samples()
    layer = by_name(compare(model, int8(model, data), data))["dense1"]
    assert layer.activation is not None and layer.weights is not None
    assert sum(layer.activation.counts) == 32 * WIDTH and sum(layer.weights.counts) == WIDTH * WIDTH
    low, high = layer.activation.range
    assert low == 0.0 and high == pytest.approx(255 * layer.activation.scale)
    assert layer.weights.range[0] == -128 * layer.weights.scale
    assert by_name(compare(model, int8(model, data), data, histograms=False))["dense1"].activation is None


def test_memory_is_bounded_by_parts_that_change_no_figure(monkeypatch: pytest.MonkeyPatch):
    model, data = network(), samples(8)
    made = int8(model, data)
    whole = compare(model, made, data)
    monkeypatch.setattr(watch, "BUDGET", 600.0)
    assert compare(model, made, data).layers == whole.layers


# -- blame -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [12.0, 1 / 6])
def test_a_wrong_range_is_charged_to_the_layer_that_makes_the_tensor(factor: float):
    model, data = network(), samples()
    seen = statistics_of(model, data)
    tensor = next(t for t, name in seen.names.items() if name == "dense1")
    one = seen.tensors[tensor]
    wrong = {**seen.tensors, tensor: replace(one, low=one.low * factor, high=one.high * factor)}
    found = compare(model, int8(model, statistics=replace(seen, tensors=wrong)), data)
    assert worst(found) == "dense1" and [found.layers[n].name for n in found.culprits] == ["dense1"]
    assert ("clips" if factor < 1 else "too coarse") in found.layers[found.culprits[0]].note
    layers = by_name(found)
    assert layers["dense2"].blame > layers["dense1"].blame + 15  # it reads the bad tensor and does nothing wrong
    assert layers["dense2"].accumulated.snr_db < 25


def test_a_loud_channel_is_found_and_the_printed_lines_cure_it():
    model, data = network(loud=100.0), samples()
    before = compare(model, int8(model, data), data)
    assert worst(before) == "dense1" and before.recipe is not None
    recipe = Recipe.parse(Recipe.load(before.recipe).to_yaml().rstrip() + "\n" + before.exempt.replace("  - ", "- "))
    after = compare(model, int8(model, data, recipe=recipe), data)
    assert after.outputs["dense3"].snr_db > before.outputs["dense3"].snr_db + 10
    assert not after.culprits
    exempt = len(before.exempt.splitlines())
    assert sorted({layer.form for layer in after.layers if layer.rule == len(recipe.rules) - 1}) == ["float32"]
    assert exempt == 2  # the layer, and the one that would read the value on the same bad grid


def test_weights_and_bias_are_told_from_grids():
    model, data = network(), samples()
    seen = statistics_of(model, data)

    def spoiled(name: str, change: Any) -> TfliteModel:
        copy = TfliteModel.parse(memoryview(model.to_bytes()))
        table = next(t for t in copy.subgraphs[0].tensors if t.name == name)
        values = copy.constant(table).view(np.float32).reshape(tuple(table.shape))
        copy.root.buffers[table.buffer].data = (
            np.ascontiguousarray(change(values), np.float32).view(np.uint8).reshape(-1)
        )
        return copy

    for name, change, said in (
        (
            "w2",
            lambda w: np.rint(w / np.abs(w).max(1, keepdims=True)) * np.abs(w).max(1, keepdims=True),
            "stored weights",
        ),
        ("b2", lambda b: b + 0.5, "look at its bias"),
    ):
        found = compare(model, int8(spoiled(name, change), statistics=seen), data)
        assert worst(found) == "dense2" and said in found.layers[found.ranking[0]].note
        assert found.exempt == '  - {name: "^dense2$", apply: float}'


def test_names_of_any_kind_become_valid_recipe_lines():
    net = Net()
    names = ['a"b: {c}', "d;e/f(1)", "späte\\zeile\t#"]
    h = net.input((1, WIDTH), name="x")
    for name in names:
        w = net.constant(RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32) ** 3)
        h = net.then("FULLY_CONNECTED", [h, w, net.constant(np.zeros(WIDTH, np.float32))], (1, WIDTH), RELU, name)
    net.outputs = [h]
    model = net.finish()
    found = compare(model, int8(model, recipe="weight-only-int4"), samples())
    assert found.exempt
    recipe = Recipe.parse("rules:\n" + found.exempt)
    matched = recipe.match(model.graph)
    assert {op.name for op in model.graph.ops if matched[op.id][1].startswith("rule")} == {
        found.layers[n].name for n in found.culprits
    }


def test_a_bad_grid_of_the_input_is_the_inputs():
    model, data = network(), samples()
    seen = statistics_of(model, data)
    tensor = next(t for t, name in seen.names.items() if name == "x")
    wrong = {**seen.tensors, tensor: replace(seen.tensors[tensor], low=-0.3, high=0.3)}
    found = compare(model, int8(model, statistics=replace(seen, tensors=wrong)), data)
    assert found.layers[found.ranking[0]].native == "INPUT" and worst(found) == "x"
    assert found.exempt == '  - {name: "^dense0$", apply: float}'
    assert by_name(found)["dense0"].inputs == (0,)


def test_rules_of_the_recipe_are_known_by_layer():
    recipe = {"rules": [{"kind": "*", "apply": {"quantize": {"weights": "int8", "activations": "int8"}}},
                        {"name": "dense2", "apply": "float"}]}  # fmt: skip
    model, data = network(), samples()
    found = by_name(compare(model, int8(model, data, recipe=recipe), data))
    assert [found[f"dense{n}"].rule for n in range(4)] == [0, 0, 1, 0]
    assert [found[f"dense{n}"].form for n in range(4)] == ["int8", "int8", "float32", "int8"]


# -- all sorts of models ---------------------------------------------------------------------------------------------


def reals(model: TfliteModel, count: int = 6) -> dict[str, np.ndarray]:
    graph, rng = model.graph, np.random.default_rng(2)
    return {graph.tensors[t].name: rng.normal(size=(count, *graph.tensors[t].shape)).astype(np.float32)
            for t in graph.inputs}  # fmt: skip


@pytest.mark.parametrize(("make", "inside"), [(recurrent, "recurrent kernel"), (branches, "then kernel")])
@pytest.mark.parametrize("recipe", ["int8", "dynamic-int8"])
def test_layers_inside_of_loops_and_branches_are_compared(make: Any, inside: str, recipe: str):
    model = make()
    data = reals(model)
    found = compare(model, int8(model, data, recipe=recipe), data)
    layer = by_name(found)[inside]
    assert layer.blame is not None and 25 < layer.blame < 60 and layer.matched
    assert not found.unmatched
    control = next(layer for layer in found.layers if layer.native in ("WHILE", "IF"))
    assert control.blame is None and "its own layers" in control.note


def test_loops_that_run_unlike_often_are_compared_as_far_as_they_go():
    model = accumulator(6)
    found = by_name(compare(model, accumulator(5), reals(model)))
    assert "it ran 5 times and 6 times in the float model" in found["part"].note
    assert found["part"].accumulated is not None and found["part"].accumulated.snr_db == 200.0


def test_several_entries(tmp_path: Path):
    model = two_entries()
    data = tmp_path / "data.npz"
    rng = np.random.default_rng(0)
    arrays = {}
    for signature in model.root.signature_defs:
        for entry in signature.inputs:
            shape = tuple(model.subgraphs[signature.subgraph_index].tensors[entry.tensor_index].shape)
            arrays[f"{signature.signature_key}/{entry.name}"] = rng.normal(size=(4, *shape)).astype(np.float32)
    np.savez(data, **arrays)
    made = int8(model, str(data))
    found = compare(model, made, str(data))
    assert {name.split("/")[0] for name in found.outputs} == {s.signature_key for s in model.root.signature_defs}
    made.root.signature_defs[1].signature_key = "other"
    with pytest.raises(
        InputError, match=r"the models do not correspond for signature \w+: expected the same signature"
    ):
        compare(model, made, str(data))


def test_integer_inputs_and_outputs_accuracy_and_made_up_samples():
    calibration, images, labels = load_digits()
    made = int8(model_path(), calibration, recipe=replace(Recipe.named("int8"), inputs="int8", outputs="uint8"))
    found = compare(model_path(), made, images[:60], labels=labels[:60], limit=50)
    assert found.samples == 50 and found.given
    assert found.outputs["probabilities"].snr_db > 30 and found.agreement["probabilities"] == 1.0
    assert any("right in float" in note for note in found.notes)
    assert found.layers[0].native == "INPUT" and found.layers[0].name == "image"
    assert not found.culprits and not found.exempt
    made_up = compare(model_path(), made)
    assert not made_up.given and "made up" in made_up.notes[0]
    with pytest.raises(InputError, match="labels without samples"):
        compare(model_path(), made, labels=labels)


def test_a_layer_that_does_not_run_alone_costs_no_other_its_figures(monkeypatch: pytest.MonkeyPatch):
    model, data = network(), samples(4)
    made = int8(model, data)
    wanted = by_name(compare(model, made, data))
    bad = next(int(op.outputs[0][1]) for op in made.graph.ops if op.name == "dense2")

    def refusing(source: TfliteModel, number: int, cuts: Any) -> TfliteModel:
        if source is not model and any(bad in ends for _, ends in cuts):
            raise InputError("cannot cut the model")
        return islands(source, number, cuts)

    monkeypatch.setattr(watch, "islands", refusing)
    found = by_name(compare(model, made, data))
    assert found["dense2"].blame is None and "does not run alone" in found["dense2"].note
    assert found["dense2"].accumulated == wanted["dense2"].accumulated
    assert {n: found[n].blame for n in ("dense0", "dense1", "dense3")} == {
        n: wanted[n].blame for n in ("dense0", "dense1", "dense3")
    }


def test_slices_side_by_side_are_not_connected(tmp_path: Path):
    model = network()
    ends = [op.outputs[0][1] for op in model.graph.ops]
    part = islands(model, 0, [([ends[0]], [ends[1]]), ([ends[1]], [ends[3]])])
    part.save(tmp_path / "part.tflite")
    whole = network()
    whole.save(tmp_path / "whole.tflite")
    x, y = (RNG.normal(size=(1, WIDTH)).astype(np.float32) for _ in range(2))
    with Worker() as worker:
        worker.load("part", tmp_path / "part.tflite")
        a, b = worker.run("part", [x, y])
    w = [np.array(model.graph.tensors[t].weight.read()) for op in model.graph.ops for t in op.inputs[1:]]  # type: ignore
    np.testing.assert_allclose(a, np.maximum(x @ w[2].T + w[3], 0), atol=1e-5)
    middle = np.maximum(y @ w[4].T + w[5], 0)
    np.testing.assert_allclose(b, np.maximum(middle @ w[6].T + w[7], 0), atol=1e-5)


def test_a_model_that_does_not_run_is_named():
    model = network()
    broken = TfliteModel.parse(memoryview(network().to_bytes()), "broken.tflite")
    broken.subgraphs[0].operators[2].builtin_options.fused_activation_function = 5  # SIGN_BIT has no kernel
    with pytest.raises(paring.ParingError, match=r"cannot run broken\.tflite: got the runtime"):
        compare(model, broken, samples(2))


# -- files of other tools --------------------------------------------------------------------------------------------


def test_a_file_of_tensorflows_converter_is_matched_and_compared(tensorflow: Any):
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras

        keras.utils.set_random_seed(3)
        layers = keras.layers
        x = inputs = keras.Input((12, 12, 3), name="image")
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", name="stem")(x)))
        y = layers.ReLU(6.0)(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same", name="depth")(x)))
        x = layers.Add()([x, layers.Conv2D(8, 1, name="project")(y)])
        x = layers.GlobalAveragePooling2D()(layers.MaxPooling2D()(x))
        model = keras.Model(inputs, layers.Dense(5, activation="softmax", name="head")(x))
        data = np.random.default_rng(0).normal(size=(16, 12, 12, 3)).astype(np.float32)
        converter = tensorflow.lite.TFLiteConverter.from_keras_model(model)
        source = converter.convert()
        converter = tensorflow.lite.TFLiteConverter.from_keras_model(model)
        converter.optimizations = [tensorflow.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([sample[None]] for sample in data)
        converter.inference_input_type = converter.inference_output_type = tensorflow.int8
        made = converter.convert()
    found = compare(source, made, data)
    assert not found.unmatched and found.recipe is None and not found.culprits
    assert {layer.matched for layer in found.layers} == {"structure"}
    weighted = [layer for layer in found.layers if layer.weight_db is not None]
    assert [layer.native for layer in weighted] == ["CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D", "FULLY_CONNECTED"]
    assert all(layer.weight_db > 35 and layer.blame > 25 and layer.form == "int8" for layer in weighted)
    ours = compare(source, int8(source, data), data)
    assert [layer.name for layer in ours.layers] == [layer.name for layer in found.layers]


def test_files_of_the_official_quantizer_are_matched(litert_quantizer: Any, tmp_path: Path):
    from litert_quantizer import quantizer, recipe

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = quantizer.Quantizer(str(model_path()), recipe.dynamic_wi8_afp32())
        made.quantize().export_model(str(tmp_path / "dynamic.tflite"))
    found = compare(model_path(), tmp_path / "dynamic.tflite", load_digits()[1][:8])
    assert not found.unmatched and {layer.matched for layer in found.layers} == {"structure"}
    assert {layer.form for layer in found.layers if layer.weight_db is not None} == {"float32 x int8"}
    assert load(tmp_path / "dynamic.tflite").graph
