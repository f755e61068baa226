"""A SavedModel for paring's own operators: where they read the weights, which are packed for them, and what rows say of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from paring.compress.base import Context
from paring.compress.quantize import Quantize
from paring.compress.weights import shelved
from paring.decision import Plan
from paring.errors import InputError
from paring.folders.observe import Inputs
from paring.folders.planning import readers_of, shown
from paring.formats.saved_model.apply import Place, SourceId, Stored, taken
from paring.formats.saved_model.flow import End, Flow, Source, Use
from paring.formats.saved_model.model import SavedModel
from paring.formats.saved_model.native import Seat, seat, unfolded
from paring.formats.saved_model.packed import pack_int4, pack_sparse, unpack
from paring.formats.saved_model.view import View
from paring.outcome import VERSION
from paring.recipe import Recipe
from paring.targets import THRESHOLD

RUNTIMES = ("portable", "native")
DENSE_INT8 = 0.8
"""Share of zeros below which int8 weights beside float activations stay dense: without their zeros they are multiplied as
floats, four bytes each, which is more to read than all of them in one byte."""

_SMALL, _LARGE = (
    2.0**-4,
    2.0**12,
)  # largest weight of a channel: between, float16 holds the scales of all blocks that count


def check_runtime(runtime: str | None) -> None:
    """Refuses a choice of runtimes for a `.tflite` file.

    Raises:
      InputError: There is one.
    """
    if runtime is not None:
        raise InputError(
            "there is no choice of runtimes", where=f"runtime {runtime}", expected="a SavedModel, written to a folder",
            got="a .tflite file", todo="LiteRT runs it; the delegate makes sparse ones faster (paring.delegate_path)",
        )  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """How the weights of a model would be packed.

    Attributes:
      seats: By weight (twins are one): as what, or why not.
      exact: Weights lie on a grid already, whose scales are kept.
    """

    seats: Mapping[SourceId, Seat | str]
    exact: bool = False

    @classmethod
    def of(cls, model: SavedModel, seen: View, twins: Mapping[SourceId, SourceId], *, exact: bool = False) -> Packing:
        """Looks at all weights that operators read."""
        return cls({id_: _packing(model, together(model, id_, twins)) for id_ in readers_of(seen, twins)}, exact)

    def packed(
        self, id_: SourceId, settings: Quantize | None, weight: np.ndarray, name: str, inputs: Inputs | None = None
    ) -> Stored | None:
        """A weight packed; None where it is to stay in its own layout.

        Args:
          id_: Which.
          settings: How it is quantized; None: not.
          weight: Its values, float32.
          name: For messages.
          inputs: What it meets, where that was observed.
        """
        place = self.seats[id_]
        if isinstance(place, str) or not weight.size:
            return None
        if settings is not None and settings.weights == "int4":
            return _int4(settings, place, weight, name, inputs)
        if settings is not None and settings.weights != "int8":
            return None
        zeros = 1 - np.count_nonzero(weight) / weight.size
        floats = settings is not None and settings.activations != "dynamic"
        return self._sparse(settings, place, weight, name) if zeros >= (DENSE_INT8 if floats else THRESHOLD) else None

    def _sparse(self, settings: Quantize | None, place: Seat, weight: np.ndarray, name: str) -> Stored:
        """Without the zeros: float32, or int8 with a scale per channel."""
        rows = np.ascontiguousarray(place.matrix(weight).T)
        if settings is None:
            blob = pack_sparse(rows, place.kernel)
            return Stored("int8", shelved(blob), np.ones(len(rows), np.float32), "sparse float32")
        encoded = settings.encode(rows, Context(name, 0, (1,), short=not self.exact))
        assert encoded.grid is not None
        scale = np.broadcast_to(encoded.grid.scale.astype(np.float32), len(rows))
        return Stored(
            "int8", shelved(pack_sparse(encoded.values, place.kernel)), np.ascontiguousarray(scale), "sparse int8"
        )

    def values(self, id_: SourceId, stored: Stored, shape: tuple[int, ...]) -> np.ndarray:
        """What a packed weight stands for, float32 of its own shape."""
        place = self.seats[id_]
        assert not isinstance(place, str) and stored.scale is not None
        return unfolded(place, unpack(stored.codes).values * stored.scale, shape)


def together(model: SavedModel, id_: SourceId, twins: Mapping[SourceId, SourceId]) -> list[Source]:
    """A variable and its twins."""
    return [model.flow.sources[i] for i in (id_, *(twin for twin, kept in twins.items() if kept == id_))]


def _packing(model: SavedModel, sources: list[Source]) -> Seat | str:
    """How a weight and its twins would be packed: all that reads them has to be an operator of paring's, and in one way."""
    flow, found = model.flow, list[Seat]()
    for source in sources:
        read: set[Place] = set()
        for use in source.uses:
            it = seat(flow, source, use)
            if isinstance(it, str):
                return f"{use.node}: {it}"
            if not it.flat:
                return f"{use.node}: its weights are a batch of matrices"
            found.append(it)
            read.add((use.scope, use.node, use.input))
        passed = {id(node) for it in found for node in it.moves}
        own = {it.id for it in sources}
        for end in source.ends:
            known = end.node is not None and ((end.scope, end.node.name, end.input) in read or id(end.node) in passed)
            if not known and not _starts(flow, end, own):
                return "something else reads it, too"
        moves = {id(node): node for _, node in source.moves}
        if any(node.op != "Identity" and number not in passed for number, node in moves.items()):
            return "something else reads it, too"
        for use, it in zip(source.uses, found[-len(source.uses) :] if source.uses else (), strict=True):
            scope = flow.scopes[use.scope]
            cast = [scope.value(node) for node in it.moves if id(node) not in moves]  # others' readers are ends
            users = [user for value in cast for user in scope.users[scope.canonical(value)]]
            if any((scope.name, n.name, index) not in read and id(n) not in passed for n, index in users):
                return "something else reads it, too"
            if set(cast) & set(scope.returned()):
                return "something else reads it, too"
        asked = [
            n
            for (name, value), ids in flow.handles.items()
            if source.id in ids
            for n, _ in flow.scopes[name].users[value]
        ]
        if source.looks or any(node.op == "VariableShape" for node in asked):
            return "its shape is asked for"
    ways = {(it.order, it.kernel) for it in found}
    return found[0] if len(ways) == 1 else "it is read in two ways"


def _starts(flow: Flow, end: End, twins: set[SourceId]) -> bool:
    """True where a read is the first value of a twin."""
    if end.node is None or end.node.op not in ("Assign", "AssignVariableOp"):
        return False
    return {it.id for it in flow.holder(end.scope, flow.scopes[end.scope].canonical(end.node.input[0]))} <= twins


def _int4(settings: Quantize, place: Seat, weight: np.ndarray, name: str, inputs: Inputs | None) -> Stored:
    """int4 in blocks of inputs, the last of a channel may be shorter; or with a scale for each channel, as one block."""
    rows = place.matrix(weight).T
    depth = rows.shape[1]
    if settings.granularity != "block":
        encoded = settings.encode(np.ascontiguousarray(rows), Context(name, 0, (1,)))
        assert encoded.grid is not None
        scale = np.broadcast_to(encoded.grid.scale.astype(np.float32), len(rows))
        blob = pack_int4(
            np.ascontiguousarray(encoded.values.T), np.ones((1, len(rows)), np.float16), depth, place.kernel
        )
        return Stored("int8", shelved(blob), np.ascontiguousarray(scale), "int4")
    peak, block = np.abs(rows).max(axis=1), settings.block_size
    if not np.isfinite(peak).all():
        raise InputError(
            "cannot quantize weights", where=name, expected="finite values", got="infinity or not-a-number"
        )
    # Scales of blocks have 16 bits: channels at the ends of their range are moved by a power of two, which loses nothing.
    outside = (peak > 0) & ((peak < _SMALL) | (peak > _LARGE))
    power = np.ldexp(np.float32(1), np.frexp(np.where(outside, peak, 0.5))[1]).astype(np.float32)
    whole = np.zeros((len(rows), -(-depth // block) * block), np.float32)
    np.divide(rows, power[:, None], out=whole[:, :depth])
    context = Context(name, 0, (1,))
    if inputs is not None and np.array_equal(inputs.meeting.matrix(weight), rows):
        context = inputs.context(name, settings, whole.shape[1])
    encoded = settings.encode(whole, context)
    assert encoded.grid is not None
    codes, scales = np.ascontiguousarray(encoded.values[:, :depth].T), encoded.grid.scale.astype(np.float16).T
    return Stored("int8", shelved(pack_int4(codes, np.ascontiguousarray(scales), block, place.kernel)), power, "int4")


NEEDED = "import paring.tensorflow before it is loaded, or call tf.load_op_library(paring.tensorflow.library_path())"
"""What to do with a model that has paring's operators."""


def told(places: Mapping[Place, bool]) -> list[str]:
    """What a report says of the runtime."""
    if not places:
        return [
            "no operator is paring's own, so stock TensorFlow runs the model: these read int8, int4 and mostly zeros"
        ]
    return [f"{len(places)} operators are paring's own: {NEEDED}"]


def record(recipe: Recipe, *, native: bool) -> str:
    """What the folder keeps of how it was made, as JSON."""
    facts = {"paring": VERSION, "recipe": recipe.to_data(), "runtime": "native" if native else "portable"}
    return json.dumps(facts | ({"needs": NEEDED} if native else {}), indent=1, sort_keys=True)


@dataclass(frozen=True)
class Natives:
    """Where paring's operators are put.

    Attributes:
      places: Each with whether what it meets becomes int8.
      made: The plan, which says so.
    """

    places: Mapping[Place, bool]
    made: Plan


def natives(model: SavedModel, seen: View, made: Plan, stored: Mapping[SourceId, Stored]) -> Natives:
    """Decides by what is stored, and notes it in the plan."""
    places: dict[Place, bool] = {}
    decisions = []
    for d in made.decisions:
        kept = list(_reads(model, seen, d.op.id, stored))
        why = [it for *_, it in kept if isinstance(it, str)]
        words = [weight.kind or weight.form for _, weight, _ in kept]
        if not kept or (d.settings is None and words[0] != "sparse float32"):
            decisions.append(d)
            continue
        dynamic = d.settings is not None and d.settings.activations == "dynamic" and words[0] == "sparse int8"
        places |= {(use.scope, use.node, use.input): dynamic for use, _, it in kept if not isinstance(it, str)}
        form = "sparse" if d.settings is None else shown(d.op, d.settings, words[0])
        reason = d.reason
        if why:
            reason = f"{reason}; stock operators: {why[0]}"
        elif d.settings is not None and d.settings.activations == "dynamic" and not dynamic:
            reason = f"{reason}; beside dense weights activations stay floats"
        form = f"{'dynamic ' if dynamic else ''}{form}{'' if why else ' native'}"
        decisions.append(replace(d, form=form, reason=reason))
    return Natives(places, replace(made, decisions=tuple(decisions)))


def _reads(
    model: SavedModel, seen: View, op: tuple[int, int], stored: Mapping[SourceId, Stored]
) -> Iterator[tuple[Use, Stored, tuple[Seat, np.ndarray] | str]]:
    """The stored weights that an operator reads."""
    for source, use in zip(seen.sources.get(op, ()), seen.uses.get(op, ()), strict=True):
        if source.id in stored and not source.refused:
            yield use, stored[source.id], taken(model.flow, source, use, stored[source.id])


__all__ = ["DENSE_INT8", "RUNTIMES", "Natives", "Packing", "check_runtime", "natives", "record", "together", "told"]
