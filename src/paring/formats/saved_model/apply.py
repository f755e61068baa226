"""Stores weights in fewer bits: variables change their type and nothing else, and what reads them converts.

A variable keeps its name, handle, key and place in the object graph, so no signature, call or loop changes. Scales are
constants beside each reader. Where paring's own operator is to read the variable, nothing is converted (`native`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as new
from types import MappingProxyType
from typing import Any

import numpy as np

from paring.formats.saved_model.axes import along
from paring.formats.saved_model.clone import separate
from paring.formats.saved_model.flow import CONSTANT, RESOURCE, End, Flow, Source, Use
from paring.formats.saved_model.loops import Loops
from paring.formats.saved_model.model import SavedModel
from paring.formats.saved_model.native import Seat, dense, factors, put, seat, shortened
from paring.formats.saved_model.operators import ROWS, picked
from paring.formats.saved_model.scope import BFLOAT16, FLOAT16, FLOAT32, INT8, INT32, Scope, field, result_type
from paring.formats.saved_model.share import share
from paring.formats.saved_model.tables import pick

TYPES = {"int8": INT8, "bfloat16": BFLOAT16, "float16": FLOAT16, "float32": FLOAT32}
SourceId = tuple[str, str]
Place = tuple[str, str, int]
"""A function, a node of it, and one of the node's inputs."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as it is stored from now on.

    Attributes:
      form: `int8`, `bfloat16` or `float16`; `float32` for other values in the same type.
      codes: In the weight's layout; bfloat16 as its bits in uint16. Packed: int8 [bytes].
      scale: float32 of the weight's rank, 1 in each dimension that shares one; None for floats. Packed: [outputs].
      rows: Each row of the codes ends in its scale (`tables`).
      kind: `int4`, `sparse float32` or `sparse int8` where the codes are packed, for paring's operators alone; else empty.
    """

    form: str
    codes: np.ndarray = new(repr=False)
    scale: np.ndarray | None = new(default=None, repr=False)
    kind: str = ""
    rows: bool = False

    @property
    def packed(self) -> bool:
        """Whether the codes are bytes that only paring's operators read."""
        return bool(self.kind)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the variable from now on; None where it keeps its own."""
        return self.codes.shape if self.packed or self.rows else None

    @property
    def type(self) -> int:
        """TensorFlow's number of the type."""
        return TYPES[self.form]

    def array(self) -> np.ndarray:
        """The codes as TensorFlow takes them."""
        if self.form != "bfloat16":
            return self.codes
        from tensorflow import bfloat16

        return self.codes.view(bfloat16.as_numpy_dtype)


def apply(
    model: SavedModel,
    stored: Mapping[SourceId, Stored],
    rounded: Iterable[tuple[str, str, tuple[int, ...]]],
    twins: Mapping[SourceId, SourceId],
    native: Mapping[Place, bool] = MappingProxyType({}),
    shifts: Mapping[Place, np.ndarray] = MappingProxyType({}),
) -> SavedModel:
    """The model with weights stored anew.

    Args:
      model: What to change; stays as it is.
      stored: By weight what it becomes; twins share one.
      rounded: (function, node, inputs that are weights) of operators that round what they multiply with these to bfloat16.
      twins: Variables that hold the same as another, which is stored for both.
      native: Where paring's operators read what is stored, and whether they are to make what it meets int8.
      shifts: What is added to the products at some places, in the weight's rank.
    """
    changed = model.changed()
    copies = separate(changed, lambda id_: None if (it := stored.get(id_)) is None or it.type == FLOAT32 else it)
    originals: dict[str, list[str]] = {}
    for copy, original in copies.items():
        originals.setdefault(original, []).append(copy)
    writer = _Writer(changed, stored)
    added = [
        (*place[:2], values)
        for (name, node, index), shift in shifts.items()
        for place in ((name, node, index), *((copy, node, index) for copy in originals.get(name, ())))
        if (values := writer.behind(place, shift)) is not None
    ]  # as the operators are before they change
    rounding = {(place, n): w for name, n, w in rounded for place in (name, *originals.get(name, ()))}
    seats = writer.seats(
        {(place, n, i): d for (name, n, i), d in native.items() for place in (name, *originals.get(name, ()))}
    )
    added = [
        (*place[:2], values)
        for (name, node, index), shift in shifts.items()
        for place in ((name, node, index), *((copy, node, index) for copy in originals.get(name, ())))
        if (values := writer.behind(place, shift)) is not None
    ]  # as the operators are before they change
    for name, node, weights in ((*at, w) for at, w in rounding.items()):
        if not any((name, node, index) in seats for index in weights):
            writer.round(writer.flow.scopes[name], writer.flow.scopes[name].by_name[node], weights)
    for (name, node, index), (found, scale, weight, dynamic) in seats.items():
        scope = writer.flow.scopes[name]
        put(
            scope, scope.by_name[node], index, found, scale,
            packed=weight.packed, rounded=(name, node) in rounding, dynamic=dynamic,
        )  # fmt: skip
    for source in list(writer.flow.sources.values()):
        if source.id in stored:
            writer.store(source, stored[source.id])
    for name, node, values in added:
        writer.add(writer.flow.scopes[name], node, values)
    written: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    for id_, weight in stored.items():
        source = writer.flow.sources[id_]
        if source.key is not None:
            written[source.key], sizes[source.key] = weight.array, weight.codes.nbytes
    changed.dropped = frozenset(share(changed, writer.flow, twins, written))
    changed.values, changed.sizes = written, sizes
    vars(changed).pop("flow")
    return changed


def taken(flow: Flow, source: Source, use: Use, stored: Stored) -> tuple[Seat, np.ndarray] | str:
    """How paring's operator reads what is stored, and the scales that it gets; or why it does not."""
    found = seat(flow, source, use)
    if isinstance(found, str):
        return found
    if stored.packed:
        assert stored.scale is not None
        return found, stored.scale
    if stored.form != "int8":
        return f"nothing native multiplies with {stored.form}"
    if why := dense(found):
        return why
    assert source.shape is not None and stored.scale is not None
    scale = along(stored.scale, source.shape, found.axes)
    given = None if scale is None else factors(found, scale, flow.scopes[use.scope].by_name[use.node], use.input)
    return "its scales are those of another operator's channels" if given is None else (found, given)


class _Writer:
    def __init__(self, model: SavedModel, stored: Mapping[SourceId, Stored]) -> None:
        self.model, self.stored = model, stored
        self.flow: Flow = model.flow
        ends = [end for source in self.flow.sources.values() for end in source.ends]
        self.places = {id(e): (e.scope, e.node.name if e.node is not None else e.value, e.input) for e in ends}
        self.done: set[Place] = set()
        self.loops = Loops(self.flow)
        self.carried: dict[tuple[str, str], str] = {}

    def seats(self, native: Mapping[Place, bool]) -> dict[Place, tuple[Seat, np.ndarray, Stored, bool]]:
        """Where paring's operators take over, with their scales; these places are done with then."""
        found: dict[Place, tuple[Seat, np.ndarray, Stored, bool]] = {}
        for source in self.flow.sources.values():
            for use in source.uses if source.id in self.stored else ():
                place, stored = (use.scope, use.node, use.input), self.stored[source.id]
                if (
                    place in native
                    and place not in found
                    and not isinstance(it := taken(self.flow, source, use, stored), str)
                ):
                    found[place] = (*it, stored, native[place])
        self.done |= set(found)
        return found

    # -- activations -----------------------------------------------------------------------------------------------

    def round(self, scope: Scope, node: Any, weights: tuple[int, ...]) -> None:
        """Rounds what meets the weights to bfloat16; the product stays float32."""
        for index in ROWS[node.op].data:
            kind = field(node, "T").type or field(node, "Tb" if index else "Ta").type  # BatchMatMulV3 has one for each
            if index not in weights and kind == FLOAT32 and not shortened(scope, node.input[index]):
                short = scope.add(f"{node.name}/bfloat16", "Cast", [node.input[index]], SrcT=FLOAT32, DstT=BFLOAT16)
                back = scope.add(f"{node.name}/rounded", "Cast", [scope.value(short)], SrcT=BFLOAT16, DstT=FLOAT32)
                scope.connect(node, index, scope.value(back))

    def behind(self, place: Place, shift: np.ndarray) -> np.ndarray | None:
        """What is added per channel of a weight, laid out for the product; None where it cannot be."""
        for source in self.flow.sources.values():
            for use in source.uses if source.id in self.stored else ():
                if (use.scope, use.node, use.input) == place and use.axes is not None and source.shape is not None:
                    values = along(shift, source.shape, use.axes)
                    node = self.flow.scopes[use.scope].by_name[use.node]
                    shape = tuple(int(np.prod([source.shape[d] for d in group], dtype=np.int64)) for group in use.axes)
                    if values is not None and result_type(node, 0) == FLOAT32:
                        return ROWS[node.op].after(node, use.input, values, shape)
        return None

    def add(self, scope: Scope, name: str, values: np.ndarray) -> None:
        """Adds a constant to what an operator gives, and takes over its name."""
        node = scope.by_name[name]
        name, take = scope.follow(node, "unshifted")
        shift = scope.constant_node(f"{name}/shift", np.ascontiguousarray(values, np.float32), node)
        take(scope.add(name, "AddV2", [scope.value(node), shift], T=FLOAT32))

    # -- weights ---------------------------------------------------------------------------------------------------

    def store(self, source: Source, stored: Stored) -> None:
        """Gives a weight its new type, wherever it is made, read, moved, saved and restored."""
        number = stored.type
        if number == FLOAT32:
            if source.kind == CONSTANT:
                self._set_constant(source, stored)
            return
        source.node.attr["dtype"].type = number
        for _, node in source.reads:
            node.attr["dtype"].type = number
        for name, node in (*source.moves, *source.looks):
            if self.flow.scopes[name].holds(node):
                node.attr["T"].type = number
        if stored.shape is not None:
            self._reshape(source, stored.shape)
        for _, node, index in source.saves:
            node.attr["dtypes"].list.type[index] = number
        for name, node in source.assigns:
            self._assign(self.flow.scopes[name], node, source, stored)
        if source.kind == CONSTANT:
            self._set_constant(source, stored)
        if source.object is not None:
            variable = self.model.meta.object_graph_def.nodes[source.object].variable
            variable.dtype, variable.trainable = number, False
            if stored.shape is not None:
                _set_shape(variable.shape, stored.shape)
        self._annotate(source, number, stored.shape)
        for end in source.ends:
            if (place := self.places[id(end)]) not in self.done:  # twins are read by the same nodes
                self.done.add(place)
                if end.node is None or self.flow.scopes[end.scope].holds(end.node):
                    self._convert(self.flow.scopes[end.scope], end, source, stored)

    def _set_constant(self, source: Source, stored: Stored) -> None:
        from tensorflow import make_tensor_proto

        source.node.attr["value"].tensor.CopyFrom(make_tensor_proto(stored.array()))

    def _reshape(self, source: Source, shape: tuple[int, ...]) -> None:
        """The variable has another shape from now on, wherever the file says it."""
        if source.kind != CONSTANT:
            _set_shape(source.node.attr["shape"].shape, shape)
        nodes = [node for _, node in (*source.reads, *source.moves)]
        if source.kind != RESOURCE:
            nodes += [source.node, *(node for _, node in source.assigns)]
        for known in (known for node in nodes for known in field(node, "_output_shapes").list.shape):
            _set_shape(known, shape)

    def _annotate(self, source: Source, number: int, shape: tuple[int, ...] | None) -> None:
        """Arguments may say what type and shape their variable has."""
        for (name, value), ids in self.flow.handles.items():
            scope = self.flow.scopes[name]
            if source.id in ids and scope.function is not None and value in scope.arguments:
                index = scope.arguments.index(value)
                if index in scope.function.arg_attr:
                    attributes = scope.function.arg_attr[index].attr
                    if "_handle_dtypes" in attributes:
                        attributes["_handle_dtypes"].list.type[0] = number
                    if "_handle_shapes" in attributes and shape is not None:
                        _set_shape(attributes["_handle_shapes"].list.shape[0], shape)

    def _assign(self, scope: Scope, node: Any, source: Source, stored: Stored) -> None:
        """What sets the variable gives its new type: a restore reads it, a first value is rounded."""
        node.attr["dtype" if source.kind == RESOURCE else "T"].type = stored.type
        value = node.input[1]
        maker, index = scope.source(value)
        if maker is not None and maker.op == "RestoreV2":
            maker.attr["dtypes"].list.type[index] = stored.type
            step, _ = scope.maker(value)
            while step.op == "Identity":
                step.attr["T"].type = stored.type
                _forget_shape(step, 0, stored)
                step, _ = scope.maker(step.input[0])
            _forget_shape(maker, index, stored)
            return
        if self._copies(scope, node, stored):
            return
        direct, _ = scope.maker(value)
        if direct is not None and direct.op == "Const" and len(scope.users[scope.canonical(value)]) == 1:
            from tensorflow import make_tensor_proto

            direct.attr["dtype"].type = stored.type  # the first value is not the restored one, so it may be that, too
            direct.attr["value"].tensor.CopyFrom(make_tensor_proto(stored.array()))
            if stored.shape is not None:
                for known in field(direct, "_output_shapes").list.shape:
                    _set_shape(known, stored.shape)
            return
        if stored.shape is not None:  # nothing in a graph packs: an operator's clear error, or a table of zeros
            size = scope.add(f"{node.name}/size", "Const", [], dtype=INT32, value=np.array(stored.shape, np.int32))
            zero = scope.add(f"{node.name}/zero", "Const", [], dtype=INT8, value=np.zeros((), np.int8))
            empty = scope.add(
                f"{node.name}/empty", "Fill", [scope.value(size), scope.value(zero)], T=INT8, index_type=INT32
            )
            scope.connect(node, 1, scope.value(empty))
            return
        if stored.scale is not None:
            inverse = scope.add(f"{node.name}/inverse", "Const", [], dtype=FLOAT32, value=1 / stored.scale)
            scaled = scope.add(f"{node.name}/scaled", "Mul", [value, scope.value(inverse)], T=FLOAT32)
            value = scope.value(scope.add(f"{node.name}/rounded", "Round", [scope.value(scaled)], T=FLOAT32))
        cast = scope.add(f"{node.name}/{stored.form}", "Cast", [value], SrcT=FLOAT32, DstT=stored.type)
        scope.connect(node, 1, scope.value(cast))

    def _copies(self, scope: Scope, node: Any, stored: Stored) -> bool:
        """True where one variable's first value is another's, and both are stored alike."""
        maker, _ = scope.source(node.input[1])
        if maker is None or maker.op != "ReadVariableOp":
            return False
        ids = self.flow.handles.get((scope.name, scope.canonical(maker.input[0])), set())
        return bool(ids) and all(self.stored.get(id_) is stored for id_ in ids)

    def _convert(self, scope: Scope, end: End, source: Source, stored: Stored) -> None:
        """Floats, where floats are wanted: the product is scaled where that can be, else the weight."""
        node = end.node
        assert source.shape is not None
        if node is not None and node.op in ("Assign", "AssignVariableOp") and self._copies_into(scope, node, stored):
            return
        scale = None if stored.scale is None else along(stored.scale, source.shape, end.axes)
        if node is None:
            made = self._floats(scope, end.value, [], f"{end.value.split(':')[0]}/float", scale, stored)
            scope.rename_returned(end.value, made)
            return
        row = ROWS.get(node.op) if end.use is not None else None
        axis = picked(scope, node) if row is not None and row.picks else None
        if axis is not None and (scale is None or scale.shape[axis] > 1 or set(scale.shape[:axis]) <= {1}):
            self._pick(scope, node, axis, scale, stored)
            return
        if (handed := self._before_loop(scope, end, source.shape, stored)) is not None:
            scope.connect(node, end.input, handed)
            return
        held = scope.held(node, end.input) if row is not None else []
        after = None
        if row is not None and scale is not None and end.use is not None and end.use.kept is not None:
            shape = tuple(int(np.prod([source.shape[d] for d in group], dtype=np.int64)) for group in end.axes)
            after = row.after(node, end.input, scale, shape)
        if after is None:
            name = f"{node.name}/weight{end.input}"
            scope.connect(node, end.input, self._floats(scope, end.value, held, name, scale, stored))
            return
        cast = scope.add(f"{node.name}/float", "Cast", [end.value, *held], SrcT=stored.type, DstT=FLOAT32)
        scope.connect(node, end.input, scope.value(cast))
        name, take = scope.follow(node, stored.form)
        factor = scope.scale_node(f"{name}/scale", np.ascontiguousarray(after, np.float32), cast)
        take(scope.add(name, "Mul", [scope.value(node), factor], T=FLOAT32))

    def _before_loop(self, scope: Scope, end: End, shape: tuple[int, ...], stored: Stored) -> str | None:
        """What a loop's body reads, converted once before the loop; None where it is read outside of loops."""
        if (scope.name, end.value) not in self.carried:
            found = self.loops.around(scope, end.value)
            if found is None:
                return None
            outer, loop, handle = found
            name = f"{loop.name}/{scope.maker(end.value)[0].name.split('/')[-1]}"
            read = outer.add(name, "ReadVariableOp", [handle], dtype=stored.type)
            made = self._floats(outer, outer.value(read), outer.held(loop), f"{name}/weight", stored.scale, stored)
            self.carried[scope.name, end.value] = self.loops.carry(scope, made, shape)
        return self.carried[scope.name, end.value]

    def _copies_into(self, scope: Scope, node: Any, stored: Stored) -> bool:
        ids = self.flow.handles.get((scope.name, scope.canonical(node.input[0])), set())
        return bool(ids) and all(self.stored.get(id_) is stored for id_ in ids)

    def _floats(
        self, scope: Scope, value: str, held: list[str], name: str, scale: np.ndarray | None, stored: Stored
    ) -> str:
        cast = scope.add(f"{name}/float", "Cast", [value, *held], SrcT=stored.type, DstT=FLOAT32)
        if scale is None:
            return scope.value(cast)
        factor = scope.scale_node(f"{name}/scale", np.ascontiguousarray(scale, np.float32), cast)
        return scope.value(scope.add(name, "Mul", [scope.value(cast), factor], T=FLOAT32))

    def _pick(self, scope: Scope, node: Any, axis: int, scale: np.ndarray | None, stored: Stored) -> None:
        """Rows are picked as they are stored, and then converted."""
        node.attr["dtype" if node.op == "ResourceGather" else "Tparams"].type = stored.type
        name, take = scope.follow(node, stored.form)
        if stored.rows:
            pick(scope, node, stored.codes.shape[1] - 2, name, take)
            return
        rows = scope.value(node)
        if scale is None:
            take(scope.add(name, "Cast", [rows], SrcT=stored.type, DstT=FLOAT32))
            return
        cast = scope.add(f"{name}/float", "Cast", [rows], SrcT=stored.type, DstT=FLOAT32)
        if scale.shape[axis] == 1:
            factor = scope.scale_node(f"{name}/scale", scale.reshape(scale.shape[axis + 1 :]), node)
        else:
            table = scope.scale_node(f"{name}/scales", scale, node, cast=False)
            place = scope.constant_node(f"{name}/axis", np.asarray(axis, np.int32), node)
            kind = field(node, "Tindices").type
            number = field(scope.maker(table)[0], "dtype").type
            picked_scale = scope.add(
                f"{name}/scale", "GatherV2", [table, node.input[1], place], Tparams=number, Tindices=kind, Taxis=INT32
            )
            if number != FLOAT32:
                picked_scale = scope.add(
                    f"{name}/scale_float", "Cast", [scope.value(picked_scale)], SrcT=number, DstT=FLOAT32
                )
            factor = scope.value(picked_scale)
        take(scope.add(name, "Mul", [scope.value(cast), factor], T=FLOAT32))


def _forget_shape(node: Any, index: int, stored: Stored) -> None:
    """A restored value is as long as the file says."""
    known = field(node, "_output_shapes").list.shape
    if stored.shape is not None and index < len(known):
        known[index].Clear()
        known[index].unknown_rank = True


def _set_shape(shape: Any, sizes: tuple[int, ...]) -> None:
    shape.Clear()
    for size in sizes:
        shape.dim.add(size=size)
