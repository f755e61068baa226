"""A SavedModel as the Graph that planning works on: real operators with the weights they read, functions opened in order.

An operator is called `function/node`, and `function/node:weight` where it reads one.

What only carries values, handles and functions is left out. A weight that an operator reads through Identity, Transpose, a call
or a loop is the operator's own input here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paring.errors import InputError
from paring.formats.saved_model.axes import FLOATS, MOVES
from paring.formats.saved_model.flow import CONSTANT, Flow, Source, Use
from paring.formats.saved_model.model import SavedModel
from paring.formats.saved_model.operators import ROWS
from paring.formats.saved_model.scope import FLOAT32, NAMES, Scope, called, definition, field, result_type
from paring.graph import Demands, Graph, Op, OpId, Tensor, TensorId, Weight, WeightUse

_LEFT_OUT = {
    "Const", "Placeholder", "PlaceholderWithDefault", "NoOp", "VarHandleOp", "VariableV2", "Variable", "ReadVariableOp",
    "Identity", "IdentityN", "Assign", "AssignVariableOp", "VarIsInitializedOp", "IsVariableInitialized", "RestoreV2", "SaveV2",
    "DisableCopyOnRead", "Switch", "Merge", "Enter", "Exit", "NextIteration", "LoopCond", "HashTableV2", "Shape",
    "ControlTrigger",
}  # fmt: skip
_FORMS = {"float": 1, "weight-only": 1}


@dataclass(frozen=True)
class View:
    """The graph, and what its operators are in the model.

    Attributes:
      graph: For planning.
      sources: The weights of each operator that has any.
      uses: How it reads each of them.
      places: (function, node) of each operator.
      refused: Operators whose weights have to stay as they are, with the reason.
    """

    graph: Graph
    sources: Mapping[OpId, tuple[Source, ...]]
    uses: Mapping[OpId, tuple[Use, ...]]
    places: Mapping[OpId, tuple[str, str]]
    refused: Mapping[OpId, str]


def view(model: SavedModel) -> View:
    """Opens the model's functions in the order in which signatures, and then Python, call them."""
    return _Builder(model).build()


class _Builder:
    def __init__(self, model: SavedModel) -> None:
        self.model, self.flow = model, model.flow
        self.ops: list[Op] = []
        self.tensors: dict[TensorId, Tensor] = {}
        self.numbers: dict[tuple[str, str], TensorId] = {}
        self.uses: dict[tuple[str, str], list[tuple[Source, Use]]] = {}
        for source in self.flow.sources.values():
            for use in source.uses:
                self.uses.setdefault((use.scope, use.node), []).append((source, use))
        self.sources: dict[OpId, tuple[Source, ...]] = {}
        self.found: dict[OpId, tuple[Use, ...]] = {}
        self.places: dict[OpId, tuple[str, str]] = {}
        self.refused: dict[OpId, str] = {}
        self.opened: set[str] = set()
        self.scopes = list(self.flow.scopes)
        self.names = _short_names(self.scopes)

    def build(self) -> View:
        flow = self.flow
        self._open(flow.scopes[""], flow.run)
        for name in sorted(flow.meta.object_graph_def.concrete_functions):
            if name in flow.scopes:
                self._open(flow.scopes[name], None)
        inputs, outputs = ([self._tensor(flow.scopes[""], value) for value in side] for side in _ends(flow))
        graph = Graph(tuple(self.ops), self.tensors, tuple(inputs), tuple(outputs))
        return View(graph, self.sources, self.found, self.places, self.refused)

    def _open(self, scope: Scope, only: set[str] | None) -> None:
        if scope.name in self.opened:
            return
        self.opened.add(scope.name)
        for node in scope.ordered():
            if only is not None and node.name not in only:
                continue
            for name, _ in called(node, self.flow.scopes):
                self._open(self.flow.scopes[name], None)
            if not called(node, self.flow.scopes) and self._stands(scope, node):
                self._op(scope, node)

    def _stands(self, scope: Scope, node: Any) -> bool:
        """True for what computes; moving a weight about is no operator of its own."""
        if node.op in _LEFT_OUT:
            return False
        if node.op in MOVES | FLOATS:
            maker, _ = scope.source(node.input[0])
            return maker is None or maker.op not in ("ReadVariableOp", "Const", "VariableV2", "Variable")
        return True

    def _op(self, scope: Scope, node: Any) -> None:
        row, id_ = ROWS.get(node.op), (self.scopes.index(scope.name), len(self.ops))
        read = sorted(
            self.uses.get((scope.name, node.name), ()), key=lambda pair: (bool(pair[0].refused), pair[1].input)
        )
        inputs: list[TensorId | None] = [self._tensor(scope, value) for value in scope.inputs(node)]
        weights: list[WeightUse] = []
        for source, use in read:
            if use.input in [w.input for w in weights]:
                continue  # a body that serves several variables: planned by the first
            inputs[use.input] = self._weight(source)
            kept = kept_of(use, source)
            reduced = tuple(d for d in range(len(source.shape or ())) if d not in kept)
            axis = kept[-1] if kept else None
            weights.append(WeightUse(use.input, axis, () if row is not None and row.picks else reduced))
        if row is not None and not weights and not row.picks:
            weights = [WeightUse(row.weights[0], None)]
        if read:
            self.sources[id_] = tuple(source for source, _ in read)
            self.found[id_] = tuple(use for _, use in read)
            if read[0][0].refused:
                self.refused[id_] = read[0][0].refused
        # Mixed precision: the weights are float32, and what they are cast to for an operator says nothing of how to store them.
        mixed = bool(read) and read[0][0].dtype == FLOAT32
        real = [i for i, t in enumerate(inputs) if t is not None and self._real(t, mixed=mixed)]
        results = [self._tensor(scope, value) for value in _results(scope, node)]
        demands = Demands(
            data=tuple(real), weights=tuple(weights), versions=_FORMS,
            results=tuple(i for i, t in enumerate(results) if self._real(t, mixed=mixed)),
        )  # fmt: skip
        name = f"{self.names[scope.name]}/{node.name}" if scope.name else node.name
        if read:  # MatMul_7 says little: the name of its weight is part of its own
            name = f"{name}:{read[0][0].name}"
        kind = row.kind if row is not None else node.op.lower()
        self.ops.append(Op(id_, name, kind, node.op, tuple(inputs), tuple(results), demands=demands))
        self.places[id_] = (scope.name, node.name)

    def _real(self, tensor: TensorId, *, mixed: bool) -> bool:
        """True for activations that planning looks at."""
        short = () if mixed else ("float16", "bfloat16")
        return self.tensors[tensor].weight is None and self.tensors[tensor].dtype in ("float32", "float64", *short)

    def _weight(self, source: Source) -> TensorId:
        place = (f"\0{source.id[0]}", source.id[1])  # no value is called so
        if place not in self.numbers:
            id_ = (-1, len(self.numbers))
            shape, dtype = source.shape or (), NAMES.get(source.dtype, "float32")
            size = source.size * {"float64": 8, "float16": 2, "bfloat16": 2, "int8": 1}.get(dtype, 4)
            weight = Weight(shape, dtype, dtype, size, _reader(self.model, source), origin=id_[1])
            self.numbers[place], self.tensors[id_] = id_, Tensor(id_, source.name, shape, dtype, weight=weight)
        return self.numbers[place]

    def _tensor(self, scope: Scope, value: str) -> TensorId:
        place = (scope.name, scope.canonical(value))
        if place not in self.numbers:
            id_ = (self.scopes.index(scope.name), len(self.numbers))
            shape, dtype = _described(scope, value)
            self.numbers[place], self.tensors[id_] = id_, Tensor(id_, value, shape, dtype)
        return self.numbers[place]


def kept_of(use: Use, source: Source) -> tuple[int, ...]:
    """The variable's dimensions, each index of which gets a scale; none where scales would outweigh what they scale."""
    kept, shape = use.kept or (), source.shape or ()
    count = 1
    for d in kept:
        count *= shape[d]
    return kept if source.size >= 8 * count else ()


def values(model: SavedModel, source: Source) -> np.ndarray:
    """A weight's values, read from the file now.

    Raises:
      InputError: The file is broken.
    """
    if source.kind == CONSTANT:
        scope = model.flow.scopes[source.id[0]]
        found = scope.constant(scope.value(source.node))
        if found is None or found.shape != source.shape:
            raise InputError(
                "cannot read a constant", where=f"{model.path}, {source.name}", todo="Export the model again"
            )
        return found
    return np.asarray(model.bundle.read(source.key or ""))


def _reader(model: SavedModel, source: Source) -> Any:
    return lambda start, stop: values(model, source)[start:stop] if source.shape else values(model, source)


def _short_names(scopes: list[str]) -> dict[str, str]:
    """What functions are called for people: as in Python, where that is the name of one only.

    >>> _short_names(["__inference_run_12", "__inference_body_3", "__inference_body_4"])
    {'__inference_run_12': 'run', '__inference_body_3': 'body_3', '__inference_body_4': 'body_4'}
    """
    plain = {name: name.removeprefix("__inference_") for name in scopes}
    short = {name: re.sub(r"_\d+$", "", plain[name]) if name != plain[name] else name for name in scopes}
    count = Counter(short.values())
    return {name: short[name] if count[short[name]] == 1 else plain[name] for name in scopes}


def _ends(flow: Flow) -> tuple[list[str], list[str]]:
    """Names of the values that signatures take and give."""
    signatures = [s for key, s in sorted(flow.meta.signature_def.items()) if not key.startswith("__saved_model")]
    names = (
        dict.fromkeys(info.name for s in signatures for _, info in sorted(s.inputs.items()) if info.name),
        dict.fromkeys(info.name for s in signatures for _, info in sorted(s.outputs.items()) if info.name),
    )
    return [*names[0]], [*names[1]]


def _results(scope: Scope, node: Any) -> list[str]:
    """The values of a node's results; of a list of them, the first."""
    known = definition(node.op)
    return [scope.value(node, index) for index in range(len(known.output_arg) if known is not None else 0)]


def _described(scope: Scope, value: str) -> tuple[tuple[int, ...], str]:
    """Shape and type of a value as far as the file says; no shape where it does not."""
    node, index = scope.maker(value)
    if node is None:
        if index < 0:
            return (), "unknown"
        argument = scope.function.signature.input_arg[index]
        known = scope.function.arg_attr
        shapes = field(known[index], "_output_shapes") if index in known else None
        return _dims(shapes, 0), NAMES.get(argument.type, "unknown")
    return _dims(field(node, "_output_shapes"), index), NAMES.get(result_type(node, index) % 100, "unknown")


def _dims(shapes: Any, index: int) -> tuple[int, ...]:
    known = shapes.list.shape if shapes is not None else []
    if index >= len(known) or known[index].unknown_rank:
        return ()
    return tuple(int(d.size) for d in known[index].dim)


__all__ = ["View", "kept_of", "values", "view"]
