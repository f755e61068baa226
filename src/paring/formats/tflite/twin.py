"""Instruments a quantized model so that each operator can be held against its own arithmetic.

Beside every quantized operator stands its float twin: the same operator on the dequantized values of the very integers
that the operator reads, weights and bias decoded. Both results become outputs; their difference is the operator's own error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paring.compress.base import Encoded
from paring.compress.encodings import decode
from paring.formats.tflite.constants import constant_weight, quantization_of, type_name
from paring.formats.tflite.draft import Draft
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.operators import TABLE, Row
from paring.graph import Quantization

INTEGER = ("int8", "uint8", "int16", "int4")
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE", "DENSIFY", "FAKE_QUANT")


@dataclass(frozen=True)
class Probe:
    """One operator under test: its result and its twin's are outputs `place` and `place + 1` of the instrumented model.

    Attributes:
      name: Operator name.
      native: LiteRT's operator name.
      place: Output position.
      grid: The grid of its result, None for a float result.
      quanta: Allowed difference in quanta of a static operator.
      reach: Dynamic operators: per output channel the sum of absolute weights, which times the input's quantum bounds
        the error that run-time quantization may make; None for static ones.
      source: Output position of the dynamic operator's input.
    """

    name: str
    native: str
    place: int
    grid: Quantization | None
    quanta: int
    reach: np.ndarray | None = None
    source: int = -1


def instrument(
    model: TfliteModel, subgraph: int = 0, only: Sequence[int] | None = None
) -> tuple[TfliteModel, list[Probe]]:
    """A model whose outputs are those of `model`, then for each quantized operator its result and its twin's.

    Args:
      model: The quantized model.
      subgraph: Which subgraph.
      only: Operator positions; all by default.
    """
    return _Instrument(model, subgraph).build(only)


class _Instrument:
    def __init__(self, model: TfliteModel, number: int) -> None:
        self.model, self.number = model, number
        self.draft = Draft(model)
        self.table = self.draft.subgraphs[number]
        self.floats: dict[int, int] = {}
        self.constants: dict[int, int] = {}
        self.out: list[Table] = []

    def build(self, only: Sequence[int] | None) -> tuple[TfliteModel, list[Probe]]:
        outputs = [int(i) for i in self.table.outputs]
        probes: list[Probe] = []
        for position, operator in enumerate(list(self.table.operators or ())):
            self.out.append(operator)
            row = TABLE.get(self.model.native(operator))
            if row is None or row.op in _CONVERSIONS or (only is not None and position not in only):
                continue
            probe = self.probe(operator, row, outputs)
            if probe is not None:
                probes.append(probe)
        self.table.operators = self.out
        self.table.outputs = np.array(outputs, np.int32)
        self.draft.root.signature_defs = None
        return self.draft.finish(), probes

    def tensor(self, index: int) -> Table:
        table: Table = self.table.tensors[index]
        return table

    def probe(self, operator: Table, row: Row, outputs: list[int]) -> Probe | None:
        ins = [int(i) for i in operator.inputs]
        result = int(operator.outputs[0])
        integers = [i for i in ins if i >= 0 and type_name(self.tensor(i)) in INTEGER and self.grid(i) is not None]
        count = range(len(operator.outputs))
        real = count[row.out] if isinstance(row.out, slice) else row.out
        grid = self.grid(result) if 0 in real else None
        kind = type_name(self.tensor(result))
        if not integers or (
            0 in real and kind != "float32" and (kind not in ("int8", "int16", "uint8") or grid is None)
        ):
            return None
        biases = {row.bias, *(w.bias for w in row.weights)}
        weights = {w.input: w for w in row.weights}
        twin_ins = [
            self.own(i) if i >= 0 and self.tensor(i).is_variable
            else self.float_of(i) if i >= 0 and (i in integers or p in biases) else i
            for p, i in enumerate(ins)
        ]  # fmt: skip
        made = [self.tensor(int(o)) for o in operator.outputs]
        twin_outs = [
            self.draft.tensor(self.number, t, f"{t.name}_twin", "float32" if i in real else type_name(t), None)
            for i, t in enumerate(made)
        ]
        twin = operator.clone()
        twin.opcode_index = self.draft.code(row.op, row.versions.get("float", 1))
        twin.intermediates = None
        twin.inputs, twin.outputs = np.array(twin_ins, np.int32), np.array(twin_outs, np.int32)
        if twin.builtin_options is not None and "weights_format" in twin.builtin_options.__dict__:
            twin.builtin_options.weights_format = 0
        self.out.append(twin)
        reach, source = None, -1
        if grid is None and weights and 0 in real:
            found = next((w for w in row.weights if w.input < len(ins) and ins[w.input] in integers), None)
            if found is None:
                return None
            values = np.abs(self.values(ins[found.input]))
            axis = None if found.axis is None else found.axis % values.ndim
            reach = values.sum(
                axis=tuple(d for d in range(values.ndim) if d != axis) if axis is not None else None, dtype=np.float64
            )
            data = [
                i
                for p, i in enumerate(ins)
                if i >= 0 and p not in weights and p != row.bias and type_name(self.tensor(i)) == "float32"
            ]
            if data:
                source = len(outputs)
                outputs.append(data[0])
        place = len(outputs)
        outputs += [result, twin_outs[0]]
        name = self.tensor(result).name or f"{row.op}@{result}"
        quanta = row.quanta16 if grid is not None and grid.dtype == "int16" else row.quanta
        return Probe(name, row.op, place, grid, quanta, None if reach is None else np.atleast_1d(reach), source)

    def grid(self, index: int) -> Quantization | None:
        return quantization_of(self.model, self.table, self.tensor(index))

    def values(self, index: int) -> np.ndarray:
        weight = constant_weight(self.model, self.tensor(index))
        assert weight is not None
        codes = np.asarray(weight.read())
        grid = self.grid(index)
        return codes.astype(np.float32) if grid is None else decode(codes, grid)

    def own(self, index: int) -> int:
        """A float variable for the twin: what an operator keeps for itself it writes to."""
        place = self.draft.tensor(self.number, self.tensor(index), f"{self.tensor(index).name}_twin", "float32", None)
        self.tensor(place).is_variable = True
        return place

    def float_of(self, index: int) -> int:
        """The dequantized value of a tensor: a decoded constant, or a DEQUANTIZE behind an activation."""
        if index in self.floats:
            return self.floats[index]
        tensor = self.tensor(index)
        if constant_weight(self.model, tensor) is not None:
            values = np.ascontiguousarray(self.values(index), np.float32)
            place = self.draft.constant(self.number, tensor, f"{tensor.name}_float", Encoded(values, "float32", None))
        elif type_name(tensor) == "float32":
            place = index
        else:
            place = self.draft.tensor(self.number, tensor, f"{tensor.name}_float", "float32", None)
            version = 3 if type_name(tensor) == "int16" else 2
            self.out.append(self.draft.operator("DEQUANTIZE", version, [index], [place], Table("DequantizeOptions")))
        self.floats[index] = place
        return place
