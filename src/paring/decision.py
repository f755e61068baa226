"""What planning says of each operator: plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from paring.compress.quantize import Quantize
from paring.graph import Graph, Op, OpId
from paring.recipe import Recipe

FLOAT, STATIC, DYNAMIC, WEIGHT_ONLY = "float", "static", "dynamic", "weight-only"
KEPT, CONSTANT, OTHER = "kept", "constant", "other"
CONVERSIONS = ("QUANTIZE", "DEQUANTIZE", "DENSIFY", "FAKE_QUANT")


@dataclass(frozen=True)
class Decision:
    """What one operator gets.

    Attributes:
      op: The operator; of a static loop or branch, its demands hold only the values that become integer.
      mode: `static`, `dynamic`, `weight-only`, `float`, `kept` (already quantized), `constant` (part of a
        weight) or `other` (works on integers or booleans: nothing to quantize).
      settings: The settings in force, after fallbacks; None for float.
      form: The row of the operator's versions that applies, e.g. `int8` or `dynamic-int4-block`.
      reason: Why it is not what the recipe asked for, or which rule asked.
    """

    op: Op
    mode: str
    settings: Quantize | None = None
    form: str = "float"
    reason: str = ""

    @property
    def activations(self) -> str | None:
        """The integer type of the operator's activations, None where they are float."""
        return self.settings.activations if self.mode == STATIC and self.settings else None


@dataclass(frozen=True)
class Plan:
    """Decisions for every operator of a graph, in its order.

    Attributes:
      graph: The graph.
      recipe: What was asked for.
      decisions: One for each operator.
      pruned: Operators whose zeros are there on purpose: later stages keep them.
    """

    graph: Graph
    recipe: Recipe
    decisions: tuple[Decision, ...]
    pruned: frozenset[OpId] = frozenset()

    @property
    def asking(self) -> tuple[OpId, ...]:
        """Operators whose weights are rounded by data."""
        return tuple(d.op.id for d in self.decisions if d.settings is not None and d.settings.sequential)

    def by_op(self) -> Mapping[OpId, Decision]:
        """The decision of each operator."""
        return {d.op.id: d for d in self.decisions}

    def counts(self) -> Counter[str]:
        """How many operators each mode has."""
        return Counter(d.mode for d in self.decisions)
