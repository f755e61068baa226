"""The layers of a SavedModel beside what became of them: where both are, and in which form the weights are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from paring.formats.saved_model.axes import along
from paring.formats.saved_model.flow import CONSTANT, Source, Use
from paring.formats.saved_model.model import SavedModel
from paring.formats.saved_model.operators import ROWS
from paring.formats.saved_model.probe import Point, homes, island
from paring.formats.saved_model.scope import BFLOAT16, FLOAT32, NAMES, NATIVE, Scope, field
from paring.formats.saved_model.view import View, view
from paring.graph import Op

_PACKED = {1: "int4", 2: "sparse float32", 3: "sparse int8"}  # kinds of packed weights, by the number in their header


@dataclass(frozen=True)
class Layers:
    """The operators of a float model that read weights.

    Attributes:
      view: The float model's.
      ops: Its layers.
      points: Where to look at each.
      paired: Those that are in the optimized model, too, and where: (function, the operator with what belongs to it).
      strangers: Operators with weights in the optimized model that belong to none, by name.
    """

    view: View
    ops: tuple[Op, ...]
    points: tuple[Point, ...]
    paired: dict[int, list[tuple[Scope, list[Any]]]]
    strangers: tuple[str, ...] = ()

    @classmethod
    def of(cls, exact: SavedModel, optimized: SavedModel | None = None) -> Layers:
        """Matches by the names of functions and operators; without an optimized model every layer is paired with itself."""
        seen = view(exact)
        ops = tuple(op for op in seen.graph.ops if op.id in seen.sources)
        points = tuple(point(exact, seen, op) for op in ops)
        bodies = exact.flow.scopes
        if optimized is None:
            return cls(seen, ops, points, {n: [] for n in range(len(points))})
        theirs = optimized.flow.scopes
        places = homes(bodies, theirs)
        paired: dict[int, list[tuple[Scope, list[Any]]]] = {}
        for number, at in enumerate(points):
            found = [theirs[home] for home in places[at.scope] if at.node in theirs[home].by_name]
            if found:
                paired[number] = [(s, island(s, bodies[at.scope], s.by_name[at.node])) for s in found]
        taken = {(s.name, node.name) for group in paired.values() for s, nodes in group for node in nodes}
        other = view(optimized)
        names = [op.name for op in other.graph.ops if op.id in other.sources and other.places[op.id] not in taken]
        return cls(seen, ops, points, paired, tuple(names))


def point(model: SavedModel, seen: View, op: Op) -> Point:
    """Where to look at an operator: its inputs that are no weights, and no constants."""
    name, node_name = seen.places[op.id]
    scope = model.flow.scopes[name]
    node = scope.by_name[node_name]
    row, weights = ROWS[node.op], {use.input for use in seen.uses[op.id]}
    inputs = (1,) if row.picks else tuple(index for index in sorted(row.data) if index not in weights)
    return Point(name, node_name, tuple(index for index in inputs if not _constant(scope, node.input[index])))


def _constant(scope: Scope, value: str) -> bool:
    maker, _ = scope.source(value)
    return maker is not None and maker.op == "Const"


@dataclass(frozen=True)
class Form:
    """How the weights of a layer are stored.

    Attributes:
      name: As reports of quantization call it.
      decoded: Gives the values that they stand for, None where these are not known.
      kept: The weight's dimensions that the layer's result has.
    """

    name: str
    decoded: Callable[[], np.ndarray] | None
    kept: tuple[int, ...] = ()


def form_of(models: tuple[SavedModel, SavedModel], layers: Layers, number: int) -> Form:
    """What became of a layer's weights."""
    exact, optimized = models
    scope, nodes = layers.paired[number][0]
    node = nodes[-1]
    op = layers.ops[number]
    place = max(range(len(layers.view.sources[op.id])), key=lambda n: not layers.view.sources[op.id][n].refused)
    source, use = layers.view.sources[op.id][place], layers.view.uses[op.id][place]
    now = optimized.flow.sources.get(source.id)
    stored = NAMES.get(now.dtype, "float32") if now is not None else _constant_type(optimized, source)
    name = stored
    if node.op.startswith(f"{NATIVE}Packed") and now is not None:
        head = np.asarray(optimized.bundle.read(now.key or "")).reshape(-1)[:12].tobytes()
        name = _PACKED.get(int.from_bytes(head[8:12], "little"), stored)
    rounds = field(node, "round_to_bfloat16").b or any(
        n.op == "Cast" and field(n, "DstT").type == BFLOAT16 and field(n, "SrcT").type == FLOAT32 for n in nodes
    )
    if rounds:
        name = f"bf16-{name}" if name in ("int8", "int4") else f"bf16 x {name}"
    if stored in ("bfloat16", "float16") and now is not None:
        return Form(name, lambda: np.asarray(_read(optimized, now)).astype(np.float32), use.kept or ())
    if stored != "int8" or now is None or now.shape != source.shape:
        return Form(name, None)
    scale = _scale(exact, scope, nodes, source, use)
    if scale is None:
        return Form(name, None)
    return Form(name, lambda: np.asarray(_read(optimized, now)).astype(np.float32) * scale, use.kept or ())


def _constant_type(model: SavedModel, source: Source) -> str:
    scope = model.flow.scopes.get(source.id[0])
    node = scope.by_name.get(source.id[1]) if scope is not None else None
    return NAMES.get(field(node, "dtype").type, "float32") if node is not None else "float32"


def _read(model: SavedModel, source: Source) -> Any:
    return model.bundle.read(source.key or "")


def _scale(
    exact: SavedModel, scope: Scope, nodes: list[Any], source: Source, use: Use
) -> np.ndarray | None:  # fmt: skip
    """The weight's scales, in its own rank, from the constants of what was written; None where none of them is it."""
    if source.shape is None or use.kept is None or source.kind == CONSTANT:
        return None
    before = exact.flow.scopes[use.scope]
    row, node = ROWS[before.by_name[use.node].op], before.by_name[use.node]
    inside = {n.name for n in nodes}
    for constant in (n for n in nodes if n.op == "Const" and n.name in inside):
        found = scope.constant(scope.value(constant))
        if found is None or found.dtype != np.float32:
            continue
        for kept in (use.kept, ()):
            sizes = [size if d in kept else 1 for d, size in enumerate(source.shape)]
            if found.size != prod(sizes):
                continue
            scale = found.reshape(sizes)
            shown = along(scale, source.shape, use.axes) if use.axes is not None else None
            if shown is None:
                continue
            shape = tuple(prod(source.shape[d] for d in group) for group in use.axes or ())
            after = row.after(node, use.input, shown, shape)
            if any(other is not None and other.size == found.size and np.array_equal(other.reshape(-1), found.reshape(-1))
                   for other in (after, shown)):  # fmt: skip
                return scale
    return None


__all__ = ["Form", "Layers", "form_of", "point"]
