"""attach, finalize: a recipe goes to work in a live Keras model, and leaves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from paring.errors import BoundError, InputError
from paring.graph import Demands, Graph, Op, Tensor, Weight, WeightUse
from paring.recipe import Recipe
from paring.training import backends, calls
from paring.training.assign import Place, algorithms, compressed_layer, factor_sites
from paring.training.attachment import MOMENTUM, Attachment, Row
from paring.training.calibrating import batches_of, calibrate
from paring.training.layouts import Part, kind_of, name_of, parts_of
from paring.training.moments import grams
from paring.training.sites import LINEAR, Site, Sites, place
from paring.training.state import ATTRIBUTE, State
from paring.training.trace import Trace, trace
from paring.training.weights import Compressed


def attach(
    model: Any,
    recipe: Any,
    data: Any = None,
    *,
    steps_per_epoch: int | None = None,
    epochs: float | None = None,
    optimizer: Any = None,
    momentum: float = MOMENTUM,
    strict: bool = False,
    paths: Sequence[str] | None = None,
) -> Attachment:
    """Puts a recipe to work in a live Keras 3 model, in place: no wrapper, no clone, names and summary unchanged.

    From then on training sees pruned, clustered, fake-quantized weights and activations, while the optimizer goes on with the
    raw weights; `evaluate` and `predict` use the deployed form that `paring.export` writes: batch normalization folded, biases
    on the integer grid. Schedules follow the optimizer's steps, without a callback. `model.save` keeps everything;
    `paring.load_model` brings it back, `keras.models.load_model` gives the plain model.

    Args:
      model: A built Keras 3 model of any kind.
      recipe: A recipe's name, file or object.
      data: Samples to calibrate activation ranges on before the first step, and to choose zeros by where pruning begins at
        once: an array, a list or dict of arrays as the model takes them, or an iterable of batches. Without, ranges start
        with the first training batch.
      steps_per_epoch: For schedules in epochs or fractions of training.
      epochs: Likewise.
      optimizer: The Keras optimizer of a training loop of your own; `compile` makes it known by itself.
      momentum: Of the moving averages that activation ranges are.
      strict: Refuse to leave a weight or activation float.
      paths: How the operations were called when the model was saved; names that Keras makes up are others after loading.

    Returns:
      The attachment: `rows` says what became of each operation; `advance()` is for loops without a Keras optimizer.

    Raises:
      InputError: The model is not built or has an attachment already, the recipe touches nothing, a pattern does not fit, a
        schedule cannot be told in steps, or data is not finite. The model is unchanged.
      BoundError: With `strict`, what would stay float.
    """
    _check(model)
    chosen = Recipe.load(recipe)
    first, batches = batches_of(data)
    calls_so_far = [
        (lists, len(lists)) for o in model._flatten_layers() for lists in (o._inbound_nodes, o._outbound_nodes)
    ]
    found = trace(model, first)
    for nodes, count in calls_so_far:
        del nodes[count:]  # what tracing leaves there, `summary` would show
    places = _places(model, found)
    _name(places, paths, model)
    by_op = {p.op: p for p in places}
    for node in found.nodes:
        node.path = by_op[node.op].path
    _match(places, chosen)
    sites = place(found.nodes, found.inputs, found.outputs, found.reals, lambda op: _bits(by_op.get(op)))
    _leaf_sites(places, found, sites)
    plans, begun = algorithms(
        places, found, steps_per_epoch, epochs, lambda ops: grams(model, ops, batches or ()), sites
    )
    if not plans and not sites.all():
        raise InputError(
            "the recipe touches no layer", where=f"model {model.name}", expected="a layer with weights that a rule selects",
            got=_said(places), todo="Look at `name` and `kind` of the rules",
        )  # fmt: skip
    rows = tuple(_row(p, found, sites) for p in places)
    left = [r for r in rows if r.became == "float" and r.weights]
    if strict and left:
        raise BoundError(
            "layers would stay float", expected="none (strict)", got="; ".join(f"{r.path} ({r.reason})" for r in left)
        )
    factor_sites(plans, by_op, sites)
    sites.folded = {op: norm for op, norm in sites.folded.items() if by_op[op].quantize is not None and plans.get(op)}
    state = State()
    state.settings = {
        "version": 1, "recipe": chosen.to_data(), "steps_per_epoch": steps_per_epoch, "epochs": epochs, "momentum": momentum,
        "paths": [p.path for p in places],
    }  # fmt: skip
    state.add("step", np.zeros((), np.float32))
    learned = any(p.quantize is not None and p.quantize.steps == "lsq" for p in places)
    for site in sites.all():
        state.add(f"range/{site.name}", np.zeros(2, np.float32), trainable=learned, aggregation="mean")
    with _beginning(begun):
        compressed = {op: compressed_layer(by_op[op], chosen_, sites, state) for op, chosen_ in plans.items()}
        attachment = Attachment(model, chosen, state, rows, sites, optimizer, momentum)
        for number, p in enumerate((p for p in places if p.rule is not None), 1):
            attachment.labels[p.op] = number
            attachment.settings[number] = p
        _own(model, state)
        state.attachment = attachment
        try:
            _patch(attachment, found, places, compressed)
            if batches is not None and sites.all():
                how = next(p.quantize for p in places if p.quantize is not None and p.quantize.static)
                calibrate(attachment, batches, how)
        except BaseException:
            detach(model)
            raise
    return attachment


@contextmanager
def _beginning(begun: Sequence[tuple[Part, np.ndarray]]) -> Iterator[None]:
    """Gives weights the values with which training begins, and takes them back where attaching fails."""
    before = [keras.ops.convert_to_numpy(part.variable) for part, _ in begun]
    for part, matrix in begun:
        part.variable.assign(part.layout.weight(np, matrix, part.shape))
    try:
        yield
    except BaseException:
        for (part, _), value in zip(begun, before, strict=True):
            part.variable.assign(value)
        raise


def attachment_of(model: Any) -> Attachment:
    """The attachment of a model.

    Raises:
      InputError: It has none.
    """
    state = getattr(model, ATTRIBUTE, None)
    found = getattr(state, "attachment", None)
    if found is None:
        raise InputError(
            "nothing is attached", where=f"model {getattr(model, 'name', model)}", expected="a model behind paring.attach",
            todo="Call paring.attach(model, recipe), or paring.load_model for a file",
        )  # fmt: skip
    assert isinstance(found, Attachment)
    return found


def finalize(model: Any) -> Any:
    """Writes the compressed weights into the model and takes the attachment away.

    Args:
      model: A model behind `attach`.

    Returns:
      The same model, plain again: weights are pruned, clustered and on their grids, stored as floats; activations are float.

    Raises:
      InputError: Nothing is attached.
    """
    attachment = attachment_of(model)
    values = []
    for compressed in attachment.compressed.values():
        for target in compressed.targets:
            values.append((target.part.variable, target.weight(target.matrix(training=False, step=None))))
    for variable, value in values:
        variable.assign(value)
    detach(model)
    return model


def detach(model: Any) -> None:
    """Takes everything back but the weights."""
    attachment = attachment_of(model)
    for undo in reversed(attachment.undo):
        undo()
    attachment.undo.clear()
    for optimizer in (attachment.optimizer, getattr(model, "optimizer", None)):
        backends.refit_optimizer(optimizer, ())
    delattr(model, ATTRIBUTE)
    model._tracker.untrack(attachment.state)  # which deleting a layer forgets
    backends.renew_parameters(model)
    attachment.forget()


def _own(model: Any, state: State) -> None:
    """Makes the state an attribute of a model, also of a subclassed one, which takes none any more once it is built."""
    tracker = model._tracker
    locked = tracker.locked
    tracker.unlock()
    try:
        setattr(model, ATTRIBUTE, state)
    finally:
        if locked:
            tracker.lock()


# -- what there is ---------------------------------------------------------------------------------------------------


def _check(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise InputError(
            "cannot attach", expected="a live Keras 3 model", got=f"{type(model).__module__}.{type(model).__qualname__}",
            todo="Load it with keras.models.load_model",
        )  # fmt: skip
    if getattr(model, ATTRIBUTE, None) is not None:
        raise InputError(
            "a recipe is attached already", where=f"model {model.name}", expected="a plain model",
            todo="Put all stages into one recipe, or call paring.finalize(model) first",
        )  # fmt: skip
    for layer in model._flatten_layers(include_self=False):
        if (other := calls.works_in(layer)) is not None:
            raise InputError(
                "a recipe is attached already", where=f"layer {layer.name} of model {other.model.name}",
                expected="layers without one", todo="Attach to one of the models that share it",
            )  # fmt: skip
    graph = hasattr(model, "_nodes_by_depth")  # what is not built there is not called
    unbuilt = [layer.name for layer in model._flatten_layers() if not layer.built and not graph]
    if not model.built or unbuilt:
        raise InputError(
            "the model is not built", where=f"model {model.name}", expected="layers with weights",
            got=f"unbuilt: {', '.join(unbuilt[:5])}", todo="Call it once on a batch, or model.build(shape)",
        )  # fmt: skip


def _places(model: Any, found: Trace) -> list[Place]:
    """Every operation of the graph, and every layer with weights, once, in order."""
    paths = dict(_paths(model, ""))
    places: dict[Any, Place] = {}
    order: list[Any] = []
    for node in found.nodes:
        order.append((node.op, paths.get(node.op, node.path)))
        inner = node.op._flatten_layers(include_self=False) if isinstance(node.op, keras.layers.Layer) else ()
        order += [(layer, paths[layer]) for layer in inner if layer in paths]
    order += list(paths.items())
    traced = {node.op for node in found.nodes}
    for op, path in order:
        if op in places or op is model:
            continue
        parts = parts_of(op) if isinstance(op, keras.layers.Layer) else []
        if parts or op in traced:
            places[op] = Place(op, path, parts)
    return list(places.values())


def _paths(layer: Any, prefix: str) -> Iterator[tuple[Any, str]]:
    for inner in layer._layers:
        if isinstance(inner, State):
            continue
        path = f"{prefix}{inner.name}"
        yield inner, path
        yield from _paths(inner, f"{path}/")


def _name(places: list[Place], paths: Sequence[str] | None, model: Any) -> None:
    """Gives the operations the names that they had; their order is that of the model's code."""
    if paths is None or {p.path for p in places} == set(paths):
        return
    if len(paths) != len(places):
        raise InputError(
            "cannot load what the recipe trained", where=f"model {model.name}", expected=f"{len(paths)} operations",
            got=str(len(places)), todo="Load it with the code that it was saved with",
        )  # fmt: skip
    for p, path in zip(places, paths, strict=True):
        p.path = path


def _match(places: list[Place], recipe: Recipe) -> None:
    """Finds each operation's rule, by the same code as for a file: the model as a Graph."""
    tensors: dict[tuple[int, int], Tensor] = {}
    ops = []
    for number, p in enumerate(places):
        inputs = []
        for part in p.parts:
            key = (0, len(tensors))
            size = int(np.prod(part.shape))
            weight = Weight(part.shape, "float32", "float32", 4 * size, lambda *_: np.zeros(0))
            tensors[key] = Tensor(key, part.variable.path, part.shape, "float32", weight=weight)
            inputs.append(key)
        uses = tuple(WeightUse(i, 0) for i in range(len(inputs)))
        ops.append(
            Op(
                (0, number),
                p.path,
                kind_of(p.op),
                type(p.op).__name__,
                tuple(inputs),
                (),
                demands=Demands(weights=uses),
            )
        )
    winners = recipe.winners(Graph(tuple(ops), tensors, (), ()))
    for op, p in zip(ops, places, strict=True):
        p.rule, p.reason = winners[op.id]
        if p.rule is not None and not p.rule.stages:
            p.rule = None


def _bits(place: Place | None) -> int:
    quantize = place.quantize if place is not None else None
    return {"int8": 8, "int16": 16}.get(quantize.activations, 0) if quantize is not None else 0


def _leaf_sites(places: list[Place], found: Trace, sites: Sites) -> None:
    """Sites of layers that no graph shows: what they read and what they make."""
    traced = {node.op for node in found.nodes}
    for p in places:
        if (
            p.op in traced
            or p.op in sites.outputs
            or p.op in sites.source
            or not _bits(p)
            or name_of(p.op) not in LINEAR
        ):
            continue
        sites.source[p.op] = sites.entries[p.op] = Site(f"{p.path}/input", _bits(p))
        sites.outputs[p.op] = [Site(p.path, _bits(p))]


# -- at work ---------------------------------------------------------------------------------------------------------


def _patch(attachment: Attachment, found: Trace, places: list[Place], compressed: dict[Any, Compressed]) -> None:
    attachment.compressed = compressed
    model, sites = attachment.model, attachment.sites
    whole = found.views.get(model)
    norms = set(sites.folded.values()) | set(sites.alone)
    for layer, view in found.views.items():
        if layer is not model:
            calls.replace(attachment, layer, "call", view)
    for p in places:
        op = p.op
        touched = (
            compressed,
            sites.outputs,
            sites.inside,
            sites.before,
            sites.entries,
            sites.reads,
            norms,
            attachment.labels,
        )
        if any(op in group for group in touched):
            calls.patch(attachment, op, compressed.get(op))
    calls.patch_model(attachment, whole if whole is not None else model.call)
    backends.follow(attachment)
    for optimizer in (attachment.optimizer, getattr(model, "optimizer", None)):
        backends.refit_optimizer(optimizer, attachment.state.trainable_variables)
    backends.store_apart(attachment)
    backends.renew_parameters(model)
    attachment.forget()


# -- what is said ----------------------------------------------------------------------------------------------------


def _row(p: Place, found: Trace, sites: Sites) -> Row:
    size = sum(int(np.prod(part.shape)) for part in p.parts)
    if p.rule is None:
        return Row(p.path, kind_of(p.op), "float", p.reason, size)
    said = [stage.describe() for stage in p.stages] if p.parts else []
    if not p.parts and _bits(p):
        said = [f"int{_bits(p)} activations"] if p.op in sites.outputs or p.op in sites.inside else ["as its input"]
    reason = "; ".join((p.reason, *p.left))
    if p.op in found.whole:
        reason += f"; not opened: {found.whole[p.op]}"
    return Row(p.path, kind_of(p.op), ", ".join(said) or "float", reason if said else f"{reason}; has no weights", size)


def _said(places: list[Place]) -> str:
    return ", ".join(sorted({kind_of(p.op) for p in places})) or "no layer with weights"
