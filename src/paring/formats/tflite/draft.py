"""A model being changed: adds tensors, buffers and operators to a clone, drops what nothing reads, gives a new model."""

from __future__ import annotations

from typing import Any

import numpy as np

from paring.compress.base import Encoded
from paring.compress.encodings import FORMS
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel, builtin_code, operator_code
from paring.formats.tflite.schema import ENUMS
from paring.graph import Quantization


class Draft:
    """A deep copy of a model's tables; weights are shared with the source until replaced."""

    def __init__(self, model: TfliteModel) -> None:
        """Clones `model`."""
        self.source = model
        self.root = model.root.clone()
        self._codes: dict[tuple[int, int], int] = {}
        self._buffers: dict[int, int] = {}
        self._keep: list[Any] = []

    @property
    def subgraphs(self) -> list[Table]:
        """The subgraphs, to be changed in place."""
        subgraphs: list[Table] = self.root.subgraphs
        return subgraphs

    def buffer(self, data: np.ndarray) -> int:
        """A new buffer with these bytes; the same array twice gives the same buffer."""
        if id(data) not in self._buffers:
            self._buffers[id(data)] = len(self.root.buffers)
            self._keep.append(data)  # so that its id stays its own
            raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            self.root.buffers.append(Table("Buffer", data=raw))
        return self._buffers[id(data)]

    def code(self, name: str, version: int) -> int:
        """The index of an operator code, added when new."""
        if not self._codes:
            for index, entry in enumerate(self.root.operator_codes or ()):
                if entry.custom_code is None:
                    self._codes.setdefault((builtin_code(entry), entry.version), index)
        key = (ENUMS["BuiltinOperator"][name], version)
        if key not in self._codes:
            self.root.operator_codes = self.root.operator_codes or []
            self._codes[key] = len(self.root.operator_codes)
            self.root.operator_codes.append(operator_code(name, version))
        return self._codes[key]

    def tensor(
        self, subgraph: int, like: Table, name: str, dtype: str, grid: Quantization | None, buffer: int = 0
    ) -> int:
        """A new tensor with the shape of `like` -> its index."""
        table = Table("Tensor", name=name, type=ENUMS["TensorType"][dtype.upper()], buffer=buffer)
        for field in ("shape", "shape_signature", "has_rank"):
            if field in like.__dict__:
                setattr(table, field, like.__dict__[field])
        self.set_grid(subgraph, table, grid)
        tensors = self.subgraphs[subgraph].tensors
        tensors.append(table)
        return len(tensors) - 1

    def set_grid(self, subgraph: int, table: Table, grid: Quantization | None) -> None:
        """Writes quantization parameters; block scales go into a tensor of their own, as LiteRT wants them."""
        table.__dict__.pop("quantization", None)
        if grid is None:
            return
        if grid.block:
            shape = np.array(grid.scale.shape, np.int32)
            scales = self.tensor(
                subgraph, Table("Tensor", shape=shape), f"{table.name}/scales", "float16", None,
                self.buffer(grid.scale.astype(np.float16)),
            )  # fmt: skip
            details = Table("BlockwiseQuantization", scales=scales, zero_points=-1, block_size=grid.block)
            kind = ENUMS["QuantizationDetails"]["BlockwiseQuantization"]
            table.quantization = Table(
                "QuantizationParameters", details_type=kind, details=details, quantized_dimension=0
            )
            return
        table.quantization = Table(
            "QuantizationParameters",
            scale=grid.scale.astype(np.float32),
            zero_point=grid.zero_point.astype(np.int64),
            quantized_dimension=grid.axis or 0,
        )

    def constant(self, subgraph: int, like: Table, name: str, encoded: Encoded) -> int:
        """A constant tensor that holds encoded values -> its index."""
        packed = encoded.values if encoded.form == "float32" else FORMS[encoded.form].pack(encoded.values)
        key = id(encoded.values)
        if key not in self._buffers:
            self._keep.append(encoded.values)
            self._buffers[key] = self.buffer(packed)
        dtype = "float32" if encoded.form == "float32" else FORMS[encoded.form].dtype
        return self.tensor(subgraph, like, name, dtype, encoded.grid, self._buffers[key])

    def operator(
        self, name: str, version: int, inputs: list[int], outputs: list[int], options: Table | None = None
    ) -> Table:
        """A new operator table; the caller places it."""
        table = Table("Operator", opcode_index=self.code(name, version))
        table.inputs, table.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        if options is not None:
            union = "builtin_options" if options.type_name in ENUMS["BuiltinOptions"] else "builtin_options2"
            enum = "BuiltinOptions" if union == "builtin_options" else "BuiltinOptions2"
            setattr(table, f"{union}_type", ENUMS[enum][options.type_name])
            setattr(table, union, options)
        return table

    def metadata(self, name: str, data: bytes) -> None:
        """Sets a metadata entry; without data it is taken out."""
        entries = [e for e in self.root.metadata or () if e.name != name]
        if data:
            entries.append(Table("Metadata", name=name, buffer=self.buffer(np.frombuffer(data, np.uint8).copy())))
        self.root.metadata = entries

    def drop_dead(self) -> None:
        """Takes out conversions whose results nothing reads."""
        for subgraph in self.subgraphs:
            _drop_dead_operators(self.source, self.root, subgraph)

    def finish(self) -> TfliteModel:
        """Drops operators whose results nothing reads, then unread tensors, buffers, operator codes; gives the model.

        Its `places` say where each tensor that is left went: by subgraph, draft index -> index in the model.
        """
        self.drop_dead()
        places = {n: _drop_unread_tensors(self.root, n, subgraph) for n, subgraph in enumerate(self.subgraphs)}
        _renumber_buffers(self.root)
        _renumber_codes(self.root)
        made = TfliteModel(self.root, self.source.data, self.source.path, self.source.archive)
        made.places = places
        return made


def _list(values: Any) -> list[int]:
    return [] if values is None else [int(v) for v in values]


def _drop_dead_operators(model: TfliteModel, root: Table, subgraph: Table) -> None:
    """Only conversions that constants used to need can die here; anything else may have an effect of its own."""
    mortal = {ENUMS["BuiltinOperator"][n] for n in ("DEQUANTIZE", "DENSIFY", "QUANTIZE", "FAKE_QUANT")}
    read = set(_list(subgraph.outputs))
    kept = []
    for operator in reversed(subgraph.operators or []):
        outputs = set(_list(operator.outputs))
        if builtin_code(root.operator_codes[operator.opcode_index]) in mortal and not outputs & read:
            continue
        read |= set(_list(operator.inputs))
        kept.append(operator)
    subgraph.operators = kept[::-1]


def _drop_unread_tensors(root: Table, number: int, subgraph: Table) -> dict[int, int]:
    tensors = subgraph.tensors or []
    used = set(_list(subgraph.inputs)) | set(_list(subgraph.outputs))
    for operator in subgraph.operators or ():
        for field in ("inputs", "outputs", "intermediates"):
            used |= set(_list(getattr(operator, field)))
    for signature in root.signature_defs or ():
        if signature.subgraph_index == number:
            used |= {e.tensor_index for e in (*(signature.inputs or ()), *(signature.outputs or ()))}
    used |= {i for i, t in enumerate(tensors) if t.is_variable}
    for index in list(used):
        q = tensors[index].quantization if index >= 0 else None
        if q is not None and q.details is not None and q.details.type_name != "CustomQuantization":
            used |= {q.details.scales, q.details.zero_points}
    used.discard(-1)
    order = sorted(used)
    place = {old: new for new, old in enumerate(order)} | {-1: -1}
    if len(order) == len(tensors):
        return place
    subgraph.tensors = [tensors[i] for i in order]

    def moved(values: Any) -> np.ndarray:
        return np.array([place[v] for v in _list(values)], np.int32)

    for field in ("inputs", "outputs"):
        setattr(subgraph, field, moved(getattr(subgraph, field)))
    for operator in subgraph.operators or ():
        for field in ("inputs", "outputs", "intermediates"):
            if getattr(operator, field) is not None:
                setattr(operator, field, moved(getattr(operator, field)))
    for signature in root.signature_defs or ():
        if signature.subgraph_index == number:
            for entry in (*(signature.inputs or ()), *(signature.outputs or ())):
                entry.tensor_index = place[entry.tensor_index]
    for tensor in subgraph.tensors:
        q = tensor.quantization
        if q is not None and q.details is not None and q.details.type_name != "CustomQuantization":
            q.details.scales, q.details.zero_points = place[q.details.scales], place.get(q.details.zero_points, -1)
    return place


def _renumber_buffers(root: Table) -> None:
    used = {0} | {t.buffer for s in root.subgraphs for t in s.tensors or ()} | {e.buffer for e in root.metadata or ()}
    used |= set(_list(root.metadata_buffer))
    order = sorted(used)
    place = {old: new for new, old in enumerate(order)}
    root.buffers = [root.buffers[i] for i in order]
    for subgraph in root.subgraphs:
        for tensor in subgraph.tensors or ():
            if tensor.buffer:
                tensor.buffer = place[tensor.buffer]
    for entry in root.metadata or ():
        entry.buffer = place[entry.buffer]
    if root.metadata_buffer is not None:
        root.metadata_buffer = np.array([place[i] for i in _list(root.metadata_buffer)], np.int32)


def _renumber_codes(root: Table) -> None:
    used = sorted({op.opcode_index for s in root.subgraphs for op in s.operators or ()})
    place = {old: new for new, old in enumerate(used)}
    root.operator_codes = [root.operator_codes[i] for i in used]
    for subgraph in root.subgraphs:
        for operator in subgraph.operators or ():
            operator.opcode_index = place[operator.opcode_index]
