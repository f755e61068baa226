"""Integers that travel: which moving operators, and which values carried by loops and branches, are integer.

Moving and reshaping is integer only next to integer computing; alone it would cost two conversions. A value that a
loop or branch carries has one type and grid wherever it shows: results, condition and body in, body out. It becomes
integer when an integer operator inside reads or makes it; else it stays float, and the operators inside convert at the
body's border.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from paring.calibration import Statistics, TensorStatistics
from paring.decision import FLOAT, STATIC, Decision, Plan
from paring.graph import Graph, Op, OpId, TensorId
from paring.grids import Propagation, united

Tie: TypeAlias = tuple[TensorId, ...]
SHARE = 8.0  # a result that uses less of its range than one part in this many has lost three of eight bits
_MOVES = "only moves values between float operators"
_NOTHING = "nothing inside has an integer use for it"
_STALLS = "it adds up over the iterations of a loop, where 8 bits would lose small steps"


@dataclass(frozen=True)
class _Node:
    """What is integer or float as one: an operator, or the ties that share a tensor inside some body."""

    members: tuple[tuple[OpId, Tie | None], ...]
    tensors: frozenset[TensorId]
    doors: frozenset[TensorId]  # tensors through which integers must come for the node to follow
    computes: bool


def accumulating(graph: Graph, decisions: Mapping[OpId, Decision]) -> tuple[dict[OpId, str], dict[Tie, str]]:
    """What 8 bits cannot hold: values that a loop hands on through sums and products alone, and operators on the way.

    A step below half a quantum rounds to no step at all, so such a value stalls. Weights, tanh or a sigmoid on the way
    make it anew in each iteration; 16 bits are fine enough.

    Returns:
      The operators and the carried values that have to stay float, with the reason.
    """
    root = united(graph.ops)
    leads: dict[TensorId, set[TensorId]] = {}
    steps = []
    for op in graph.ops:
        if op.kind == "while":
            edges = [(t, tie[0]) for tie in op.ties for t in _entering(op, tie)]
        elif op.demands is not None and not (op.ties or op.demands.weights or op.demands.fixed or op.kind == "matmul"):
            steps.append(op)
            read = [t for i in op.demands.data if (t := op.inputs[i]) is not None]
            edges = [(t, op.outputs[o]) for t in read for o in op.demands.results]
        else:
            continue
        for a, b in edges:
            leads.setdefault(root.get(a, a), set()).add(root.get(b, b))
    circles = {}
    for loop in graph.ops:
        if loop.kind == "while" and decisions[loop.id].activations != "int16":
            for tie in loop.ties:
                ahead = _reached(root[tie[0]], leads)
                circles[tie] = {t for t in ahead if root[tie[0]] in _reached(t, leads)}
    ring = set().union(*circles.values())
    rounding, grown = {}, set()
    for op in steps:
        ends = {root.get(t, t) for t in op.outputs} & ring
        starts = {root.get(t, t) for i in op.demands.data if (t := op.inputs[i]) is not None} if op.demands else set()
        if ends and starts & ring and not (op.demands and op.demands.same):
            grown |= ends
            if decisions[op.id].activations == "int8":
                rounding[op.id] = _STALLS
    return rounding, {tie: _STALLS for tie, circle in circles.items() if circle & grown}


def deciding(graph: Graph, decisions: Mapping[OpId, Decision]) -> dict[OpId, str]:
    """Operators without weights that only decide which way a loop or branch goes: float, lest rounding flips it."""
    users = graph.consumers()
    conditions = {tensor[0] for op in graph.ops if op.kind == "while" for tie in op.ties for tensor in tie[1:2]}
    carried = {*graph.outputs, *(tensor for op in graph.ops for tie in op.ties for tensor in tie)}
    found: set[OpId] = set()
    for op in reversed(graph.ops):
        uses = [use for tensor in op.outputs for use in users.get(tensor, ())]
        decides = bool(uses) and all(user.id in found or (user.kind == "if" and not place) for user, place in uses)
        if op.id[0] in conditions or (decides and not carried & set(op.outputs)):
            found.add(op.id)
    wanted = {
        d.op.id for d in decisions.values() if d.activations == "int8" and d.op.demands and not d.op.demands.weights
    }
    return dict.fromkeys(found & wanted, "it only decides which way a loop or branch goes, and 8 bits could flip that")


def _reached(start: TensorId, leads: Mapping[TensorId, set[TensorId]]) -> set[TensorId]:
    """All tensors that at least one step leads to."""
    found: set[TensorId] = set()
    queue = [start]
    while queue:
        for tensor in leads.get(queue.pop(), ()):
            if tensor not in found:
                found.add(tensor)
                queue.append(tensor)
    return found


def inner(op: Op, tie: Tie) -> frozenset[TensorId]:
    """The names that a carried value has inside the bodies."""
    return frozenset(tensor for tensor in tie if tensor[0] != op.id[0])


def settle(graph: Graph, decisions: dict[OpId, Decision], barred: Mapping[Tie, str] | None = None) -> None:
    """Makes float, in place, what would travel as integers for nothing.

    Args:
      graph: The graph.
      decisions: For every operator of it.
      barred: Carried values that have to stay float, with the reason.
    """
    known = dict(barred or {})
    nodes = [*_operators(graph, decisions), *_carried(graph, decisions, known)]
    touching: dict[TensorId, list[_Node]] = {}
    for node in nodes:
        for tensor in node.doors:
            touching.setdefault(tensor, []).append(node)
    queue = [node for node in nodes if node.computes]
    reached = {node.members for node in queue}
    while queue:
        for tensor in queue.pop().tensors:
            for other in touching.get(tensor, ()):
                if other.members not in reached:
                    reached.add(other.members)
                    queue.append(other)
    kept = {member for members in reached for member in members}
    for op_id, decision in list(decisions.items()):
        if decision.mode != STATIC:
            continue
        if not decision.op.ties:
            if (op_id, None) not in kept:
                decisions[op_id] = Decision(decision.op, FLOAT, reason=_MOVES)
            continue
        left = [tie for tie in decision.op.ties if (op_id, tie) in kept]
        lost = {tie: known.get(tie, _NOTHING) for tie in decision.op.ties if (op_id, tie) not in kept}
        decisions[op_id] = _narrowed(graph, decision, left, lost)


def _operators(graph: Graph, decisions: Mapping[OpId, Decision]) -> list[_Node]:
    found = []
    for op in graph.ops:
        if decisions[op.id].mode == STATIC and not op.ties:
            ports = frozenset(t for t in (*op.inputs, *op.outputs) if t is not None and graph.tensors[t].weight is None)
            found.append(_Node(((op.id, None),), ports, ports, bool(op.demands and op.demands.computes)))
    return found


def _carried(graph: Graph, decisions: Mapping[OpId, Decision], barred: dict[Tie, str]) -> list[_Node]:
    """One node for all ties that share a tensor inside a body: that tensor has one type, whoever runs the body."""
    every = [(op, tie) for op in graph.ops for tie in op.ties]
    entries = {*graph.inputs, *graph.outputs}
    groups: dict[TensorId, list[tuple[Op, Tie]]] = {}
    for op, tie in every:
        names = inner(op, tie)
        merged = [(op, tie)]
        for group in {id(groups[t]): groups[t] for t in names if t in groups}.values():
            merged += group
        for tensor in {t for o, other in merged for t in inner(o, other)}:
            groups[tensor] = merged
    found = []
    for group in {id(g): g for g in groups.values()}.values():
        names = frozenset(t for op, tie in group for t in inner(op, tie))
        integer = [decisions[op.id].mode == STATIC and tie in decisions[op.id].op.ties for op, tie in group]
        why = next((barred[tie] for _, tie in group if tie in barred), "")
        if not why and names & entries:
            why = "a body that is an entry of its own keeps its types"
        if not why and not all(integer) and any(integer):
            why = "another loop or branch runs the same body in float"
        if why:
            barred.update({tie: why for _, tie in group})
        elif all(integer):
            whole = {t for op, tie in group for t in (*tie, *_entering(op, tie))}
            found.append(_Node(tuple((op.id, tie) for op, tie in group), frozenset(whole), names, False))
    return found


def _entering(op: Op, tie: Tie) -> list[TensorId]:
    """The operator's operand that a tie belongs to."""
    if op.demands is None:
        return []
    found = [op.inputs[i] for i, other in zip(op.demands.data, op.demands.ties, strict=False) if other == tie]
    return [t for t in found if t is not None]


def _narrowed(graph: Graph, decision: Decision, left: list[Tie], lost: Mapping[Tie, str]) -> Decision:
    """The decision of a loop or branch with only the ties in `left` as integers."""
    op, demands = decision.op, decision.op.demands
    assert demands is not None
    if not lost:
        return decision
    said = [f"{graph.tensors[tie[0]].name} stays float: {why}" for tie, why in lost.items()]
    if not left:
        return Decision(op, FLOAT, reason="; ".join(said))
    paired = list(zip(demands.data, demands.ties, strict=False))
    keep = {tensor for tie in left for tensor in tie}
    narrow = replace(
        demands,
        data=tuple(i for i, tie in paired if tie in left),
        results=tuple(i for i in demands.results if op.outputs[i] in keep),
        ties=tuple(tie for tie in demands.ties if tie in left),
    )
    return replace(decision, op=replace(op, demands=narrow), reason="; ".join([decision.reason, *said]))


def witnessed(made: Plan, statistics: Statistics) -> Plan:
    """The plan with float inside bodies wherever no sample showed a range, or a carried value cannot share one.

    Tensors of the entries are left alone: samples reach those, or solving says that none do.
    """
    graph, entries = made.graph, {0, *(tensor[0] for tensor in made.graph.inputs)}
    found = {tensor: s for tensor, s in statistics.tensors.items() if s.count}
    decisions = {d.op.id: d for d in made.decisions}
    carried = {tie: why for op in graph.ops for tie in op.ties if (why := _unshared(graph, op, tie, found))}
    settle(graph, decisions, carried)
    while True:
        made = replace(made, decisions=tuple(decisions[d.op.id] for d in made.decisions))
        blind: dict[OpId, str] = {}
        for dtype in ("int8", "int16"):
            spread = Propagation(made, dtype)
            for node in spread.owners():
                names = spread.members(node)
                if node not in spread.carried and node[0] not in entries and not any(t in found for t in names):
                    why = statistics.unseen.get(node[0], "no sample reaches it")
                    blind |= {op.id: why for op in (*spread.makers.get(node, ()), *spread.users.get(node, ()))}
        if not blind:
            return made
        for op_id, why in blind.items():
            decisions[op_id] = Decision(decisions[op_id].op, FLOAT, reason=why)
        settle(graph, decisions)


def _unshared(graph: Graph, op: Op, tie: Tie, found: Mapping[TensorId, TensorStatistics]) -> str:
    """Why a carried value has no range that serves all its names; empty where it has one."""
    names = [t for t in tie if graph.tensors[t].weight is None]
    unseen = [t for t in names if t not in found]
    if unseen:
        return f"no sample reaches {graph.tensors[unseen[0]].name}"
    spans = [max(found[t].high, 0.0) - min(found[t].low, 0.0) for t in names]
    if op.native == "WHILE" and spans[0] * SHARE < max(spans):
        return f"it leaves the loop {max(spans) / max(spans[0], 1e-30):.3g} times smaller than it gets inside"
    return ""
