"""Patterns of zeros, what targets gain from them, and `paring inspect --target`."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import Net

from paring.cli import main
from paring.errors import InputError
from paring.formats import load
from paring.formats.tflite.view import view
from paring.graph import Op
from paring.layer import Layer, laid_out, layer_of, layers_of
from paring.measure.gains import gains, together
from paring.patterns import BLOCKS, UNSTRUCTURED, block_name, detect
from paring.targets import TARGETS, find, predict, sparse_choice, speed_up

X86 = tuple(name for name in TARGETS if name.startswith("x86-"))
OTHERS = tuple(name for name in TARGETS if name not in X86)
DTYPES = ("float32", "int8", "dynamic-int8")


def op(kind: str, **params: object) -> Op:
    return Op((0, 0), "layer", kind, kind.upper(), (), (), params)


def pruned(shape: tuple[int, ...], block: tuple[int, int], density: float, seed: int = 0) -> np.ndarray:
    """Random weights [outputs, ..., inputs] of which exactly so many blocks are kept, as near as it goes."""
    rng = np.random.default_rng(seed)
    blocks = (-(-shape[0] // block[0]), *shape[1:-1], -(-shape[-1] // block[1]))
    kept = rng.permutation(np.prod(blocks)).reshape(blocks) < density * np.prod(blocks)
    mask = kept.repeat(block[0], 0).repeat(block[1], -1)[: shape[0], ..., : shape[-1]]
    return np.where(mask, rng.uniform(0.1, 1.0, shape), 0).astype(np.float32)


# -- patterns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=block_name)
@pytest.mark.parametrize("shape", [(64, 96), (48, 3, 3, 32), (70, 1, 1, 50)])
def test_blocks_are_found_with_their_share_of_work(block, shape):
    found = detect(pruned(shape, block, 0.2))
    assert found.pattern == block_name(block)
    assert found.covered[block_name(block)] == 1
    assert found.stored[block_name(block)] == pytest.approx(1 - found.zeros)


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8)])
def test_so_many_of_every_so_many(kept: int, of: int):
    rng = np.random.default_rng(0)
    order = rng.random((64, 32, of)).argsort(axis=-1)
    assert detect((order < kept).reshape(64, -1) * 1.0).pattern == f"{kept}:{of}"


def test_zeros_without_a_pattern_and_weights_without_zeros():
    rng = np.random.default_rng(0)
    found = detect(rng.random((64, 64)) * (rng.random((64, 64)) < 0.3))
    assert found.pattern == UNSTRUCTURED and found.covered["16x1"] < 0.05 and found.stored["16x1"] > 0.95
    assert found.stored[UNSTRUCTURED] == pytest.approx(1 - found.zeros)
    assert detect(rng.random((64, 64)) + 1).pattern == ""


def test_a_few_zeros_elsewhere_leave_the_pattern_as_it_is():
    weight = pruned((64, 64), (16, 1), 0.5)
    weight[weight < np.quantile(weight[weight > 0], 0.01)] = 0
    found = detect(weight)
    assert found.pattern == "16x1" and 0.97 < found.covered["16x1"] < 1


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_what_a_kernel_reads_is_what_slices_say(outputs, taps, inputs, density, seed):
    weight = (np.random.default_rng(seed).random((outputs, taps, inputs)) < density) * 1.0
    found = detect(weight)
    for high, wide in BLOCKS:
        read = 0
        for top in range(0, outputs, high):
            for tap in range(taps):
                for left in range(0, inputs, wide):
                    part = weight[top : top + high, tap, left : left + wide]
                    read += part.size if part.any() else 0
        assert found.stored[block_name((high, wide))] == pytest.approx(read / weight.size)


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "shape", "positions"),
    [("dense", (2048, 2048), 1), ("conv2d", (256, 1, 1, 256), 784), ("conv2d", (256, 3, 3, 256), 784)],
    ids=["dense", "1x1", "3x3"],
)
def test_the_delegate_gains_from_large_layers(target, dtype, kind, shape, positions):
    if dtype == "dynamic-int8" and kind == "conv2d":
        return
    pattern, why = sparse_choice(target, op(kind), shape, positions, dtype)
    assert pattern is not None and "times as fast" in why
    speeds = [
        predict(target, op(kind), shape, positions, dtype, pattern, sparsity) for sparsity in (0.5, 0.7, 0.8, 0.9)
    ]
    assert speeds == sorted(speeds) and speeds[-1] > 2.5
    # Never slower: what does not pay is left to the dense kernels.
    assert predict(target, op(kind), shape, positions, dtype, pattern, 0.0) == 1.0


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "why"),
    [
        ("depthwise_conv2d", (1, 3, 3, 256), "float32", "depthwise"),
        ("conv2d", (64, 3, 3, 3), "float32", r"few input channels \(3\)"),
        ("dense", (10, 64), "float32", r"few weights \(640\)"),
        ("lstm", (512, 512), "float32", "no sparse kernel for lstm"),
        ("dense", (512, 512), "int16", "no sparse kernel for int16, only for .*float32"),
    ],
)
@pytest.mark.parametrize("target", X86)
def test_layers_that_gain_nothing_say_why(target, kind, shape, dtype, why):
    pattern, reason = sparse_choice(target, op(kind), shape, 49, dtype)
    assert pattern is None and re.search(why, reason)
    assert predict(target, op(kind), shape, 49, dtype, "16x1", 0.9) == 1.0


def test_grouped_convolutions_are_left_alone():
    layer = layer_of(op("conv2d"), (64, 3, 3, 16), 49, "float32", channels=64)
    assert layer.groups == 4
    assert speed_up(find("x86-avx512"), layer, {"16x1": 0.1}) == 1.0


@pytest.mark.parametrize("target", OTHERS)
def test_other_runtimes_gain_nothing_or_what_was_not_measured(target):
    pattern, why = sparse_choice(target, op("dense"), (1024, 1024), 1, "float32")
    assert pattern is None and why
    pattern, why = sparse_choice(target, op("conv2d"), (256, 1, 1, 256), 784, "float32")
    speed = predict(target, op("conv2d"), (256, 1, 1, 256), 784, "float32", "4x1", 0.9)
    assert (pattern, speed) == (("4x1", None) if target == "litert-arm" else (None, 1.0))


def test_an_unknown_target_is_refused_with_the_list():
    with pytest.raises(
        InputError, match=r"unknown target for avx512: expected one of x86-avx512vnni, .*microcontroller"
    ):
        find("avx512")


@given(
    st.sampled_from(X86), st.sampled_from(DTYPES), st.integers(1, 3000), st.integers(4, 3000), st.sampled_from((1, 9)),
    st.integers(1, 5000), st.floats(0, 1),
)  # fmt: skip
def test_predictions_are_never_below_one_nor_beyond_the_work_saved(
    target, dtype, outputs, inputs, taps, positions, stored
):
    layer = Layer("conv2d", outputs, inputs, taps, positions, dtype)
    for kernel in find(target).kernels:
        speed = speed_up(find(target), layer, {kernel.pattern: stored})
        assert speed is not None and speed >= 1.0
        assert speed_up(find(target), layer, {kernel.pattern: stored / 2}) >= speed


# -- layers ------------------------------------------------------------------------------------------------------------


def test_matrix_products_are_laid_out_by_their_outputs():
    net = Net()
    x = net.input((1, 7, 64), name="x")
    for name, shape, options in (("a", (64, 40), {}), ("b", (48, 40), {"adj_y": True})):
        x = net.then("BATCH_MATMUL", [x, net.constant(pruned(shape, (1, 1), 0.3))], (1, 7, 40 if name == "a" else 48),
                     ("BatchMatMulOptions", options), name)  # fmt: skip
    net.outputs = [x]
    graph = view(net.finish())
    first, second = (layer for o in graph.ops for _, layer in layers_of(graph, o))
    assert first == Layer("matmul", 40, 64, 1, 7) and second == Layer("matmul", 48, 40, 1, 7)
    weight = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    np.testing.assert_array_equal(laid_out(op("matmul"), weight)[5], weight[1, :, 0][None])
    np.testing.assert_array_equal(laid_out(op("matmul", adj_y=True), weight)[3], weight[1, 0][None])
    assert laid_out(op("depthwise_conv2d"), np.zeros((1, 3, 3, 8))).shape == (8, 9, 1)


def network() -> Net:
    """A convolution and two dense layers, in a model."""
    net = Net()
    x = net.input((1, 14, 14, 64), name="image")
    kernel = net.constant(pruned((128, 3, 3, 64), (16, 1), 0.1))
    options = ("Conv2DOptions", {"stride_w": 2, "stride_h": 2})
    x = net.then("CONV_2D", [x, kernel, net.constant(np.zeros(128, np.float32))], (1, 7, 7, 128), options, "conv")
    shape = net.constant(np.array([1, 6272], np.int32))
    x = net.then("RESHAPE", [x, shape], (1, 6272), ("ReshapeOptions", {}), "flat")
    for name, size in (("wide", (60, 6272)), ("last", (10, 60))):
        weights = [net.constant(pruned(size, (1, 1), 0.5)), net.constant(np.zeros(size[0], np.float32))]
        x = net.then("FULLY_CONNECTED", [x, *weights], (1, size[0]), ("FullyConnectedOptions", {}), name)
    net.outputs = [x]
    return net


def test_gains_of_a_model():
    graph = view(network().finish())
    rows = {row.name: row for row in gains(graph, "x86-avx512")}
    assert list(rows) == ["conv", "wide", "last"]
    conv, wide, last = rows.values()
    assert (conv.found, conv.covered, conv.dtype) == ("16x1", 1.0, "float32")
    assert conv.zeros == pytest.approx(0.9, abs=0.01) and conv.now > 3 and conv.then > 3
    assert wide.found == UNSTRUCTURED and wide.zeros == pytest.approx(0.5) and wide.now == 1 < 4 < wide.then
    assert (last.pattern, last.now, last.then, last.why) == (None, 1.0, 1.0, "few weights (600)")
    now, then = together(list(rows.values()))
    assert 1 < now < then
    assert all(row.now == 1.0 and row.pattern is None and row.why for row in gains(graph, "edge-tpu"))
    assert [row.now for row in gains(graph, "litert-arm")] == [1.0, 1.0, 1.0]
    (positions,) = [layer.positions for o in graph.ops[:1] for _, layer in layers_of(graph, o)]
    assert positions == 49


def inspect(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["paring", "inspect", *words])
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    return capsys.readouterr().out


def test_inspect_shows_what_zeros_gain(tmp_path, monkeypatch, capsys):
    path = tmp_path / "m.tflite"
    path.write_bytes(network().finish().to_bytes())
    out = inspect(monkeypatch, capsys, str(path), "--target", "x86-avx512")
    assert "16x1" in out and "90%" in out and "these layers together" in out and "x86-avx512: " in out
    facts = json.loads(inspect(monkeypatch, capsys, str(path), "--target", "x86-avx2", "--json"))
    assert facts["target"] == "x86-avx2" and [row["found"] for row in facts["layers"]] == [
        "16x1",
        UNSTRUCTURED,
        UNSTRUCTURED,
    ]
    assert facts["together"]["now"] > 1 and facts["together"]["zeros"] == 0.9
    out = inspect(monkeypatch, capsys, str(path), "--target", "litert-x86")
    assert "XNNPACK" in out
    facts = json.loads(inspect(monkeypatch, capsys, str(path), "--target", "litert-arm", "--json"))
    assert facts["together"] == {"now": None, "then": None, "zeros": 0.9}


def test_inspect_refuses_an_unknown_target(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["paring", "inspect", "absent.tflite", "--target", "avx512"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "unknown target for avx512" in capsys.readouterr().err


def test_sparse_weights_count_as_what_they_are(shared):
    rows = gains(view(load(shared / "models" / "face_detection_full_range_sparse.tflite"), densify=True), "x86-avx512")
    pruned_rows = [row for row in rows if row.zeros > 0.5]
    assert len(pruned_rows) > 20 and all(row.kind == "conv2d" for row in pruned_rows)
