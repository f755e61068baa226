"""The LiteRT delegate inside stock interpreters: what it claims, and that results stay what they were.

Floats are compared with default LiteRT (XNNPACK) within rounding, integers bit for bit.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sparse_models as models
from ai_edge_litert.interpreter import Interpreter, load_delegate
from models import Net
from sparse_models import CASES, Case, encoded, integers, normal, on_grid, sparse

EXACT = 0.0
ROUNDING = 1e-5  # of the largest value
QUIET: Mapping[str, str] = {"measure": "false"}
"""Whether a claim is made must not depend on how busy the machine is."""

Build = Callable[[Net], None]


def model(build: Build) -> bytes:
    net = Net()
    build(net)
    return net.finish().to_bytes()


@pytest.fixture
def delegated(native: ModuleType) -> Callable[..., Interpreter]:
    """`delegated(bytes, num_threads=1, **options)`: an interpreter with the delegate."""

    def build(content: bytes, num_threads: int = 1, **options: str) -> Interpreter:
        delegate = load_delegate(native.delegate_path(), {**QUIET, **options})
        return Interpreter(model_content=content, num_threads=num_threads, experimental_delegates=[delegate])

    return build


def stock(content: bytes) -> Interpreter:
    return Interpreter(model_content=content, num_threads=1)


def inputs(interpreter: Any, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        rng.integers(-128, 128, d["shape"]).astype(np.int8) if d["dtype"] == np.int8
        else rng.standard_normal(d["shape"]).astype(d["dtype"])
        for d in interpreter.get_input_details()
    ]  # fmt: skip


def run(interpreter: Any, values: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
    interpreter.allocate_tensors()
    for detail, value in zip(interpreter.get_input_details(), values or inputs(interpreter), strict=True):
        interpreter.set_tensor(detail["index"], value)
    interpreter.invoke()
    return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray], tolerance: float = ROUNDING) -> None:
    assert [a.shape for a in ours] == [a.shape for a in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0)
        assert difference <= tolerance * np.abs(b.astype(np.float64)).max(initial=0)


def operators(interpreter: Any) -> list[str]:
    return [details["op_name"] for details in interpreter._get_ops_details()]


def said(text: str) -> dict[int, str]:
    """What `verbose` printed of each node."""
    return {int(m[1]): m[0] for m in re.finditer(r"^paring: node (\d+) .*$", text, re.MULTILINE)}


def claimed(text: str) -> set[int]:
    return {node for node, line in said(text).items() if ": claimed" in line or ", claimed" in line}


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_are_those_of_litert(case: Case, delegated, capfd):
    content = case.bytes()
    ours = delegated(content, verbose="true")
    assert len(claimed(capfd.readouterr().err)) == 1
    assert_same(run(ours), run(stock(content)), EXACT if case.exact else ROUNDING)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_results_under_a_lower_instruction_set(isa, delegated, capfd):
    case = next(case for case in CASES if case.name == "int8-conv-3x3")
    try:
        ours = delegated(case.bytes(), isa=isa, verbose="true", sparsity_threshold="0.5")
    except ValueError as error:
        pytest.skip(str(error))
    assert f"claimed, {isa}," in capfd.readouterr().err
    assert_same(run(ours), run(stock(case.bytes())), EXACT)


def test_constants_are_unpacked_by_nobody_else(delegated):
    content = next(case for case in CASES if case.name == "dense-densify-float16").bytes()
    ours = delegated(content)
    run(ours)
    details = ours._get_ops_details()
    delegates = [d for d in details if d["op_name"] == "DELEGATE"]
    # One partition, whose inputs are the model's and the constants as stored.
    assert len(delegates) == 1
    assert set(details[0]["inputs"]) < set(delegates[0]["inputs"])


@pytest.mark.parametrize("read", [True, False])
def test_a_constant_that_is_a_result(read, delegated):
    # Default LiteRT gives zeros for such a result, so what is right is the constant itself.
    weights = sparse(1024, 512)

    def build(net: Net) -> None:
        w = models.behind(net, "DENSIFY", encoded(net, weights), "float32")
        net.outputs = [net.then("FULLY_CONNECTED", [net.input((1, 512)), w, -1], (1, 1024), models.FC), w]
        if read:
            net.outputs.append(net.then("NEG", [w], (1024, 512), ("NegOptions", {})))

    content = model(build)
    product, same, *negative = run(delegated(content))
    assert_same([product], run(stock(content))[:1])
    assert_same([same, *negative], [weights, -weights][: 1 + read], EXACT)


def test_a_constant_shared_by_two_partitions(delegated, capfd):
    def build(net: Net) -> None:
        w = models.behind(net, "DEQUANTIZE", net.constant(sparse(512, 512).astype(np.float16)), "float32")
        a = net.then("FULLY_CONNECTED", [net.input((4, 512)), w, -1], (4, 512), models.FC)
        b = net.then("NEG", [a], (4, 512), ("NegOptions", {}))
        net.outputs = [net.then("FULLY_CONNECTED", [b, w, -1], (4, 512), models.FC)]

    content = model(build)
    ours = delegated(content, verbose="true")
    assert len(claimed(capfd.readouterr().err)) == 2
    assert_same(run(ours), run(stock(content)))


def test_sparse_encoded_dynamic_int8(delegated):
    # Default LiteRT reads these wrongly (version 12), so the same weights stored densely are what is right.
    codes, scales = integers(np.repeat(sparse(1024, 64), 16, axis=1), True)

    def build(stored: Callable[[Net], int]) -> bytes:
        net = Net()
        y = net.tensor((2, 1024))
        x = net.input((2, 1024))
        net.op(
            "FULLY_CONNECTED",
            [x, stored(net), -1],
            [y],
            ("FullyConnectedOptions", {"asymmetric_quantize_inputs": True}),
            12,
        )
        net.outputs = [y]
        return net.finish().to_bytes()

    dense = stock(build(lambda net: on_grid(net, codes, scales)))
    ours = delegated(build(lambda net: encoded(net, codes, 16, scales)))
    assert_same(run(ours), run(dense), EXACT)


# -- islands of planes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_islands_of_planes(pad, threads, delegated):
    content = model(lambda net: models.mobile(net, pad))
    assert_same(run(delegated(content, threads)), run(stock(content)))


def test_an_island_that_something_stands_between(delegated):
    # NEG is not ours: what it reads and what reads it cannot be one island.
    def build(net: Net) -> None:
        x, b = net.input((1, 24, 24, 64)), net.constant(normal(64))
        a = net.then("CONV_2D", [x, net.constant(sparse(64, 3, 3, 64, rows=1)), b], (1, 24, 24, 64), models.conv())
        n = net.then("NEG", [a], (1, 24, 24, 64), ("NegOptions", {}))
        c = net.then(
            "CONV_2D", [a, net.constant(sparse(64, 3, 3, 64, rows=1, seed=2)), b], (1, 24, 24, 64), models.conv()
        )
        s = net.then("ADD", [c, n], (1, 24, 24, 64), models.ADD)
        net.outputs = [
            net.then(
                "CONV_2D", [s, net.constant(sparse(64, 3, 3, 64, rows=1, seed=3)), b], (1, 24, 24, 64), models.conv()
            )
        ]

    content = model(build)
    assert_same(run(delegated(content)), run(stock(content)))


# -- shapes that change ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "dense-densify", "conv-3x3", "int8-dense", "dynamic-dense", "matmul"])
def test_resizing_after_allocation(name, delegated):
    content = next(case for case in CASES if case.name == name).bytes()
    ours, theirs = delegated(content), stock(content)
    index, shape = ours.get_input_details()[0]["index"], ours.get_input_details()[0]["shape"]
    for batch in (3, 1, 8, 2):
        for interpreter in (ours, theirs):
            interpreter.resize_tensor_input(index, [batch, *shape[1:]])
            interpreter.allocate_tensors()
        assert_same(run(ours, inputs(theirs, batch)), run(theirs, inputs(theirs, batch)))


def test_an_image_of_another_size(delegated):
    content = model(models.mobile)
    ours, theirs = delegated(content), stock(content)
    for side in (24, 7, 31, 24):
        for interpreter in (ours, theirs):
            interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], [2, side, side + 3, 32])
            interpreter.allocate_tensors()
        assert_same(run(ours, inputs(theirs, side)), run(theirs, inputs(theirs, side)))


@pytest.mark.parametrize("told", [(6, 512), (1, 1)])
def test_a_shape_known_only_when_running(told, delegated, capfd):
    # As converters write it: what is not known is 1 in the shape and -1 in the signature.
    def build(net: Net) -> None:
        x, shape = net.input((6, 512)), net.input((2,), "int32")
        rows = net.then("RESHAPE", [x, shape], told, models.RESHAPE)
        net.graph.tensors[rows].shape_signature = np.array([-1, -1], np.int32)
        hidden = net.then("FULLY_CONNECTED", [rows, net.constant(sparse(1024, 512)), -1], (told[0], 1024), models.FC)
        net.graph.tensors[hidden].shape_signature = np.array([-1, 1024], np.int32)
        net.outputs = [
            net.then("FULLY_CONNECTED", [hidden, net.constant(sparse(512, 1024)), -1], (told[0], 512), models.FC)
        ]

    content = model(build)
    ours = delegated(content, verbose="true")
    assert len(claimed(capfd.readouterr().err)) == 2
    for shape in ([6, 512], [3, 1024], [2, 1536]):
        values = [normal(6, 512), np.array(shape, np.int32)]
        assert_same(run(ours, values), run(stock(content), values))


def test_an_image_whose_size_is_not_known_yet(delegated, capfd):
    def build(net: Net) -> None:
        x = net.input((1, 1, 1, 32))
        net.graph.tensors[x].shape_signature = np.array([-1, -1, -1, 32], np.int32)
        w = net.constant(sparse(64, 3, 3, 32))
        net.outputs = [net.then("CONV_2D", [x, w, net.constant(normal(64))], (1, 1, 1, 64), models.conv())]

    content = model(build)
    ours, theirs = delegated(content, verbose="true"), stock(content)
    assert len(claimed(capfd.readouterr().err)) == 1
    for shape in ([1, 20, 30, 32], [2, 5, 5, 32]):
        for interpreter in (ours, theirs):
            interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], shape)
            interpreter.allocate_tensors()
        assert_same(run(ours, inputs(theirs)), run(theirs, inputs(theirs)))


def test_an_input_that_does_not_fit_is_named(delegated):
    ours = delegated(next(case for case in CASES if case.name == "dense").bytes())
    ours.resize_tensor_input(ours.get_input_details()[0]["index"], [1, 100])
    with pytest.raises(RuntimeError, match=r"expected rows of 512 values, got 100"):
        ours.allocate_tensors()


# -- what is left alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_dense_models_are_left_as_they_are(zeros, delegated, capfd):
    def build(net: Net) -> None:
        x = net.input((1, 12, 12, 64))
        y = net.then(
            "CONV_2D",
            [x, net.constant(sparse(64, 3, 3, 64, zeros=zeros)), net.constant(normal(64))],
            (1, 12, 12, 64),
            models.conv(),
        )
        net.outputs = [
            net.then("FULLY_CONNECTED", [y, net.constant(sparse(256, 64, zeros=zeros)), -1], (144, 256), models.FC)
        ]

    content = model(build)
    ours, theirs = delegated(content, verbose="true"), stock(content)
    text = capfd.readouterr().err
    assert claimed(text) == set() and len(said(text)) == 2 and "% zeros" in text
    assert_same(run(ours), run(theirs), EXACT)
    assert operators(ours) == operators(theirs)


@pytest.mark.parametrize(
    "name", ["kws_ref_model", "kws_ref_model_float32", "pretrainedResnet", "face_detection_short_range"]
)
def test_dense_networks_are_left_as_they_are(name, shared, native):
    path = str(shared / "models" / f"{name}.tflite")
    ours = Interpreter(path, num_threads=1, experimental_delegates=[load_delegate(native.delegate_path())])
    theirs = Interpreter(path, num_threads=1)
    assert_same(run(ours), run(theirs), EXACT)
    assert operators(ours) == operators(theirs)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_weights_that_are_not_finite_are_left_alone(bad, delegated, capfd):
    weights = sparse(1024, 512)
    weights[700, 3] = bad

    def build(net: Net) -> None:
        net.outputs = [
            net.then("FULLY_CONNECTED", [net.input((1, 512)), net.constant(weights), -1], (1, 1024), models.FC)
        ]

    delegated(model(build), verbose="true")
    text = capfd.readouterr().err
    assert claimed(text) == set() and "its weights have infinities or not-a-numbers" in said(text)[0]


def test_codes_of_minus_128_are_left_alone(delegated, capfd):
    codes, scales = integers(sparse(1024, 512), True)
    codes[9, 9] = -128

    def build(net: Net) -> None:
        y = net.tensor((1, 1024))
        net.op("FULLY_CONNECTED", [net.input((1, 512)), on_grid(net, codes, scales), -1], [y], models.FC, 12)
        net.outputs = [y]

    delegated(model(build), verbose="true")
    text = capfd.readouterr().err
    assert claimed(text) == set() and "-128" in said(text)[0]


def test_an_activation_without_a_kernel_is_left_alone(delegated, capfd):
    def build(net: Net) -> None:
        options = ("FullyConnectedOptions", {"fused_activation_function": 4})  # TANH
        net.outputs = [
            net.then("FULLY_CONNECTED", [net.input((1, 512)), net.constant(sparse(1024, 512)), -1], (1, 1024), options)
        ]

    delegated(model(build), verbose="true")
    text = capfd.readouterr().err
    assert claimed(text) == set() and "fused activation 4" in said(text)[0]


# -- options and messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "sparsity",
            "0.5",
            r"option 'sparsity': expected one of sparsity_threshold, isa, verbose, num_threads, measure",
        ),
        ("sparsity_threshold", "70", r"'sparsity_threshold': expected a number from 0 to 1, got '70'"),
        ("isa", "neon", r"'isa': expected one of portable.*, got 'neon'"),
        ("verbose", "perhaps", r"'verbose': expected true or false, got 'perhaps'"),
        ("num_threads", "two", r"'num_threads': expected a whole number up to 1024, got 'two'"),
        ("measure", "2", r"'measure': expected true or false, got '2'"),
    ],
)
def test_options_that_cannot_be_are_named(option, value, message, native):
    with pytest.raises(ValueError, match=message):
        load_delegate(native.delegate_path(), {option: value})


def test_the_threshold_decides_what_is_looked_at(delegated, capfd):
    content = CASES[0].bytes()
    delegated(content, verbose="true", sparsity_threshold="0.97")
    assert claimed(capfd.readouterr().err) == set()
    delegated(content, verbose="true", sparsity_threshold="0.9")
    assert claimed(capfd.readouterr().err) == {0}


def test_verbose_says_what_was_found_and_done(delegated, capfd):
    delegated(CASES[0].bytes(), 2, verbose="true")
    text = capfd.readouterr().err
    assert re.search(
        r"node 0 FULLY_CONNECTED 't\d+': float32, 94 % zeros, 16 x 1 blocks, 100 % full, kernel f32-16x1\S*, "
        r"expected gain \d+\.\dx, claimed: expected \d+\.\d us, dense \d+\.\d us", text,
    )  # fmt: skip
    assert re.search(r"1 of 1 nodes claimed, \w+, 2 threads", text)


def test_nothing_is_printed_unless_asked(delegated, capfd):
    run(delegated(CASES[0].bytes()))
    assert "paring" not in capfd.readouterr().err


def test_measuring_changes_no_result(delegated):
    content = model(models.mobile)
    assert_same(run(delegated(content, measure="true")), run(stock(content)))


# -- many of them ------------------------------------------------------------------------------------------------------


def test_several_interpreters_in_several_threads(delegated):
    contents = [CASES[0].bytes(), model(models.mobile)]
    expected = [run(stock(content)) for content in contents]
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(3):
                interpreter = delegated(contents[number % 2], 1 + number // 2)
                for _ in range(10):
                    assert_same(run(interpreter), expected[number % 2])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_interpreters_that_go_leave_nothing_behind(delegated):
    content = model(models.mobile)  # 0.3 MB of weights, 2 MB of planes

    def lives(count: int) -> None:
        for number in range(count):
            interpreter = delegated(content)
            interpreter.allocate_tensors()
            if number % 10 == 0:
                run(interpreter)

    lives(60)
    before = _resident()
    lives(300)
    assert _resident() - before < 300 * 20_000


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")
def test_tensorflow_loads_it_too(tensorflow, native):
    content = CASES[0].bytes()
    delegate = tensorflow.lite.experimental.load_delegate(native.delegate_path(), dict(QUIET))
    ours = tensorflow.lite.Interpreter(model_content=content, experimental_delegates=[delegate])
    assert_same(run(ours), run(stock(content)))
    assert operators(ours).count("DELEGATE") == 1


def test_a_pruned_network_as_shipped(shared, native, delegated):
    content = (shared / "models" / "face_detection_full_range_sparse.tflite").read_bytes()
    assert_same(run(delegated(content, 2)), run(stock(content)))
