"""Which variable every handle is, and which operators read which weight: followed forward through the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from dataclasses import field as new
from functools import cached_property
from typing import Any

from paring.formats.saved_model.axes import FLOATS, MOVES, Axes, moved
from paring.formats.saved_model.operators import ROWS
from paring.formats.saved_model.scope import FLOAT32, NAMES, Scope, called, definition, field, scopes

RESOURCE, REFERENCE, CONSTANT = "resource", "reference", "constant"
HOLDERS = {"VarHandleOp": RESOURCE, "VariableV2": REFERENCE, "Variable": REFERENCE}
SMALL = 256  # elements: below, scales and conversions take as much room as integers save
_HANDS_ON = {"Identity", "Enter", "RefEnter", "Switch"}  # a handle in, the same handle out
_HARMLESS = {
    "VarIsInitializedOp", "DisableCopyOnRead", "VariableShape", "NoOp", "DestroyResourceOp", "IsVariableInitialized",
}  # fmt: skip
SHAPES = {"Shape", "Size", "Rank"}
"""Operators that look at a value's shape only."""


@dataclass(frozen=True)
class Use:
    """An operator that reads a weight.

    Attributes:
      scope: The function's name.
      node: The operator's.
      input: As which input.
      axes: The variable's dimensions in the operand, None where they cannot be told.
      kept: The variable's dimensions that the operator's result has, None where they cannot be told.
      direct: It could read the stored values; else they become floats before, and others may read them, too.
      picks: It picks rows.
    """

    scope: str
    node: str
    input: int
    axes: Axes | None
    kept: tuple[int, ...] | None
    direct: bool
    picks: bool


@dataclass(frozen=True)
class End:
    """Where stored values have to become floats: an input of a node, or what a function returns (`node` is None)."""

    scope: str
    node: Any
    input: int
    value: str
    axes: Axes
    use: Use | None


@dataclass
class Source:
    """Something that holds values: a variable, or a constant.

    Attributes:
      id: (function, node); the function is empty for variables.
      kind: `resource`, `reference` or `constant`.
      node: What makes its handle or its values.
      shape: None where it is not fixed.
      dtype: TensorFlow's number.
      key: In the checkpoint, None where nothing restores it.
      object: Its number in the object graph.
      label: Its name in Python, empty where there is none.
      reads: Nodes that read a handle.
      moves: Nodes that only move what was read.
      looks: Nodes that look at its shape.
      saves: Nodes that save it, and as which input.
      assigns: Nodes that set it.
      ends: Where it becomes float.
      uses: Operators that read it as a weight.
      refused: Why it has to stay as it is; empty where it need not.
    """

    id: tuple[str, str]
    kind: str
    node: Any
    shape: tuple[int, ...] | None
    dtype: int
    key: str | None = None
    object: int | None = None
    label: str = ""
    reads: list[tuple[str, Any]] = new(default_factory=list)
    moves: list[tuple[str, Any]] = new(default_factory=list)
    looks: list[tuple[str, Any]] = new(default_factory=list)
    saves: list[tuple[str, Any, int]] = new(default_factory=list)
    assigns: list[tuple[str, Any]] = new(default_factory=list)
    ends: list[End] = new(default_factory=list)
    uses: list[Use] = new(default_factory=list)
    refused: str = ""

    @property
    def name(self) -> str:
        """What people call it: as in Python, else as its node."""
        return self.label or self.id[1]

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for d in self.shape or ():
            count *= d
        return count


class Flow:
    """A meta graph, followed through.

    Attributes:
      scopes: The graph (under the empty name) and its functions.
      sources: All variables, and constants that are weights.
      handles: For each value that is a handle, the variables that it may be.
      bound: By number in the object graph, the variables.
    """

    def __init__(self, meta: Any, objects: dict[str, int], keys: Container[str]) -> None:
        """Follows handles and values; `objects`: by key of the checkpoint, numbers in the object graph; `keys`: all of them."""
        self.meta, self._known = meta, keys
        graph = meta.graph_def
        self.scopes = scopes(graph)
        self.handles: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
        self.sources: dict[tuple[str, str], Source] = {}
        self.bound: dict[int, Source] = {}
        for node in graph.node:
            if node.op in HOLDERS:
                dims = field(node, "shape").shape
                fixed = not dims.unknown_rank and all(d.size >= 0 for d in dims.dim)
                shape = tuple(int(d.size) for d in dims.dim) if fixed else None
                source = Source(("", node.name), HOLDERS[node.op], node, shape, field(node, "dtype").type)
                self.sources[source.id] = source
                self._hand_on(self.scopes[""], node.name, source)
        self._keys()
        self._bind(objects)
        self._assigned()
        for source in self.sources.values():
            self._reads(source)
        for scope in self.scopes.values():
            for node in scope.nodes:
                if node.op == "Const" and field(node, "dtype").type == FLOAT32:
                    self._constant(scope, node)
        self._refuse()

    @cached_property
    def run(self) -> set[str]:
        """Names of the graph's nodes that signatures run."""
        signatures = [s for key, s in self.meta.signature_def.items() if not key.startswith("__saved_model")]
        return self.scopes[""].ancestors(info.name for s in signatures for info in s.outputs.values())

    def holder(self, scope: str, value: str) -> list[Source]:
        """The variables that a handle may be."""
        return [self.sources[i] for i in sorted(self.handles.get((scope, value), ()))]

    # -- handles ---------------------------------------------------------------------------------------------------

    def _hand_on(self, scope: Scope, value: str, source: Source) -> None:
        ahead = [(scope, value)]
        while ahead:
            scope, value = ahead.pop()
            known = self.handles[scope.name, value]
            if source.id in known:
                continue
            known.add(source.id)
            for node, index in scope.users[value]:
                ahead += self._inside(node, index)
                if node.op in _HANDS_ON and source.kind == RESOURCE:
                    ahead += [(scope, scope.value(node, result)) for result in range(2 if node.op == "Switch" else 1)]
                if node.op in ("While", "StatelessWhile"):
                    ahead.append((scope, scope.value(node, index)))

    def _inside(self, node: Any, index: int) -> list[tuple[Scope, str]]:
        """What an input of a node is called in the functions that the node calls."""
        found = []
        for name, skipped in called(node, self.scopes):
            inner = self.scopes[name]
            if skipped <= index < skipped + len(inner.arguments):
                found.append((inner, inner.arguments[index - skipped]))
        return found

    def _keys(self) -> None:
        """From which key of the checkpoint each variable is restored."""
        for _, node, scope, source in self._assignments():
            maker, index = scope.source(node.input[1])
            if maker is not None and maker.op == "RestoreV2":
                names, parts = scope.constant(maker.input[1]), scope.constant(maker.input[2])
                if (
                    names is None
                    or parts is None
                    or index >= min(names.size, parts.size, len(field(maker, "dtypes").list.type))
                ):
                    source.refused = "nobody knows which key it is restored from"
                elif parts.reshape(-1)[index]:
                    source.refused = "it is a part of a partitioned variable"
                else:
                    source.key = names.reshape(-1)[index].decode(errors="replace")

    def _assigned(self) -> None:
        """What sets each variable, and whether that is more than a restore and a first value."""
        starters, run = _initializers(self.meta), self.run
        dead = bool(
            self.meta.object_graph_def.nodes
        )  # TensorFlow 2 never runs what the graph holds beside its signatures
        for name, node, scope, source in self._assignments():
            source.assigns.append((name, node))
            maker, _ = scope.source(node.input[1])
            first = not name and node.name not in run and (dead or node.name in starters)
            if not first and (maker is None or maker.op != "RestoreV2"):
                source.refused = f"{_place(scope, node)} assigns to it"

    def _assignments(self) -> Iterator[tuple[str, Any, Scope, Source]]:
        for name, scope in self.scopes.items():
            for node in scope.nodes:
                if node.op in ("AssignVariableOp", "Assign"):
                    for source in self.holder(name, scope.canonical(node.input[0])):
                        yield name, node, scope, source

    def _bind(self, objects: dict[str, int]) -> None:
        """Functions that only Python calls: the object graph says which variables they get."""
        for source in self.sources.values():
            if source.key in objects:
                source.object = objects[source.key]
                source.label = self.meta.object_graph_def.nodes[source.object].variable.name
                self.bound[source.object] = source
        for name, function in self.meta.object_graph_def.concrete_functions.items():
            if name in self.scopes and function.bound_inputs:
                scope = self.scopes[name]
                bound = zip(scope.arguments[-len(function.bound_inputs) :], function.bound_inputs, strict=True)
                for argument, number in bound:
                    if number in self.bound:
                        self._hand_on(scope, argument, self.bound[number])

    # -- values ----------------------------------------------------------------------------------------------------

    def _reads(self, source: Source) -> None:
        rank = len(source.shape) if source.shape is not None else 0
        axes: Axes = tuple((d,) for d in range(rank))
        seen: set[tuple[str, str, bool]] = set()
        if source.kind == REFERENCE:
            self._trace(source, self.scopes[""], source.node.name, axes, seen)
            return
        places = [place for place, ids in self.handles.items() if source.id in ids]
        for name, value in places:
            scope = self.scopes[name]
            for node, index in scope.users[value]:
                if node.op == "ReadVariableOp":
                    source.reads.append((name, node))
                    self._trace(source, scope, scope.value(node), axes, seen)
                elif node.op == "ResourceGather" and not field(node, "batch_dims").i:
                    kept = (0,) if rank else None
                    use = Use(name, node.name, index, axes, kept, direct=True, picks=True)
                    source.uses.append(use)
                    source.ends.append(End(name, node, index, value, axes, use))
                elif not (
                    node.op in _HARMLESS
                    or node.op in _HANDS_ON
                    or (node.op in ("AssignVariableOp",) and index == 0)
                    or called(node, self.scopes)
                ):
                    source.refused = f"{_place(scope, node)} ({node.op}) uses it"

    def _constant(self, scope: Scope, node: Any) -> None:
        shape = tuple(int(d.size) for d in field(node, "value").tensor.tensor_shape.dim)
        source = Source((scope.name, node.name), CONSTANT, node, shape, FLOAT32)
        if source.size < SMALL or len(shape) < 2:
            return
        self._trace(source, scope, scope.value(node), tuple((d,) for d in range(len(shape))), set())
        if source.uses:
            self.sources[source.id] = source

    def _trace(self, source: Source, scope: Scope, value: str, axes: Axes, seen: set[tuple[str, str, bool]]) -> None:
        """Follows what was read, as it is stored and then as floats, to the operators that it is a weight of."""
        ahead: list[tuple[Scope, str, Axes | None, bool]] = [(scope, value, axes, True)]
        while ahead:
            scope, value, told, stored = ahead.pop()
            if (scope.name, value, stored) in seen or source.shape is None:
                continue
            seen.add((scope.name, value, stored))
            for node, index in scope.users[value]:
                moves = node.op in MOVES | FLOATS and index == 0
                behind = moved(scope, node, told, source.shape) if moves and told is not None else None
                keeps = stored and node.op in MOVES and behind is not None
                if keeps:
                    source.moves.append((scope.name, node))
                elif stored and self._kept_as_stored(source, scope, node, index):
                    continue
                else:
                    use = self._use(source, scope, node, index, told, direct=stored)
                    if stored:
                        assert told is not None
                        source.ends.append(End(scope.name, node, index, value, told, use))
                if moves:
                    results = range(2 if node.op == "Switch" else 1)
                    ahead += [(scope, scope.value(node, result), behind, keeps) for result in results]
                ahead += [(inner, argument, told, False) for inner, argument in self._inside(node, index)]
            if stored and value in scope.returned():
                assert told is not None
                source.ends.append(End(scope.name, None, 0, value, told, None))

    def _kept_as_stored(self, source: Source, scope: Scope, node: Any, index: int) -> bool:
        """True where the node takes values of any type and makes no others of them; notes what has to be retyped."""
        if node.op == "SaveV2" and index >= 3:
            if index - 3 >= len(field(node, "dtypes").list.type):
                source.refused = f"{_place(scope, node)} saves it as no type"
            source.saves.append((scope.name, node, index - 3))
            return True
        if node.op in SHAPES:
            source.looks.append((scope.name, node))
            return True
        if source.kind != REFERENCE:
            return False
        if (node.op == "Assign" and index == 0) or node.op in _HARMLESS:
            return True
        if _takes_reference(node, index):
            source.refused = f"{_place(scope, node)} ({node.op}) changes it"
        return False

    def _use(
        self, source: Source, scope: Scope, node: Any, index: int, axes: Axes | None, *, direct: bool
    ) -> Use | None:
        row = ROWS.get(node.op)
        if row is None or index not in row.weights:
            return None
        kept = None
        if axes is not None:
            own = row.kept(scope, node, index, len(axes))
            fits = own is not None and all(0 <= place < len(axes) for place in own)
            kept = None if own is None or not fits else tuple(sorted(d for place in own for d in axes[place]))
        found = Use(scope.name, node.name, index, axes, kept, direct, row.picks)
        if found not in source.uses:
            source.uses.append(found)
        return found

    def _refuse(self) -> None:
        """Variables that have to stay as they are, whoever reads them."""
        fetched = {
            info.name.split(":")[0]
            for signature in self.meta.signature_def.values()
            for info in (*signature.outputs.values(), *signature.inputs.values())
        }
        captured = {
            o.constant.operation for o in self.meta.object_graph_def.nodes if o.WhichOneof("kind") == "constant"
        }
        for source in self.sources.values():
            shown = [n.name for place, n in (*source.reads, *source.moves) if not place]
            if source.kind != RESOURCE and not source.id[0]:
                shown.append(source.node.name)
            if source.dtype != FLOAT32:
                source.refused = f"its weights are {NAMES.get(source.dtype, 'of another type')}"
            elif source.shape is None:
                source.refused = "its shape is not fixed"
            elif source.kind == CONSTANT and source.node.name in captured and not source.id[0]:
                source.refused = "a constant that functions get as an argument"
            elif source.kind != CONSTANT and (source.key is None or source.key not in self._known):
                source.refused = source.refused or "nothing restores it from the checkpoint"
            elif fetched & set(shown):
                source.refused = "a signature returns the weights themselves"


def _place(scope: Scope, node: Any) -> str:
    return f"{scope.name}/{node.name}" if scope.name else str(node.name)


def _takes_reference(node: Any, index: int) -> bool:
    """True where an operator wants the variable itself at this input, not its value."""
    known = definition(node.op)
    arguments = list(known.input_arg) if known is not None else []
    plain = not any(a.number_attr or a.type_list_attr for a in arguments)
    return plain and index < len(arguments) and bool(arguments[index].is_ref)


def _initializers(meta: Any) -> set[str]:
    """Names of the nodes that set variables to their first values (TensorFlow 1)."""
    from tensorflow.core.framework.variable_pb2 import VariableDef

    found = set()
    for collection in meta.collection_def.values():
        for raw in _bytes(collection):
            try:
                found.add(VariableDef.FromString(raw).initializer_name)
            except Exception:  # other collections hold other messages
                continue
    return {name.split(":")[0] for name in found if name}


def _bytes(collection: Any) -> Iterable[bytes]:
    return collection.bytes_list.value if collection.WhichOneof("kind") == "bytes_list" else ()
