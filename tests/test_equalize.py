"""Cross-layer equalization: the function stays, ranges meet, and what does not allow it is left alone with a reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net

from paring import Recipe, optimize
from paring.equalize import equalize
from paring.formats.tflite.apply import set_constants
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.view import view
from paring.runtime import Worker

CONV = {"stride_h": 1, "stride_w": 1}


def uneven(*shape: int, axis: int, seed: int) -> np.ndarray:
    """Weights whose channels differ in range by up to e^6."""
    rng = np.random.default_rng(seed)
    size = [1] * len(shape)
    size[axis] = shape[axis]
    return (rng.normal(size=shape) * np.exp(rng.uniform(-3, 3, size))).astype(np.float32)


def chain(activation: int = 1, between: str = "", half: bool = False, shared: bool = False) -> TfliteModel:
    """conv - depthwise - conv - (something) - dense, with uneven channels."""
    net = Net()
    x = net.input((1, 6, 6, 3), name="x")

    def conv(source: int, weight: np.ndarray, out: tuple[int, ...], name: str, native: str = "CONV_2D") -> int:
        options = {**CONV, "fused_activation_function": activation}
        options |= {"depth_multiplier": 1} if native != "CONV_2D" else {}
        kind = "DepthwiseConv2DOptions" if native != "CONV_2D" else "Conv2DOptions"
        if half:
            stored = net.constant(weight.astype(np.float16), f"{name}/half")
            constant = net.then("DEQUANTIZE", [stored], weight.shape, ("DequantizeOptions", {}), f"{name}/weight")
        else:
            constant = net.constant(weight, f"{name}/weight")
        bias = net.constant(np.linspace(-1, 1, out[-1]).astype(np.float32), f"{name}/bias")
        return net.then(native, [source, constant, bias], out, (kind, options), name)

    a = conv(x, uneven(8, 3, 3, 3, axis=0, seed=1), (1, 6, 6, 8), "first")
    b = conv(a, uneven(1, 3, 3, 8, axis=3, seed=2), (1, 6, 6, 8), "depthwise", "DEPTHWISE_CONV_2D")
    c = conv(b, uneven(6, 1, 1, 8, axis=3, seed=3), (1, 6, 6, 6), "third")
    if between:
        options = {"stride_h": 6, "stride_w": 6, "filter_height": 6, "filter_width": 6, "padding": 1}
        c = net.then(between, [c], (1, 1, 1, 6), ("Pool2DOptions", options), "pool")
    size = 6 if between else 216
    weight = net.constant(uneven(5, size, axis=1, seed=4), "head/weight")
    net.outputs.append(net.then("FULLY_CONNECTED", [c, weight, -1], (1, 5), ("FullyConnectedOptions", {}), "head"))
    if shared:
        net.outputs.append(a)
    return net.finish()


def outputs(model: TfliteModel, samples: np.ndarray, tmp_path) -> np.ndarray:
    model.save(tmp_path / "m.tflite")
    with Worker() as worker:
        worker.load("m", tmp_path / "m.tflite")
        return np.stack([worker.run("m", [sample[None]])[0] for sample in samples])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("between", ["", "AVERAGE_POOL_2D", "MAX_POOL_2D"])
def test_the_function_stays_and_neighbouring_ranges_meet(half, between, tmp_path):
    model = chain(half=half, between=between)
    found = equalize(view(model))
    expected = [("first", "depthwise"), ("depthwise", "third")] + ([("third", "head")] if between else [])
    assert list(found.pairs) == expected
    changed = set_constants(model, found.constants)
    graph = view(changed)
    by_name = {op.name: graph.tensors[op.inputs[1]].weight.read() for op in graph.ops if op.kind in ("conv2d", "dense")}
    depthwise = next(op for op in graph.ops if op.kind == "depthwise_conv2d")
    middle = np.abs(graph.tensors[depthwise.inputs[1]].weight.read()).max(axis=(0, 1, 2))
    np.testing.assert_allclose(np.abs(by_name["first"]).max(axis=(1, 2, 3)), middle, rtol=0.01)
    np.testing.assert_allclose(middle, np.abs(by_name["third"]).max(axis=(0, 1, 2)), rtol=0.01)
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)
    before, after = outputs(model, x, tmp_path), outputs(changed, x, tmp_path)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_one_pair_gets_the_closed_form(seed):
    """s_i = sqrt(r1_i / r2_i): both ranges become sqrt(r1_i r2_i)."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(4, 3)) * rng.uniform(0.01, 10, (4, 1)), rng.normal(size=(2, 4))
    net = Net()
    x = net.input((1, 3))
    relu = ("FullyConnectedOptions", {"fused_activation_function": 1})
    hidden = net.then("FULLY_CONNECTED", [x, net.constant(first.astype(np.float32)), -1], (1, 4), relu, "a")
    net.outputs.append(
        net.then("FULLY_CONNECTED", [hidden, net.constant(second.astype(np.float32)), -1], (1, 2), relu, "b")
    )
    graph = view(net.finish())
    found = equalize(graph)
    a, b = (found.constants[op.inputs[1]] for op in graph.ops)
    wanted = np.sqrt(np.abs(first).max(axis=1) * np.abs(second).max(axis=0))
    np.testing.assert_allclose(np.abs(a).max(axis=1), wanted, rtol=1e-5)
    np.testing.assert_allclose(np.abs(b).max(axis=0), wanted, rtol=1e-5)


def test_a_bias_that_layers_share_matters_only_where_it_would_be_scaled(tmp_path):
    """Converters give all layers without a bias the same zeros."""
    rng, net = np.random.default_rng(0), Net()
    x, zeros = net.input((1, 4)), net.constant(np.zeros(4, np.float32))
    relu = ("FullyConnectedOptions", {"fused_activation_function": 1})
    for name, bias in (("a", net.constant(np.ones(4, np.float32))), ("b", zeros), ("c", zeros)):
        weight = net.constant((rng.normal(size=(4, 4)) * rng.uniform(0.01, 10, (4, 1))).astype(np.float32))
        x = net.then("FULLY_CONNECTED", [x, weight, bias], (1, 4), relu, name)
    net.outputs.append(x)
    model = net.finish()
    found = equalize(view(model))
    assert found.pairs == (("a", "b"),)
    assert found.left == {"its weights are shared or integers": 2}
    samples = rng.normal(size=(5, 4)).astype(np.float32)
    before, after = (outputs(m, samples, tmp_path) for m in (model, set_constants(model, found.constants)))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_dead_channels_are_left_alone(tmp_path):
    net = Net()
    x, weight = net.input((1, 3)), np.array([[0, 0, 0], [1, 2, 3]], np.float32)
    linear = ("FullyConnectedOptions", {})
    hidden = net.then("FULLY_CONNECTED", [x, net.constant(weight), -1], (1, 2), linear, "a")
    head = np.array([[5, 0.5], [7, 0.25]], np.float32)
    net.outputs.append(net.then("FULLY_CONNECTED", [hidden, net.constant(head), -1], (1, 2), linear, "b"))
    graph = view(net.finish())
    values = equalize(graph).constants
    assert all(np.isfinite(v).all() for v in values.values())
    np.testing.assert_array_equal(values[graph.ops[0].inputs[1]][0], 0)
    np.testing.assert_array_equal(values[graph.ops[1].inputs[1]][:, 0], [5, 7])


@pytest.mark.parametrize("size", [1e-4, 1e-8, 1e-30])
def test_a_channel_that_is_nearly_dead_does_not_take_the_grid_from_the_others(size):
    rng, net = np.random.default_rng(0), Net()
    first, bias = rng.normal(size=(16, 24)).astype(np.float32) / 5, np.abs(rng.normal(size=16)).astype(np.float32)
    first[3] *= np.float32(size)
    relu, x = ("FullyConnectedOptions", {"fused_activation_function": 1}), net.input((1, 24), name="x")
    hidden = net.then("FULLY_CONNECTED", [x, net.constant(first), net.constant(bias)], (1, 16), relu, "a")
    second = net.constant((rng.normal(size=(8, 16)) / 4).astype(np.float32))
    net.outputs.append(net.then("FULLY_CONNECTED", [hidden, second, -1], (1, 8), ("FullyConnectedOptions", {}), "b"))
    recipe = Recipe.load({"version": 1, "rules": [{"kind": "*", "apply": {"quantize": {"activations": "int8"}}}]})
    data = rng.normal(size=(40, 1, 24)).astype(np.float32)
    plain, evened = (
        optimize(net.finish(), replace(recipe, equalize=e), data).report.verification.difference["b"]
        for e in (False, True)
    )
    assert evened < 2 * plain


def test_what_does_not_allow_it_is_left_with_the_reason():
    assert equalize(view(chain(activation=3))).left == {
        "an activation with a fixed point follows": 3, "it ends the model": 1,
    }  # fmt: skip
    found = equalize(view(chain(shared=True)))
    assert ("first", "depthwise") not in found.pairs
    assert any("several" in why or "ends" in why for why in found.left)
    assert "channels do not meet one by one" in equalize(view(chain())).left


def test_per_tensor_weights_gain_and_the_report_says_what_was_done():
    model = chain(between="AVERAGE_POOL_2D")
    data = np.random.default_rng(0).normal(size=(32, 6, 6, 3)).astype(np.float32)
    coarse = {"weights": "int8", "activations": "int8", "granularity": "tensor"}
    recipe = Recipe.load({"version": 1, "rules": [{"kind": "*", "apply": {"quantize": coarse}}]})
    plain = optimize(model, recipe, data).report
    evened = optimize(model, replace(recipe, equalize=True), data).report
    assert evened.verification.difference["head"] < 0.6 * plain.verification.difference["head"]
    assert any("3 pairs of layers were equalized" in note for note in evened.notes)
    assert evened.source_bytes == plain.source_bytes


def test_a_recipe_file_says_it_and_keeps_it():
    data = {"version": 1, "equalize": True, "rules": [{"kind": "*", "apply": {"quantize": {"weights": "int8"}}}]}
    recipe = Recipe.load(data)
    assert recipe.equalize
    assert Recipe.load(recipe.to_data()).equalize
