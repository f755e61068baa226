"""A SavedModel folder through a recipe: planned as every model, its variables stored anew one by one, run beside the float one.

It does not train, and it makes nothing faster: stock TensorFlow multiplies floats. What it gains is size and memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from paring.beside import beside, judge
from paring.compress.base import Context
from paring.compress.quantize import Quantize
from paring.compress.weights import shelved
from paring.decision import FLOAT, WEIGHT_ONLY, Decision, Plan
from paring.errors import InputError, UnsupportedError
from paring.formats.saved_model.apply import SourceId, Stored, apply
from paring.formats.saved_model.axes import along
from paring.formats.saved_model.flow import RESOURCE, SMALL, Flow, Source
from paring.formats.saved_model.model import SavedModel, folder_bytes
from paring.formats.saved_model.operators import ROWS
from paring.formats.saved_model.view import View, kept_of, values, view
from paring.graph import OpId
from paring.outcome import VERSION, Clock, Report, Row
from paring.plan import ground, plan
from paring.recipe import Recipe

_LISTED = "_all_variables/"  # where Keras 3 lists the variables of its signatures
_FORMS = {"int8": "int8", "int4": "int8", "float16": "float16", "bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Written:
    """What became of a folder."""

    model: SavedModel
    report: Report
    plan: Plan


def optimize_folder(
    source: str | os.PathLike[str],
    recipe: Recipe,
    data: Any,
    output: str | os.PathLike[str],
    *,
    statistics: Any = None,
    strict: bool = False,
    verified: bool = True,
    max_error: float | None = None,
    overwrite: bool = False,
    limit: int | None = None,
    image_range: Any = None,
) -> Written:
    """Applies a recipe to a SavedModel and writes another; arguments as those of `paring.optimize`.

    Raises:
      InputError: Bad model, recipe, data or output path.
      UnsupportedError: The recipe has what SavedModels cannot do yet.
      BoundError: The result does not run, is not-a-number, or a bound was missed.
    """
    if strict or statistics is not None:
        raise UnsupportedError(
            "cannot write the SavedModel", where=str(output), expected="a recipe and data",
            got="strict" if strict else "statistics", todo="Leave that out: it computes in floats, and needs no ranges",
        )  # fmt: skip
    check_recipe(recipe)
    target = _check_target(Path(source), Path(output), overwrite)
    clock = Clock()
    model = SavedModel.open(source)
    seen = view(model)
    clock.mark("load")
    twins = _twins(model)
    made = _settled(plan(seen.graph, recipe), seen, twins)
    clock.mark("plan")
    stored, notes = _stored(model, seen, made, twins)
    clock.mark("encode")
    rounded = [
        (*seen.places[d.op.id], tuple(use.input for use in seen.uses[d.op.id]))
        for d in made.decisions
        if d.mode == WEIGHT_ONLY and d.settings is not None and d.settings.activations == "bfloat16"
    ]
    changed = apply(model, stored, rounded, twins)
    changed.record = json.dumps({"paring": VERSION, "recipe": recipe.to_data()}, indent=1, sort_keys=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    verification = None
    try:
        changed.save(part)
        clock.mark("save")
        if verified:
            verification = beside(model, part, data, limit=limit, image_range=image_range)
            judge(verification, max_error)
            clock.mark("verify")
        elif data is not None:
            notes.append("the data was not read: it serves to compare the outputs, which --no-verify leaves out")
        size = folder_bytes(part)
        _replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    report = Report(
        source=str(source), output=str(target), recipe=recipe.name, source_bytes=model.bytes, output_bytes=size,
        rows=tuple(_rows(made, seen)), culprits=(), verification=verification, runtime=None, samples=0, seconds=clock.seconds,
        notes=(*notes, *(verification.notes if verification is not None else ())), kind="SavedModel",
    )  # fmt: skip
    return Written(changed, report, made)


def check_recipe(recipe: Recipe) -> None:
    """Refuses what SavedModels cannot do yet.

    Raises:
      UnsupportedError: Stages before quantization, integers in and out, or weights that are rounded together by data.
    """

    def refuse(what: str, todo: str) -> UnsupportedError:
        return UnsupportedError(
            "cannot apply the recipe to a SavedModel", where=f"recipe {recipe.name}",
            expected="quantize with rounding nearest", got=what, todo=todo,
        )  # fmt: skip

    if {recipe.inputs, recipe.outputs} != {"float32"}:
        raise refuse("integer inputs and outputs", "Write a .tflite file")
    if recipe.equalize:
        raise refuse("equalize", "Leave it out, or write a .tflite file")
    for rule in recipe.rules:
        if rule.before:
            raise refuse(f"stages before quantization in rule {rule.describe()}", "Write a .tflite file")
        if rule.apply is not None and rule.apply.sequential:
            raise refuse(f"rounding {rule.apply.rounding} in rule {rule.describe()}", "Take --rounding nearest")


def _check_target(source: Path, target: Path, overwrite: bool) -> Path:
    if target.exists() and not target.is_dir():
        raise InputError("cannot write the model", where=str(target), expected="a folder's name", got="a file")
    if target.exists() and not overwrite:
        raise InputError("the output exists", where=str(target), todo="Say --overwrite to replace it")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise InputError("cannot write the model", where=str(target), got="the model's own folder, or one in it")
    if target.exists() and any(target.iterdir()) and not (target / "saved_model.pb").is_file():
        raise InputError(
            "cannot replace the folder", where=str(target), expected="a SavedModel", got="something else", todo="Move it away"
        )  # fmt: skip
    if not target.absolute().parent.is_dir():
        raise InputError("cannot write the model", where=str(target), got=f"no folder {target.parent}")
    return target


def _replace(part: Path, target: Path) -> None:
    """Moves the folder into place; one that is there makes room, and comes back if that fails."""
    if not target.exists():
        os.rename(part, target)
        return
    old = part.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(part, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


# -- planning ------------------------------------------------------------------------------------------------------


def _settled(made: Plan, seen: View, twins: Mapping[SourceId, SourceId]) -> Plan:
    """The plan in which every variable has one fate: what its readers agree on, float where one of them stays float."""
    made = ground(
        made, {d.op.id: seen.refused[d.op.id] for d in made.decisions if _quantized(d) and d.op.id in seen.refused}
    )
    while True:
        modes = made.by_op()
        why: dict[OpId, str] = {}
        for source, readers in _readers(seen, twins).values():
            floats = [op for op in readers if not _quantized(modes[op])]
            if floats and not source.refused:
                other = modes[floats[0]].op.name
                why |= {op: f"shares its weights with {other}, which stays float" for op in readers if op not in floats}
        if not why:
            break
        made = ground(made, why)
    modes = dict(made.by_op())
    for _, readers in _readers(seen, twins).values():
        settings = [d.settings for op in readers if (d := modes[op]).settings is not None]
        for op in readers if settings else ():
            d = modes[op]
            if d.settings is not None and settings[0] is not None:
                modes[op] = _as_stored(d, settings[0])
    return replace(made, decisions=tuple(modes[d.op.id] for d in made.decisions))


def _quantized(decision: Decision) -> bool:
    return decision.mode == WEIGHT_ONLY


def _as_stored(decision: Decision, first: Quantize) -> Decision:
    """The decision with the form in which its weights are stored: that of the first of their readers."""
    own = decision.settings
    assert own is not None
    form, reason = _FORMS[first.weights], decision.reason
    if first.weights == "int4":
        reason = f"{reason}; stock TensorFlow multiplies no int4 weights, int8 instead"
    if _FORMS[own.weights] != form:
        reason = f"{reason}; stored as another operator that reads them asks"
    row = ROWS.get(decision.op.native)
    short = own.activations == "bfloat16" and row is not None and bool(row.data)
    settings = replace(first, weights=form, granularity=_granularity(first), block_size=0, activations=own.activations)
    shown = f"bf16-{form}" if short and form == "int8" else f"bf16 x {form}" if short else form
    return replace(decision, settings=settings, form=shown, reason=reason)


def _granularity(settings: Quantize) -> str:
    return "channel" if settings.granularity == "block" else settings.granularity


def _readers(seen: View, twins: Mapping[SourceId, SourceId]) -> dict[SourceId, tuple[Source, list[OpId]]]:
    """The operators that read each variable, or a twin of it."""
    found: dict[SourceId, tuple[Source, list[OpId]]] = {}
    for op, sources in seen.sources.items():
        for source in sources:
            id_ = twins.get(source.id, source.id)
            _, readers = found.setdefault(id_, (source, []))
            if op not in readers:
                readers.append(op)
    return found


def _twins(model: SavedModel) -> dict[SourceId, SourceId]:
    """Variables of Keras' that hold the same as another: each with the one that is kept.

    Keras 3 exports every variable twice, one for the object graph and one in a list for the signatures. Only a pair of these
    with one name, that serves the same argument of a function, is taken for one: what else is equal now (zeros) may be
    set apart in Python.
    """
    flow = model.flow
    alike: dict[tuple[Any, ...], list[Source]] = {}
    for source in flow.sources.values():
        if source.kind == RESOURCE and source.object is not None and not source.refused and source.size >= SMALL:
            alike.setdefault((source.shape, source.dtype, source.label), []).append(source)
    found: dict[SourceId, SourceId] = {}
    for sources in alike.values():
        listed = [s for s in sources if str(s.key).startswith(_LISTED)]
        for twin in listed:
            near = [s for s in sources if s not in listed and _meet(flow, twin, s)]
            if near and _digest(model, near[0]) == _digest(model, twin):
                found[twin.id] = near[0].id
    return found


def _digest(model: SavedModel, source: Source) -> bytes:
    return blake2b(np.ascontiguousarray(values(model, source)).data.cast("B"), digest_size=16).digest()


def _meet(flow: Flow, one: Source, other: Source) -> bool:
    return any(one.id in ids and other.id in ids for ids in flow.handles.values())


# -- weights -------------------------------------------------------------------------------------------------------


def _stored(
    model: SavedModel, seen: View, made: Plan, twins: Mapping[SourceId, SourceId]
) -> tuple[dict[SourceId, Stored], list[str]]:
    """Every weight that the plan stores anew, read and encoded one at a time."""
    modes, notes = made.by_op(), list[str]()
    if any(d.settings is not None and d.settings.bias_correction for d in made.decisions):
        notes.append("no bias correction: SavedModels have none yet")
    stored: dict[SourceId, Stored] = {}
    for id_, (_, readers) in _readers(seen, twins).items():
        source = model.flow.sources[id_]
        settings = modes[readers[0]].settings
        if source.refused or settings is None or not all(_quantized(modes[op]) for op in readers):
            continue
        ids = [id_, *(twin for twin, kept in twins.items() if kept == id_)]
        kept = _kept([model.flow.sources[i] for i in ids], settings)
        weight = encode(settings, values(model, source), kept, source.name)
        ends = [end for i in ids for end in model.flow.sources[i].ends]
        assert source.shape is not None
        if weight.scale is not None and any(along(weight.scale, source.shape, end.axes) is None for end in ends):
            weight = encode(settings, values(model, source), (), source.name)
            notes.append(f"{source.name} has one scale: a reshape joins its channels with others")
        stored |= dict.fromkeys(ids, weight)
    if not stored:
        notes.append("nothing became smaller: no weight is stored anew, the table says why (try weight-only-int8)")
    if twins:
        size = sum(4 * model.flow.sources[twin].size for twin in twins)
        notes.append(f"{len(twins)} variables ({size:,} bytes) were stored twice under two names; they are stored once")
    large = [s for s in model.flow.sources.values() if s.size >= SMALL and len(s.shape or ()) > 1 and s.key]
    unread = [s.name for s in large if not s.uses and s.id not in twins]
    if unread:
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        notes.append(f"stay as they are, because no operator known here reads them: {', '.join(unread[:5])}{more}")
    return stored, notes


def _kept(sources: Sequence[Source], settings: Quantize) -> tuple[int, ...]:
    """The dimensions that get scales of their own: as the first product that reads it wants it, else what picks rows."""
    if settings.granularity == "tensor":
        return ()
    told = [(use, source) for source in sources for use in source.uses if use.kept is not None]
    if told:
        return kept_of(*min(told, key=lambda pair: pair[0].picks))
    shape = sources[0].shape or ()
    return (len(shape) - 1,) if len(shape) > 1 and sources[0].size >= 8 * shape[-1] else ()


def encode(settings: Quantize, weight: np.ndarray, kept: tuple[int, ...], name: str) -> Stored:
    """A weight as it is to be stored.

    Args:
      settings: How.
      weight: float32, any rank.
      kept: Dimensions whose every index has a scale of its own; none for one scale.
      name: For messages.

    >>> encode(Quantize("int8", "float"), np.array([[1.0, -4.0], [2.0, 2.0]], np.float32), (1,), "w").codes.tolist()
    [[64, -127], [127, 64]]
    """
    if settings.weights in ("float16", "bfloat16"):
        return Stored(settings.weights, shelved(settings.encode(weight, Context(name, None)).values))
    order = (*kept, *(d for d in range(weight.ndim) if d not in kept))
    count = prod(weight.shape[d] for d in kept)
    turned = weight.transpose(order)
    encoded = settings.encode(turned.reshape(count, -1), Context(name, 0, (1,)))
    assert encoded.grid is not None
    codes = encoded.values.reshape(turned.shape).transpose(np.argsort(order))
    sizes = [weight.shape[d] if d in kept and encoded.grid.scale.size > 1 else 1 for d in range(weight.ndim)]
    return Stored("int8", shelved(np.ascontiguousarray(codes)), encoded.grid.scale.astype(np.float32).reshape(sizes))


def _rows(made: Plan, seen: View) -> Iterator[Row]:
    for d in made.decisions:
        size = sum(t.weight.stored_bytes for _, t in made.graph.weights_of(d.op) if t.weight)
        reason = d.reason
        parts = seen.sources.get(d.op.id, ())
        if d.mode != FLOAT and (left := [s for s in parts if s.refused]):
            reason = f"{reason}; but {', '.join(s.name for s in left)} stays float: {left[0].refused}"
        yield Row(d.op.name, d.op.native, d.op.kind, d.mode, d.form, reason, size, d.op.scope)


__all__ = ["Written", "check_recipe", "encode", "optimize_folder"]
