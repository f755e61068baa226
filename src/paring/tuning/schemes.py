"""The schemes that a search may give a layer, and the recipes that say so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from paring.compress.quantize import Quantize
from paring.decision import DYNAMIC, STATIC, WEIGHT_ONLY, Decision, Plan
from paring.graph import Graph, OpId
from paring.plan import plan
from paring.recipe import Recipe, Rule
from paring.tuning.search import Allocation

BASE = "int8"


def schemes(activations: str, rounding: str) -> dict[str, Quantize]:
    """The schemes by name.

    Args:
      activations: Of the int8 and int4 schemes: `dynamic` or `int8`.
      rounding: Of int4 weights.

    >>> list(schemes("dynamic", "gptq"))
    ['float16', 'int8', 'int8-int16', 'int4', 'int4-block']
    """
    four: dict[str, Any] = {"weights": "int4", "range": "mse", "rounding": rounding, "bias_correction": True}
    return {
        "float16": Quantize("float16", "float"),
        "int8": Quantize("int8", activations),
        "int8-int16": Quantize("int8", "int16"),
        "int4": Quantize(activations=activations, **four),
        "int4-block": Quantize(activations="dynamic", granularity="block", block_size=32, **four),
    }


def folder_schemes(activations: str, rounding: str, runtime: str) -> dict[str, Quantize]:
    """The same for SavedModels, which compute in floats.

    Args:
      activations: What meets the weights is left as it is (`dynamic`) or rounded to `bfloat16`.
      rounding: Of int4 weights.
      runtime: On the `native` one there is int4 in blocks.

    >>> list(folder_schemes("bfloat16", "gptq", "native"))
    ['float16', 'int8', 'int4-block']
    """
    kind = "bfloat16" if activations == "bfloat16" else "float"
    found = {"float16": Quantize("float16", "float"), "int8": Quantize("int8", kind)}
    if runtime == "native":
        found["int4-block"] = Quantize(
            "int4", kind, granularity="block", block_size=32, range="mse", rounding=rounding, bias_correction=True
        )
    return found


def choices(
    graph: Graph,
    offered: Mapping[str, Quantize],
    skip: Iterable[str],
    planned: Callable[[Recipe], Plan] | None = None,
) -> dict[str, dict[str, Quantize]]:
    """By layer, the schemes that would give it forms of its own; a scheme that falls back to another's form is left out.

    Layers that the base scheme leaves float (too small, of no known operator, quantized before) do not appear: what else
    could be done to them costs more time than it saves bytes.
    """
    found: dict[str, dict[str, Quantize]] = {}
    seen: dict[OpId, set[tuple[str, str, Any]]] = {}
    for name, settings in offered.items():
        recipe = Recipe((Rule((settings,), kind="*"),), "probe").restricted(skip)
        for decision in (plan(graph, recipe) if planned is None else planned(recipe)).decisions:
            if not any(True for _ in graph.weights_of(decision.op)) or decision.mode not in (
                STATIC,
                DYNAMIC,
                WEIGHT_ONLY,
            ):
                continue
            form = _form(decision)
            if form not in seen.setdefault(decision.op.id, set()):
                seen[decision.op.id].add(form)
                found.setdefault(decision.op.name, {})[name] = settings
    return {layer: own for layer, own in found.items() if BASE in own}


def _form(decision: Decision) -> tuple[str, str, Any]:
    settings = decision.settings
    assert settings is not None
    return decision.mode, decision.form, (settings.weights, settings.granularity, settings.block_size)


def patterns(names: Iterable[str]) -> dict[str, str]:
    """By layer, a regular expression that matches its name and no other; the model carries it, and someone reads it.

    A converter strings the names of all that it fused together: the first part will do where no other begins with it.

    >>> list(patterns(["conv;bn/mul;bn/add", "relu;a", "relu;b"]).values())
    ['conv;', 'relu;a$', 'relu;b$']
    """
    known = dict.fromkeys(names)
    firsts = Counter(name.split(";")[0] for name in known)
    parts = {name: name.split(";")[0] for name in known}
    return {
        name: f"{re.escape(part)};" if part != name and firsts[part] == 1 else f"{re.escape(name)}$"
        for name, part in parts.items()
    }


def only(layer: str, settings: Quantize, names: Mapping[str, str]) -> Recipe:
    """One layer under a scheme, all others float; `names` are the `patterns` of the model."""
    return Recipe((Rule((), kind="*"), Rule((settings,), name=_any([layer], names))), "one layer")


def recipe_of(
    allocation: Allocation, offered: Mapping[str, Quantize], skip: Iterable[str], name: str, names: Mapping[str, str]
) -> Recipe:
    """The recipe of an allocation: int8 for all, then one rule for each other scheme."""
    by_scheme: dict[str, list[str]] = {}
    for layer, scheme in allocation:
        by_scheme.setdefault(scheme, []).append(layer)
    rules = [Rule((offered[BASE],), kind="*")]
    rules += [
        Rule((offered[scheme],), name=_any(layers, names))
        for scheme, layers in sorted(by_scheme.items())
        if scheme != BASE
    ]
    return Recipe(tuple(rules), name).restricted(skip)


def label_of(allocation: Allocation) -> str:
    """An allocation in a few words.

    >>> label_of((("a", "int8"), ("b", "int4"), ("c", "int4")))
    '2 int4, 1 int8'
    """
    counts = Counter(scheme for _, scheme in allocation)
    if len(counts) == 1:
        return f"all {next(iter(counts))}"
    return ", ".join(f"{count} {scheme}" for scheme, count in counts.most_common())


def _any(layers: Iterable[str], names: Mapping[str, str]) -> str:
    return f"^(?:{'|'.join(names[layer] for layer in layers)})"
