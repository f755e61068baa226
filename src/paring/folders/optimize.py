"""A SavedModel folder through a recipe: planned as every model, its variables stored anew one by one, run beside the float one.

It does not train. With stock operators it makes nothing faster, for these multiply floats: what it gains is size and memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from paring.compress.base import Context
from paring.compress.quantize import Quantize
from paring.compress.weights import shelved
from paring.decision import FLOAT, WEIGHT_ONLY, Plan
from paring.diagnose import fitted
from paring.errors import InputError, UnsupportedError
from paring.folders.beside import beside, judge
from paring.folders.native import RUNTIMES, Packing, natives, record, together, told
from paring.folders.observe import Inputs, Observation
from paring.folders.planning import planned, quantized, readers_of, twins_of
from paring.folders.signatures import samples_of
from paring.folders.stages import Got, Staged, staged
from paring.formats.saved_model.apply import Place, SourceId, Stored, apply
from paring.formats.saved_model.axes import along
from paring.formats.saved_model.flow import SMALL, Source
from paring.formats.saved_model.model import SavedModel, folder_bytes
from paring.formats.saved_model.native import check_library
from paring.formats.saved_model.tables import only_picked, with_scales
from paring.formats.saved_model.view import View, kept_of, view
from paring.graph import OpId
from paring.outcome import Clock, Report, Row
from paring.recipe import Recipe
from paring.samples import Sample


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
    runtime: str = "portable",
    progress: Callable[[int], None] | None = None,
    exact: bool = False,
) -> Written:
    """Applies a recipe to a SavedModel and writes another; arguments as those of `paring.optimize`.

    `exact` says that the weights lie on the recipe's grids already, which are kept: no blocks but those it names.

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
    check_recipe(recipe, runtime)
    target = check_target(Path(source), Path(output), overwrite)
    clock = Clock()
    model = SavedModel.open(source)
    if runtime == "native" and verified:
        check_library(target)
    seen = view(model)
    clock.mark("load")
    twins = twins_of(model)
    winners = recipe.winners(seen.graph)
    behind = staged(model, seen, winners, twins, progress)
    if recipe.changes:
        clock.mark("compress")
    packing = Packing.of(model, seen, twins, exact=exact) if runtime == "native" else None
    made = planned(seen, recipe, winners, twins, packing.seats if packing is not None else None, exact=exact)
    clock.mark("plan")

    @cache
    def samples() -> tuple[dict[str, Iterable[Sample]], list[str]]:
        """Opened once, for a stream can be read once only."""
        return samples_of(model, data, limit=limit, image_range=image_range)

    observation, left = Observation.of(model, seen, made, twins, (lambda: samples()[0]) if data is not None else None)
    with observation:
        stored, shifts, notes = _stored(model, seen, made, twins, behind, packing, observation, exact=exact)
    if any(d.settings is not None and d.settings.bias_correction for d in made.decisions) and data is None:
        notes.append("no data was given: no bias correction")
    if behind.zeros and packing is None:
        notes.append(
            "stock TensorFlow multiplies with zeros and stores them: nothing gets faster, and smaller only in an archive "
            "(--runtime native leaves them out)"
        )
    places: Mapping[Place, bool] = {}
    if packing is not None:
        found = natives(model, seen, made, stored)
        places, made = found.places, found.made
        notes += told(places)
    clock.mark("encode")
    rounded = [
        (*seen.places[d.op.id], tuple(use.input for use in seen.uses[d.op.id]))
        for d in made.decisions
        if d.mode == WEIGHT_ONLY and d.settings is not None and d.settings.activations == "bfloat16"
    ]
    changed = apply(model, stored, rounded, twins, places, shifts)
    changed.record = record(recipe, native=bool(places))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    verification = None
    try:
        changed.save(part)
        clock.mark("save")
        if verified:
            verification = beside(model, part, *samples(), given=data is not None)
            judge(verification, max_error)
            clock.mark("verify")
        elif data is not None and not observation.count:
            notes.append("the data was not read: it serves to compare the outputs, which --no-verify leaves out")
        size = folder_bytes(part)
        _replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    report = Report(
        source=str(source), output=str(target), recipe=recipe.name, source_bytes=model.bytes, output_bytes=size,
        rows=tuple(_rows(made, seen, behind, left)), culprits=(), verification=verification,
        runtime="native" if places else "portable", samples=observation.count, seconds=clock.seconds,
        notes=(*notes, *((*verification.notes, *_fitted(made, data)) if verification is not None else ())), kind="SavedModel",
    )  # fmt: skip
    return Written(changed, report, made)


def check_recipe(recipe: Recipe, runtime: str = "portable") -> None:
    """Refuses what SavedModels cannot do yet.

    Raises:
      InputError: There is no such runtime.
      UnsupportedError: Integers in and out, equalization, or zeros that stock operators would have to read.
    """

    def refuse(what: str, todo: str, expected: str = "floats in and out, scales as they are") -> UnsupportedError:
        return UnsupportedError(
            "cannot apply the recipe to a SavedModel", where=f"recipe {recipe.name}",
            expected=expected, got=what, todo=todo,
        )  # fmt: skip

    if runtime not in RUNTIMES:
        raise InputError("no such runtime", where="--runtime", expected=" or ".join(RUNTIMES), got=repr(runtime))
    if {recipe.inputs, recipe.outputs} != {"float32"}:
        raise refuse("integer inputs and outputs", "Write a .tflite file")
    if recipe.equalize:
        raise refuse("equalize", "Leave it out, or write a .tflite file")
    for rule in recipe.rules:
        if rule.prune is not None and rule.prune.storage == "sparse" and runtime == "portable":
            what = f"storage sparse in rule {rule.describe()}"
            raise refuse(
                what,
                "Take --runtime native, which stores it so by itself",
                "storage dense: stock operators read no other",
            )


def check_target(source: Path, target: Path, overwrite: bool) -> Path:
    """The output folder.

    Raises:
      InputError: It cannot be written, or exists and may not be replaced.
    """
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


# -- weights -------------------------------------------------------------------------------------------------------


def _stored(
    model: SavedModel,
    seen: View,
    made: Plan,
    twins: Mapping[SourceId, SourceId],
    behind: Staged,
    packing: Packing | None,
    observation: Observation,
    *,
    exact: bool,
) -> tuple[dict[SourceId, Stored], dict[Place, np.ndarray], list[str]]:
    """Every weight that the plan stores anew, read and encoded one at a time; and what is added to the products."""
    modes, notes = made.by_op(), [*behind.notes]
    stored: dict[SourceId, Stored] = {}
    shifts: dict[Place, np.ndarray] = {}
    for id_, (_, readers) in readers_of(seen, twins).items():
        source = model.flow.sources[id_]
        settings = modes[readers[0]].settings if all(quantized(modes[op]) for op in readers) else None
        if source.refused or (settings is None and id_ not in behind.held):
            continue
        sources = together(model, id_, twins)
        weight = behind.values(model, source)
        inputs = observation.inputs(id_)
        packed = packing.packed(id_, settings, weight, source.name, inputs) if packing is not None else None
        if packed is not None:
            made_of = packed
        elif settings is None:
            made_of = Stored("float32", weight)
        else:
            made_of = encode(settings, weight, _kept(sources, settings), source.name, inputs, exact=exact)
            ends = [end for s in sources for end in s.ends]
            assert source.shape is not None
            if made_of.scale is not None and any(along(made_of.scale, source.shape, end.axes) is None for end in ends):
                made_of = encode(settings, weight, (), source.name, inputs, exact=exact)
                notes.append(f"{source.name} has one scale: a reshape joins its channels with others")
            if id_ in behind.stages and made_of.scale is not None:
                notes += behind.broken(source, made_of.codes.astype(np.float32) * made_of.scale)
        if settings is not None and settings.bias_correction and inputs is not None:
            values = _values(id_, made_of, packing, weight.shape)
            shifts |= inputs.shifts(weight, values)
        if (
            made_of.form == "int8"
            and made_of.scale is not None
            and not made_of.packed
            and only_picked(model.flow, sources)
        ):
            table = with_scales(made_of.codes, made_of.scale)
            made_of = made_of if table is None else replace(made_of, codes=shelved(table), rows=True)
        stored |= dict.fromkeys([s.id for s in sources], made_of)
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
    return stored, shifts, notes


def _values(id_: SourceId, stored: Stored, packing: Packing | None, shape: tuple[int, ...]) -> np.ndarray:
    """What a weight is from now on, as real numbers."""
    if packing is not None and stored.packed:
        return packing.values(id_, stored, shape)
    values = stored.codes.astype(np.float32)
    return values if stored.scale is None else values * stored.scale


def _kept(sources: Sequence[Source], settings: Quantize) -> tuple[int, ...]:
    """The dimensions that get scales of their own: as the first product that reads it wants it, else what picks rows."""
    if settings.granularity == "tensor":
        return ()
    told = [(use, source) for source in sources for use in source.uses if use.kept is not None]
    if told:
        return kept_of(*min(told, key=lambda pair: pair[0].picks))
    shape = sources[0].shape or ()
    return (len(shape) - 1,) if len(shape) > 1 and sources[0].size >= 8 * shape[-1] else ()


def encode(
    settings: Quantize,
    weight: np.ndarray,
    kept: tuple[int, ...],
    name: str,
    inputs: Inputs | None = None,
    *,
    exact: bool = False,
) -> Stored:
    """A weight as it is to be stored.

    Args:
      settings: How.
      weight: float32, any rank.
      kept: Dimensions whose every index has a scale of its own; none for one scale.
      name: For messages.
      inputs: What it meets, where that was observed; it is left out of account where scales lie in another way.
      exact: Its values lie on a grid, whose scales are kept; else scales are rounded up to bfloat16, which take less room.

    >>> encode(Quantize("int8", "float"), np.array([[1.0, -4.0], [2.0, 2.0]], np.float32), (1,), "w").codes.tolist()
    [[63, -126], [126, 63]]
    """
    if settings.weights in ("float16", "bfloat16"):
        return Stored(settings.weights, shelved(settings.encode(weight, Context(name, None)).values))
    meeting = inputs.meeting if inputs is not None else None
    if inputs is not None and meeting is not None and (not kept or {*meeting.order[: meeting.outputs]} == {*kept}):
        order, outputs, context = meeting.order, meeting.outputs, inputs.context(name, settings)
    else:
        order, outputs = (*kept, *(d for d in range(weight.ndim) if d not in kept)), len(kept)
        context = Context(name, 0, (1,))
    own = settings if kept else replace(settings, granularity="tensor")
    turned = weight.transpose(order)
    encoded = own.encode(turned.reshape(prod(turned.shape[:outputs]), -1), replace(context, short=not exact))
    assert encoded.grid is not None
    back, scale = np.argsort(order), encoded.grid.scale.astype(np.float32)
    codes = encoded.values.reshape(turned.shape).transpose(back)
    sizes = [size if place < outputs and scale.size > 1 else 1 for place, size in enumerate(turned.shape)]
    return Stored("int8", shelved(np.ascontiguousarray(codes)), scale.reshape(sizes).transpose(back))


def _fitted(made: Plan, data: Any) -> tuple[str, ...]:
    return fitted(made) if data is not None else ()


def _rows(made: Plan, seen: View, behind: Staged, unseen: Mapping[OpId, str]) -> Iterator[Row]:
    for d in made.decisions:
        size = sum(t.weight.stored_bytes for _, t in made.graph.weights_of(d.op) if t.weight)
        reason = d.reason
        parts = seen.sources.get(d.op.id, ())
        if d.mode != FLOAT and (left := [s for s in parts if s.refused]):
            reason = f"{reason}; but {', '.join(s.name for s in left)} stays float: {left[0].refused}"
        got = behind.ops.get(d.op.id, Got())
        reason = "; ".join((reason, *([unseen[d.op.id]] if d.op.id in unseen else ()), *got.left))
        row = Row(d.op.name, d.op.native, d.op.kind, d.mode, d.form, reason, size, d.op.scope, stages=got.done)
        if got.zeros is not None:
            row = replace(row, sparsity=got.zeros.sparsity, pattern=got.zeros.pattern, pruning=got.zeros.reason)
        yield row


__all__ = ["Written", "check_recipe", "check_target", "encode", "optimize_folder"]
