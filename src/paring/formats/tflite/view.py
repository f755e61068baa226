"""The Graph of a .tflite model: what planning sees. Constants are looked through, loops and branches tie their operands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paring.compress.encodings import decode
from paring.formats.tflite.check import regions
from paring.formats.tflite.constants import (
    constant_weight,
    mapped,
    quantization_of,
    shape_of,
    type_name,
)
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.operators import TABLE, Row, WeightInput
from paring.formats.tflite.schema import FIELDS
from paring.graph import Demands, Graph, Op, Quantization, StateUse, Tensor, TensorId, Weight, WeightUse

CONTROL = {"WHILE": "while", "IF": "if", "CALL_ONCE": "call_once", "STABLEHLO_COMPOSITE": "composite"}


def view(model: TfliteModel, *, densify: bool = False, fold_ranges: bool = False) -> Graph:
    """Reads the Graph.

    Args:
      model: The model; its weights are not touched.
      densify: Look through DENSIFY, so that sparse weights appear as ordinary ones.
      fold_ranges: Look through quantize/dequantize pairs and FAKE_QUANT; the tensor before them carries their grid.

    Returns:
      Every operator of every subgraph, in file order.
    """
    ops: list[Op] = []
    tensors: dict[TensorId, Tensor] = {}
    for number in range(len(model.subgraphs)):
        _Subgraph(model, number, densify, fold_ranges).read(ops, tensors)
    entries = sorted({0} | {s.subgraph_index for s in model.root.signature_defs or ()})
    inputs = tuple((n, int(i)) for n in entries for i in _list(model.subgraphs[n].inputs))
    outputs = tuple((n, int(i)) for n in entries for i in _list(model.subgraphs[n].outputs))
    return Graph(tuple(_unique_names(ops)), tensors, inputs, outputs)


def _list(values: Any) -> list[int]:
    return [] if values is None else [int(v) for v in values]


def _unique_names(ops: list[Op]) -> list[Op]:
    seen: Counter[str] = Counter()
    named = []
    for op in ops:
        seen[op.name] += 1
        named.append(op if seen[op.name] == 1 else Op(**{**op.__dict__, "name": f"{op.name}#{seen[op.name]}"}))
    return named


class _Subgraph:
    def __init__(self, model: TfliteModel, number: int, densify: bool, fold_ranges: bool) -> None:
        self.model, self.number, self.densify, self.fold_ranges = model, number, densify, fold_ranges
        self.table = model.subgraphs[number]
        self.operators: list[Table] = self.table.operators or []
        self.maker = {i: op for op in self.operators for i in _list(op.outputs)}
        self.weights: dict[int, Weight | None] = {}
        self.grids: dict[int, Quantization] = {}
        self.alias: dict[int, int] = {}

    def read(self, ops: list[Op], tensors: dict[TensorId, Tensor]) -> None:
        count: list[Table] = self.table.tensors or []
        for index in range(len(count)):
            self.weights[index] = self.weight(index)
        made = {id(op): [self.weights[i] for i in _list(op.outputs)] for op in self.operators}
        constant_ops = {key for key, found in made.items() if found and all(w is not None for w in found)}
        if self.fold_ranges:
            self.fold(_list(self.table.outputs))
        for index, table in enumerate(count):
            signature = table.shape_signature
            shape = shape_of(table) if signature is None or not signature.size else tuple(int(d) for d in signature)
            grid = self.grids.get(index) or quantization_of(self.model, self.table, table)
            name = table.name or f"tensor{index}"
            tensors[self.number, index] = Tensor(
                (self.number, index), name, shape, type_name(table), grid, self.weights[index]
            )
        for position, operator in enumerate(self.operators):
            ops.append(self.op(position, operator, constant=id(operator) in constant_ops))

    def weight(self, index: int) -> Weight | None:
        tensor = self.table.tensors[index]
        found = constant_weight(self.model, tensor, densify=self.densify)
        operator = self.maker.get(index)
        if found is not None or operator is None or not _list(operator.inputs):
            return found
        native = self.model.native(operator)
        if native not in ("DEQUANTIZE", "DENSIFY"):
            return None
        source = _list(operator.inputs)[0]
        stored = self.weights.get(source) if source in self.weights else self.weight(source)
        if stored is None:
            return None
        if native == "DENSIFY":
            return stored
        grid = quantization_of(self.model, self.table, self.table.tensors[source])
        if grid is None:
            unpacked = mapped(stored, "float32", lambda rows, _: rows.astype("float32"))
            return replace(unpacked, origin=stored.origin)
        self.grids[index] = grid
        if grid.block:
            return mapped(stored, "float32", lambda _, start: decode(stored.read(), grid)[start : start + len(_)])
        return mapped(stored, "float32", lambda rows, start: decode(rows, _rows_of(grid, start, len(rows))))

    def fold(self, outputs: list[int]) -> None:
        """Records X for every Y = DEQUANTIZE(QUANTIZE(X)) or FAKE_QUANT(X), with the grid that the pair carries."""
        for operator in self.operators:
            native, produced = self.model.native(operator), _list(operator.outputs)
            if native == "DEQUANTIZE" and produced[0] not in outputs:
                stored = _list(operator.inputs)[0]
                quantize = self.maker.get(stored)
                if quantize is None or self.model.native(quantize) != "QUANTIZE":
                    continue
                source = _list(quantize.inputs)[0]
                grid = quantization_of(self.model, self.table, self.table.tensors[stored])
            elif native == "FAKE_QUANT" and produced[0] not in outputs and operator.builtin_options.num_bits == 8:
                source, grid = _list(operator.inputs)[0], _fake_quant_grid(operator.builtin_options)
            else:
                continue
            if grid is not None and type_name(self.table.tensors[source]) == "float32":
                self.alias[produced[0]] = source = self.alias.get(source, source)
                self.grids.setdefault(source, grid)

    def op(self, position: int, operator: Table, *, constant: bool) -> Op:
        native = self.model.native(operator)
        row = TABLE.get(native)
        ids = [self.alias.get(i, i) for i in _list(operator.inputs)]
        inputs = tuple((self.number, i) if i >= 0 else None for i in ids)
        outputs = tuple((self.number, i) for i in _list(operator.outputs))
        options = operator.builtin_options if operator.builtin_options is not None else operator.builtin_options2
        params = {} if options is None else {f: v for f, v in options.__dict__.items()}
        name = self.table.tensors[outputs[0][1]].name if outputs else ""
        scope = self.table.name or f"subgraph{self.number}" if self.number else ""
        return Op(
            id=(self.number, position),
            name=name or f"{native.lower()}@{self.number}.{position}",
            kind=row.kind if row else CONTROL.get(native, native.lower()),
            native=native,
            inputs=inputs,
            outputs=outputs,
            params=params,
            demands=self.demands(row, operator, native, ids, len(outputs)),
            scope=scope,
            version=self.model.opcode(operator).version,
            constant=constant,
        )

    def demands(self, row: Row | None, operator: Table, native: str, ids: list[int], outputs: int) -> Demands | None:
        if native in ("WHILE", "IF"):
            return self.control(operator, native)
        if row is None:
            return None
        inputs = len(ids)
        ports = [i for i in (range(inputs)[row.data] if isinstance(row.data, slice) else row.data) if i < inputs]
        # Where weights are computed at run time, some operators take them as any other operand (BATCH_MATMUL).
        weights = [w for w in row.weights if w.input < inputs and ids[w.input] >= 0]
        weights = [w for w in weights if w.input not in ports or self.weights.get(ids[w.input]) is not None]
        taken = {w.input for w in weights} | {row.bias}
        biased = any(w.bias is not None for w in row.weights)

        def bias(w: WeightInput) -> int | None:
            port = w.bias if biased else row.bias
            return port if port is not None and port < inputs and ids[port] >= 0 else None

        def grouped(w: WeightInput) -> bool:
            if len(w.reduced) != 3 or w.axis != 0:
                return False
            kernel, source = (shape_of(self.table.tensors[ids[port]]) for port in (w.input, ports[0]))
            return bool(kernel and source) and kernel[-1] != source[-1]

        flipped = operator.builtin_options is not None and bool(operator.builtin_options.__dict__.get("adj_y"))
        results = range(outputs)[row.out] if isinstance(row.out, slice) else row.out
        return Demands(
            data=tuple(i for i in ports if i not in taken and ids[i] >= 0),
            results=tuple(i for i in results if i < outputs),
            weights=tuple(
                WeightUse(w.input, w.axis, (-1,) if flipped else w.reduced, bias(w), w.meets, w.dtype, grouped(w))
                for w in weights
            ),
            bias=row.bias if row.bias is not None and row.bias < inputs and ids[row.bias] >= 0 else None,
            same=row.same,
            fixed=row.fixed,
            versions=row.versions,
            computes=row.computes,
            symmetric=row.symmetric,
            rescale=(row.rescale.of, row.rescale.low, row.rescale.high) if row.rescale is not None else None,
            state=tuple(StateUse(port, grid) for port, grid in row.state),
            refuses={form: why for form in row.versions if (why := _refusal(row, form, operator, ids))},
            since=row.since,
        )

    def control(self, operator: Table, native: str) -> Demands:
        """Values that a loop or branch carries, each under several names inside and outside; only real ones are tied."""
        graphs = self.model.subgraphs
        ins, outs, inner = _list(operator.inputs), _list(operator.outputs), regions(operator)
        taken, given = ([_list(getattr(graphs[r], side)) for r in inner] for side in ("inputs", "outputs"))
        first = int(native == "IF")
        entering = [[(r, t[i]) for r, t in zip(inner, taken, strict=True)] for i in range(len(ins) - first)]
        if native == "WHILE":  # what enters may be converted on the way in, so it is not tied
            leaving = [[(self.number, out), *entering[i], (inner[1], given[1][i])] for i, out in enumerate(outs)]
            data = results = [i for i, tie in enumerate(leaving) if self.real([(self.number, ins[i]), *tie])]
            ties = [leaving[i] for i in data]
        else:
            entering = [[(self.number, i), *tie] for i, tie in zip(ins[1:], entering, strict=True)]
            sides = list(zip(inner, given, strict=True))
            leaving = [[(self.number, o), *((r, g[i]) for r, g in sides)] for i, o in enumerate(outs)]
            data = [i + 1 for i, tie in enumerate(entering) if self.real(tie)]
            results = [i for i, tie in enumerate(leaving) if self.real(tie)]
            ties = [entering[i - 1] for i in data] + [leaving[i] for i in results]
        return Demands(
            data=tuple(data),
            results=tuple(results),
            versions={"float": 1, "int8": 1, "int16": 1},
            ties=tuple(tuple(tie) for tie in ties),
            computes=False,
        )

    def real(self, tie: list[TensorId]) -> bool:
        """True where all names of a value are float32."""
        return all(type_name(self.model.subgraphs[n].tensors[i]) == "float32" for n, i in tie)


def _refusal(row: Row, form: str, operator: Table, ids: list[int]) -> str:
    """Why a form does not take an operator with these options and inputs; empty where it may."""
    options = operator.builtin_options
    for name, value in row.only.items() if form in ("int8", "int16") else ():
        if options is not None and name in FIELDS[options.type_name] and getattr(options, name) != value:
            return f"its {form} kernel is right only where {name} is {value}, not {int(getattr(options, name))}"
    wrong = [port for port in row.without.get(form, ()) if port < len(ids) and ids[port] >= 0]
    if wrong:
        return f"its {form} kernel is not known to be right with input {wrong[0]}"
    return ""


def _rows_of(grid: Quantization, start: int, count: int) -> Quantization:
    if grid.axis != 0:
        return grid
    stop = start + count
    return Quantization(grid.scale[start:stop], grid.zero_point[start:stop], grid.dtype, 0)


def _fake_quant_grid(options: Table) -> Quantization | None:
    import numpy as np

    low, high = float(options.min), float(options.max)
    if not low < high:
        return None
    scale = (high - low) / 255
    zero = round(-128 - low / scale)
    return Quantization(np.array([scale], np.float32), np.array([zero], np.int64), "int8")


def entries(model: TfliteModel) -> Mapping[str, tuple[int, dict[str, int], dict[str, int]]]:
    """Each signature (or `""` for a model without one) -> subgraph, inputs by name, outputs by name."""
    found = {}
    for signature in model.root.signature_defs or ():
        found[signature.signature_key or ""] = (
            signature.subgraph_index,
            {entry.name: int(entry.tensor_index) for entry in signature.inputs or ()},
            {entry.name: int(entry.tensor_index) for entry in signature.outputs or ()},
        )
    if not found:
        graph = model.subgraphs[0]
        found[""] = (0, _named(graph, _list(graph.inputs)), _named(graph, _list(graph.outputs)))
    return found


def _named(graph: Table, indices: list[int]) -> dict[str, int]:
    names: dict[str, int] = {}
    for index in indices:
        name = graph.tensors[index].name or f"tensor{index}"
        names[name if name not in names else f"{name}#{index}"] = index
    return names
