"""Moves constants into the loops and branches that take them as operands, where they are weights again.

A branch that TensorFlow traced gets its weights from outside; as operands they could be neither planned nor shrunk.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from paring.formats.tflite.check import regions
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel


def sink(model: TfliteModel) -> TfliteModel:
    """An equal model whose bodies hold their constants themselves; the given one where there is nothing to move.

    Only bodies that a single loop or branch runs are changed, and of a loop's operands only those that it hands on
    unchanged. Buffers stay shared.
    """
    root = model.root.clone()
    moved = TfliteModel(root, model.data, model.path, model.archive)
    moved.notes, moved.folder = model.notes, model.folder
    callers = Counter(r for s in root.subgraphs for op in s.operators or () for r in regions(op))
    entries = {0, *(s.subgraph_index for s in root.signature_defs or ())}
    changed = False
    todo = list(range(len(root.subgraphs)))
    while todo:  # a constant may sink through several levels
        graph = root.subgraphs[todo.pop(0)]
        for operator in graph.operators or ():
            inner = regions(operator)
            alone = all(callers[r] == 1 and r not in entries for r in inner)
            if alone and moved.native(operator) in ("WHILE", "IF") and _sink(moved, graph, operator, inner):
                changed = True
                todo += inner
    return moved if changed else model


def _sink(model: TfliteModel, graph: Table, operator: Table, inner: list[int]) -> bool:
    loop = model.native(operator) == "WHILE"
    first = 0 if loop else 1
    ins, outs = _list(operator.inputs), _list(operator.outputs)
    bodies = [model.subgraphs[r] for r in inner]
    taken = [_list(body.inputs) for body in bodies]
    given = _list(bodies[1].outputs) if loop else []
    found = [
        place
        for place in range(len(ins) - first)
        if model.constant(graph.tensors[ins[place + first]]) is not None
        and all(t[place] not in _list(body.outputs) or loop for body, t in zip(bodies, taken, strict=True))
        and (not loop or _handed_on(graph, bodies, taken, given, outs, place))
    ]
    if loop and len(found) == len(ins):
        found = found[1:]
    for place in found:
        source = graph.tensors[ins[place + first]]
        for body, t in zip(bodies, taken, strict=True):
            tensor = body.tensors[t[place]]
            for field in ("shape", "shape_signature", "type", "buffer", "quantization", "sparsity", "has_rank"):
                tensor.__dict__.pop(field, None)
                if field in source.__dict__:
                    setattr(tensor, field, getattr(source, field))
    if not found:
        return False
    if loop:
        same = {outs[place]: ins[place] for place in found}
        for reader in graph.operators:
            reader.inputs = None if reader.inputs is None else _array([same.get(i, i) for i in _list(reader.inputs)])
        operator.outputs = _without(outs, found)
        bodies[1].outputs = _without(given, found)
    operator.inputs = _array([*ins[:first], *_list(_without(ins[first:], found))])
    for body, t in zip(bodies, taken, strict=True):
        body.inputs = _without(t, found)
    return True


def _handed_on(
    graph: Table, bodies: list[Table], taken: list[list[int]], given: list[int], outs: list[int], place: int
) -> bool:
    """True where a loop gives the operand on as it came, and its result is not the subgraph's own."""
    once = given.count(taken[1][place]) == 1 and taken[0][place] not in _list(bodies[0].outputs)
    return once and given[place] == taken[1][place] and outs[place] not in _list(graph.outputs)


def _without(values: list[int], places: list[int]) -> np.ndarray:
    return _array([value for place, value in enumerate(values) if place not in places])


def _array(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def _list(values: Any) -> list[int]:
    return [] if values is None else [int(v) for v in values]
