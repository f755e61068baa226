"""A model as a program: slices between loops and branches, so that calibration and verification see inside bodies."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from paring.errors import InputError, UnsupportedError
from paring.formats.tflite.check import regions
from paring.formats.tflite.constants import constant_weight, shape_of, type_name
from paring.formats.tflite.extract import extract, reachable
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel
from paring.graph import TensorId
from paring.runtime import Program, Routine, Step

CONTROL = {"WHILE": "while", "IF": "if", "STABLEHLO_COMPOSITE": "call"}
_STATE = ("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE", "HASHTABLE")
_OPAQUE = ("resource", "variant", "string")


def bodies(model: TfliteModel, entry: int) -> set[int]:
    """The subgraphs that an entry runs beside itself."""
    return reachable(model.subgraphs, model.subgraphs[entry].operators or ())


def build(
    model: TfliteModel, entry: int, wanted: Collection[TensorId], inside: Collection[int], folder: Path
) -> Program:
    """Cuts an entry at the loops and branches that lead to the subgraphs `inside`; others stay whole within a slice.

    Args:
      model: The model.
      entry: The subgraph that samples enter.
      wanted: Tensors to watch.
      inside: Subgraphs that must become routines of their own.
      folder: Where the slices go, as files.

    Raises:
      UnsupportedError: Values that live outside of tensors (variables) or that no slice can take (strings).
    """
    builder = _Builder(model, set(wanted), set(inside), folder, f"slice{entry}")
    builder.routine(entry)
    watched = tuple(dict.fromkeys(t for t in wanted if t[0] in builder.routines))
    return Program(entry, builder.routines, tuple(builder.slices), builder.constants, watched)


class _Builder:
    def __init__(self, model: TfliteModel, wanted: set[TensorId], inside: set[int], folder: Path, prefix: str) -> None:
        self.model, self.wanted, self.inside, self.folder, self.prefix = model, wanted, inside, folder, prefix
        self.routines: dict[int, Routine] = {}
        self.slices: list[str] = []
        self.constants: dict[TensorId, np.ndarray] = {}

    def routine(self, number: int) -> None:
        if number in self.routines:
            return
        graph = self.model.subgraphs[number]
        groups: list[list[Table]] = [[]]
        for operator in graph.operators or ():
            if self.opened(operator):
                groups += [[operator], []]
            else:
                groups[-1].append(operator)
        inputs, outputs = _list(graph.inputs), _list(graph.outputs)
        reads = [{i for op in group for i in _list(op.inputs) if i >= 0} for group in groups]
        given = set(inputs).union(*(_list(op.outputs) for op in graph.operators or ()))
        for index, tensor in enumerate(graph.tensors or ()):
            if tensor.is_variable and sum(index in read for read in reads) > 1:
                raise UnsupportedError(f"the variable {tensor.name} is used on both sides of a loop or branch")
        steps = []
        for place, group in enumerate(groups):
            later = set(outputs).union(*reads[place + 1 :])
            if place % 2:
                steps.append(self.control(number, group[0]))
            elif group:
                step = self.slice(number, group, given, later)
                steps += [step] if step is not None else []
        self.routines[number] = Routine(tuple(inputs), tuple(outputs), tuple(steps))
        known = set(inputs).union(*(step.outputs for step in steps))
        for index in {i for step in steps for i in step.inputs}.union(outputs) - known:
            self.constants[number, index] = self.constant(number, index)

    def opened(self, operator: Table) -> bool:
        """True for a loop or branch that has to be followed."""
        led = reachable(self.model.subgraphs, [operator])
        return bool(led & self.inside) and self.model.native(operator) in CONTROL

    def control(self, number: int, operator: Table) -> Step:
        kind, target = CONTROL[self.model.native(operator)], regions(operator)
        ins, outs = _list(operator.inputs), _list(operator.outputs)
        for index in (*ins, *outs):
            self.check(number, index)
        for region in target:
            self.routine(region)
        return Step(kind, tuple(target), tuple(ins), tuple(outs))

    def slice(self, number: int, group: list[Table], given: set[int], later: set[int]) -> Step | None:
        for operator in group:
            if self.model.native(operator).startswith(_STATE):
                raise UnsupportedError("the model keeps variables, which cannot be followed into loops and branches")
        made = [i for op in group for i in _list(op.outputs)]
        ends = [i for i in made if i in later or (number, i) in self.wanted]
        if not ends:
            return None
        read = dict.fromkeys(i for op in group for i in _list(op.inputs) if i >= 0 and i not in made)
        starts = [i for i in read if i in given]
        for index in (*starts, *ends):
            self.check(number, index)
        path = self.folder / f"{self.prefix}_{len(self.slices)}.tflite"
        extract(self.model, [(number, i) for i in starts], [(number, i) for i in ends]).save(path)
        self.slices.append(str(path))
        return Step("run", (len(self.slices) - 1,), tuple(starts), tuple(ends))

    def check(self, number: int, index: int) -> None:
        tensor = self.model.subgraphs[number].tensors[index]
        if type_name(tensor) in _OPAQUE or tensor.is_variable:
            raise UnsupportedError(f"{tensor.name} ({type_name(tensor)}) cannot be followed into a loop or branch")

    def constant(self, number: int, index: int) -> np.ndarray:
        tensor = self.model.subgraphs[number].tensors[index]
        weight = constant_weight(self.model, tensor)
        if weight is not None:
            return np.asarray(weight.read())
        if 0 in shape_of(tensor):
            return np.zeros(shape_of(tensor), type_name(tensor))
        raise InputError("cannot cut the model", where=f"tensor {tensor.name}", got="a value that nothing gives")


def _list(values: np.ndarray | None) -> list[int]:
    return [] if values is None else [int(v) for v in values]
