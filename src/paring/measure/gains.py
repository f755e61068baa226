"""What a model's layers gain from zeros on a target: those that they have, and those that they could have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paring.graph import Graph
from paring.layer import Layer, laid_out, layers_of
from paring.patterns import UNSTRUCTURED, detect
from paring.targets import KINDS, USUAL, Target, choose, find, speed_up


@dataclass(frozen=True)
class Gain:
    """One layer on one target.

    Attributes:
      name: Of the operator.
      kind: Of the operator.
      dtype: `float32`, `int8`, `dynamic-int8`, or another that nothing serves.
      zeros: Share of the weights that are zero.
      found: The pattern that the zeros form, empty where there are hardly any.
      covered: Share of the zeros that lie in blocks of this pattern; 1 where it is none of blocks.
      pattern: The pattern that pays on the target; None where none does.
      now: Predicted speed-up with the weights as they are; None where it is not known.
      then: The same at `USUAL` zeros in `pattern`.
      why: What to expect, or why no pattern pays.
      weight: Predicted cycles of the dense layer, 0 where not known: to weigh layers with.
    """

    name: str
    kind: str
    dtype: str
    zeros: float
    found: str
    covered: float
    pattern: str | None
    now: float | None
    then: float | None
    why: str
    weight: float


def gains(graph: Graph, target: str) -> list[Gain]:
    """What each weight of a model gains on a target, in the order of the operators; weights are read.

    Raises:
      InputError: Unknown target.

    >>> from paring.demo import model_path
    >>> from paring.formats import load
    >>> from paring.formats.tflite.view import view
    >>> rows = gains(view(load(model_path())), "x86-avx512")
    >>> rows[0].why, rows[0].now
    ('few input channels (1)', 1.0)
    """
    chosen, rows = find(target), []
    for op in graph.ops:
        for use, layer in layers_of(graph, op):
            tensor = graph.tensors[op.inputs[use.input]]  # type: ignore[index]
            if tensor.weight is None:
                continue
            found = detect(laid_out(op, tensor.weight.read()))
            tensor.weight.release()
            pattern, why = choose(chosen, layer)
            # Weights in blocks are run by the kernel of these blocks; others by whichever reads least.
            stored = {name: found.stored[name] for name in (found.pattern, UNSTRUCTURED) if name in found.stored}
            now = speed_up(chosen, layer, stored if found.pattern in found.covered else found.stored)
            then = 1.0 if pattern is None else speed_up(chosen, layer, {pattern: 1 - USUAL})
            rows.append(
                Gain(
                    op.name, op.kind, layer.dtype, found.zeros, found.pattern, found.covered.get(found.pattern, 1.0), pattern,
                    now, then, why, _cycles(chosen, layer),
                )
            )  # fmt: skip
    return rows


def together(rows: Sequence[Gain]) -> tuple[float | None, float | None]:
    """What all layers gain together, with the weights as they are and at `USUAL` zeros; None where not known."""
    dense = now = then = 0.0
    for row in rows:
        if not row.weight:
            continue
        if row.now is None or row.then is None:
            return None, None
        dense, now, then = dense + row.weight, now + row.weight / row.now, then + row.weight / row.then
    return (dense / now, dense / then) if dense else (None, None)


def _cycles(target: Target, layer: Layer) -> float:
    dense = target.dense.get(layer.dtype)
    return dense.cycles(layer) if dense is not None and layer.kind in KINDS else 0.0
