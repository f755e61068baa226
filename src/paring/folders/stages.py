"""The stages before quantization on a SavedModel: zeros, clusters, algorithms of the user's; each weight by itself, no data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as new
from math import prod

import numpy as np

from paring.compress.base import Algorithm, Context
from paring.compress.pattern import UNSTRUCTURED, Pattern
from paring.compress.sparsify import Sparsify
from paring.compress.weights import shelved
from paring.errors import InputError
from paring.folders.planning import readers_of
from paring.formats.saved_model.apply import SourceId
from paring.formats.saved_model.flow import Source, Use
from paring.formats.saved_model.model import SavedModel
from paring.formats.saved_model.native import sizes
from paring.formats.saved_model.view import View, kept_of, values
from paring.graph import Op, OpId
from paring.pruning import Layer
from paring.recipe import Rule, stage_name
from paring.stages import encoded
from paring.targets import sparse_choice

_PRUNED = ("dense", "matmul", "einsum", "conv2d", "conv3d", "conv2d_transpose", "conv3d_transpose")
_NO_DATA = (
    "the smallest weights were pruned and the others left as they are, which costs far more accuracy than pruning on data; "
    "that is done to .tflite files, and while a model trains"
)


@dataclass(frozen=True)
class Got:
    """What the stages made of one operator: in words, why not others, and what pruning did (None: nobody asked)."""

    done: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    zeros: Layer | None = None


@dataclass
class Staged:
    """The weights behind the stages.

    Attributes:
      held: Those that became others, float32 in the variable's layout; in files without names where they are large.
      stages: The algorithms that these went through.
      uses: Which use says how a weight lies as a matrix.
      ops: By operator.
      notes: What to say of it.
    """

    held: dict[SourceId, np.ndarray] = new(default_factory=dict, repr=False)
    stages: dict[SourceId, tuple[Algorithm, ...]] = new(default_factory=dict)
    uses: dict[SourceId, Use] = new(default_factory=dict)
    ops: dict[OpId, Got] = new(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def zeros(self) -> bool:
        """True where weights were pruned."""
        return any(isinstance(stage, Sparsify) for stages in self.stages.values() for stage in stages)

    def values(self, model: SavedModel, source: Source) -> np.ndarray:
        """A weight as it is now, float32."""
        held = self.held.get(source.id)
        return values(model, source) if held is None else np.asarray(held)

    def broken(self, source: Source, weight: np.ndarray) -> tuple[str, ...]:
        """What a finished weight does not hold any more of what its stages promised."""
        stages = self.stages.get(source.id, ())
        if not stages:
            return ()
        rows = matrix(source, self.uses[source.id], weight)
        context = Context(source.name, 0, taps=prod(rows.shape[1:-1]))
        flat = rows.reshape(len(rows), -1)
        return tuple(
            f"{stage_name(s)} gives up: {said} ({source.name})" for s in stages for said in s.promises(flat, context)
        )


def staged(
    model: SavedModel,
    seen: View,
    winners: Mapping[OpId, tuple[Rule | None, str]],
    twins: Mapping[SourceId, SourceId],
    progress: Callable[[int], None] | None = None,
) -> Staged:
    """Applies what the recipe's rules have before quantization: the first stage of every rule, then the second, ...

    A weight gets what the rules of its readers agree on.

    Args:
      model: The float model.
      seen: Its operators.
      winners: The rule of each, and why.
      twins: Variables that hold the same as another.
      progress: Called with the number of weights done, from 1 in each turn.

    Raises:
      InputError: No layer can be touched, with the reasons, or an algorithm failed.
    """
    found = Staged()
    ops = {op.id: op for op in seen.graph.ops}
    rules = {op: rule for op, (rule, _) in winners.items() if rule is not None}
    for turn in range(max((len(rule.before) for rule in rules.values()), default=0)):
        tasks = []
        for id_, (_, readers) in readers_of(seen, twins).items():
            task = _task(model, seen, found, ops, rules, id_, readers, turn)
            if task is not None:
                tasks.append(task)
        for number, task in enumerate(_allocated(model, found, tasks), 1):
            _run(model, found, task)
            if progress is not None:
                progress(number)
    if rules and any(rule.before for rule in rules.values()):
        _check(model, found, rules)
    if found.zeros:
        found.notes = (_NO_DATA,)
    return found


@dataclass(frozen=True)
class _Task:
    """One weight and the stage that it gets."""

    source: Source
    use: Use
    op: Op
    readers: tuple[OpId, ...]
    stage: Algorithm
    rule: Rule
    why: str


def _task(
    model: SavedModel,
    seen: View,
    found: Staged,
    ops: Mapping[OpId, Op],
    rules: Mapping[OpId, Rule],
    id_: SourceId,
    readers: list[OpId],
    turn: int,
) -> _Task | None:
    """What a weight gets in a turn; None, and the reason in its readers' rows, where it gets nothing."""
    asking = [op for op in readers if op in rules and len(rules[op].before) > turn]
    if not asking:
        return None
    source, stage, rule = model.flow.sources[id_], rules[asking[0]].before[turn], rules[asking[0]]
    other = next((op for op in readers if op not in rules or rules[op].before != rule.before), None)
    fitting = [
        (op, use) for op in asking for s, use in zip(seen.sources[op], seen.uses[op], strict=True) if s is source
    ]
    why = source.refused
    if not why and other is not None:
        why = f"shares its weights with {ops[other].name}, which the recipe treats otherwise"
    if not why and isinstance(stage, Sparsify):
        fitting = [(op, use) for op, use in fitting if ops[op].kind in _PRUNED and use.kept is not None] or fitting
    if not why and not fitting:
        why = "the layout of its weights is not known"
    if not why:
        op, use = fitting[0]
        made, why = _chosen(model, seen, source, use, ops[op], stage, rule)
        if made is not None:
            return _Task(source, use, ops[op], tuple(readers), made, rule, why)
    for op in asking:
        got = found.ops.get(op, Got())
        if isinstance(stage, Sparsify):
            got = replace(got, zeros=Layer(reason=why))
        found.ops[op] = replace(got, left=(*got.left, f"no {stage_name(stage)}: {why}"))
    return None


def _chosen(
    model: SavedModel, seen: View, source: Source, use: Use, op: Op, stage: Algorithm, rule: Rule
) -> tuple[Algorithm | None, str]:
    """The stage in force, and why so; or None and why it has no place here."""
    if not isinstance(stage, Sparsify):
        return stage, ""
    if op.kind == "depthwise_conv2d":
        return None, "depthwise: each output has so few weights that none can stand in for another"
    if op.kind not in _PRUNED:
        return None, f"no pruning known for {op.native}"
    if use.kept is None:
        return None, "the layout of its weights is not known"
    if source.size < stage.min_size:
        return None, f"{source.size} weights, fewer than {stage.min_size} (min_size)"
    if stage.allocation == "error":
        raise InputError(
            "cannot share zeros out by error in a SavedModel", where="sparsify.allocation", expected="uniform, global or erk",
            got="error, which asks for data", todo="Take --allocation uniform, or write a .tflite file",
        )  # fmt: skip
    pattern, reason = stage.pattern or UNSTRUCTURED, "as asked for"
    if stage.target:
        shape, scope = _rows(source, use), model.flow.scopes[use.scope]
        read = sizes(scope, scope.by_name[use.node].input[0]) if op.kind == "conv2d" else None
        if read and read[-1] > shape[-1]:
            return None, "grouped: its channels do not see each other"
        result = seen.graph.tensors[op.outputs[0]].shape
        dtype = rule.apply.multiplied if rule.apply is not None else "float32"
        layer = replace(op, kind="dense") if op.kind == "einsum" else op
        chosen, reason = sparse_choice(stage.target, layer, shape, prod(max(1, d) for d in result[:-1]), dtype)
        if chosen is None:
            return None, reason
        pattern = stage.pattern or chosen
    return replace(stage, pattern=pattern), reason


def _allocated(model: SavedModel, found: Staged, tasks: list[_Task]) -> list[_Task]:
    """The tasks with each weight's own share of zeros, where that hangs on the weights of a whole rule."""
    shares: dict[SourceId, Algorithm] = {}
    groups: dict[tuple[int, str], list[_Task]] = {}
    for task in tasks:
        stage = task.stage
        by_weights = isinstance(stage, Sparsify) and stage.allocation in ("global", "erk")
        if isinstance(stage, Sparsify) and by_weights and Pattern.parse(stage.pattern).sparsity is None:
            groups.setdefault((id(task.rule), stage.pattern), []).append(task)
    for group in groups.values():
        rows = [matrix(task.source, task.use, found.values(model, task.source)) for task in group]
        contexts = [Context(task.op.name, 0, taps=prod(w.shape[1:-1])) for task, w in zip(group, rows, strict=True)]
        flat = [shelved(w.reshape(len(w), -1)) for w in rows]
        del rows
        for task, stage in zip(group, group[0].stage.allocate(flat, contexts), strict=True):
            shares[task.source.id] = stage
    return [replace(task, stage=shares.get(task.source.id, task.stage)) for task in tasks]


def _run(model: SavedModel, found: Staged, task: _Task) -> None:
    """One stage of one weight."""
    source, stage = task.source, task.stage
    before = np.asarray(found.values(model, source), np.float32)
    rows = matrix(source, task.use, before)
    pruned = any(isinstance(done, Sparsify) for done in found.stages.get(source.id, ()))
    made = encoded(stage, rows, Context(task.op.name, 0, tuple(range(1, rows.ndim)), pruned=pruned))
    if made.factors is not None:
        why = "one operator would have to become two, which SavedModels do not get"
        for op in task.readers:
            got = found.ops.get(op, Got())
            found.ops[op] = replace(got, left=(*got.left, f"no {stage_name(stage)}: {why}"))
        return
    after = np.asarray(stage.decode(made), np.float32)
    found.held[source.id] = shelved(unrolled(source, task.use, after))
    found.stages[source.id] = (*found.stages.get(source.id, ()), stage)
    found.uses[source.id] = task.use
    words, layer = stage.describe(), None
    if isinstance(stage, Sparsify):
        zeros = 1 - float(np.count_nonzero(after)) / max(1, after.size)
        words, layer = f"{zeros:.1%} zeros ({stage.pattern})", Layer(zeros, stage.pattern, None, task.why, stage)
    for op in task.readers:
        got = found.ops.get(op, Got())
        found.ops[op] = replace(got, done=(*got.done, words), zeros=layer or got.zeros)


def _kept(source: Source, use: Use) -> tuple[int, ...]:
    """The dimensions that are outputs."""
    return use.kept or () if not use.picks else kept_of(use, source)


def _rows(source: Source, use: Use) -> tuple[int, ...]:
    """The shape of `matrix`."""
    assert source.shape is not None
    kept = _kept(source, use)
    rest = [source.shape[d] for d in range(len(source.shape)) if d not in kept]
    outputs = prod(source.shape[d] for d in kept)
    taps = prod(rest[:-1])
    return (outputs, taps, rest[-1]) if taps > 1 else (outputs, prod(rest))


def matrix(source: Source, use: Use, weight: np.ndarray) -> np.ndarray:
    """A variable's values with the outputs first: [outputs, inputs], or [outputs, taps, inputs] for a convolution's kernel."""
    return np.ascontiguousarray(weight.transpose(_order(source, use))).reshape(_rows(source, use))


def unrolled(source: Source, use: Use, rows: np.ndarray) -> np.ndarray:
    """The inverse of `matrix`."""
    assert source.shape is not None
    order = _order(source, use)
    return np.ascontiguousarray(rows.reshape([source.shape[d] for d in order]).transpose(np.argsort(order)))


def _order(source: Source, use: Use) -> tuple[int, ...]:
    kept = _kept(source, use)
    return (*kept, *(d for d in range(len(source.shape or ())) if d not in kept))


def _check(model: SavedModel, found: Staged, rules: Mapping[OpId, Rule]) -> None:
    """Refuses a recipe whose stages do nothing, unless it quantizes."""
    if found.stages or any(rule.apply is not None for rule in rules.values()):
        return
    reasons = Counter(why for got in found.ops.values() for why in got.left)
    said = "; ".join(f"{why} ({n} layer{'s' if n > 1 else ''})" for why, n in reasons.most_common(4))
    raise InputError(
        "the recipe touches no layer", where=str(model.path), expected="rules that select a layer with float weights",
        got=said or "no layer with weights", todo="`paring inspect` shows names and kinds",
    )  # fmt: skip


__all__ = ["Got", "Staged", "matrix", "staged", "unrolled"]
