"""Applies solved edits: operators read and write their new grids, conversions appear where two forms meet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from paring.compress.base import Encoded
from paring.edits import Edit, Port
from paring.errors import UnsupportedError
from paring.formats.tflite.constants import quantization_of, type_name
from paring.formats.tflite.draft import Draft
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.schema import ENUMS
from paring.formats.tflite.versions import oldest_runtime
from paring.graph import Graph, OpId, Quantization, TensorId

ACTIVATIONS = {1: ("RELU", 1), 2: ("RELU_N1_TO_1", 1), 3: ("RELU6", 1), 4: ("TANH", 1)}


def apply(
    model: TfliteModel,
    graph: Graph,
    edits: tuple[Edit, ...],
    borders: Mapping[TensorId, Quantization],
    record: Mapping[str, Any] | None = None,
    floors: Iterable[str] = (),
) -> TfliteModel:
    """The edited model; the source is not changed.

    Args:
      model: The source.
      graph: The Graph the edits were made for (it says which conversions were looked through).
      edits: At most one per operator.
      borders: Integer grids of graph inputs and outputs.
      record: What to note in the file's metadata.
      floors: Releases that the result needs for other reasons than its operators' versions.

    Raises:
      UnsupportedError: An edit that this format cannot make; nothing is written.
    """
    draft = Draft(model)
    by_op = {edit.op: edit for edit in edits}
    ops = {op.id: op for op in graph.ops}
    for number in range(len(draft.subgraphs)):
        _Subgraph(draft, graph, number, borders).rewrite(by_op, ops)
    if record is not None:
        draft.metadata("paring", json.dumps(record, sort_keys=True).encode())
        draft.drop_dead()
        runtime = oldest_runtime(versions_of(draft.root, model), floors)
        draft.metadata("min_runtime_version", runtime.encode().ljust(16, b"\0") if runtime is not None else b"")
    return draft.finish()


def set_constants(model: TfliteModel, values: Mapping[TensorId, np.ndarray]) -> TfliteModel:
    """The model with new float32 values for constants, also for those that were unpacked from another form.

    Args:
      model: The source; it is not changed.
      values: By tensor as the Graph names it, in the shape it has there.
    """
    draft = Draft(model)
    for number, subgraph in enumerate(draft.subgraphs):
        place = {}
        for index in (t for n, t in values if n == number):
            like, array = subgraph.tensors[index], np.ascontiguousarray(values[number, index], np.float32)
            place[index] = draft.constant(number, like, like.name, Encoded(array, "float32", None))
        for operator in subgraph.operators or () if place else ():
            if not any(int(i) in place for i in operator.outputs):
                operator.inputs = np.array([place.get(int(i), int(i)) for i in operator.inputs], np.int32)
    changed = draft.finish()
    changed.notes, changed.folder = model.notes, model.folder
    return changed


def moved(changed: TfliteModel, graph: Graph) -> dict[OpId, OpId]:
    """Where operators of `graph` are in a model that was made from its own: found by what they make, else by their order."""
    makers = makers_of(changed)
    kept = [(op, op.outputs[0]) for op in graph.ops if op.outputs and op.outputs[0][1] in changed.places[op.id[0]]]
    found = {op.id: makers[n, changed.places[n][tensor]] for op, (n, tensor) in kept}
    for number, subgraph in enumerate(changed.subgraphs):
        silent = [(number, place) for place, operator in enumerate(subgraph.operators) if not len(operator.outputs)]
        found |= zip((op.id for op in graph.ops if op.id[0] == number and not op.outputs), silent, strict=True)
    return found


def makers_of(model: TfliteModel) -> dict[TensorId, OpId]:
    """The operator that makes each tensor."""
    return {
        (number, int(tensor)): (number, position)
        for number, subgraph in enumerate(model.subgraphs)
        for position, operator in enumerate(subgraph.operators or ())
        for tensor in operator.outputs
    }


def versions_of(root: Table, model: TfliteModel) -> list[tuple[str, int]]:
    """(operator, version) of every builtin operator in use."""
    probe = TfliteModel(root, model.data, model.path)
    found = {(probe.native(op), probe.opcode(op).version) for s in root.subgraphs for op in s.operators or ()}
    return sorted(pair for pair in found if not pair[0].startswith("CUSTOM"))


class _Subgraph:
    """Rewrites one subgraph. Every tensor has a form it is made in; readers that want another get a conversion."""

    def __init__(self, draft: Draft, graph: Graph, number: int, borders: Mapping[TensorId, Quantization]) -> None:
        self.draft, self.graph, self.number, self.borders = draft, graph, number, borders
        self.table = draft.subgraphs[number]
        self.made: dict[int, Quantization | None] = {}
        self.place: dict[int, int] = {}
        self.copies: dict[tuple[int, Any], int] = {}
        self.constants: dict[tuple[int, int, bool], int] = {}
        self.out: list[Table] = []

    def rewrite(self, edits: Mapping[OpId, Edit], ops: Mapping[OpId, Any]) -> None:
        operators = list(self.table.operators or ())
        for index in _list(self.table.inputs):
            self.make_input(index)
        for position, operator in enumerate(operators):
            op_id = (self.number, position)
            edit = edits.get(op_id)
            self.read(operator, ops[op_id].inputs, edit)
            self.out.append(operator)
            if edit is not None:
                self.write(operator, edit)
        outputs = [self.read_output(index) for index in _list(self.table.outputs)]
        self.retarget(_list(self.table.outputs), outputs)
        self.table.outputs = np.array(outputs, np.int32)
        self.table.operators = self.out

    # -- borders -------------------------------------------------------------------------------------------------

    def make_input(self, index: int) -> None:
        grid = self.borders.get((self.number, index))
        if grid is None:
            return
        table = self.table.tensors[index]
        table.type = ENUMS["TensorType"][grid.dtype.upper()]
        self.draft.set_grid(self.number, table, grid)
        self.made[index] = grid
        if grid.dtype == "uint8":  # kernels are int8: a QUANTIZE shifts the zero point
            signed = Quantization(grid.scale, grid.zero_point - 128, "int8")
            copy = self.convert(index, index, grid, signed)
            self.made[index], self.place[index] = signed, copy

    def read_output(self, index: int) -> int:
        return self.wanted(index, self.borders.get((self.number, index)) or self.source_form(index))

    def retarget(self, old: list[int], new: list[int]) -> None:
        """Outputs keep their names and signatures when a conversion took their place."""
        moved = {a: b for a, b in zip(old, new, strict=True) if a != b}
        for a, b in moved.items():
            before, after = self.table.tensors[a], self.table.tensors[b]
            name = before.name
            before.name, after.name = f"{name}_{type_name(before)}", name
        for signature in self.draft.root.signature_defs or ():
            if signature.subgraph_index == self.number:
                for entry in signature.outputs or ():
                    entry.tensor_index = moved.get(entry.tensor_index, entry.tensor_index)

    # -- operators -----------------------------------------------------------------------------------------------

    def read(self, operator: Table, sources: tuple[TensorId | None, ...], edit: Edit | None) -> None:
        ids = [s[1] if s is not None else -1 for s in sources]
        for position, index in enumerate(ids):
            if index < 0:
                continue
            port = edit.inputs.get(position) if edit is not None else None
            if port is not None and port.state:
                self.retype(index, port.grid)
            elif port is not None and port.encoded is not None:
                ids[position] = self.constant(index, port)
            else:
                ids[position] = self.wanted(index, port.grid if port is not None else self.source_form(index))
        operator.inputs = np.array(ids, np.int32)

    def form(self, index: int) -> Quantization | None:
        """The grid that a tensor is made in, None for float32 and for what carries no real numbers."""
        return self.made[index] if index in self.made else self.source_form(index)

    def source_form(self, index: int) -> Quantization | None:
        """The same in the source model: what an unchanged operator reads."""
        subgraph = self.draft.source.subgraphs[self.number]
        if index >= len(subgraph.tensors):
            return None
        return quantization_of(self.draft.source, subgraph, subgraph.tensors[index])

    def write(self, operator: Table, edit: Edit) -> None:
        native = self.draft.source.native(self.draft.source.subgraphs[self.number].operators[edit.op[1]])
        operator.opcode_index = self.draft.code(native, edit.version)
        if operator.builtin_options is not None:
            for name, value in edit.params.items():
                setattr(operator.builtin_options, name, value)
        for position, port in edit.outputs.items():
            self.retype(int(operator.outputs[position]), port.grid)
        if edit.inner:
            scalar = Table("Tensor", shape=np.zeros(0, np.int32))
            name = self.table.tensors[int(operator.outputs[0])].name
            operator.intermediates = np.array(
                [self.draft.tensor(self.number, scalar, f"{name}/{i}", g.dtype, g) for i, g in enumerate(edit.inner)],
                np.int32,
            )
        if edit.unfuse:
            self.unfuse(operator)

    def retype(self, index: int, grid: Quantization | None) -> None:
        assert grid is not None
        table = self.table.tensors[index]
        table.type = ENUMS["TensorType"][grid.dtype.upper()]
        self.draft.set_grid(self.number, table, grid)
        self.made[index] = grid

    def unfuse(self, operator: Table) -> None:
        activation = operator.builtin_options.fused_activation_function if operator.builtin_options is not None else 0
        if not activation:
            return
        if activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"cannot take activation {activation} out of an operator of {self.draft.source.path}"
            )
        operator.builtin_options.fused_activation_function = 0
        index = int(operator.outputs[0])
        table = self.table.tensors[index]
        raw = self.draft.tensor(self.number, table, f"{table.name}_linear", type_name(table), None)
        operator.outputs = np.array([raw], np.int32)
        name, version = ACTIVATIONS[activation]
        self.out.append(self.draft.operator(name, version, [raw], [index]))

    # -- tensors -------------------------------------------------------------------------------------------------

    def constant(self, index: int, port: Port) -> int:
        assert port.encoded is not None
        key = (index, id(port.encoded.values), port.unpack)
        if key not in self.constants:
            like = self.table.tensors[index]
            stored = self.draft.constant(self.number, like, like.name or f"tensor{index}", port.encoded)
            if port.unpack:
                table = self.table.tensors[stored]
                copy = self.draft.tensor(self.number, like, f"{table.name}_dequantized", "float32", None)
                self.out.append(self.conversion(stored, copy))
                stored = copy
            self.constants[key] = stored
        return self.constants[key]

    def wanted(self, index: int, grid: Quantization | None) -> int:
        """The tensor that carries the value of `index` in the wanted form."""
        made = self.form(index)
        here = self.place.get(index, index)
        if (grid is None and made is None) or (grid is not None and grid.same_grid(made)):
            return here
        key = (index, None if grid is None else (grid.dtype, float(grid.scale[0]), int(grid.zero_point[0])))
        if key not in self.copies:
            self.copies[key] = self.convert(index, here, made, grid)
        return self.copies[key]

    def convert(self, index: int, here: int, made: Quantization | None, grid: Quantization | None) -> int:
        like = self.table.tensors[index]
        dtype = grid.dtype if grid is not None else "float32"
        suffix = "dequantized" if grid is None else "quantized" if made is None else "requantized"
        copy = self.draft.tensor(self.number, like, f"{like.name}_{suffix}", dtype, grid)
        self.out.append(self.conversion(here, copy))
        return copy

    def conversion(self, source: int, target: int) -> Table:
        a, b = (type_name(self.table.tensors[i]) for i in (source, target))
        if b == "float32":
            version = {"float16": 3, "int16": 3, "int4": 6}.get(a, 2)
            return self.draft.operator("DEQUANTIZE", version, [source], [target], Table("DequantizeOptions"))
        version = 2 if ("int16" in (a, b) and a != b) or a == b == "int16" else 1
        return self.draft.operator("QUANTIZE", version, [source], [target], Table("QuantizeOptions"))


def _list(values: Any) -> list[int]:
    return [] if values is None else [int(v) for v in values]
