"""Matching layers: by structure, whatever a tool renamed, fused, dropped or reordered; models that do not correspond."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from graphs import CONV, DENSE, MOVE, PAIR, SAME, SOFTMAX, Sketch, grid, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from paring.errors import InputError
from paring.graph import Graph, Op, Tensor, TensorId
from paring.measure.match import Matching, match

WIDTH = 16


class Drawing(Sketch):
    """A sketch whose weights are random, the same for the same label, and perhaps rounded."""

    def __init__(self, steps: float = 0.0) -> None:
        super().__init__()
        self.steps = steps

    def values(self, label: str, *shape: int) -> np.ndarray:
        rng = np.random.default_rng(list(label.encode()))
        found = rng.normal(size=shape).astype(np.float32)
        return np.rint(found / self.steps) * np.float32(self.steps) if self.steps else found

    def linear(self, label: str, source: TensorId, native: str = "FULLY_CONNECTED", name: str = "") -> TensorId:
        conv = native == "CONV_2D"
        shape = (WIDTH, 1, 1, WIDTH) if conv else (WIDTH, WIDTH)
        kernel = self.tensor("kernel", shape, weight=weight(self.values(label, *shape)))
        inputs = [source, kernel, self.constant(WIDTH)]
        demands, kind = (CONV, "conv2d") if conv else (DENSE, "dense")
        return self.op(name or label, native, inputs, demands, kind=kind, shape=(1, WIDTH))

    def unary(self, native: str, source: TensorId, name: str = "", **more: object) -> TensorId:
        return self.op(name or native.lower(), native, [source], SAME, shape=(1, WIDTH), **more)  # type: ignore[arg-type]

    def add(self, a: TensorId, b: TensorId, name: str = "add") -> TensorId:
        return self.op(name, "ADD", [a, b], PAIR, shape=(1, WIDTH))


def residual(steps: float = 0.0) -> Graph:
    """x -> a, relu -> three branches (b1, c1), (b2, c2), (b3, c3) of the same shapes -> added up -> head -> softmax."""
    g = Drawing(steps)
    x = g.tensor("x", (1, WIDTH))
    stem = g.unary("RELU", g.linear("stem", x))
    ends = [g.linear(f"c{n}", g.unary("TANH", g.linear(f"b{n}", stem), f"tanh{n}")) for n in (1, 2, 3)]
    total = g.add(g.add(ends[0], ends[1], "add1"), ends[2], "add2")
    y = g.op("probabilities", "SOFTMAX", [g.linear("head", total)], SOFTMAX, shape=(1, WIDTH))
    return g.finish([x], [y])


def named(found: Matching) -> dict[str, str]:
    return {pair.source.name: pair.optimized.name for pair in found.pairs}


def same(found: Matching, graph: Graph) -> None:
    """Every layer is matched with the one of its own name."""
    assert named(found) == {name: name for name in named(found)}
    assert not found.source_only and not found.optimized_only
    assert len(found.pairs) == len([op for op in graph.ops if op.kind not in ("quantize", "dequantize", "relu")])


# -- what tools do to graphs -----------------------------------------------------------------------------------------


def renamed(graph: Graph) -> tuple[Graph, dict[str, str]]:
    """Other names for everything -> the graph, and the old name by new name."""
    old = {f"n{number}": op.name for number, op in enumerate(graph.ops)}
    ops = tuple(replace(op, name=f"n{number}") for number, op in enumerate(graph.ops))
    tensors = {t: replace(tensor, name=f"t{t[1]}") for t, tensor in graph.tensors.items()}
    return replace(graph, ops=ops, tensors=tensors), old


def reordered(graph: Graph, seed: int) -> Graph:
    """Another order of the operators in which each still comes behind what it reads."""
    rng, left, done = np.random.default_rng(seed), list(graph.ops), set(graph.inputs)
    made = {t for op in graph.ops for t in op.outputs}
    order: list[Op] = []
    while left:
        able = [op for op in left if all(t is None or t in done or t not in made for t in op.inputs)]
        op = able[rng.integers(len(able))]
        left.remove(op)
        done |= set(op.outputs)
        order.append(replace(op, id=(0, len(order))))
    return replace(graph, ops=tuple(order))


def fused(graph: Graph) -> Graph:
    """Without the standalone RELUs: the operator before gives their result."""
    makers = graph.producers()
    gone = {op.inputs[0]: op.outputs[0] for op in graph.ops if op.kind == "relu" and op.inputs[0] in makers}
    ops = [
        replace(op, outputs=tuple(gone.get(t, t) for t in op.outputs), params={"fused_activation_function": 1})
        if op.outputs[0] in gone
        else op
        for op in graph.ops
        if not (op.kind == "relu" and op.inputs[0] in gone)
    ]
    return replace(graph, ops=tuple(ops))


def quantized(graph: Graph) -> Graph:
    """Integers inside: a QUANTIZE behind every input, a DEQUANTIZE before every output, one requantization between."""
    tensors: dict[TensorId, Tensor] = dict(graph.tensors)
    made = {t for op in graph.ops for t in op.outputs}
    for t in made:
        tensors[t] = replace(tensors[t], dtype="int8", quantization=grid(0.1))
    place: dict[TensorId, TensorId] = {}
    extra: list[Op] = []

    def convert(native: str, source: TensorId, dtype: str) -> TensorId:
        key = (0, len(tensors))
        tensors[key] = replace(
            tensors[source], id=key, dtype=dtype, quantization=grid(0.1) if dtype == "int8" else None
        )
        extra.append(Op((0, 0), f"{native}{key[1]}", native.lower(), native, (source,), (key,), demands=MOVE))
        return key

    for t in graph.inputs:
        place[t] = convert("QUANTIZE", t, "int8")
    front, extra = extra, []
    again = graph.ops[1].outputs[0]
    other = convert("QUANTIZE", again, "int8")
    middle, extra = extra, []
    outputs = tuple(convert("DEQUANTIZE", t, "float32") for t in graph.outputs)
    ops = [replace(op, inputs=tuple(place.get(t, t) if t else t for t in op.inputs)) for op in graph.ops]
    ops[-1] = replace(ops[-1], inputs=tuple(other if t == again else t for t in ops[-1].inputs))
    ops = [*front, *ops[:2], *middle, *ops[2:], *extra]
    return replace(
        graph, ops=tuple(replace(op, id=(0, n)) for n, op in enumerate(ops)), tensors=tensors, outputs=outputs
    )


# -- the same model --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.booleans(), st.booleans())
def test_no_name_no_order_and_no_fusion_changes_the_matching(seed: int, fuse: bool, integers: bool):
    graph = residual()
    other = residual(steps=0.5)
    other = quantized(other) if integers else other
    other = fused(other) if fuse else other
    other, old = renamed(reordered(other, seed))
    found = match(graph, other)
    back = {source: old[optimized] for source, optimized in named(found).items()}
    assert back == {name: name for name in back}
    assert len(back) == 14 and not found.source_only and not found.optimized_only
    assert {pair.how for pair in found.pairs} == {"structure"}


def test_a_model_matches_itself_and_both_directions_agree():
    graph, other = residual(), reordered(fused(residual(0.3)), 3)
    same(match(graph, graph), graph)
    there, back = named(match(graph, other)), named(match(other, graph))
    assert there == {b: a for a, b in back.items()}


def test_an_activation_and_a_constant_bias_belong_to_their_layer():
    def model(apart: bool) -> Graph:
        g = Drawing()
        x = g.tensor("x", (1, WIDTH))
        h = g.linear("first", x)
        if apart:
            h = g.op(
                "bias", "ADD", [h, g.tensor("b", (WIDTH,), weight=weight(g.values("b", WIDTH)))], PAIR, shape=(1, 16)
            )
            h = g.unary("RELU6", h)
        return g.finish([x], [g.linear("second", h)])

    found = match(model(True), model(False))
    assert named(found) == {"first": "first", "second": "second"}
    assert [op.native for op in found.pairs[0].source.ops] == ["FULLY_CONNECTED", "ADD", "RELU6"]
    assert not found.source_only


def test_what_somebody_else_reads_stays_a_layer_of_its_own():
    g = Drawing()
    x = g.tensor("x", (1, WIDTH))
    h = g.linear("first", x)
    relu = g.unary("RELU", h, "relu")
    graph = g.finish([x], [g.add(h, relu)])
    assert named(match(graph, graph)) == {"first": "first", "relu": "relu", "add": "add"}


def test_a_dropped_reshape_and_a_product_written_differently():
    g = Drawing()
    x = g.tensor("x", (1, WIDTH))
    flat = g.op("flat", "RESHAPE", [g.linear("conv", x, "CONV_2D")], MOVE, kind="reshape", shape=(1, 1, WIDTH))
    source = g.finish([x], [g.linear("last", flat)])
    h = Drawing()
    x = h.tensor("x", (1, WIDTH))
    first = h.linear("conv", x, name="n0")
    transposed = h.tensor("k", (WIDTH, WIDTH), weight=weight(h.values("last", WIDTH, WIDTH).T.copy()))
    use = replace(DENSE, weights=(replace(DENSE.weights[0], axis=None, reduced=(-2,)),), bias=None)
    y = h.op("n1", "BATCH_MATMUL", [first, transposed], use, kind="matmul", shape=(1, WIDTH))
    found = match(source, h.finish([x], [y]))
    assert named(found) == {"conv": "n0", "last": "n1"}
    assert found.pairs[1].likeness == pytest.approx(1.0, abs=1e-5)
    assert [unit.name for unit in found.source_only] == ["flat"]


def test_a_layer_that_was_taken_out_shifts_nothing():
    def chain(*labels: str) -> Graph:
        g = Drawing()
        x = h = g.tensor("x", (1, WIDTH))
        for label in labels:
            h = g.linear(label, h)
        return g.finish([x], [h])

    found = match(chain("a", "b", "c", "d", "e"), renamed(chain("a", "b", "d", "e"))[0])
    assert named(found) == {"a": "n0", "b": "n1", "d": "n2", "e": "n3"}
    assert [unit.name for unit in found.source_only] == ["c"]


def test_another_operator_in_the_same_place_is_matched_by_its_neighbours():
    def model(native: str) -> Graph:
        g = Drawing()
        x = g.tensor("x", (1, WIDTH))
        return g.finish([x], [g.linear("b", g.unary(native, g.linear("a", x), native))])

    found = match(model("HARD_SWISH"), model("TANH"))
    assert named(found) == {"a": "a", "HARD_SWISH": "TANH", "b": "b"}
    assert [pair.how for pair in found.pairs if pair.source.name == "HARD_SWISH"] == ["position"]


def test_without_weights_what_comes_before_and_behind_tells_branches_apart():
    g = Drawing()
    x = g.tensor("x", (1, WIDTH))
    ends = []
    for last in ("EXP", "NEG", "ABS"):
        h = g.unary("TANH", g.unary("TANH", x, f"first {last}"), f"second {last}")
        ends.append(g.unary(last, h, last))
    graph = g.finish([x], [g.add(g.add(ends[0], ends[1], "add1"), ends[2], "add2")])
    for seed in range(6):
        other, old = renamed(reordered(graph, seed))
        assert {a: old[b] for a, b in named(match(graph, other)).items()} == {op.name: op.name for op in graph.ops}


def test_no_pair_turns_the_order_of_computation_round():
    def chain(*labels: str) -> Graph:
        g = Drawing()
        x = h = g.tensor("x", (1, WIDTH))
        for label in labels:
            h = g.linear(label, h)
        return g.finish([x], [h])

    found = named(match(chain("a", "b", "c", "d"), chain("new", "a", "c", "b", "d", "newer")))
    assert {"a": "a", "d": "d"}.items() <= found.items()
    order = list(chain("new", "a", "c", "b", "d", "newer").producers().values())
    places = [[op.name for op in order].index(name) for name in found.values()]
    assert places == sorted(places) and len({"b", "c"} & found.keys()) == 1


def test_inside_of_loops_layers_are_matched_where_the_loops_are():
    def model(first: int) -> Graph:
        g = Drawing()
        x = g.tensor("x", (1, WIDTH))
        y = g.op("loop", "WHILE", [x], None, kind="while", shape=(1, WIDTH))
        params = {"cond_subgraph_index": first, "body_subgraph_index": 3 - first}
        g.ops[-1] = replace(g.ops[-1], params=params)
        for number, label in ((first, "condition"), (3 - first, "body")):
            start = g.tensor("h", (1, WIDTH), scope=number)
            kernel = g.tensor("k", (WIDTH, WIDTH), weight=weight(g.values("w", WIDTH, WIDTH)), scope=number)
            g.op(label, "FULLY_CONNECTED", [start, kernel], DENSE, kind="dense", shape=(1, WIDTH), scope=number)
        return g.finish([x], [y])

    found = match(model(1), model(2))
    assert named(found) == {"loop": "loop", "condition": "condition", "body": "body"}
    assert set(found.sides) == {(0, 0), (1, 2), (2, 1)}


# -- models that do not correspond -----------------------------------------------------------------------------------


def small(change: Callable[[Drawing, TensorId], TensorId] | None = None, **more: object) -> Graph:
    g = Drawing()
    x = g.tensor("x", more.get("shape", (1, WIDTH)), str(more.get("dtype", "float32")))  # type: ignore[arg-type]
    h = g.linear(str(more.get("label", "a")), x)
    return g.finish([x], [change(g, h) if change else h])


SPOILED: Mapping[str, tuple[Graph, str]] = {
    "input shape": (small(shape=(1, 8)), r"input x: expected \[1, 16\], got \[1, 8\]"),
    "input type": (small(dtype="int32"), "input x: expected float32, got int32"),
    "outputs": (
        replace(small(), outputs=(*small().inputs, *small().outputs)),
        r"their outputs: expected 1 \(a\), got 2 \(",
    ),
    "weights": (
        small(label="b"),
        "layer a: expected a layer with weights like its own, got b, whose weights correlate by",
    ),
    "no layer": (
        small(lambda g, h: g.op("k", "TANH", [g.ops.pop().inputs[0]], SAME, shape=(1, WIDTH))),
        "layer a: expected a counterpart, got no layer in common",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_models_that_do_not_correspond_are_refused_with_what_differs(name: str):
    other, said = SPOILED[name]
    with pytest.raises(InputError, match=said) as error:
        match(small(), other)
    assert str(error.value).startswith("the models do not correspond for ")


def test_an_integer_input_corresponds_to_a_float_one():
    g = Drawing()
    x = g.tensor("x", (1, WIDTH), "int8", quantization=grid(0.1))
    other = g.finish([x], [g.linear("a", x)])
    assert named(match(small(), other)) == {"a": "a"}
