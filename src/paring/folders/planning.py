"""What becomes of each variable of a SavedModel: one fate, on which all operators that read it agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np

from paring.compress.quantize import Quantize
from paring.decision import WEIGHT_ONLY, Decision, Plan
from paring.formats.saved_model.apply import SourceId
from paring.formats.saved_model.flow import RESOURCE, SMALL, Flow, Source
from paring.formats.saved_model.model import SavedModel
from paring.formats.saved_model.native import Seat
from paring.formats.saved_model.operators import ROWS
from paring.formats.saved_model.view import View, values
from paring.graph import Op, OpId
from paring.plan import ground, plan
from paring.recipe import Recipe, Rule

_LISTED = "_all_variables/"  # where Keras 3 lists the variables of its signatures
_FORMS = {"int8": "int8", "int4": "int8", "float16": "float16", "bfloat16": "bfloat16"}
BLOCK = 32  # inputs that share a scale, where a recipe has int4 and names no block


def planned(
    seen: View,
    recipe: Recipe,
    winners: Mapping[OpId, tuple[Rule | None, str]],
    twins: Mapping[SourceId, SourceId],
    packing: Mapping[SourceId, Seat | str] | None = None,
    *,
    exact: bool = False,
) -> Plan:
    """The plan in which every variable has one fate: what its readers agree on, float where one of them stays float.

    Args:
      seen: The model.
      recipe: What was asked for.
      winners: Which rule each operator follows, and why.
      twins: Variables that hold the same as another.
      packing: On the native runtime, by weight how it would be packed, or why it cannot be; None on the portable one.
      exact: The weights lie on the recipe's grids already, which are kept.
    """
    asked = {op: (rule.apply if rule is not None else None, why) for op, (rule, why) in winners.items()}
    if packing is None and not exact:
        return _settled(plan(seen.graph, recipe, asked), seen, twins, None, exact=False)
    made = plan(seen.graph, recipe, {op: (_plain(wanted), why) for op, (wanted, why) in asked.items()})
    decisions = []
    for d in made.decisions:
        wanted = asked[d.op.id][0]
        found = _blocked(wanted, 0 if exact else BLOCK) if wanted is not None and d.settings is not None else d.settings
        decisions.append(replace(d, settings=found))
    return _settled(replace(made, decisions=tuple(decisions)), seen, twins, packing, exact=exact)


def _plain(wanted: Quantize | None) -> Quantize | None:
    """As it is planned: neither blocks nor activations that change are in the way of paring's operators."""
    if wanted is None or wanted.static:
        return wanted
    granularity = "channel" if wanted.granularity == "block" else wanted.granularity
    activations = "float" if wanted.activations == "dynamic" else wanted.activations
    return replace(wanted, activations=activations, granularity=granularity, block_size=0)


def _blocked(wanted: Quantize, block: int) -> Quantize:
    """As it is stored: int4 in blocks."""
    size = wanted.block_size or block
    if wanted.weights != "int4" or not size:
        return wanted
    return replace(wanted, granularity="block", block_size=size)


def _settled(
    made: Plan,
    seen: View,
    twins: Mapping[SourceId, SourceId],
    packing: Mapping[SourceId, Seat | str] | None,
    *,
    exact: bool,
) -> Plan:
    made = ground(
        made, {d.op.id: seen.refused[d.op.id] for d in made.decisions if quantized(d) and d.op.id in seen.refused}
    )
    while True:
        modes = made.by_op()
        why: dict[OpId, str] = {}
        for source, readers in readers_of(seen, twins).values():
            floats = [op for op in readers if not quantized(modes[op])]
            if floats and not source.refused:
                other = modes[floats[0]].op.name
                why |= {op: f"shares its weights with {other}, which stays float" for op in readers if op not in floats}
        if not why:
            break
        made = ground(made, why)
    modes = dict(made.by_op())
    for id_, (_, readers) in readers_of(seen, twins).items():
        packed = "stock TensorFlow multiplies no int4 weights" if packing is None else packing[id_]
        whole = packed if isinstance(packed, str) else ""
        settings = [d.settings for op in readers if (d := modes[op]).settings is not None]
        for op in readers if settings else ():
            d = modes[op]
            if d.settings is not None and settings[0] is not None:
                modes[op] = _as_stored(d, settings[0], whole, exact=exact)
    return replace(made, decisions=tuple(modes[d.op.id] for d in made.decisions))


def quantized(decision: Decision) -> bool:
    """True where the operator's weights are stored in fewer bits."""
    return decision.mode == WEIGHT_ONLY


def _as_stored(decision: Decision, first: Quantize, whole: str, *, exact: bool) -> Decision:
    """The decision with the form in which its weights are stored: that of the first of their readers.

    `whole` says why they cannot have 4 bits, empty where they can; `exact` keeps their grid of 4 bits in any case.
    """
    own, reason = decision.settings, decision.reason
    assert own is not None
    form = first.weights if not whole else _FORMS[first.weights]
    kept = exact and first.granularity != "block"
    if form != first.weights:
        reason = f"{reason}; {whole}, int8 {'that holds the same' if kept else 'instead'}"
    if _FORMS[own.weights] != _FORMS[first.weights]:
        reason = f"{reason}; stored as another operator that reads them asks"
    blocks = first.granularity == "block" and form == "int4"
    granularity = "channel" if first.granularity == "block" and not blocks else first.granularity
    settings = replace(
        first, weights=first.weights if kept else form, activations=own.activations, granularity=granularity,
        block_size=first.block_size if blocks else 0,
    )  # fmt: skip
    return replace(decision, settings=settings, form=shown(decision.op, own, form), reason=reason)


def shown(op: Op, settings: Quantize, form: str) -> str:
    """What an operator with weights of a form becomes, for people."""
    row = ROWS.get(op.native)
    if settings.activations != "bfloat16" or row is None or not row.data:
        return form
    return f"bf16-{form}" if form in ("int8", "int4") else f"bf16 x {form}"


def readers_of(seen: View, twins: Mapping[SourceId, SourceId]) -> dict[SourceId, tuple[Source, list[OpId]]]:
    """The operators that read each variable, or a twin of it."""
    found: dict[SourceId, tuple[Source, list[OpId]]] = {}
    for op, sources in seen.sources.items():
        for source in sources:
            id_ = twins.get(source.id, source.id)
            _, readers = found.setdefault(id_, (source, []))
            if op not in readers:
                readers.append(op)
    return found


def twins_of(model: SavedModel) -> dict[SourceId, SourceId]:
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
