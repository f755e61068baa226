"""Tables whose rows are picked: each row ends in its own scale, so that no constant of the graph holds one for every row.

Stored is int8 [rows, columns + 2]: the codes of a row, then the two bytes of its scale, bfloat16, little endian. Whoever picks
a row has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from paring.formats.saved_model.flow import CONSTANT, Flow, Source
from paring.formats.saved_model.operators import picked
from paring.formats.saved_model.scope import BFLOAT16, FLOAT32, INT8, INT32, Scope, field

LEAST = 16  # columns: below, a scale takes too much of a row
_TAIL = 2  # bytes of a scale
_HANDED = ("Identity", "StopGradient", "PreventGradient")


def with_scales(codes: np.ndarray, scale: np.ndarray) -> np.ndarray | None:
    """Codes int8 [rows, columns] and scales float32 [rows, 1] -> int8 [rows, columns + 2].

    None where they are others: some scale is no bfloat16, or rows are short.

    >>> with_scales(np.ones((2, 16), np.int8), np.array([[1.0], [0.5]], np.float32))[:, 15:].tolist()
    [[1, -128, 63], [1, 0, 63]]
    """
    if codes.ndim != 2 or codes.shape[1] < LEAST or scale.shape != (len(codes), 1):
        return None
    bits = np.ascontiguousarray(scale, np.float32).view(np.uint32)
    if (bits & 0xFFFF).any():
        return None
    return np.concatenate([codes, (bits >> 16).astype("<u2").view(np.int8)], axis=1)


def values_of(stored: np.ndarray) -> np.ndarray:
    """What a stored table stands for, float32 [rows, columns].

    >>> float(values_of(with_scales(np.ones((2, 16), np.int8), np.full((2, 1), 0.5, np.float32))).sum())
    16.0
    """
    bits = np.ascontiguousarray(stored[:, -_TAIL:]).view("<u2").astype(np.uint32) << 16
    return np.asarray(stored[:, :-_TAIL].astype(np.float32) * bits.view(np.float32))


def only_picked(flow: Flow, sources: Sequence[Source]) -> bool:
    """True where all that reads a variable, or a twin of it, picks rows of it as it is stored."""
    own = {source.id for source in sources}

    def fits(source: Source) -> bool:
        if source.kind == CONSTANT or source.looks or not source.uses:
            return False
        if any(node.op not in _HANDED for _, node in source.moves):
            return False
        asked = [
            node
            for (name, value), ids in flow.handles.items()
            if source.id in ids
            for node, _ in flow.scopes[name].users[value]
        ]
        if any(node.op == "VariableShape" for node in asked):
            return False
        for end in source.ends:
            scope, node = flow.scopes[end.scope], end.node
            if node is not None and node.op in ("Assign", "AssignVariableOp"):  # a twin's first value
                if not {it.id for it in flow.holder(end.scope, scope.canonical(node.input[0]))} <= own:
                    return False
            elif node is None or end.use is None or not end.use.picks or picked(scope, node) != 0:
                return False
        return all(use.direct and use.picks for use in source.uses)

    return all(fits(source) for source in sources)


def pick(scope: Scope, node: Any, columns: int, name: str, take: Any) -> None:
    """Parts the rows that a node picks into codes and scales, and hands on their products.

    Args:
      scope: Its function.
      node: What picks; it gives int8 already.
      columns: Of the table as it was.
      name: Which the node had.
      take: As `Scope.follow` gives it.
    """
    sizes = scope.constant_node(f"{name}/parts", np.array([columns, _TAIL], np.int32), node)
    last = scope.constant_node(f"{name}/last", np.asarray(-1, np.int32), node)
    parts = scope.add(f"{name}/row", "SplitV", [scope.value(node), sizes, last], T=INT8, Tlen=INT32)
    parts.attr["num_split"].i = 2
    codes = scope.add(f"{name}/float", "Cast", [scope.value(parts)], SrcT=INT8, DstT=FLOAT32)
    bits = scope.add(f"{name}/bits", "Bitcast", [scope.value(parts, 1)], T=INT8, type=BFLOAT16)
    lifted = scope.add(f"{name}/lifted", "ExpandDims", [scope.value(bits), last], T=BFLOAT16, Tdim=INT32)
    scale = scope.add(f"{name}/scale", "Cast", [scope.value(lifted)], SrcT=BFLOAT16, DstT=FLOAT32)
    take(scope.add(name, "Mul", [scope.value(codes), scope.value(scale)], T=FLOAT32))
    if "_output_shapes" in node.attr:
        del node.attr["_output_shapes"]  # it was that of the floats


def is_picked(nodes: Sequence[Any]) -> bool:
    """True where a layer's nodes read such a table."""
    return any(node.op == "Bitcast" and field(node, "type").type == BFLOAT16 for node in nodes)
