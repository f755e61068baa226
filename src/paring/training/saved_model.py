"""export to a SavedModel: weights on the grids of training, what they multiply rounded to bfloat16 as in training."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from paring.compress.quantize import Quantize
from paring.errors import UnsupportedError
from paring.folders.optimize import check_target, optimize_folder
from paring.formats.saved_model.model import SavedModel
from paring.formats.saved_model.native import shortened
from paring.formats.saved_model.view import View, view
from paring.graph import Op, OpId
from paring.optimize import Result
from paring.recipe import Rule
from paring.training.attachment import Attachment
from paring.training.exporting import LABEL, Trained, readable, save_marked


def export_folder(
    attachment: Attachment,
    path: str | os.PathLike[str],
    data: Any = None,
    *,
    overwrite: bool = False,
    verified: bool = True,
    max_error: float | None = None,
    runtime: str = "portable",
) -> Result:
    """Writes the model as a SavedModel whose outputs are those of `evaluate`; arguments as those of `export`.

    It is exported as floats first, with weights on their grids, and then stored by the writer that stores any SavedModel. That
    finds the trained scales again: the largest value of a channel or block is its largest code.

    Raises:
      UnsupportedError: A rule has integer activations.
    """
    for number, rule in enumerate(attachment.recipe.rules, 1):
        if rule.apply is not None and rule.apply.static:
            raise UnsupportedError(
                "cannot export to a SavedModel", where=f"rule {number} {rule.describe()} of recipe {attachment.recipe.name}",
                expected="activations float, dynamic or bfloat16", got=rule.apply.activations, todo="Name a .tflite file",
            )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="paring-") as work:
        floats = Path(work) / "float"
        target = check_target(floats, Path(path), overwrite)
        save_marked(attachment, floats, Path(work), static_batch=False, variables=True)
        model = SavedModel.open(floats)
        recipe = attachment.recipe
        trained = Trained(
            recipe.rules,
            recipe.name,
            recipe.description,
            source=recipe.source,
            chosen=_chosen(attachment, model, view(model)),
        )
        written = optimize_folder(
            floats,
            trained,
            data,
            target,
            overwrite=overwrite,
            verified=verified,
            max_error=max_error,
            runtime=runtime,
            exact=True,
        )
    places = attachment.settings
    rows = tuple(replace(row, name=_named(row.name, places)) for row in written.report.rows)
    report = replace(written.report, source=f"{attachment.model.name} (Keras)", rows=rows)
    return Result(SavedModel.open(target), report, written.plan)


def _named(name: str, places: Any) -> str:
    """An operator's name with the layer's path in place of scopes; the weight's name stays."""
    front, colon, weight = name.partition(":")
    return readable(front, places) + colon + weight


def _chosen(attachment: Attachment, model: SavedModel, seen: View) -> dict[OpId, tuple[Rule | None, str]]:
    """The rule of each operator, by the label in its name."""
    chosen: dict[OpId, tuple[Rule | None, str]] = {}
    for op in seen.graph.ops:
        here = [attachment.settings[int(n)] for n in LABEL.findall(op.name) if int(n) in attachment.settings]
        place = next((p for p in reversed(here) if p.parts), here[-1] if here else None)
        quantize = place.quantize if place is not None else None
        if place is None or quantize is None:
            chosen[op.id] = (None, place.reason if place is not None else "no layer of the recipe")
            continue
        stage = _found_again(quantize, rounded=_rounded(model, seen, op))
        chosen[op.id] = (Rule(stages=(stage,), optional=True), place.reason)
    return chosen


def _found_again(quantize: Quantize, *, rounded: bool) -> Quantize:
    """How the writer finds the trained numbers again; what is rounded in the graph may be rounded by the operator, too."""
    activations = quantize.activations if quantize.activations != "bfloat16" or rounded else "float"
    return replace(quantize, activations=activations, range="minmax", rounding="nearest", bias_correction=False)


def _rounded(model: SavedModel, seen: View, op: Op) -> bool:
    """True where all that meets the operator's weights is rounded to bfloat16 already."""
    name, node = seen.places[op.id]
    scope = model.flow.scopes[name]
    weights = {use.input for use in seen.uses.get(op.id, ())}
    inputs = scope.inputs(scope.by_name[node])
    return all(shortened(scope, value) for index, value in enumerate(inputs) if index not in weights)
