"""`plan` decides *what*, `Propagation` which tensors share a grid: on hand-made graphs, with no format behind them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from graphs import CONV, DENSE, DEPTHWISE, JOIN, MOVE, PAIR, SAME, SOFTMAX, Sketch, grid, with_grids

from paring.calibration import Statistics, TensorStatistics
from paring.compress.quantize import Quantize
from paring.errors import InputError
from paring.graph import Demands, Graph, Op
from paring.grids import Propagation, activation_grid, symmetric
from paring.plan import ground, plan, refine
from paring.recipe import Recipe, Rule

INT8 = Quantize(activations="int8")
INT4 = Quantize(weights="int4", activations="int8")
DYNAMIC = Quantize()
BLOCKS = Quantize(weights="int4", granularity="block", block_size=32)


def modes(graph: Graph, *rules: Rule, **more) -> dict[str, str]:
    return {d.op.name: d.mode for d in plan(graph, Recipe(rules, **more)).decisions}


def decide(graph: Graph, settings: Quantize, name: str):
    """The decision for the operator `name` where one rule asks for `settings` everywhere."""
    return next(d for d in plan(graph, Recipe((Rule((settings,)),))).decisions if d.op.name == name)


@pytest.fixture
def network() -> Graph:
    """conv (2304) -> pool -> depthwise (144) -> flatten -> body (4096) -> head (640) -> softmax."""
    net = Sketch()
    x = net.tensor("x", (1, 8, 8, 16))
    y = net.conv("trunk/conv", x)
    y = net.op("trunk/pool", "MAX_POOL_2D", [y], SAME, kind="max_pool2d")
    y = net.op(
        "trunk/depthwise",
        "DEPTHWISE_CONV_2D",
        [y, net.constant(1, 3, 3, 16), net.constant(16)],
        DEPTHWISE,
        kind="depthwise_conv2d",
    )
    y = net.op("flatten", "RESHAPE", [y], MOVE, kind="reshape")
    y = net.dense("body", y)
    y = net.dense("head", y, (10, 64))
    y = net.op("softmax", "SOFTMAX", [y], SOFTMAX, kind="softmax")
    return net.finish([x], [y])


# -- rules -----------------------------------------------------------------------------------------------------------


def test_the_last_rule_that_matches_wins(network):
    got = modes(network, Rule(()), Rule((DYNAMIC,), kind="dense"), Rule((), name="head"))
    assert got["trunk/conv"] == got["head"] == "float"
    assert got["body"] == "dynamic"


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ({"name": "trunk/"}, "trunk/conv trunk/depthwise"),
        ({"name": "^.ody$"}, "body"),
        ({"kind": "dense"}, "body head"),
        ({"kind": "FULLY_CONNECTED"}, "body head"),
        ({"kind": "conv2d|dense"}, "trunk/conv body head"),
        ({"kind": "CONV_2D|dense"}, "trunk/conv body head"),
        ({"min_size": 2304}, "trunk/conv body"),
        ({"max_size": 2303, "kind": "dense|depthwise_conv2d"}, "trunk/depthwise head"),
        ({"min_size": 640, "max_size": 640}, "head"),
        ({"position": "first"}, "trunk/conv"),
        ({"position": "last"}, "head"),
        ({"kind": "dense", "name": "h"}, "head"),
        ({"kind": "*"}, "trunk/conv trunk/depthwise body head"),
    ],
)
def test_all_selectors_of_a_rule_must_hold(network, selector, names):
    chosen = Recipe((Rule((Quantize(weights="float16", activations="float"),), **selector),)).match(network)
    weighted = {op.id for op in network.ops if op.demands and op.demands.weights}
    assert {op.name for op in network.ops if op.id in weighted and chosen[op.id][0] is not None} == set(names.split())


@pytest.mark.parametrize("pattern", ["body", "^bo", "dense", "FULLY_CONNECTED", "conv2d|dense"])
def test_skip_wins_over_every_rule(network, pattern):
    made = plan(network, Recipe((Rule((DYNAMIC,)),)).restricted(skip=[pattern])).by_op()
    body = next(op.id for op in network.ops if op.name == "body")
    assert (made[body].mode, made[body].reason) == ("float", "skipped by request")


@pytest.mark.parametrize(
    ("pattern", "names"), [("body", "body"), ("dense", "body head"), ("CONV_2D|dense", "trunk/conv body head")]
)
def test_only_leaves_all_others_float(network, pattern, names):
    got = plan(network, Recipe((Rule((DYNAMIC,)),)).restricted(only=[pattern])).decisions
    assert {d.op.name for d in got if d.mode != "float"} == set(names.split())
    assert {d.reason for d in got if d.op.name not in names.split()} == {"not among the requested operators"}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule((), name="hed"), ["rule 1 {name: hed}", "Nearest: head", "optional: true"]),
        (Rule((), kind="conv2"), ["rule 1 {kind: conv2}", "Nearest: conv2d"]),
        (Rule((), kind="lstm"), ["rule 1 {kind: lstm}"]),
        (Rule((), min_size=10**6), ["rule 1 {min_size: 1000000}"]),
        (Rule((), kind="dense", max_size=3), ["rule 1 {kind: dense, max_size: 3}"]),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_unless_optional(network, rule, words):
    with pytest.raises(InputError) as error:
        plan(network, Recipe((rule,)))
    assert all(word in str(error.value) for word in words), str(error.value)
    plan(network, Recipe((replace(rule, optional=True),)))


@pytest.mark.parametrize("option", ["skip", "only"])
@pytest.mark.parametrize(("pattern", "nearest"), [("bodi", "body"), ("densee", "dense"), ("softmaxx", "softmax")])
def test_a_skip_or_only_that_matches_nothing_names_the_nearest(network, option, pattern, nearest):
    with pytest.raises(InputError, match=rf"--{option} {pattern} matches no operator. Nearest: .*{nearest}") as error:
        plan(network, Recipe((Rule(()),)).restricted(**{option: [pattern]}))
    assert "optional" not in str(error.value)


def test_an_operator_that_no_rule_matches_stays_float_and_says_so(network):
    made = {d.op.name: d for d in plan(network, Recipe((Rule((DYNAMIC,), name="body"),))).decisions}
    assert (made["head"].mode, made["head"].reason) == ("float", "no rule matches")
    assert (made["body"].mode, made["body"].reason) == ("dynamic", "rule 1")


def test_planning_never_reads_a_weight(network):
    def refuse(start, stop):
        raise AssertionError("a weight was read")

    closed = {
        k: t if t.weight is None else replace(t, weight=replace(t.weight, reader=refuse))
        for k, t in network.tensors.items()
    }
    for settings in (INT8, INT4, DYNAMIC, BLOCKS):
        plan(replace(network, tensors=closed), Recipe((Rule((settings,)),)))


# -- fallbacks, each with its reason ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name", "mode", "form", "weights", "reason"),
    [
        (INT4, "body", "static", "int8-int4", "int4", "rule 1"),
        (INT4, "trunk/depthwise", "static", "int8", "int8", "no int8 kernel takes int4 weights here, int8 instead"),
        (replace(INT4, activations="int16"), "trunk/conv", "static", "int16", "int8", "no int16 kernel takes int4"),
        (Quantize(weights="int4"), "trunk/conv", "dynamic", "dynamic-int4", "int4", "rule 1"),
        (BLOCKS, "body", "dynamic", "dynamic-int4-block", "int4", "rule 1"),
        (BLOCKS, "trunk/conv", "dynamic", "dynamic-int4", "int4", "blocks of 32 do not fit CONV_2D 16x3x3x16"),
        (replace(BLOCKS, block_size=128), "body", "dynamic", "dynamic-int4", "int4", "fit FULLY_CONNECTED 64x64"),
        (replace(BLOCKS, activations="float"), "body", "weight-only", "float", "int4", "one scale per channel"),
        (replace(BLOCKS, activations="int8"), "body", "static", "int8-int4", "int4", "blocks need dynamic activations"),
        (DYNAMIC, "trunk/depthwise", "float", "float", None, "too small to gain (under 256 elements)"),
        (DYNAMIC, "softmax", "float", "float", None, "has no weights"),
        (Quantize(weights="float16", activations="int8"), "body", "float", "float", None, "need integer weights"),
        (Quantize(weights="float", activations="float"), "body", "float", "float", None, "rule 1"),
        (Quantize(weights="float", activations="int8"), "softmax", "static", "int8", "float", "rule 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_falls_back_with_the_reason(network, settings, name, mode, form, weights, reason):
    got = decide(network, settings, name)
    assert (got.mode, got.form) == (mode, form)
    assert (got.settings.weights if got.settings else None) == weights
    assert reason in got.reason
    if got.form != "dynamic-int4-block":
        assert got.settings is None or got.settings.granularity != "block"


def one(demands: Demands | None, inputs: list, native: str = "ANY", net: Sketch | None = None, **more) -> Op:
    net = net or Sketch()
    net.op("it", native, inputs, demands, **more)
    return net.finish()


def depthwise_of(size: int) -> Graph:
    net = Sketch()
    return one(DEPTHWISE, [net.tensor(), net.constant(1, 4, 4, size), None], "DEPTHWISE_CONV_2D", net)


def test_without_a_dynamic_kernel_weights_are_converted_back_on_load():
    got = decide(depthwise_of(16), DYNAMIC, "it")
    assert (got.mode, got.form) == ("weight-only", "float")
    assert "no fast kernel takes int8 weights" in got.reason


def test_small_weights_still_become_integer_where_activations_are():
    assert decide(depthwise_of(1), INT8, "it").mode == "static"
    assert decide(depthwise_of(1), DYNAMIC, "it").mode == "float"


def test_a_dynamic_operator_without_int4_kernel_takes_int8():
    net = Sketch()
    demands = replace(DENSE, versions={"float": 1, "dynamic-int8": 1})
    got = decide(one(demands, [net.tensor(), net.constant(64, 64)], net=net), Quantize(weights="int4"), "it")
    assert (got.form, got.settings.weights) == ("dynamic-int8", "int8")
    assert "no kernel takes int4 weights here" in got.reason


def built(kind: str) -> Graph:
    net = Sketch()
    match kind:
        case "int32":
            return one(PAIR, [net.tensor(dtype="int32"), net.tensor(dtype="int32")], "ADD", net, dtype="int32")
        case "no reals":
            return one(
                Demands(versions={"float": 1, "int8": 1}), [net.tensor(dtype="int32")], "SHAPE", net, dtype="int32"
            )
        case "no row":
            return one(None, [net.tensor()], "SIN", net)
        case "no int8 kernel":
            return one(replace(SAME, versions={"float": 1}), [net.tensor()], "REVERSE_SEQUENCE", net)
        case "run time":
            return one(DENSE, [net.tensor(), net.tensor("w", (64, 64)), None], "FULLY_CONNECTED", net)
        case "sparse":
            w = net.op("w", "DENSIFY", [net.constant(64, 64, stored="sparse")], None)
            return one(DENSE, [net.tensor(), w, None], "FULLY_CONNECTED", net)
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("no row", INT8, "no quantized kernel known for SIN"),
        ("no row", DYNAMIC, "no quantized kernel known for SIN"),
        ("no int8 kernel", INT8, "no int8 kernel for REVERSE_SEQUENCE"),
        ("run time", INT8, "computed at run time"),
        ("run time", DYNAMIC, "computed at run time"),
        ("sparse", INT8, "--densify"),
        ("sparse", DYNAMIC, "--densify"),
    ],
)
def test_what_no_kernel_serves_stays_float_with_the_reason(kind, settings, reason):
    got = decide(built(kind), settings, "it")
    assert got.mode == "float"
    assert reason in got.reason


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("int32", INT8, "works on int32"),
        ("int32", DYNAMIC, "works on int32"),
        ("no reals", INT8, "works on no real numbers"),
    ],
)
def test_what_carries_no_real_numbers_has_nothing_to_quantize(kind, settings, reason):
    got = decide(built(kind), settings, "it")
    assert (got.mode, got.reason) == ("other", reason)


@pytest.mark.parametrize("settings", [INT8, DYNAMIC, None])
def test_what_is_quantized_already_is_kept(settings):
    net = Sketch()
    x = net.tensor(dtype="int8", quantization=grid(0.1))
    graph = one(PAIR, [x, x], "ADD", net, dtype="int8")
    got = plan(graph, Recipe((Rule((settings,) if settings else ()),))).decisions[0]
    assert (got.mode, got.reason) == ("kept", "already quantized in the source model")


def test_integer_weights_are_kept_by_dynamic_and_go_on_as_they_are_into_static():
    net = Sketch()
    net.dense("it", net.tensor(), stored="int8")
    graph = net.finish()
    assert decide(graph, DYNAMIC, "it").mode == "kept"
    assert decide(graph, INT8, "it").mode == "static"
    got = decide(graph, INT4, "it")
    assert (got.form, got.settings.weights) == ("int8", "int8")


def test_an_operator_that_only_unpacks_a_weight_is_part_of_it():
    net = Sketch()
    w = net.op("w", "DEQUANTIZE", [net.constant(64, 64, stored="float16")], None, constant=True)
    net.tensors[w] = replace(net.tensors[w], weight=net.tensors[next(iter(net.tensors))].weight)
    net.op("it", "FULLY_CONNECTED", [net.tensor(), w, None], DENSE)
    assert modes(net.finish(), Rule((DYNAMIC,))) == {"w": "constant", "it": "dynamic"}


# -- islands ---------------------------------------------------------------------------------------------------------


def test_moving_operators_are_integer_only_beside_integer_computing():
    net = Sketch()
    x = net.tensor()
    y = net.op("near", "RESHAPE", [net.dense("dense", x)], MOVE)
    z = net.op("unknown", "SIN", [y], None)
    z = net.op("far", "RESHAPE", [z], MOVE)
    net.op("further", "TRANSPOSE", [z], MOVE)
    got = {d.op.name: d for d in plan(net.finish(), Recipe((Rule((INT8,)),))).decisions}
    assert {n: d.mode for n, d in got.items()} == {
        "dense": "static", "near": "static", "unknown": "float", "far": "float", "further": "float",
    }  # fmt: skip
    assert got["further"].reason == "only moves values between float operators"


def test_a_chain_of_moves_is_reached_through_each_other():
    net = Sketch()
    y = net.op("a", "RESHAPE", [net.tensor()], MOVE)
    y = net.op("b", "TRANSPOSE", [y], MOVE)
    net.dense("dense", y)
    assert set(modes(net.finish(), Rule((INT8,))).values()) == {"static"}


def test_ground_leaves_the_named_float_and_the_moves_that_hung_on_them():
    net = Sketch()
    y = net.op("add", "ADD", [net.tensor(), net.tensor()], PAIR)
    y = net.op("reshape", "RESHAPE", [y], MOVE)
    net.op("sin", "SIN", [y], None)
    made = plan(net.finish(), Recipe((Rule((INT8,)),)))
    assert [d.mode for d in made.decisions] == ["static", "static", "float"]
    grounded = ground(made, {(0, 0): "out of reach"})
    assert [(d.mode, d.reason) for d in grounded.decisions[:2]] == [
        ("float", "out of reach"), ("float", "only moves values between float operators"),
    ]  # fmt: skip


def branch(computing: bool) -> Graph:
    """An IF whose body (subgraph 1) computes, or only reshapes."""
    net = Sketch()
    y = net.dense("outside", net.tensor("x"))
    entered = net.tensor("entered", scope=1)
    left = net.dense("inside", entered, scope=1) if computing else net.op("inside", "RESHAPE", [entered], MOVE, scope=1)
    outer = (0, len(net.tensors))
    control = Demands(
        data=(1,), results=(0,), versions=MOVE.versions, ties=((y, entered), (outer, left)), computes=False
    )
    net.op("if", "IF", [net.tensor("flag", (1,), "bool"), y], control)
    made = net.ops[-1].outputs[0]
    net.ops[-1] = replace(net.ops[-1], demands=replace(control, ties=((y, entered), (made, left))))
    return net.finish()


def test_a_branch_is_integer_only_where_something_inside_computes():
    assert modes(branch(True), Rule((INT8,)))["if"] == "static"
    assert modes(branch(False), Rule((INT8,)))["if"] == "float"


# -- second thoughts -------------------------------------------------------------------------------------------------


def seen(*channels: float, high: float) -> TensorStatistics:
    squares = np.square(channels) * 10
    return TensorStatistics(0.0, high, 10 * len(channels), None, np.array(channels) * 10.0, squares)


@pytest.mark.parametrize(("high", "mode"), [(2.0, "dynamic"), (500.0, "weight-only")])
def test_refine_keeps_an_input_float_whose_range_drowns_most_channels(network, high, mode):
    made = plan(network, Recipe((Rule((BLOCKS,)),)))
    body = next(op for op in network.ops if op.name == "body")
    statistics = Statistics({body.inputs[0]: seen(1.0, 1.0, 1.0, high, high=high)}, {})
    got = refine(made, statistics).by_op()[body.id]
    assert got.mode == mode
    assert ("drowns most channels" in got.reason) == (mode == "weight-only")
    assert got.settings.granularity == ("block" if mode == "dynamic" else "channel")
    assert got.settings.activations == ("dynamic" if mode == "dynamic" else "float")


# -- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "dtype", "scale", "zero"),
    [
        (0.0, 2.55, "int8", 0.01, -128),
        (1.0, 2.55, "int8", 0.01, -128),
        (-2.55, 0.0, "int8", 0.01, 127),
        (-2.55, -1.0, "int8", 0.01, 127),
        (-1.0, 1.0, "int8", 2 / 255, -1),
        (-1.0, 1.55, "int8", 0.01, -28),
        (0.0, 2.55, "uint8", 0.01, 0),
        (-1.0, 1.55, "uint8", 0.01, 100),
        (0.0, 0.0, "int8", 2e-6 / 255, 0),
        (0.0, 0.0, "int16", 1e-6 / 32767, 0),
        (-1.0, 3.2767, "int16", 1e-4, 0),
        (-3.2767, 1.0, "int16", 1e-4, 0),
        (2.0, 3.2767, "int16", 1e-4, 0),
        (-3.4e38, 3.4e38, "int8", 6.8e38 / 255, 0),
    ],
)
def test_a_range_becomes_a_grid_with_an_exact_zero(low, high, dtype, scale, zero):
    got = activation_grid(low, high, dtype)
    assert got.scale[0] == pytest.approx(scale, rel=1e-5)
    assert got.zero_point[0] == zero
    assert got.scale.dtype == np.float32
    assert got.dtype == dtype


@pytest.mark.parametrize(
    ("scale", "zero", "wanted"), [(0.01, -128, 2.55 / 127), (0.01, 27, 1.55 / 127), (0.01, 0, 0.01)]
)
def test_a_symmetric_grid_holds_the_range_of_the_one_it_replaces(scale, zero, wanted):
    got = symmetric(grid(scale, zero))
    assert got.zero_point[0] == 0
    assert got.scale[0] == pytest.approx(wanted)


def solved(net: Sketch | Graph, ranges: dict, dtype: str = "int8"):
    graph = net if isinstance(net, Graph) else net.finish()
    settings = Quantize(activations=dtype)
    spread = Propagation(plan(graph, Recipe((Rule((settings,)),))), dtype)
    return spread, spread.solve({t: ranges.get(t, (-1.0, 1.0)) for t in spread.owners()})


def test_a_pool_hands_its_inputs_grid_on():
    net = Sketch()
    x = net.tensor()
    y = net.op("pool", "MAX_POOL_2D", [x], SAME)
    z = net.op("reshape", "RESHAPE", [y], MOVE)
    spread, got = solved(net, {x: (0.0, 2.55)})
    assert spread.owners() == [x]
    assert all(got.written[t, "int8"].same_grid(activation_grid(0.0, 2.55, "int8")) for t in (x, y, z))


def test_a_concatenations_own_range_rules_all_its_inputs():
    net = Sketch()
    a, b = (net.op(n, "ADD", [net.tensor(), net.tensor()], PAIR) for n in "ab")
    c = net.op("join", "CONCATENATION", [a, b], JOIN)
    spread, got = solved(net, {c: (0.0, 5.1), a: (0.0, 1.0), b: (0.0, 2.0)})
    wanted = activation_grid(0.0, 5.1, "int8")
    assert c in spread.owners()
    assert not {a, b} & set(spread.owners())
    assert all(got.written[t, "int8"].same_grid(wanted) for t in (a, b, c))
    assert got.read[(0, 2), 0].same_grid(wanted)


def test_a_concatenation_reaches_back_through_a_pool():
    net = Sketch()
    a = net.op("a", "ADD", [net.tensor(), net.tensor()], PAIR)
    pooled = net.op("pool", "MAX_POOL_2D", [a], SAME)
    other = net.op("b", "ADD", [net.tensor(), net.tensor()], PAIR)
    c = net.op("join", "CONCATENATION", [pooled, other], JOIN)
    _, got = solved(net, {c: (0.0, 5.1), a: (0.0, 1.0)})
    assert got.written[pooled, "int8"].same_grid(got.written[c, "int8"])
    assert got.read[(0, 3), 0].same_grid(got.written[c, "int8"])


def test_a_fixed_output_is_requantized_for_a_concatenation():
    net = Sketch()
    probability = net.op("softmax", "SOFTMAX", [net.tensor()], SOFTMAX)
    other = net.op("add", "ADD", [net.tensor(), net.tensor()], PAIR)
    c = net.op("join", "CONCATENATION", [probability, other], JOIN)
    spread, got = solved(net, {c: (-1.0, 4.1)})
    assert probability not in spread.owners()
    assert got.written[probability, "int8"].same_grid(grid(1 / 256, -128))
    assert got.read[(0, 2), 0].same_grid(activation_grid(-1.0, 4.1, "int8"))
    assert got.written[other, "int8"].same_grid(activation_grid(-1.0, 4.1, "int8"))


def test_two_concatenations_of_one_value_read_it_on_two_grids():
    net = Sketch()
    a, b, c = (net.op(n, "ADD", [net.tensor(), net.tensor()], PAIR) for n in "abc")
    left = net.op("left", "CONCATENATION", [a, b], JOIN)
    right = net.op("right", "CONCATENATION", [a, c], JOIN)
    _, got = solved(net, {left: (0.0, 1.0), right: (0.0, 10.0)})
    assert got.read[(0, 3), 0].same_grid(activation_grid(0.0, 1.0, "int8"))
    assert got.read[(0, 4), 0].same_grid(activation_grid(0.0, 10.0, "int8"))
    assert got.written[a, "int8"] in (got.read[(0, 3), 0], got.read[(0, 4), 0])


def test_an_input_that_must_be_symmetric_gets_zero_point_0():
    net = Sketch()
    a, b = net.tensor(), net.tensor()
    net.op("matmul", "BATCH_MATMUL", [a, b], replace(PAIR, symmetric=(1,)))
    _, got = solved(net, {a: (0.0, 2.55), b: (0.0, 2.54)})
    assert got.read[(0, 0), 0].zero_point[0] == -128
    assert got.read[(0, 0), 1].zero_point[0] == 0
    assert got.read[(0, 0), 1].scale[0] == pytest.approx(2.54 / 127)


def test_int16_grids_are_symmetric_everywhere():
    net = Sketch()
    net.op("softmax", "SOFTMAX", [net.dense("dense", net.tensor())], SOFTMAX)
    _, got = solved(net, {}, "int16")
    assert {int(g.zero_point[0]) for g in got.written.values()} == {0}


def test_a_carried_grid_wins_over_a_range():
    net = Sketch()
    x = net.tensor()
    y = net.op("add", "ADD", [x, net.tensor()], PAIR)
    spread, got = solved(with_grids(net.finish(), {y: grid(0.5, 3), x: grid(0.25, 131, "uint8")}), {})
    assert got.written[y, "int8"].same_grid(grid(0.5, 3))
    assert got.written[x, "int8"].same_grid(grid(0.25, 3))
    assert set(spread.carried) == {x, y}


def test_names_of_one_value_share_one_grid():
    _, got = solved(branch(True), {})
    control = branch(True).ops[-1]
    for tie in control.demands.ties:
        first, *rest = (got.written[t, "int8"] for t in tie)
        assert all(first.same_grid(other) for other in rest)


def test_a_ring_of_moves_that_no_range_reaches_still_gets_a_grid():
    net = Sketch()
    y = net.op("softmax", "SOFTMAX", [net.tensor()], SOFTMAX)
    z = net.op("reshape", "RESHAPE", [y], MOVE)
    _, got = solved(net, {})
    assert got.written[z, "int8"].same_grid(grid(1 / 256, -128))


def test_convolution_weights_are_no_activations(network):
    spread, got = solved(network, {})
    constants = {k for k, t in network.tensors.items() if t.weight is not None}
    assert not constants & {t for t, _ in got.written}
    assert not constants & set(spread.owners())
    assert CONV.data == (0,)
