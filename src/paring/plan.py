"""What each operator becomes, and why: a pure function of the graph and the recipe, with no format behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from paring.calibration import Statistics
from paring.compress.quantize import Quantize
from paring.decision import CONSTANT, CONVERSIONS, DYNAMIC, FLOAT, KEPT, OTHER, STATIC, WEIGHT_ONLY, Decision, Plan
from paring.errors import InputError
from paring.graph import Graph, Op, OpId, Tensor, TensorId
from paring.loops import accumulating, deciding, settle
from paring.recipe import Recipe

_STATE = ("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE")
_INTEGER = ("int8", "uint8", "int16", "int4")
DROWNED = 6.0  # dB: below, the median channel of a tensor is mostly rounding noise
SMALL = 256  # elements: below, scales and tables take as much room as integers save


def plan(graph: Graph, recipe: Recipe, matched: Mapping[OpId, tuple[Quantize | None, str]] | None = None) -> Plan:
    """Decides for every operator; never looks at a weight's values.

    Args:
      graph: What is planned for.
      recipe: What was asked for.
      matched: How each operator is to be quantized, and why, where the recipe was matched with the model before this one.

    Raises:
      InputError: A rule of the recipe matches nothing.
    """
    matched = recipe.match(graph) if matched is None else matched
    decisions = {op.id: _decide(graph, op, *matched[op.id]) for op in graph.ops}
    rounding, carried = accumulating(graph, decisions)
    for op_id, why in {**rounding, **deciding(graph, decisions)}.items():
        decisions[op_id] = Decision(decisions[op_id].op, FLOAT, reason=why)
    settle(graph, decisions, carried)
    return Plan(graph, recipe, tuple(decisions[op.id] for op in graph.ops))


def check(recipe: Recipe) -> None:
    """Refuses what only training and SavedModels know.

    Raises:
      InputError: A rule wants activations that no kernel for integer weights takes.
    """
    for number, rule in enumerate(recipe.rules, 1):
        if rule.apply is not None and rule.apply.activations == "bfloat16":
            raise InputError(
                "cannot quantize after training", where=f"rule {number} {rule.describe()} of recipe {recipe.name}",
                expected="activations float, dynamic, int8 or int16", got="bfloat16",
                todo="Take this recipe to paring.attach or to a SavedModel, or other activations",
            )  # fmt: skip
        if rule.apply is not None and rule.apply.weights == "bfloat16":
            raise InputError(
                "cannot quantize to .tflite", where=f"rule {number} {rule.describe()} of recipe {recipe.name}",
                expected="weights int8, int4 or float16", got="bfloat16, which LiteRT lacks",
                todo="Take float16, or write a SavedModel (-o FOLDER)",
            )  # fmt: skip


def _decide(graph: Graph, op: Op, wanted: Quantize | None, why: str) -> Decision:
    if op.constant:
        return Decision(op, CONSTANT, reason="unpacks a stored weight; its users decide")
    if op.native in CONVERSIONS:
        return Decision(op, KEPT, reason="a conversion in the source model")
    data = _data(graph, op)
    if any(t.dtype in _INTEGER and t.quantization is not None for t in data):
        return Decision(op, KEPT, reason="already quantized in the source model")
    if wanted is None:
        return Decision(op, FLOAT, reason=why)
    if op.native in _STATE:
        return Decision(op, FLOAT, reason="a variable keeps its type, and what sets it up stays as it is")
    if op.demands is None:
        if not data:
            return Decision(op, OTHER, reason="works on no real numbers")
        return Decision(op, FLOAT, reason=f"no quantized kernel known for {op.native}")
    if any(t.dtype != "float32" for t in data) or not (data or op.demands.weights):
        kinds = sorted({t.dtype for t in data if t.dtype != "float32"})
        return Decision(op, OTHER, reason=f"works on {', '.join(kinds) or 'no real numbers'}")
    if wanted.static:
        return _static(graph, op, wanted, why)
    return _weights_only(graph, op, wanted, why)


def _data(graph: Graph, op: Op) -> list[Tensor]:
    """The real-valued activations that an operator reads and makes; without a row, all of them."""
    if op.demands is None:
        ids: list[TensorId | None] = [*op.inputs, *op.outputs]
        return [
            graph.tensors[t] for t in ids if t is not None and graph.tensors[t].dtype not in ("int32", "int64", "bool")
        ]
    found = [op.inputs[i] for i in op.demands.data] + [op.outputs[i] for i in op.demands.results]
    return [graph.tensors[t] for t in found if t is not None]


def _missing_weights(graph: Graph, op: Op) -> str:
    """Why an operator's weights cannot be read; empty where they can."""
    for use in op.demands.weights if op.demands else ():
        tensor = op.inputs[use.input]
        if tensor is not None and graph.tensors[tensor].weight is None:
            maker = graph.producers().get(tensor)
            if maker is not None and maker.native in ("DENSIFY", "DEQUANTIZE"):
                return "sparse weights stay behind DENSIFY (--densify quantizes them)"
            return "its weights are computed at run time"
    return ""


def _static(graph: Graph, op: Op, wanted: Quantize, why: str) -> Decision:
    assert op.demands is not None
    versions = op.demands.versions
    missing = _missing_weights(graph, op)
    if missing:
        return Decision(op, FLOAT, reason=missing)
    form, reason, settings = wanted.activations, why, wanted
    if op.demands.weights and wanted.weights in ("float16", "float"):
        return Decision(op, FLOAT, reason=f"{wanted.activations} activations need integer weights")
    if op.demands.weights and wanted.weights == "int4":
        if wanted.granularity == "block":
            reason, settings = (
                f"{why}; blocks need dynamic activations, one scale per channel",
                replace(settings, granularity="channel", block_size=0),
            )
        if f"{form}-int4" in versions and not _stored(graph, op):
            form = f"{form}-int4"
        else:
            reason, settings = (
                f"{why}; no {form} kernel takes int4 weights here, int8 instead",
                replace(settings, weights="int8"),
            )
    elif op.demands.weights:
        settings = (
            replace(settings, granularity="channel", block_size=0) if settings.granularity == "block" else settings
        )
    if form not in versions:
        return Decision(op, FLOAT, reason=f"no {wanted.activations} kernel for {op.native}")
    if form in op.demands.refuses:
        return Decision(op, FLOAT, reason=op.demands.refuses[form])
    return Decision(op, STATIC, settings, form, reason)


def _stored(graph: Graph, op: Op) -> bool:
    """True where a weight is stored as integers already: it keeps them."""
    return any(t.weight is not None and t.weight.stored in _INTEGER for _, t in graph.weights_of(op))


def _weights_only(graph: Graph, op: Op, wanted: Quantize, why: str) -> Decision:
    assert op.demands is not None
    if not op.demands.weights:
        return Decision(op, FLOAT, reason="has no weights")
    missing = _missing_weights(graph, op)
    if missing:
        return Decision(op, FLOAT, reason=missing)
    weights = [(use, t) for use, t in graph.weights_of(op) if t.weight is not None]
    if all(t.weight is not None and t.weight.stored in _INTEGER for _, t in weights):
        return Decision(op, KEPT, reason="its weights are already quantized")
    if wanted.weights == "float":
        return Decision(op, FLOAT, reason=why)
    if sum(t.weight.size for _, t in weights if t.weight) < SMALL:
        return Decision(op, FLOAT, reason=f"{why}; too small to gain (under {SMALL} elements)")
    settings, reason = wanted, why
    if settings.granularity == "block":
        shapes = [t.shape for _, t in weights]
        whole = all(len(s) == 2 and s[1] % settings.block_size == 0 for s in shapes)
        if "dynamic-int4-block" in op.demands.versions and whole and settings.activations == "dynamic":
            return Decision(op, DYNAMIC, settings, "dynamic-int4-block", reason)
        shape = "x".join(str(d) for d in shapes[0])
        reason = f"{why}; blocks of {settings.block_size} do not fit {op.native} {shape}, one scale per channel"
        settings = replace(settings, granularity="channel", block_size=0)
    if settings.granularity == "tensor" and any(use.grouped for use, _ in weights):
        settings, reason = replace(settings, granularity="channel"), f"{reason}; groups need one scale per channel"
    if settings.activations == "dynamic":
        form = f"dynamic-{settings.weights}"
        fallback = op.demands.versions.keys() & {"dynamic-int8", "codes-int8"}
        if form not in op.demands.versions and settings.weights == "int4" and fallback:
            form, settings = "dynamic-int8", replace(settings, weights="int8")
            reason = f"{reason}; no kernel takes int4 weights here, int8 instead"
        if form == "dynamic-int8" and "codes-int8" in op.demands.versions:
            form = "codes-int8"
        if form in op.demands.versions and form not in op.demands.refuses:
            return Decision(op, DYNAMIC, settings, form, reason)
        no_kernel = f"no fast kernel takes {settings.weights} weights beside float activations"
        reason = f"{reason}; {op.demands.refuses.get(form, no_kernel)}: converted back before use"
    return Decision(op, WEIGHT_ONLY, settings, "float", reason)


def ground(made: Plan, unreachable: Mapping[OpId, str]) -> Plan:
    """The plan with some operators float: their scales are out of the kernels' reach, by operator the reason."""
    decisions = {
        d.op.id: Decision(d.op, FLOAT, reason=unreachable[d.op.id]) if d.op.id in unreachable else d
        for d in made.decisions
    }
    settle(made.graph, decisions)
    return replace(made, decisions=tuple(decisions[d.op.id] for d in made.decisions))


def refine(made: Plan, statistics: Statistics) -> Plan:
    """Second thoughts once ranges are known: run-time int8 input that drowns most channels is left float (weight-only).

    The kernel quantizes the whole input with one scale; where one channel takes all levels, the others become noise.
    """
    decisions = []
    for decision in made.decisions:
        source = activation_input(made.graph, decision.op)
        found = statistics.tensors.get(source) if source is not None else None
        level = found.channel_db(255) if found is not None else None
        if decision.mode == DYNAMIC and level is not None and level < DROWNED:
            reason = (
                f"{decision.reason}; its input's range drowns most channels at 8 bits ({level:.0f} dB): weights only"
            )
            settings = replace(decision.settings, activations="float") if decision.settings else None
            if settings is not None and settings.granularity == "block":
                settings = replace(settings, granularity="channel", block_size=0)
            decision = replace(decision, mode=WEIGHT_ONLY, form="float", settings=settings, reason=reason)
        decisions.append(decision)
    return replace(made, decisions=tuple(decisions))


def activation_input(graph: Graph, op: Op) -> TensorId | None:
    """The activation that meets an operator's weights."""
    if op.demands is None or not op.demands.weights or not op.demands.data:
        return None
    tensor = op.inputs[op.demands.data[0]]
    return tensor if tensor is not None and graph.tensors[tensor].weight is None else None
