"""Loops, branches and several entries: what is inside bodies is planned, calibrated, written and verified too."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import needs
from models import Net

from paring.decision import DYNAMIC, FLOAT, OTHER, STATIC, WEIGHT_ONLY
from paring.errors import InputError
from paring.formats.tflite.constants import type_name
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.sink import sink
from paring.optimize import Result, Row, optimize
from paring.runtime import Worker
from paring.verify import PATHS

# What a recipe may cost: the relative difference of the whole model; and what it makes of operators with weights.
EXPECTED = {
    "int8": (0.08, STATIC),
    "int8-int16": (0.02, STATIC),
    "dynamic-int8": (0.03, DYNAMIC),
    "weight-only-int8": (0.03, WEIGHT_ONLY),
    "float16": (0.002, WEIGHT_ONLY),
}
UNPROBED = ("WHILE", "IF")  # they compute nothing of their own

# -- models on our own writer --------------------------------------------------------------------------------------


class Body(Net):
    """One more subgraph of a net."""

    def __init__(self, whole: Net, name: str, inputs: int = 0) -> None:
        none = np.zeros(0, np.int32)
        self.draft, self.number = whole.draft, len(whole.draft.subgraphs)
        self.graph = Table("SubGraph", name=name, tensors=[], operators=[], inputs=none, outputs=none)
        self.draft.subgraphs.append(self.graph)
        self.inputs, self.outputs = [], []

    def tensor(self, shape: Any, dtype: str = "float32", name: str = "", *, grid: Any = None, buffer: int = 0) -> int:
        like = Table("Tensor", shape=np.array(shape, np.int32))
        name = name or f"{self.graph.name}/{len(self.graph.tensors)}"
        return self.draft.tensor(self.number, like, name, dtype, grid, buffer)

    def close(self, *outputs: int) -> int:
        self.graph.inputs, self.graph.outputs = (np.array(v, np.int32) for v in (self.inputs, outputs))
        return self.number


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(0, shape[-1] ** -0.5, shape).astype(np.float32)


def dense(net: Net, source: int, w: int, shape: tuple[int, ...], name: str = "") -> int:
    return net.then("FULLY_CONNECTED", [source, w, -1], shape, ("FullyConnectedOptions", {}), name)


def add(net: Net, a: int, b: int, shape: tuple[int, ...], dtype: str = "float32") -> int:
    result = net.tensor(shape, dtype)
    net.op("ADD", [a, b], [result], ("AddOptions", {}))
    return result


def until(net: Net, name: str, steps: int, *shapes: tuple[int, ...]) -> int:
    """The condition `counter < steps` of a loop that carries a counter and reals of these shapes."""
    cond = Body(net, name)
    counter, *_ = cond.input((), "int32"), *(cond.input(shape) for shape in shapes)
    less = cond.tensor((), "bool")
    cond.op("LESS", [counter, cond.constant(np.int32(steps))], [less], ("LessOptions", {}))
    return cond.close(less)


def loop(net: Net, cond: int, body: int, carried: list[int], shapes: list[tuple[int, ...]], name: str) -> list[int]:
    results = [net.tensor((), "int32", f"{name}:counter")]
    results += [net.tensor(shape, name=f"{name}:{place}") for place, shape in enumerate(shapes)]
    options = ("WhileOptions", {"cond_subgraph_index": cond, "body_subgraph_index": body})
    net.op("WHILE", carried, results, options)
    return results


def step(net: Net, name: str) -> tuple[Body, int, int]:
    body = Body(net, name)
    counter = body.input((), "int32")
    return body, counter, add(body, counter, body.constant(np.int32(1)), (), "int32")


def recurrent(steps: int = 6) -> TfliteModel:
    """h = tanh(w x[i] + u h) in a loop over x, and a dense layer behind it."""
    net, shapes = Net(), [(1, 24), (steps, 1, 16)]
    x = net.input((steps, 1, 16), name="x")
    cond = until(net, "cond", steps, *shapes)
    body, counter, following = step(net, "cell")
    h, given = body.input((1, 24)), body.input((steps, 1, 16))
    now = body.then("GATHER", [given, counter], (1, 16), ("GatherOptions", {}), "now")
    new = dense(body, now, body.constant(weights(24, 16)), (1, 24), "input kernel")
    old = dense(body, h, body.constant(weights(24, 24)), (1, 24), "recurrent kernel")
    state = body.then("TANH", [add(body, new, old, (1, 24))], (1, 24), name="state")
    number = body.close(following, state, given)
    zero = net.constant(np.zeros((1, 24), np.float32), "zeros")
    _, last, _ = loop(net, cond, number, [net.constant(np.int32(0)), zero, x], shapes, "loop")
    net.outputs = [dense(net, last, net.constant(weights(32, 24)), (1, 32), "head")]
    return net.finish()


def accumulator(steps: int = 40) -> TfliteModel:
    """sum = 0.9 sum + w x / 20, many times: steps that 8 bits would lose."""
    net, shapes = Net(), [(2, 16), (2, 16)]
    x = net.input((2, 16), name="x")
    cond = until(net, "cond", steps, *shapes)
    body, _, following = step(net, "mean")
    total, given = body.input((2, 16)), body.input((2, 16))
    part = dense(body, given, body.constant(weights(16, 16) / 20), (2, 16), "part")
    scaled = body.then("MUL", [total, body.constant(np.float32([0.9]))], (2, 16), ("MulOptions", {}), "decay")
    total = body.then("ADD", [scaled, part], (2, 16), ("AddOptions", {}), "sum")
    number = body.close(following, total, given)
    zero = net.constant(np.zeros((2, 16), np.float32), "zeros")
    _, last, _ = loop(net, cond, number, [net.constant(np.int32(0)), zero, x], shapes, "loop")
    net.outputs = [dense(net, last, net.constant(weights(16, 16, seed=1)), (2, 16), "head")]
    return net.finish()


def chained() -> TfliteModel:
    """Two loops one behind the other: their ranges differ by far, and so may their grids."""
    net, value = Net(), 0
    value = net.input((2, 16), name="x")
    for number, (native, size) in enumerate((("RELU", 1.5), ("TANH", 1.0))):
        cond = until(net, f"cond{number}", 3, (2, 16))
        body, _, following = step(net, f"body{number}")
        given = body.input((2, 16))
        w = body.constant(size * weights(16, 16, seed=number))
        out = body.then(native, [dense(body, given, w, (2, 16))], (2, 16), name=f"made{number}")
        body.close(following, out)
        carried = [net.constant(np.int32(0)), value]
        value = loop(net, cond, body.number, carried, [(2, 16)], f"loop{number}")[1]
    net.outputs = [value]
    return net.finish()


def branches() -> TfliteModel:
    """relu(w x) or tanh(v x), with w and v given to both branches as operands, as TensorFlow writes them."""
    net = Net()
    x = net.input((2, 16), name="x")
    y = dense(net, x, net.constant(weights(16, 16)), (2, 16), "stem")
    total = net.then("SUM", [x, net.constant(np.int32([0, 1]))], (), ("ReducerOptions", {}), "total")
    positive = net.tensor((), "bool")
    net.op("GREATER", [total, net.constant(np.float32(0))], [positive], ("GreaterOptions", {}))
    numbers = []
    for which, native in enumerate(("RELU", "TANH")):
        body = Body(net, ("then", "else")[which])
        given, *both = body.input((2, 16)), body.input((32, 16)), body.input((32, 16))
        made = dense(body, given, both[which], (2, 32), f"{body.graph.name} kernel")
        numbers.append(body.close(body.then(native, [made], (2, 32), name=f"{body.graph.name} made")))
    chosen = net.tensor((2, 32), name="chosen")
    operands = [positive, y, *(net.constant(weights(32, 16, seed=s)) for s in (1, 2))]
    options = {"then_subgraph_index": numbers[0], "else_subgraph_index": numbers[1]}
    net.op("IF", operands, [chosen], ("IfOptions", options))
    net.outputs = [dense(net, chosen, net.constant(weights(16, 32)), (2, 16), "head")]
    return net.finish()


def two_entries() -> TfliteModel:
    """Two signatures on two subgraphs that share a weight."""
    net, shared = Net(), weights(64, 64)
    places = {}
    for name, part, rows in (("encode", net, 2), ("decode", Body(net, "decode"), 3)):
        source = part.input((rows, 64), name=f"{name}_x")
        out = dense(part, source, part.constant(shared), (rows, 64), f"{name}_y")
        places[name] = (source, out)
        if isinstance(part, Body):
            part.close(out)
        part.outputs = [out]
    net.draft.root.signature_defs = [
        Table(
            "SignatureDef",
            signature_key=name,
            subgraph_index=number,
            inputs=[Table("TensorMap", name="x", tensor_index=source)],
            outputs=[Table("TensorMap", name="y", tensor_index=out)],
        )
        for number, (name, (source, out)) in enumerate(places.items())
    ]
    return net.finish()


HAND_MADE: Mapping[str, Callable[[], TfliteModel]] = {
    "recurrent": recurrent,
    "accumulator": accumulator,
    "chained": chained,
    "branches": branches,
    "two_entries": two_entries,
}


def samples(model: TfliteModel, count: int = 12, *, low: float = -1.0) -> dict[str, np.ndarray]:
    """Data for every entry."""
    found, rng = {}, np.random.default_rng(7)
    for entry in model.root.signature_defs or [None]:
        graph = model.subgraphs[entry.subgraph_index if entry is not None else 0]
        for index in graph.inputs:
            tensor = graph.tensors[index]
            names = {e.tensor_index: e.name for e in (entry.inputs if entry is not None else ())}
            name = names.get(int(index), tensor.name)
            key = f"{entry.signature_key}/{name}" if len(model.root.signature_defs or ()) > 1 else name
            found[key] = rng.uniform(low, 1, (count, *tensor.shape)).astype(np.float32)
    return found


def optimized(model: TfliteModel, recipe: str, data: Any = None, **options: Any) -> Result:
    """The result, seen to be right operator by operator on both paths, inside bodies too."""
    result = optimize(model.to_bytes(), recipe, samples(model) if data is None else data, **options)
    shown = result.report.verification
    assert shown is not None and not shown.skipped and not shown.failed and not shown.nan
    changed = [r for r in result.report.rows if r.mode in (STATIC, DYNAMIC) and r.native not in UNPROBED]
    for path in PATHS:
        assert not shown.wrong(path)
        assert {f.native for f in shown.findings[path]} == {r.native for r in changed}
        assert len(shown.findings[path]) == len(changed)
    return result


@cache
def plain(name: str, recipe: str) -> Result:
    """A hand-made model on samples of its own."""
    return optimized(HAND_MADE[name](), recipe)


def difference(result: Result) -> float:
    assert result.report.verification is not None
    return max(result.report.verification.difference.values())


def relative(a: TfliteModel, b: TfliteModel, xs: np.ndarray) -> float:
    """Relative difference of two models with one input, run by the default kernels."""
    with tempfile.TemporaryDirectory() as folder, Worker() as worker:
        for name, model in (("a", a), ("b", b)):
            model.save(Path(folder) / f"{name}.tflite")
            worker.load(name, Path(folder) / f"{name}.tflite")
        left, right = (np.stack([worker.run(name, [x])[0] for x in xs]) for name in "ab")
    return float(np.linalg.norm(left - right) / np.linalg.norm(left))


def rows(result: Result) -> dict[str, Row]:
    return {row.name: row for row in result.report.rows}


def types(result: Result, number: int, side: str) -> list[str]:
    graph = result.model.subgraphs[number]
    return [type_name(graph.tensors[i]) for i in getattr(graph, side)]


EVERYWHERE = [(name, recipe) for name in HAND_MADE for recipe in ("dynamic-int8", "int8")]
ONCE = [
    ("accumulator", "int8-int16"),
    ("recurrent", "int8-int16"),
    ("branches", "weight-only-int8"),
    ("recurrent", "float16"),
]


@pytest.mark.parametrize(("name", "recipe"), EVERYWHERE + ONCE)
def test_every_recipe_reaches_into_bodies_and_stays_right(name: str, recipe: str):
    result = plain(name, recipe)
    bound, mode = EXPECTED[recipe]
    assert difference(result) < bound
    assert mode in {r.mode for r in result.report.rows} <= {FLOAT, OTHER, mode}
    dense = [r for r in result.report.rows if r.native == "FULLY_CONNECTED"]
    assert dense and all(r.mode == mode and r.weight_bytes for r in dense)
    assert all(r.reason for r in result.report.rows)


def test_a_recurrent_loop_carries_integers():
    result = plain("recurrent", "int8")
    assert types(result, 2, "inputs") == types(result, 2, "outputs") == ["int32", "int8", "int8"]
    assert types(result, 1, "inputs") == ["int32", "int8", "int8"] and types(result, 1, "outputs") == ["bool"]
    natives = [result.model.native(op) for op in result.model.subgraphs[2].operators]
    assert "QUANTIZE" not in natives and "DEQUANTIZE" not in natives  # tanh's own grid serves the state
    outer, cond, body = result.model.subgraphs
    operator = next(op for op in outer.operators if result.model.native(op) == "WHILE")
    for place in (1, 2):
        tensors = [outer.tensors[operator.inputs[place]], outer.tensors[operator.outputs[place]]]
        tensors += [g.tensors[v[place]] for g, v in ((cond, cond.inputs), (body, body.inputs), (body, body.outputs))]
        grids = {(float(t.quantization.scale[0]), int(t.quantization.zero_point[0])) for t in tensors}
        assert len(grids) == 1


def test_what_adds_up_over_a_loop_stays_float_in_8_bits_and_not_in_16():
    result = plain("accumulator", "int8")
    assert types(result, 2, "inputs") == ["int32", "float32", "int8"]
    found = rows(result)
    for name in ("decay", "sum"):
        assert found[name].mode == FLOAT and "adds up over the iterations" in found[name].reason
    assert found["part"].mode == STATIC
    assert "loop:0 stays float: it adds up" in found["loop:counter"].reason
    assert types(plain("accumulator", "int8-int16"), 2, "inputs") == ["int32", "int16", "int16"]


def test_two_loops_one_behind_the_other_have_a_grid_each():
    result = plain("chained", "int8")
    scales = [float(g.tensors[g.inputs[1]].quantization.scale[0]) for g in (result.model.subgraphs[n] for n in (2, 4))]
    assert types(result, 2, "inputs") == types(result, 4, "inputs") == ["int32", "int8"]
    assert scales[0] != scales[1]


def test_an_interior_is_static_beside_a_float_loop():
    result = optimized(recurrent(), "int8", skip=["WHILE"])
    assert types(result, 2, "inputs") == ["int32", "float32", "float32"]
    assert rows(result)["loop:counter"].mode == FLOAT
    assert all(rows(result)[name].mode == STATIC for name in ("input kernel", "recurrent kernel", "state"))
    assert difference(result) < EXPECTED["int8"][0]


def test_a_branch_that_no_sample_takes_stays_float_and_says_so():
    model = branches()
    result = optimized(model, "int8", samples(model, low=0.2))
    found = rows(result)
    assert {found[f"then {what}"].mode for what in ("kernel", "made")} == {STATIC}
    for what in ("kernel", "made"):
        assert found[f"else {what}"].mode == FLOAT and "no sample reaches" in found[f"else {what}"].reason
    assert found["chosen"].mode == FLOAT or "stays float: no sample reaches" in found["chosen"].reason
    assert difference(result) < EXPECTED["int8"][0]


def test_what_decides_a_branch_stays_float():
    found = rows(plain("branches", "int8"))
    for name in ("total", "t5"):
        assert found[name].mode in (FLOAT, OTHER) and "only decides which way" in found[name].reason


def test_dynamic_operators_that_no_sample_reaches_are_verified_on_made_up_values():
    model = branches()
    result = optimized(model, "dynamic-int8", samples(model, low=0.2))
    shown = result.report.verification
    assert shown is not None
    assert shown.notes == ["else: its operators were verified on made-up values, because no sample reaches it"]
    assert shown.notes[0] in result.report.notes


def test_constants_that_a_branch_takes_as_operands_become_its_weights():
    model = branches()
    sunk = sink(model)
    assert [len(g.inputs) for g in model.subgraphs] == [1, 3, 3]
    assert [len(g.inputs) for g in sunk.subgraphs] == [1, 1, 1]
    assert relative(model, sunk, samples(model)["x"]) < 1e-5  # XNNPACK packs what is a weight now
    assert len(sunk.to_bytes()) <= len(model.to_bytes())
    assert sink(sunk) is sunk


def test_subgraphs_share_the_codes_of_shared_weights():
    for recipe in ("dynamic-int8", "int8"):
        result = plain("two_entries", recipe)
        graphs = result.model.subgraphs
        stored = [t.buffer for g in graphs for t in g.tensors if type_name(t) == "int8"]
        assert len({b for b in stored if result.model.root.buffers[b].data is not None}) == 1
        assert result.report.output_bytes < 0.5 * result.report.source_bytes
        shown = result.report.verification
        assert shown is not None and set(shown.difference) == {"encode/y", "decode/y"}


def test_statistics_of_bodies_can_be_saved_and_taken_again(tmp_path: Path):
    model, first = recurrent(), plain("recurrent", "int8")
    assert first.statistics is not None
    first.statistics.save(tmp_path / "ranges.npz")
    again = optimize(model.to_bytes(), "int8", statistics=tmp_path / "ranges.npz", verified=False)
    assert again.model.to_bytes() == first.model.to_bytes()


def test_all_iterations_count():
    """The state's range is that of every step: NumPy runs the loop and finds the same extremes."""
    data, statistics = samples(recurrent()), plain("recurrent", "int8").statistics
    assert statistics is not None
    w, u = weights(24, 16), weights(24, 24)
    seen = []
    for x in data["x"]:
        h = np.zeros((1, 24), np.float32)
        for now in x:
            h = np.tanh(now @ w.T + h @ u.T)
            seen.append(h)
    state = next(s for t, s in statistics.tensors.items() if statistics.names[t] == "state")
    assert state.count == np.size(seen)
    assert np.allclose([state.low, state.high], [np.min(seen), np.max(seen)], atol=1e-5)


# -- files that lie ------------------------------------------------------------------------------------------------


def drop_body_output(model: TfliteModel) -> None:
    model.root.subgraphs[2].outputs = model.root.subgraphs[2].outputs[:-1]


def drop_condition_input(model: TfliteModel) -> None:
    model.root.subgraphs[1].inputs = model.root.subgraphs[1].inputs[:-1]


def drop_operand(model: TfliteModel) -> None:
    operator = next(op for op in model.root.subgraphs[0].operators if model.native(op) in ("WHILE", "IF"))
    operator.inputs = operator.inputs[:-1]


def leave_out_operand(model: TfliteModel) -> None:
    operator = next(op for op in model.root.subgraphs[0].operators if model.native(op) in ("WHILE", "IF"))
    operator.inputs = np.array([*operator.inputs[:-1], -1], np.int32)


def drop_branch_output(model: TfliteModel) -> None:
    model.root.subgraphs[2].outputs = np.zeros(0, np.int32)


def answer_a_number(model: TfliteModel) -> None:
    model.root.subgraphs[1].outputs = model.root.subgraphs[1].inputs[:1]


@pytest.mark.parametrize(
    ("make", "spoil", "said"),
    [
        (recurrent, drop_body_output, "has 3 results, its subgraphs give [1, 2]"),
        (recurrent, drop_condition_input, "has 3 operands, its subgraphs take [2, 3]"),
        (recurrent, drop_operand, "has 2 operands"),
        (recurrent, leave_out_operand, "leaves out an operand"),
        (recurrent, answer_a_number, "has a condition that does not give one boolean"),
        (branches, drop_operand, "has 2 operands, its subgraphs take [3, 3]"),
        (branches, drop_branch_output, "has 1 results, its subgraphs give [1, 0]"),
    ],
)
def test_loops_and_branches_that_do_not_fit_their_bodies_are_refused(make: Any, spoil: Any, said: str):
    model = make()
    spoil(model)
    with pytest.raises(InputError) as error:
        TfliteModel.parse(memoryview(model.to_bytes()), "bad.tflite")
    assert said in str(error.value)


# -- models of TensorFlow's converter ------------------------------------------------------------------------------

BUILD = """
import os, sys
from pathlib import Path
os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
import keras, numpy as np, tensorflow as tf
from paring.formats.convert_child import convert
L, here, rng = keras.layers, Path(sys.argv[1]), np.random.default_rng(0)
keras.utils.set_random_seed(0)
for name, layer in {
    "lstm": L.LSTM(16, return_sequences=True),
    "gru": L.GRU(16),
    "rnn": L.SimpleRNN(16),
    "bidirectional": L.Bidirectional(L.LSTM(16)),
}.items():
    keras.Sequential([keras.Input((6, 16)), layer, L.Dense(32)]).save(here / f"{name}.keras")
    convert(here / f"{name}.keras", here / f"{name}.tflite")

class Flow(tf.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = (tf.constant(rng.normal(0, .25, (32, 32)).astype("f4")) for _ in range(2))
        self.state = tf.Variable(tf.zeros((2, 32)))
    def cond(self, x):
        y = tf.matmul(x, self.w)
        up, down = (lambda: tf.nn.relu(tf.matmul(y, self.w))), (lambda: tf.tanh(tf.matmul(y, self.v)))
        return tf.cond(tf.reduce_sum(x) > 0, up, down)
    def loop(self, x):
        return tf.while_loop(lambda i, y: i < 4, lambda i, y: (i + 1, tf.nn.relu(tf.matmul(y, self.w))), [0, x])[1]
    def nested(self, x):
        def body(i, y):
            up, down = (lambda: tf.matmul(y, self.w)), (lambda: tf.tanh(tf.matmul(y, self.v)))
            return i + 1, tf.cond(i % 2 > 0, up, down)
        return tf.while_loop(lambda i, y: i < 4, body, [0, x])[1]
    def variable(self, x):
        self.state.assign(tf.tanh(self.state + tf.matmul(x, self.w)))
        return tf.matmul(self.state.read_value(), self.v)

flow = Flow()
for name in ("cond", "loop", "nested", "variable"):
    function = tf.function(getattr(flow, name), input_signature=[tf.TensorSpec((2, 32), tf.float32, "x")])
    tf.saved_model.save(flow, str(here / name), signatures={"serving_default": function})
    convert(here / name, here / f"{name}.tflite")
"""
TRACED = ("lstm", "gru", "rnn", "bidirectional", "cond", "loop", "nested", "variable")


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("tensorflow", "keras"):
        if importlib.util.find_spec(module) is None:
            needs("tensorflow", f"{module} is not installed")
    folder = tmp_path_factory.mktemp("traced")
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize(
    ("name", "recipe"),
    [*((name, "int8") for name in TRACED), ("lstm", "dynamic-int8"), ("nested", "dynamic-int8"), ("gru", "int8-int16")],
)
def test_converted_models_are_optimized_inside_their_bodies(traced: Path, name: str, recipe: str):
    model = TfliteModel.open(traced / f"{name}.tflite")
    result = optimized(model, recipe)
    assert difference(result) < EXPECTED[recipe][0]
    weighted = [r for r in result.report.rows if r.native in ("FULLY_CONNECTED", "BATCH_MATMUL")]
    assert weighted and all(r.mode == EXPECTED[recipe][1] for r in weighted)
    assert name == "variable" or any(r.scope and r.mode in (STATIC, DYNAMIC) for r in result.report.rows)
    for r in result.report.rows:
        if r.native in ("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE"):
            assert r.mode == FLOAT and "stays as it is" in r.reason
