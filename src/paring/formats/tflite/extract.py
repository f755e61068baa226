"""Runnable slices of a model: `extract` gives one, which calibration and verification are built on, `islands` many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paring.errors import InputError
from paring.formats.tflite.check import regions
from paring.formats.tflite.draft import Draft
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel
from paring.graph import TensorId


def extract(model: TfliteModel, inputs: Sequence[TensorId] | None, outputs: Sequence[TensorId]) -> TfliteModel:
    """The operators between `inputs` and `outputs`, as a model of its own with one signature-less entry.

    Args:
      model: The source; its weights are shared.
      inputs: Where the slice begins, all in one subgraph; None for the subgraph's own inputs.
      outputs: What it gives, in this order.

    Raises:
      InputError: An output needs a value that is neither an input nor computed from one.
    """
    number = outputs[0][0] if outputs else 0
    draft = Draft(model)
    graph = draft.subgraphs[number]
    own = [] if graph.inputs is None else [int(i) for i in graph.inputs]
    starts = own if inputs is None else [index for _, index in inputs]
    operators = _between(graph, set(starts), [index for _, index in outputs], model)
    return _alone(draft, number, operators, starts, [index for _, index in outputs])


def islands(model: TfliteModel, number: int, cuts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> TfliteModel:
    """Several slices of one subgraph side by side in one model, each with inputs of its own.

    A tensor may be the output of one slice and the input of another: they are not connected.

    Args:
      model: The source; its weights are shared.
      number: The subgraph.
      cuts: For each slice the tensors where it begins and those it gives.

    Returns:
      A model that takes the beginnings of all slices, one after the other, and gives the results of all. Operators that
      give nothing (ASSIGN_VARIABLE, CALL_ONCE) are in no slice.

    Raises:
      InputError: A slice needs a value that is neither among its inputs nor computed from them.
    """
    draft = Draft(model)
    graph = draft.subgraphs[number]
    chosen = [_between(graph, set(starts), list(ends), model, effects=False) for starts, ends in cuts]
    operators: list[Table] = []
    inputs: list[int] = []
    outputs: list[int] = []
    for (starts, ends), found in zip(cuts, chosen, strict=True):
        place: dict[int, int] = {}

        def own(index: int, place: dict[int, int] = place) -> int:
            if index not in place:
                place[index] = len(graph.tensors)
                graph.tensors.append(graph.tensors[index].clone())
            return place[index]

        inputs += [own(i) for i in starts]
        for operator in (op.clone() for op in found):
            made = [] if operator.outputs is None else [int(i) for i in operator.outputs]
            read = [] if operator.inputs is None else [int(i) for i in operator.inputs]
            operator.inputs = np.array(
                [own(i) if i in place or (i >= 0 and graph.tensors[i].is_variable) else i for i in read], np.int32
            )
            operator.outputs = np.array([own(i) for i in made], np.int32)
            operators.append(operator)
        outputs += [place[i] for i in ends]
    return _alone(draft, number, operators, inputs, outputs)


def _alone(
    draft: Draft, number: int, operators: list[Table], inputs: Sequence[int], outputs: Sequence[int]
) -> TfliteModel:
    """The model of these operators of a subgraph and of the bodies they run."""
    draft.root.signature_defs = None
    sliced = draft.subgraphs[number]
    sliced.operators = operators
    sliced.inputs, sliced.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
    run = reachable(draft.subgraphs, operators)
    if number and 0 in run:
        raise InputError(
            "cannot cut the model", where=f"subgraph {number}", got="a body that is the model's first subgraph"
        )
    draft.subgraphs[0] = sliced  # the entry is always subgraph 0; bodies keep their numbers, for operators name them
    nothing = np.zeros(0, np.int32)
    for other in range(1, len(draft.subgraphs)):
        if other not in run:
            draft.subgraphs[other] = Table("SubGraph", tensors=[], inputs=nothing, outputs=nothing, operators=[])
    return draft.finish()


def reachable(subgraphs: Sequence[Table], operators: Sequence[Table]) -> set[int]:
    """The subgraphs that these operators run, directly or through others."""
    found: set[int] = set()
    todo = [r for op in operators for r in regions(op)]
    while todo:
        number = todo.pop()
        if number not in found and 0 <= number < len(subgraphs):
            found.add(number)
            todo += [r for op in subgraphs[number].operators or () for r in regions(op)]
    return found


def _between(
    graph: Table, starts: set[int], ends: list[int], model: TfliteModel, *, effects: bool = True
) -> list[Table]:
    """The operators from `starts` to `ends`; with `effects` those too that give nothing (ASSIGN_VARIABLE)."""
    needed, kept = set(ends) - starts, []
    for operator in reversed(graph.operators or []):
        made = {int(i) for i in operator.outputs} if operator.outputs is not None else set()
        read = operator.inputs if operator.inputs is not None else ()
        made |= {int(i) for i in read if i >= 0 and graph.tensors[i].is_variable}
        if made & needed or (effects and not made):
            kept.append(operator)
            needed -= made
            needed |= {int(i) for i in operator.inputs if i >= 0} - starts if operator.inputs is not None else set()
    for index in needed:
        tensor = graph.tensors[index]
        if not (
            tensor.buffer
            or tensor.is_variable
            or index in starts
            or 0 in (tensor.shape if tensor.shape is not None else ())
        ):
            raise InputError(
                "cannot cut the model", where=f"tensor {tensor.name}", got="a value that no input of the slice gives"
            )
    return kept[::-1]
