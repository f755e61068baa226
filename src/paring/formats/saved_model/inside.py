"""The layers of a SavedModel beside what became of them: where both are, and in which form the weights are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from paring.formats.saved_model.axes import along
from paring.formats.saved_model.flow import CONSTANT, Source, Use
from paring.formats.saved_model.model import SavedModel
from paring.formats.saved_model.native import seat, unfolded
from paring.formats.saved_model.operators import ROWS
from paring.formats.saved_model.packed import Packed, unpack
from paring.formats.saved_model.probe import Point, homes, island
from paring.formats.saved_model.scope import BFLOAT16, FLOAT32, NAMES, NATIVE, Scope, field
from paring.formats.saved_model.tables import is_picked, values_of
from paring.formats.saved_model.view import View, view
from paring.graph import Op


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
    def of(cls, exact: SavedModel, optimized: SavedModel) -> Layers:
        """Matches by the names of functions and operators."""
        seen = view(exact)
        ops = tuple(op for op in seen.graph.ops if op.id in seen.sources)
        points = tuple(point(exact, seen, op) for op in ops)
        bodies = exact.flow.scopes
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
      decoded: What they may stand for; nothing where that is not known. An operator with two weights, or a body of several
        variables, has several scales: those are the weight's that fit it best.
      kept: The weight's dimensions that the layer's result has.
    """

    name: str
    decoded: tuple[Callable[[], np.ndarray], ...]
    kept: tuple[int, ...] = ()


def form_of(models: tuple[SavedModel, SavedModel], layers: Layers, number: int) -> Form:
    """What became of a layer's weights."""
    exact, optimized = models
    scope, nodes = layers.paired[number][0]
    op = layers.ops[number]
    pairs = zip(layers.view.sources[op.id], layers.view.uses[op.id], strict=True)
    source, use = min(pairs, key=lambda pair: bool(pair[0].refused))
    now = optimized.flow.sources.get(source.id)
    stored = NAMES.get(now.dtype, "float32") if now is not None else _constant_type(optimized, source)
    name, decoded = stored, tuple[Callable[[], np.ndarray], ...]()
    if now is not None and any(n.op.startswith(f"{NATIVE}Packed") for n in nodes):
        packed = unpack(optimized.bundle.read(now.key or ""))
        name, decoded = packed.name, _packed(exact, scope, nodes, source, use, packed)
    elif now is not None and stored in ("bfloat16", "float16"):
        decoded = (_reader(optimized, now, np.float32(1)),)
    elif now is not None and stored == "int8" and is_picked(nodes):
        decoded = (lambda: values_of(optimized.bundle.read(now.key or "")),)
    elif now is not None and stored == "int8" and now.shape == source.shape:
        scales = (scale for home in layers.paired[number] for scale in _scales(exact, *home, source, use))
        decoded = tuple(_reader(optimized, now, scale) for scale in scales)
    rounds = any(
        field(n, "round_to_bfloat16").b
        or (n.op == "Cast" and field(n, "DstT").type == BFLOAT16 and field(n, "SrcT").type == FLOAT32)
        for n in nodes
    )
    if rounds:
        name = f"bf16-{name}" if name in ("int8", "int4") else f"bf16 x {name}"
    return Form(name, decoded, use.kept or ())


def _reader(model: SavedModel, source: Source, scale: np.ndarray | np.float32) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(model.bundle.read(source.key or "")).astype(np.float32) * scale


def _packed(
    exact: SavedModel, scope: Scope, nodes: list[Any], source: Source, use: Use, packed: Packed
) -> tuple[Callable[[], np.ndarray], ...]:
    """What paring's operator multiplies with; nothing where its scales are no constant."""
    place = seat(exact.flow, source, use)
    node = next(n for n in nodes if n.op.startswith(NATIVE))
    scale = scope.constant(node.input[2])
    if isinstance(place, str) or scale is None or source.shape is None:
        return ()
    shape = source.shape
    return (lambda: unfolded(place, packed.values * scale, shape),)


def _constant_type(model: SavedModel, source: Source) -> str:
    scope = model.flow.scopes.get(source.id[0])
    node = scope.by_name.get(source.id[1]) if scope is not None else None
    return NAMES.get(field(node, "dtype").type, "float32") if node is not None else "float32"


def _scales(exact: SavedModel, scope: Scope, nodes: list[Any], source: Source, use: Use) -> Iterator[np.ndarray]:
    """Constants of what was written that may be the weight's scales, in its own rank."""
    if source.shape is None or use.kept is None or source.kind == CONSTANT:
        return
    before = exact.flow.scopes[use.scope]
    row, node = ROWS[before.by_name[use.node].op], before.by_name[use.node]
    inside = {n.name for n in nodes}
    added = {value.split(":")[0] for n in nodes if n.op == "AddV2" for value in n.input}  # a correction, not scales
    for constant in (n for n in nodes if n.op == "Const" and n.name in inside - added):
        found = scope.constant(scope.value(constant))
        if found is None or found.dtype.name not in ("float32", "bfloat16"):
            continue
        found = found.astype(np.float32)
        for kept in {other.kept for other in source.uses if other.kept is not None} | {()}:
            sizes = [size if d in kept else 1 for d, size in enumerate(source.shape)]
            if found.size != prod(sizes) or use.axes is None:
                continue
            places = along(np.arange(found.size, dtype=np.float32).reshape(sizes), source.shape, use.axes)
            shape = tuple(prod(source.shape[d] for d in group) for group in use.axes)
            for laid in (places, None if places is None else row.after(node, use.input, places, shape)):
                if laid is not None and laid.size == found.size:
                    scale = np.empty(found.size, np.float32)
                    scale[laid.reshape(-1).astype(np.int64)] = found.reshape(-1)
                    yield scale.reshape(sizes)


__all__ = ["Form", "Layers", "form_of", "point"]
