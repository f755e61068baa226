"""The stages before quantization: float weights become others, one stage behind the other, and what each layer got."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, cast

import numpy as np

from paring.compress.base import Algorithm, Context, Encoded
from paring.compress.encodings import decode
from paring.compress.sparsify import Sparsify
from paring.compress.unfold import Unfolding
from paring.compress.weights import shelved
from paring.data import Feed
from paring.decision import CONSTANT, FLOAT, OTHER, Plan
from paring.edits import Edit, Port
from paring.errors import InputError
from paring.formats.tflite.apply import apply, moved
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.split import SPLITTABLE, Split, split
from paring.formats.tflite.view import view
from paring.graph import Graph, Op, OpId, Tensor, WeightUse
from paring.plan import plan
from paring.pruning import Layer, bias_of, prune
from paring.recipe import Recipe, Rule, stage_name
from paring.replay import Replay
from paring.solve import Solution

_INTEGER = ("int8", "uint8", "int16", "int4")


@dataclass(frozen=True)
class Staged:
    """What the stages before quantization made of one operator.

    Attributes:
      rule: That selects it.
      why: It does.
      done: What it got, in words.
      stages: What it got: the algorithms in force.
      left: Why it did not get others.
      zeros: What pruning made of it, None where no stage of the recipe prunes.
      shares: Weights that are equal now have to stay equal, so that rounding by data is out of place.
    """

    rule: Rule | None
    why: str
    done: tuple[str, ...] = ()
    stages: tuple[Algorithm, ...] = ()
    left: tuple[str, ...] = ()
    zeros: Layer | None = None
    shares: bool = False

    def got(self, stage: Algorithm, words: str, *, shares: bool = False) -> Staged:
        """With one more stage."""
        return replace(self, done=(*self.done, words), stages=(*self.stages, stage), shares=self.shares or shares)

    @property
    def keeps_zeros(self) -> bool:
        """True where the recipe made zeros."""
        return any(isinstance(stage, Sparsify) for stage in self.stages)


@dataclass(frozen=True)
class Stages:
    """A model behind the stages.

    Attributes:
      model: Float, as before, with new weights.
      ops: By operator of this model.
      notes: What to say of it.
    """

    model: TfliteModel = field(repr=False)
    ops: Mapping[OpId, Staged]
    notes: tuple[str, ...] = ()

    @property
    def pruned(self) -> frozenset[OpId]:
        """The operators that have their zeros on purpose."""
        return frozenset(op for op, it in self.ops.items() if it.keeps_zeros)

    @property
    def sparse(self) -> tuple[OpId, ...]:
        """Operators whose weights are to be stored sparsely."""
        found = [(op, stage) for op, it in self.ops.items() for stage in it.stages]
        return tuple(op for op, stage in found if isinstance(stage, Sparsify) and stage.storage == "sparse")

    def planned(self, graph: Graph, recipe: Recipe) -> Plan:
        """The plan for this model, in which nothing is rounded by data that would lose what its weights share.

        Raises:
          InputError: The recipe touches no layer.
        """
        none = Staged(None, "unpacks a weight")  # operators that only came with new weights
        known = {op.id: self.ops.get(op.id, none) for op in graph.ops}
        made = plan(graph, recipe, {op: (it.rule.apply if it.rule else None, it.why) for op, it in known.items()})
        _check(made, known, self.model.path)
        decisions = []
        for decision in made.decisions:
            settings, staged = decision.settings, known[decision.op.id]
            if settings is not None and settings.sequential and staged.shares:
                reason = (
                    f"{decision.reason}; rounded to nearest, not by {settings.rounding}: its shared weights stay shared"
                )
                decision = replace(decision, settings=replace(settings, rounding="nearest"), reason=reason)
            decisions.append(decision)
        return replace(made, decisions=tuple(decisions), pruned=self.pruned)

    def broken(self, made: Plan, solution: Solution) -> tuple[str, ...]:
        """What is not held any more of what the stages promised, once all are done."""
        edits = {edit.op: edit for edit in solution.edits}
        lost: dict[str, list[str]] = {}
        for op in made.graph.ops:
            staged = self.ops.get(op.id)
            if staged is None or not staged.stages:
                continue
            for use, tensor in made.graph.weights_of(op):
                port = edits[op.id].inputs.get(use.input) if op.id in edits else None
                weight, context = _matrix(made.graph, op, use, tensor, port)
                for stage in staged.stages:
                    for said in stage.promises(weight, context):
                        lost.setdefault(f"{stage_name(stage)} gives up: {said}", []).append(op.name.split(";")[0])
                if tensor.weight is not None:
                    tensor.weight.release()
        return tuple(
            f"{words} ({', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"
            for words, names in lost.items()
        )


def _matrix(graph: Graph, op: Op, use: WeightUse, tensor: Tensor, port: Port | None) -> tuple[np.ndarray, Context]:
    """A weight as it is read from now on, float32 [outputs, taps * inputs], with what there is to know of it."""
    assert tensor.weight is not None
    encoded = port.encoded if port is not None else None
    if encoded is None:
        values = np.asarray(tensor.weight.read(), np.float32)
    else:
        values = decode(encoded.values, encoded.grid) if encoded.grid is not None else encoded.values
    unfolding = Unfolding.of(graph, op, use)
    if unfolding is not None and unfolding.parts == 1:
        found = unfolding.matrix(values)
        found = found.reshape(-1, found.shape[-1])
        taps = unfolding.taps(unfolding.matrix(values)).shape[-2]
    else:
        lead = np.moveaxis(values, use.axis or 0, 0)
        found, taps = lead.reshape(len(lead), -1), prod(lead.shape[1:-1])
    return np.asarray(found, np.float32), Context(op.name, 0, taps=taps)


def run(
    model: TfliteModel,
    graph: Graph,
    recipe: Recipe,
    given: Sequence[Feed] | None,
    progress: Callable[[int], None] | None = None,
) -> Stages:
    """Applies what the recipe's rules have before quantization: the first stage of every rule, then the second, ...

    Args:
      model: A float model; it is not changed.
      graph: Its graph, sparse weights unfolded where the recipe `changes` weights.
      recipe: What to do; without stages before quantization the model stays as it is.
      given: Samples, for stages that look at them.
      progress: Called with the number of layers done, from 1 in each turn.

    Raises:
      InputError: No layer can be touched, with the reasons, or an algorithm of the user's failed.
    """

    state = Stages(model, {op: Staged(rule, why) for op, (rule, why) in recipe.winners(graph).items()})
    for turn in range(max((len(rule.before) for rule in recipe.rules), default=0)):
        for kind, step in _TURNS.items():
            found = {op: it.rule.before[turn] for op, it in state.ops.items() if it.rule and len(it.rule.before) > turn}
            asked = {op: stage for op, stage in found.items() if isinstance(stage, Sparsify) is (kind is Sparsify)}
            if asked:
                state = step(state, graph, asked, given, progress)
                graph = view(state.model, densify=True, fold_ranges=recipe.static)
                state.model.notes, state.model.folder = model.notes, model.folder
    return state


def _check(made: Plan, known: Mapping[OpId, Staged], where: str) -> None:
    """Refuses a recipe that does nothing, where it could do nothing."""
    asked = [d for d in made.decisions if d.mode != CONSTANT and (rule := known[d.op.id].rule) and rule.stages]
    quantizes = any((rule := known[d.op.id].rule) and rule.apply for d in asked)
    done = any(
        it.stages or (it.rule and it.rule.apply and d.mode not in (FLOAT, OTHER))
        for d in asked
        if (it := known[d.op.id])
    )
    weighted = any(d.op.demands is not None and d.op.demands.weights for d in asked)
    if not asked or done or (quantizes and weighted):  # what is too small to gain, say, is no fault of the recipe
        return
    reasons = Counter(why for d in asked for why in known[d.op.id].left)
    said = "; ".join(f"{why} ({number} layer{'s' if number > 1 else ''})" for why, number in reasons.most_common(4))
    kinds = ", ".join(sorted({d.op.native for d in asked})[:5])
    raise InputError(
        "the recipe touches no layer", where=where, expected="rules that select a layer with float weights",
        got=said or kinds, todo="`paring inspect` shows names and kinds",
    )  # fmt: skip


def _pruned(
    state: Stages,
    graph: Graph,
    asked: Mapping[OpId, Algorithm],
    given: Sequence[Feed] | None,
    progress: Callable[[int], None] | None,
) -> Stages:
    """One turn of pruning."""
    selected = {op: (it.rule, cast("Sparsify | None", asked.get(op)), it.why) for op, it in state.ops.items()}
    made = prune(state.model, graph, selected, given, progress)
    ops = {}
    for op, it in state.ops.items():
        layer = made.layers.get(op)
        if layer is not None and layer.settings is not None:
            it = it.got(layer.settings, f"{layer.sparsity:.1%} zeros ({layer.pattern})")
        if layer is not None and (it.zeros is None or op in asked):
            it = replace(it, zeros=layer)
        if op in made.moved:
            ops[made.moved[op]] = it
    return Stages(made.model, ops, (*state.notes, *made.notes))


def _changed(
    state: Stages,
    graph: Graph,
    asked: Mapping[OpId, Algorithm],
    given: Sequence[Feed] | None,
    progress: Callable[[int], None] | None,
) -> Stages:
    """One turn in which algorithms encode weights, each on its own; the weights are what they decode to.

    Where a weight was decomposed, its operator becomes two with a smaller value between them, if that is less work. On data,
    biases take up what the others shift in the mean, each layer behind those before it.
    """
    ops = dict(state.ops)
    edits: list[Edit] = []
    splits: list[Split] = []
    done: dict[Any, tuple[Encoded, ...]] = {}
    with contextlib.ExitStack() as stack:
        replay = stack.enter_context(Replay(state.model, graph, list(asked), given)) if given is not None else None
        for op in (op for op in graph.ops if op.id in asked):
            stage, weights = asked[op.id], _weights(graph, op)
            if isinstance(weights, str):
                ops[op.id] = _left(ops[op.id], stage, weights)
                continue
            inputs = {}
            for use, tensor in weights:
                assert tensor.weight is not None
                weight = tensor.weight
                key = (stage, tensor.id if weight.origin is None else (weight.origin, weight.shape), use.axis)
                if key not in done:
                    made = _encoded(graph, op, use, tensor, stage, state.ops[op.id].keeps_zeros)
                    half = "float16" in weight.stored
                    values = _factors(made) or (np.asarray(stage.decode(made), np.float32),)
                    done[key] = tuple(_stored(part, half=half) for part in values)
                    weight.release()
                if len(done[key]) == 1:
                    inputs[use.input] = Port(None, done[key][0], unpack=done[key][0].form == "float16")
                elif why := _unsplit(graph, op, use, done[key]):
                    ops[op.id] = _left(ops[op.id], stage, why)
                else:
                    first, second = done[key]
                    splits.append(Split(op.id, use.input, first, second))
                    words = f"rank {len(first.values)} of {min(len(second.values), first.values[0].size)}"
                    ops[op.id] = ops[op.id].got(stage, words)
            if inputs:
                inputs |= _corrected(graph, op, weights, inputs, edits, replay)
                edits.append(Edit(op.id, "float", op.version, inputs))
                ops[op.id] = ops[op.id].got(stage, stage.describe(), shares=True)
            if progress is not None:
                progress(len(edits) + len(splits))
    model = state.model
    if edits:
        model = apply(model, graph, tuple(edits), {})
        now = moved(model, graph)
        ops = {now[op]: it for op, it in ops.items() if op in now}
        splits = [replace(part, op=now[part.op]) for part in splits]
    if splits:
        halved, added = split(model, splits)
        now = moved(halved, view(model))
        firsts = {added[part.op]: ops[part.op] for part in splits}
        model, ops = halved, {now[op]: it for op, it in ops.items() if op in now} | firsts
    return Stages(model, ops, state.notes)


def _corrected(
    graph: Graph,
    op: Op,
    weights: list[tuple[WeightUse, Tensor]],
    inputs: Mapping[int, Port],
    edits: Sequence[Edit],
    replay: Replay | None,
) -> dict[int, Port]:
    """The bias that gives the float model's mean output, where there is data and a bias (Nagel et al. 2019, section 4.2)."""
    use, tensor = weights[0]
    unfolding, bias = Unfolding.of(graph, op, use), bias_of(graph, op, use)
    if replay is None or unfolding is None or bias is None or len(weights) > 1 or use.bias is None:
        return {}
    gram = replay.gram(op, unfolding, edits, {}, None)
    new = inputs[use.input].encoded
    if gram is None or new is None or tensor.weight is None:
        return {}
    before, after = (np.asarray(values, np.float32) for values in (tensor.weight.read(), new.values))
    shifted = (bias + gram.shift(before, after).reshape(bias.shape)).astype(np.float32)
    return {use.bias: Port(None, Encoded(shifted, "float32", None))}


def _encoded(graph: Graph, op: Op, use: WeightUse, tensor: Tensor, stage: Algorithm, pruned: bool) -> Encoded:
    """What an algorithm makes of one weight.

    Raises:
      InputError: The weight is not finite, or the algorithm, which may be the user's, failed.
    """
    assert tensor.weight is not None
    weight = np.asarray(tensor.weight.read(), np.float32)
    axis = use.axis if use.axis is None else use.axis % weight.ndim
    reduced = tuple(d % weight.ndim for d in use.reduced)
    context = Context(op.name, axis, reduced, unfolding=Unfolding.of(graph, op, use), pruned=pruned)
    return encoded(stage, weight, context)


def encoded(stage: Algorithm, weight: np.ndarray, context: Context) -> Encoded:
    """What an algorithm, which may be the user's, makes of one weight, float32.

    Raises:
      InputError: It failed, or gave values that are not finite, or of another shape.
    """
    name, where = stage_name(stage), f"layer {context.name}"
    try:
        found = stage.encode(weight, context)
        values = np.asarray(stage.decode(found), np.float32)
    except InputError as error:
        raise InputError(str(error).rstrip("."), where=where) from error
    except Exception as error:  # the user's own code may raise anything
        raise InputError(f"{name} failed", where=where, got=f"{type(error).__name__}: {error}") from error
    if values.shape != weight.shape or not np.isfinite(values).all():
        shape, got = ("x".join(map(str, it.shape)) for it in (weight, values))
        got = "infinity or not-a-number" if got == shape else got
        raise InputError(f"{name} failed", where=where, expected=f"finite values {shape}", got=got)
    return found


def _factors(encoded: Encoded) -> tuple[np.ndarray, np.ndarray] | None:
    """The weights of two operators in place of one, [rank, ..., inputs] and [outputs, 1, ..., rank]."""
    if encoded.factors is None:
        return None
    left, right = (np.asarray(part, np.float32) for part in encoded.factors)
    shape = encoded.values.shape
    if shape[0] != len(left):  # outputs lie elsewhere, where no operator becomes two
        return right, left
    return right.reshape(len(right), *shape[1:]), left.reshape(len(left), *[1] * (len(shape) - 2), left.shape[1])


def _unsplit(graph: Graph, op: Op, use: WeightUse, parts: tuple[Encoded, ...]) -> str:
    """Why an operator stays one; empty where it becomes two."""
    unfolding, (first, second) = Unfolding.of(graph, op, use), (part.values for part in parts)
    if op.kind not in SPLITTABLE or unfolding is None or unfolding.groups > 1:
        return f"{op.native} of this form is no product of one matrix"
    inputs = first[0].size
    if len(first) * (len(second) + inputs) >= len(second) * inputs:
        return f"rank {len(first)} is no less work than {len(second)}x{inputs} weights"
    return ""


_TURNS: Mapping[type[Algorithm], Callable[..., Stages]] = {Sparsify: _pruned, Algorithm: _changed}


def _weights(graph: Graph, op: Op) -> list[tuple[WeightUse, Tensor]] | str:
    """The weights of an operator that can become others, or why they cannot; an empty list where it has none."""
    if op.constant or op.demands is None or not op.demands.weights:
        return []
    found = list(graph.weights_of(op))
    if not found:
        return "its weights are computed at run time"
    for _, tensor in found:
        assert tensor.weight is not None
        if tensor.weight.stored in _INTEGER or tensor.weight.dtype != "float32":
            return f"its weights are {tensor.weight.stored}: compress the float model, quantize it last"
    return [(use, tensor) for use, tensor in found if tensor.weight is not None and tensor.weight.size]


def _stored(values: np.ndarray, *, half: bool) -> Encoded:
    """Float values as the weight was stored before."""
    return Encoded(shelved(values.astype(np.float16 if half else np.float32)), "float16" if half else "float32", None)


def _left(staged: Staged, stage: Algorithm, why: str) -> Staged:
    return replace(staged, left=(*staged.left, f"no {stage_name(stage)}: {why}"))
