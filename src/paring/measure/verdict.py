"""Who is to blame: the ranking of layers, the culprits among them and why, and the recipe lines that exempt these."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paring.errors import InputError
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.sink import sink
from paring.formats.tflite.view import view
from paring.measure.noise import EXACT
from paring.measure.result import Error, Layer
from paring.measure.units import Unit
from paring.recipe import Recipe

FINE = 20.0  # dB: noise a tenth as loud as the signal; where no layer is worse and none stands out, all is fine
LOUD = 25.0  # dB: what is quieter harms nobody, however much it stands out
APART = 10.0  # dB below the middle of the layers of the same form: more than they differ by themselves
_FEW = 3  # layers of a form that have a middle of their own
MOST = 5
_SAME = 3.0  # dB within which one cause explains an error
_WEIGHTS = 12.0  # dB that a product may lie below its weights, where their errors add up over a biased input


@dataclass(frozen=True)
class Verdict:
    """What the figures say.

    Attributes:
      ranking: Indices of the layers that have a figure, the worst first.
      culprits: Those of them that stand clearly below the rest.
      causes: Why each culprit is so bad.
      exempt: Recipe lines that leave the culprits float.
    """

    ranking: tuple[int, ...]
    culprits: tuple[int, ...]
    causes: Mapping[int, str]
    exempt: str


def score(error: Error | None, family: str) -> float | None:
    """The figure that layers are ranked by: signal to noise in dB, of all values or of the median channel, the worse.

    All values alone would hide that one loud channel left the others no levels, the median channel alone that one channel
    is broken. Probabilities are compared with one another, whatever their channel: of a softmax all values count.

    >>> score(Error(snr_db=40.0, channel_db=8.0, cosine=1.0), "linear")
    8.0
    """
    if error is None:
        return None
    return error.snr_db if family == "softmax" else min(error.snr_db, error.channel_db)


def verdict(layers: Sequence[Layer], units: Sequence[Unit | None], rounding: Sequence[float | None]) -> Verdict:
    """Ranks the layers and names the culprits.

    Args:
      layers: Measured.
      units: Their operators in the float model, None for an input of the model.
      rounding: What `score` gives where nothing but the grid of the result is at work; None without a grid.
    """
    blames = {n: layer.blame for n, layer in enumerate(layers) if layer.blame is not None}
    ranking = tuple(sorted(blames, key=lambda n: (blames[n], n)))
    usual = _usual(layers, blames)
    if not usual:
        return Verdict(ranking, (), {}, "")
    culprits = tuple(n for n in ranking if blames[n] < min(LOUD, usual[layers[n].form] - APART))[:MOST]
    if not culprits and blames[ranking[0]] < FINE:
        culprits = ranking[:1]
    readers = _readers(layers)
    names: dict[str, None] = {}
    causes = {}
    for n in culprits:
        level = rounding[n]
        by_grid = level is not None and level < blames[n] + _SAME
        causes[n] = _cause(layers[n], by_grid, blames[n])
        unit = units[n]
        names.update(dict.fromkeys(op.name for op in unit.ops) if unit is not None else {})
        for reader in _beyond(n, readers, layers, units) if by_grid else ():
            found = units[reader]
            names.update(dict.fromkeys(op.name for op in found.ops) if found is not None else {})
    return Verdict(ranking, culprits, causes, "\n".join(_line(name) for name in names))


def _usual(layers: Sequence[Layer], blames: Mapping[int, float]) -> dict[str, float]:
    """By form, the middle of what its layers add; of all layers where a form has too few to have a middle."""
    noisy = {n: blame for n, blame in blames.items() if blame < EXACT}
    if not noisy:
        return {}
    found = {}
    for form in {layers[n].form for n in blames}:
        same = sorted(blame for n, blame in noisy.items() if layers[n].form == form)
        same = same if len(same) >= _FEW else sorted(noisy.values())
        found[form] = same[len(same) // 2]
    return found


def recipe_of(optimized: TfliteModel, source: TfliteModel) -> tuple[dict[str, Any] | None, dict[str, int], list[str]]:
    """The recipe in the optimized file's metadata -> it, the index of each operator's rule by name, what went wrong."""
    entry = next((e for e in optimized.root.metadata or () if e.name == "paring"), None)
    raw = optimized.payload(optimized.root.buffers[entry.buffer]) if entry is not None else None
    if raw is None:
        return None, {}, []
    try:
        data = json.loads(raw.tobytes())["recipe"]
        recipe = Recipe.load(dict(data))
        graph = view(sink(source), fold_ranges=recipe.static)
        matched = recipe.match(graph)
        reasons = {op.name: matched[op.id][1] for op in graph.ops}
    except (ValueError, TypeError, KeyError, RecursionError, InputError) as error:
        return None, {}, [f"the recipe in the file's metadata does not fit the float model: {error}"]
    rules = {name: int(why.split()[1]) - 1 for name, why in reasons.items() if re.fullmatch(r"rule \d+", why)}
    return data, rules, []


def _line(name: str) -> str:
    """A rule that leaves one operator float; JSON strings are YAML strings."""
    return f"  - {{name: {json.dumps(f'^{re.escape(name)}$', ensure_ascii=False)}, apply: float}}"


def _cause(layer: Layer, by_grid: bool, blame: float) -> str:
    clipped = layer.accumulated.clipped if layer.accumulated is not None else None
    if by_grid and clipped is not None and clipped > 0.001:
        return f"the grid of its result clips {clipped:.1%} of the values"
    if by_grid:
        return "the steps of its result's grid are too coarse for it"
    if layer.weight_db is not None and layer.weight_db < blame + _WEIGHTS:
        return f"its stored weights keep only {layer.weight_db:.1f} dB"
    if layer.form.startswith("bf16"):
        return "its input is rounded to bfloat16, and 8 bits are too few for it"
    if layer.form.startswith("float32 x "):
        return "its input is rounded at run time, and 8 bits are too few for it"
    return (
        "neither the grid of its result nor its weights alone explain it: look at its bias, and for channels of its input "
        "that are much louder than the others"
    )


def _readers(layers: Sequence[Layer]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for number, layer in enumerate(layers):
        for source in layer.inputs:
            found.setdefault(source, []).append(number)
    return found


def _beyond(
    start: int, readers: Mapping[int, Sequence[int]], layers: Sequence[Layer], units: Sequence[Unit | None]
) -> list[int]:
    """The layers that read a value on its grid, through those that pass the grid on: float behind it needs them float."""
    found: dict[int, None] = {}
    todo = [start]
    while todo:
        for number in readers.get(todo.pop(0), ()):
            unit = units[number]
            stored = layers[number].blame is not None and not layers[number].form.startswith("float")
            if number in found or unit is None or not stored:
                continue
            found[number] = None
            if unit.head.demands is not None and unit.head.demands.same:
                todo.append(number)
    return list(found)
