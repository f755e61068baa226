"""The pruning stage: which layers get zeros in which pattern, what each loses, and the model with them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import prod
from typing import Any

import numpy as np

from paring.compress.allocate import SHARES, allocate
from paring.compress.base import Context, Encoded
from paring.compress.gram import Gram
from paring.compress.pattern import UNSTRUCTURED, Pattern
from paring.compress.sparsify import Sparsify
from paring.compress.unfold import KINDS, Unfolding
from paring.compress.weights import shelved
from paring.data import Feed
from paring.edits import Edit, Port
from paring.errors import InputError
from paring.formats.tflite.apply import apply, moved
from paring.formats.tflite.model import TfliteModel
from paring.graph import Graph, Op, OpId, Tensor, Weight, WeightUse
from paring.recipe import Rule
from paring.replay import Replay
from paring.targets import THRESHOLD, sparse_choice

MARGIN = 0.02  # above the share from which on kernels look at a layer: blocks meet a share only nearly
LEAST = 0.01  # share of zeros that is worth a layer's rounding
_INTEGER = ("int8", "uint8", "int16", "int4")


@dataclass(frozen=True)
class Layer:
    """What pruning made of one operator with weights.

    Attributes:
      sparsity: Share of its weights that are zero now, None where it was not pruned.
      pattern: Of the zeros; empty where it was not pruned.
      error: Relative output error that the zeros add on the data, None without data.
      reason: Why this pattern, or why it was not pruned.
      settings: Those in force, None where it was not pruned.
    """

    sparsity: float | None = None
    pattern: str = ""
    error: float | None = None
    reason: str = ""
    settings: Sparsify | None = None


@dataclass(frozen=True)
class Pruned:
    """A pruned model.

    Attributes:
      model: With the zeros in place, float.
      moved: Where operators are now.
      layers: By operator of the model before, for all with weights.
      notes: What to say of it.
    """

    model: TfliteModel = field(repr=False)
    moved: Mapping[OpId, OpId]
    layers: Mapping[OpId, Layer]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Task:
    """One layer to prune."""

    op: Op
    use: WeightUse
    tensor: Tensor
    unfolding: Unfolding
    settings: Sparsify
    rule: Rule
    reason: str
    mends: bool = False  # not pruned, but fitted to what pruned layers before it make

    @property
    def weight(self) -> Weight:
        assert self.tensor.weight is not None
        return self.tensor.weight

    @property
    def key(self) -> Any:
        """What layers share that share their weights."""
        return self.tensor.id if self.weight.origin is None else (self.weight.origin, self.weight.shape)


def prune(
    model: TfliteModel,
    graph: Graph,
    asked: Mapping[OpId, tuple[Rule | None, Sparsify | None, str]],
    given: Sequence[Feed] | None,
    progress: Callable[[int], None] | None = None,
) -> Pruned:
    """Prunes what is asked for, one layer behind the other.

    Args:
      model: A float model; it is not changed.
      graph: Its graph.
      asked: By operator, the rule that selects it, how it is to be pruned (None: not), and why.
      given: Samples; without them the smallest weights go.
      progress: Called with the number of looks at layers done: one where shares are the same, else two.

    Raises:
      InputError: No layer can be pruned, with the reasons.
    """
    tasks, left = _choose(graph, asked)
    layers = {op: Layer(reason=why) for op, why in (left | {t.op.id: t.reason for t in tasks if t.mends}).items()}
    if all(task.mends for task in tasks):
        raise _nothing(model, layers)
    looks = count(1)

    def step(_: int) -> None:
        if progress is not None:
            progress(next(looks))

    tasks = _allocated(model, graph, tasks, given, step)
    layers |= {task.op.id: Layer(reason=task.reason) for task in tasks}
    tasks = [task for task in tasks if not task.mends or (given is not None and task.key not in _shared(tasks))]
    notes = []
    edits: list[Edit] = []
    done: dict[Any, Port] = {}
    asking = [task.op.id for task in tasks]
    with contextlib.ExitStack() as stack:
        replay = None
        if given is not None:
            replay = stack.enter_context(Replay(model, graph, asking, given, progress=step))
        for task in tasks:
            if task.mends and not edits:
                continue  # nothing before it has changed
            gram = replay.gram(task.op, task.unfolding, edits, {}, None) if replay is not None else None
            if task.mends and gram is None:
                continue
            if replay is not None and gram is None:
                task = replace(task, reason=f"{task.reason}; no finite sample reaches it: the smallest weights went")
            edit, layers[task.op.id] = _solve(graph, task, gram, done)
            edits.append(edit)
    changed = apply(model, graph, tuple(edits), {})
    changed.notes, changed.folder = model.notes, model.folder
    if given is None:
        notes.append(
            "no data was given: the smallest weights were pruned and the others left as they are, which costs far more "
            "accuracy than pruning on data (--data)"
        )
    return Pruned(changed, moved(changed, graph), layers, tuple(notes))


def _choose(
    graph: Graph, asked: Mapping[OpId, tuple[Rule | None, Sparsify | None, str]]
) -> tuple[list[_Task], dict[OpId, str]]:
    """The layers to prune or to mend in the graph's order, and why other layers with weights are neither."""
    tasks: list[_Task] = []
    left: dict[OpId, str] = {}
    for op in graph.ops:
        rule, settings, why = asked[op.id]
        if op.constant or op.demands is None or not op.demands.weights:
            continue
        if rule is None or settings is None:
            left[op.id] = why if rule is None else f"{why} does not prune"
            continue
        found = _task(graph, op, rule, settings, why)
        if isinstance(found, str):
            left[op.id] = found
        else:
            tasks.append(found)
    for task in (t for t in tasks if t.mends and not t.settings.mend):
        left[task.op.id] = task.reason
    return [task for task in tasks if task.op.id not in left], left


def _shared(tasks: list[_Task]) -> set[Any]:
    """The weights that several layers read: what one of them makes of them the others get, too."""
    return {key for key, users in Counter(task.key for task in tasks).items() if users > 1}


def _task(graph: Graph, op: Op, rule: Rule, settings: Sparsify, why: str) -> _Task | str:
    """What to do with one operator, or why nothing."""
    weights = list(graph.weights_of(op))
    if op.kind not in KINDS:
        return f"no pruning known for {op.native}"
    if len(weights) != 1 or weights[0][1].weight is None:
        return "its weights are computed at run time"
    use, tensor = weights[0]
    weight = tensor.weight
    assert weight is not None
    if weight.stored in _INTEGER or weight.dtype != "float32":
        return f"its weights are {weight.stored}: prune the float model, then quantize"
    unfolding = Unfolding.of(graph, op, use)
    if unfolding is None:
        return f"the layout of its weights is not known ({'x'.join(map(str, weight.shape))})"
    pattern, reason = settings.pattern or UNSTRUCTURED, why
    task = _Task(op, use, tensor, unfolding, replace(settings, pattern=pattern), rule, reason)
    if op.kind == "depthwise_conv2d":
        why = "depthwise: each output has so few weights that none can stand in for another"
        return replace(task, reason=why, mends=True)
    if weight.size < settings.min_size:
        return replace(task, reason=f"{weight.size} weights, fewer than {settings.min_size} (min_size)", mends=True)
    if settings.target and unfolding.groups > 1:
        return replace(task, reason="grouped: its channels do not see each other", mends=True)
    if settings.target:
        shape = (unfolding.groups * unfolding.rows, *weight.shape[1:]) if op.kind != "matmul" else _turned(unfolding)
        positions = prod(max(1, d) for d in graph.tensors[op.outputs[0]].shape[:-1])
        dtype = rule.apply.multiplied if rule.apply is not None else "float32"
        found, reason = sparse_choice(settings.target, op, shape, positions, dtype)
        if found is None:
            return replace(task, reason=reason, mends=True)
        pattern = settings.pattern or found
    return replace(task, settings=replace(settings, pattern=pattern), reason=reason)


def _turned(unfolding: Unfolding) -> tuple[int, ...]:
    return unfolding.rows, prod(unfolding.shape) // (unfolding.rows * unfolding.groups)


def _allocated(
    model: TfliteModel,
    graph: Graph,
    tasks: list[_Task],
    given: Sequence[Feed] | None,
    step: Callable[[int], None],
) -> list[_Task]:
    """The tasks with each layer's own share of zeros; a layer that is better not pruned is mended.

    Layers that one rule selects are a group. Their curves are measured in the float model: what is pruned before a layer moves
    its curve much less than its own zeros do.
    """
    groups: dict[int, list[_Task]] = {}
    first: dict[Any, _Task] = {}
    plain: dict[Any, list[_Task]] = {}
    for task in (t for t in tasks if not t.mends and first.setdefault(t.key, t) is t):
        if Pattern.parse(task.settings.pattern).sparsity is not None:
            continue
        if task.settings.allocation == "error":
            groups.setdefault(id(task.rule), []).append(task)
        elif task.settings.allocation != "uniform":
            plain.setdefault((id(task.rule), task.settings.pattern), []).append(task)
    shares: dict[OpId, float] = {}
    for group in plain.values():
        shares |= _by_weights(group)
    asking = [task.op.id for group in groups.values() for task in group if len(group) > 1]
    if not asking and not shares:
        return tasks
    if asking and given is None:
        raise InputError(
            "cannot share zeros out by error", where="sparsify.allocation", expected="data", got="none",
            todo="Give samples with --data, or take allocation uniform",
        )  # fmt: skip
    curves: dict[OpId, np.ndarray] = {}
    with Replay(model, graph, asking, given or (), progress=step) as replay:
        for task in (t for t in tasks if t.op.id in asking):
            gram = replay.gram(task.op, task.unfolding, (), {}, None)
            if gram is not None:
                gram = gram.centered() if _corrects(graph, task) else gram
                curves[task.op.id] = task.settings.curve(
                    np.asarray(task.weight.read(), np.float32), gram, _points(task.settings)
                )
                task.weight.release()
    for group in groups.values():
        known = [task for task in group if task.op.id in curves]
        if len(known) > 1:
            share = known[0].settings.share
            sizes, errors = [task.weight.size for task in known], np.stack([curves[task.op.id] for task in known])
            parts = (
                allocate(sizes, _points(known[0].settings), errors, share)
                if share < SHARES[-1]
                else [share] * len(known)
            )
            shares |= {task.op.id: float(part) for task, part in zip(known, parts, strict=True)}
    found = []
    for task in tasks:
        own = shares.get(first[task.key].op.id) if task.key in first and not task.mends else None
        if own is not None and own < LEAST:
            task = replace(task, reason="zeros cost less in other layers", mends=True)
        elif own is not None:
            task = replace(task, settings=replace(task.settings, sparsity=own))
        found.append(task)
    return found


def _by_weights(group: list[_Task]) -> dict[OpId, float]:
    """Shares that hang on the weights or their shapes alone, as in training."""
    cuts = [t.unfolding.taps(t.unfolding.matrix(np.asarray(t.weight.read(), np.float32))) for t in group]
    weights = [cut.reshape(cut.shape[0] * cut.shape[1], -1) for cut in cuts]
    contexts = [Context(task.op.name, 0, taps=cut.shape[2]) for task, cut in zip(group, cuts, strict=True)]
    found = group[0].settings.allocate(weights, contexts)
    return {task.op.id: settings.share for task, settings in zip(group, found, strict=True)}


def _points(settings: Sparsify) -> np.ndarray:
    """Shares at which a layer's error is measured, from the least that it may get: kernels skip no zeros where they are few."""
    least = min(settings.share, THRESHOLD + MARGIN) if settings.target else 0.0
    return np.array([least, *(share for share in SHARES if share > least)])


def _solve(graph: Graph, task: _Task, gram: Gram | None, done: dict[Any, Port]) -> tuple[Edit, Layer]:
    """The edit of one layer, and what to say of it. Layers that share weights share what the first one made of them."""
    op, weight, bias = task.op, task.weight, bias_of(graph, task.op, task.use)
    before = np.asarray(weight.read(), np.float32)
    corrected = gram is not None and _corrects(graph, task)
    if gram is not None and corrected:
        gram = gram.centered()
    if task.key not in done:
        context = Context(op.name, task.use.axis, gram=gram, unfolding=task.unfolding)
        try:
            mended = gram if task.mends else None
            encoded = task.settings.encode(before, context) if mended is None else task.settings.mended(before, mended)
        except InputError as error:
            raise InputError(str(error).rstrip("."), where=f"layer {op.name}") from error
        half = "float16" in weight.stored
        stored = Encoded(encoded.values.astype(np.float16), "float16", None) if half else encoded
        done[task.key] = Port(None, replace(stored, values=shelved(stored.values)), unpack=half)
    port = done[task.key]
    assert port.encoded is not None
    after = np.asarray(task.settings.decode(port.encoded), np.float32)
    inputs = {task.use.input: port}
    if gram is not None and bias is not None and corrected and task.use.bias is not None:
        shifted = (bias + gram.shift(before, after).reshape(bias.shape)).astype(np.float32)
        inputs[task.use.bias] = Port(None, Encoded(shifted, "float32", None))
    lost = None
    if gram is not None:
        meant = gram.retarget(before, task.settings.damping)
        power = float(gram.loss(meant).sum())
        lost = float(np.sqrt(gram.loss(meant - after).sum() / power)) if power > 0 else 0.0
    weight.release()
    if task.mends:
        return Edit(op.id, "float", op.version, inputs), Layer(reason=f"{task.reason}; fitted to what it reads now")
    zeros = 1 - float(np.count_nonzero(after)) / max(1, after.size)
    layer = Layer(zeros, task.settings.pattern, lost, task.reason, task.settings)
    return Edit(op.id, "float", op.version, inputs), layer


def _corrects(graph: Graph, task: _Task) -> bool:
    """True where the bias takes up what pruning shifts in the mean."""
    return task.settings.bias_correction and bias_of(graph, task.op, task.use) is not None


def bias_of(graph: Graph, op: Op, use: WeightUse) -> np.ndarray | None:
    """The constant bias that a correction can go into."""
    index = use.bias
    tensor = op.inputs[index] if index is not None and index < len(op.inputs) else None
    weight = graph.tensors[tensor].weight if tensor is not None else None
    if weight is None or weight.dtype != "float32" or use.axis is None:
        return None
    return np.asarray(weight.read(), np.float32)


def _nothing(model: TfliteModel, layers: Mapping[OpId, Layer]) -> InputError:
    """Why no layer was pruned."""
    reasons = Counter(layer.reason for layer in layers.values())
    said = "; ".join(f"{why} ({number} layer{'s' if number > 1 else ''})" for why, number in reasons.most_common(4))
    integer = sum(number for why, number in reasons.items() if "prune the float model" in why)
    if integer and integer == max(reasons.values()):
        return InputError(
            "cannot prune a quantized model", where=model.path, expected="float weights", got=said,
            todo="Prune the float model and quantize it in one go: a recipe with apply: [{sparsify: ...}, {quantize: ...}]",
        )  # fmt: skip
    return InputError("no layer can be pruned", where=model.path, got=said or "no layer with weights")
