"""The section about `paring debug`: a `measure.result.Comparison`, as data, made ready for its template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from paring.report import figures
from paring.report.chart import Axis
from paring.report.lanes import RADII, ROW, lay_out
from paring.report.terminal import short_name

MEASURES = ("blame", "own", "accumulated")
"""What the graph can be coloured by."""

COLUMNS = (
    ("Rank", "ascending", "1 is the layer that adds the most error", True),
    ("Layer", "ascending", "name in the float model", False),
    ("Blame", "ascending", "what the layer itself adds, in dB", True),
    ("Own", "ascending", "signal to noise of the layer alone, fed with float input, in dB", True),
    ("In model", "ascending", "signal to noise inside the whole optimized model, in dB", True),
    ("Weights", "ascending", "signal to noise of the stored weights, in dB", True),
    ("MSE/scale²", "descending", "of the layer alone; rounding alone gives 0.083", True),
    ("Clipped", "descending", "share of float values that the grid cannot hold", True),
    ("Kind", "ascending", "LiteRT's name of the operator", False),
    ("Became", "ascending", "form in the optimized model", False),
    ("At", "ascending", "position in the float model", True),
    ("Rule", "ascending", "rule of the recipe that decided", False),
)
"""Of each column of the table of layers: heading, order of the first click, explanation, whether it holds numbers."""


def debug_section(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """What the template `debug.html` shows.

    Args:
      comparison: A `Comparison` as data that went through `figures.clean`.

    Returns:
      Names for the template; `data` is what the page's script reads.
    """
    layers: list[dict[str, Any]] = comparison["layers"]
    ranking = [i for i in dict.fromkeys(comparison["ranking"]) if 0 <= i < len(layers)]
    rest = [i for i in range(len(layers)) if i not in set(ranking)]
    ranks = {layer: rank for rank, layer in enumerate(ranking, 1)}
    recipe = comparison["recipe"]
    rules = figures.rule_texts(recipe) if recipe else []
    rows = [_row(i, layer, ranks.get(i), len(layers), len(rules)) for i, layer in enumerate(layers)]
    return {
        "title": f"{_file(comparison['optimized'])} against {_file(comparison['source'])}",
        "heading": "What quantization did to each layer",
        "comparison": comparison,
        "columns": COLUMNS,
        "rows": [rows[i] for i in ranking + rest],
        "layers": rows,
        "kinds": sorted({r["native"] for r in rows}),
        "forms": sorted({r["form"] for r in rows}),
        "outputs": [_output(n, e, comparison["agreement"].get(n)) for n, e in comparison["outputs"].items()],
        "culprit": rows[ranking[0]] if ranking else None,
        "others": [rows[i] for i in ranking[1:5]],
        "unmatched": [short_name(figures.name(n)) for n in comparison["unmatched"]],
        "graph": _graph(rows),
        "profile": _profile(rows, ranking),
        "rules": [
            {"text": text, "layers": [r for r in rows if r["rule"] == number]} for number, text in enumerate(rules)
        ],
        "recipe": figures.recipe_text(recipe) if recipe else "",
        "settings": _settings(recipe) if recipe else [],
        "bands": figures.BANDS,
        "measures": MEASURES,
        "data": {"layers": [_detail(layer, row) for layer, row in zip(layers, rows, strict=True)], "radii": RADII},
    }


def _file(path: str) -> str:
    return short_name(path.replace("\\", "/").rstrip("/").rpartition("/")[2] or path)


def _row(index: int, layer: Mapping[str, Any], rank: int | None, layers: int, rules: int) -> dict[str, Any]:
    """A layer as the table, the graph and the lists of the recipe show it."""
    own, accumulated = layer["own"], layer["accumulated"]
    full = figures.name(layer["name"])
    db = {"blame": layer["blame"], "own": figures.snr(own), "accumulated": figures.snr(accumulated)}
    if db["blame"] is None and db["own"] == math.inf:
        db["blame"] = math.inf  # a layer that makes no error is to blame for none
    rule = layer["rule"]
    return {
        "index": index,
        "rank": rank,
        "name": short_name(full),
        "native": layer["native"],
        "form": layer["form"] or "no counterpart",
        "became": ", ".join(filter(None, (layer.get("shared"), layer["form"] or "no counterpart"))),
        "db": db,
        "weights": layer["weight_db"],
        "mse": own and own["mse"],
        "clipped": own and own["clipped"],
        "rule": rule if isinstance(rule, int) and 0 <= rule < rules else None,
        "inputs": [i for i in layer["inputs"] if 0 <= i < layers and i != index],
        "marks": {m: [figures.decibel(db[m]), figures.band(db[m])] for m in MEASURES},
    }


def _output(name: str, error: Mapping[str, Any], agreement: float | None) -> dict[str, Any]:
    return {
        "name": short_name(figures.name(name)),
        "snr": figures.snr(error),
        "channel": figures.snr(error, "channel_db"),
        "cosine": error["cosine"],
        "agreement": agreement,
    }


def _settings(recipe: Mapping[str, Any]) -> list[str]:
    """What a recipe says beside its rules."""
    said = [f"{key}: {recipe[key]}" for key in ("name", "description", "inputs", "outputs") if recipe.get(key)]
    for key in ("skip", "only"):
        patterns = recipe.get(key)
        said += [f"{key}: {', '.join(map(str, patterns))}"] if isinstance(patterns, list) and patterns else []
    return said


def _detail(layer: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """What the script shows when a row is opened: only what is there, numbers short."""
    facts = [
        ("Name in the float model", figures.name(layer["name"])),
        ("In the optimized model", figures.name(layer["optimized"]) or "no counterpart"),
        ("Matched by", layer["matched"]),
        ("Result", " × ".join("?" if n < 0 else str(n) for n in layer["shape"])),
        ("Stored weights", f"{figures.decibel(row['weights'])} dB" if row["weights"] is not None else ""),
        ("Stored weights have", layer.get("shared") or ""),
        ("Note", layer["note"]),
    ]
    found: dict[str, Any] = {
        "name": row["name"],
        "native": row["native"],
        "form": row["form"],
        "facts": [fact for fact in facts if fact[1]],
        "inputs": row["inputs"],
        "rule": row["rule"],
        "errors": [_error(layer[key]) for key in ("own", "accumulated")],
        "marks": [row["marks"][m] for m in MEASURES],
    }
    for key in ("activation", "weights"):
        drawn = _histogram(layer[key])
        if drawn is not None:
            found[key] = drawn
    return found


def _error(error: Mapping[str, Any] | None) -> list[str] | None:
    if error is None:
        return None
    return [
        figures.decibel(figures.snr(error)),
        figures.decibel(figures.snr(error, "channel_db")),
        figures.plain(error["mse"], 3),
        figures.plain(error["cosine"], 6),
        figures.share(error["clipped"]),
    ]


def _histogram(histogram: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The histogram without digits that nobody sees; None where there is nothing to draw."""

    def short(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            kept = [short(item) for item in value]
            return None if None in kept else kept
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        return value

    found = {key: short(value) for key, value in (histogram or {}).items()}
    drawable = found.get("counts") and None not in (found["low"], found["high"])
    return {key: value for key, value in found.items() if value is not None} if drawable else None


def _graph(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The lanes, drawn beside the list of layers."""
    lanes = lay_out([row["inputs"] for row in rows])
    return {
        "width": lanes.room,
        "height": ROW * len(rows),
        "row": ROW,
        "lines": [lanes.path(edge) for edge in lanes.edges],
        "nodes": [
            {"x": lanes.x(i), "y": lanes.y(i), "r": RADII[band] if band is not None else 3, "band": band}
            for i, row in enumerate(rows)
            for band in [row["marks"]["blame"][1]]
        ],
    }


def _profile(rows: Sequence[Mapping[str, Any]], ranking: Sequence[int]) -> dict[str, Any] | None:
    """The error along the model: one dot for each layer's own, a line for what has added up."""
    values = [row["db"][m] for row in rows for m in ("own", "accumulated") if row["db"][m] is not None]
    finite = [value for value in values if math.isfinite(value)]
    if len(rows) < 2 or not finite:
        return None
    x = Axis(1, len(rows), 44, 888)
    top, bottom = max(*finite, 10.0), min(*finite, 0.0)
    y = Axis(bottom, top * 1.05, 216, 12)
    line = [
        (x.at(i + 1), y.at(row["db"]["accumulated"]))
        for i, row in enumerate(rows)
        if row["db"]["accumulated"] is not None
    ]
    dots = [
        {"x": x.at(i + 1), "y": y.at(row["db"]["own"]), "band": figures.band(row["db"]["own"])}
        for i, row in enumerate(rows)
        if row["db"]["own"] is not None
    ]
    worst = rows[ranking[0]] if ranking else None
    label = None
    if worst is not None and worst["db"]["own"] is not None:
        at = x.at(worst["index"] + 1)
        label = {
            "x": at,
            "y": y.at(worst["db"]["own"]),
            "anchor": "end" if at > 600 else "start",
            "name": worst["name"],
        }
        label["text_x"] = at + (-12 if at > 600 else 12)
    last = next((row["db"]["accumulated"] for row in reversed(rows) if row["db"]["accumulated"] is not None), None)
    return {
        "line": "M" + "L".join(f"{px:g} {py:g}" for px, py in line) if line else "",
        "dots": dots,
        "label": label,
        "levels": [{"y": y.at(t), "text": text} for t, text in y.labels()],
        "steps": [{"x": x.at(t), "text": f"{t:.0f}"} for t in x.ticks(8) if t == int(t)],
        "last": figures.decibel(last),
    }


__all__ = ["debug_section"]
