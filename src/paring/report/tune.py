"""The section about `paring tune`: a `measure.result.Tuning`, as data, made ready for its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paring.report import figures
from paring.report.chart import Axis, around
from paring.report.terminal import short_name, size

COLUMNS = (
    ("Candidate", "ascending", "what was tried", False),
    ("Size", "ascending", "bytes of the file", True),
    ("Smaller", "descending", "float size over this size", True),
    ("Score", "descending", "the metric, measured", True),
    ("Drop", "ascending", "how much worse than float, in the metric's unit", True),
    ("Latency, ms", "ascending", "median with one thread", True),
    ("Took", "descending", "making and measuring it", True),
    ("Standing", "ascending", "chosen, on the front, or neither", False),
)
"""Of each column of the table of candidates: heading, order of the first click, explanation, whether numeric."""

_LIMITS = {"max_drop": "drop at most", "max_size": "size at most", "max_latency": "latency at most"}
_FAR = 0.5  # how far, in heights of the front, the score axis follows candidates that failed


def tune_section(tuning: Mapping[str, Any]) -> dict[str, Any]:
    """What the template `tune.html` shows.

    Args:
      tuning: A `Tuning` as data that went through `figures.clean`.

    Returns:
      Names for the template.
    """
    before = tuning["before"]
    candidates = [_candidate(i, c, before) for i, c in enumerate(tuning["candidates"])]
    chosen = next((c for c in candidates if c["chosen"]), None)
    return {
        "title": f"Recipes for {tuning['source'].replace(chr(92), '/').rpartition('/')[2] or tuning['source']}",
        "heading": "Which recipe fits",
        "tuning": tuning,
        "limits": [(_LIMITS.get(k, k), _limit(k, v)) for k, v in tuning["limits"].items() if v is not None],
        "before": _candidate(None, before, before),
        "chosen": chosen,
        "columns": COLUMNS,
        "candidates": candidates,
        "front": sum(c["pareto"] for c in candidates),
        "curve": _curve(tuning, before),
        "sensitivity": _sensitivity(tuning["sensitivity"]),
        "bands": figures.BANDS,
        "took": figures.seconds(tuning["seconds"]),
        "data": {},
    }


def _limit(key: str, value: float) -> str:
    return size(value) if key == "max_size" else f"{value:g} ms" if key == "max_latency" else f"{value:g}"


def _candidate(index: int | None, candidate: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    standing = [word for word, holds in (("chosen", candidate["chosen"]), ("front", candidate["pareto"])) if holds]
    return {
        **candidate,
        "index": index,
        "label": figures.name(candidate["label"]),
        "size": size(candidate["bytes"]),
        "smaller": before["bytes"] / max(1, candidate["bytes"]),
        "took": figures.seconds(candidate["seconds"]),
        "standing": ", ".join(standing),
        "text": figures.recipe_text(candidate["recipe"]) if candidate["recipe"] else "",
    }


def _better(tuning: Mapping[str, Any], before: Mapping[str, Any]) -> int:
    """1 where a larger score is better, -1 where a smaller one is: what the drops say."""
    for candidate in tuning["candidates"]:
        if candidate["drop"] and candidate["score"] is not None and before["score"] != candidate["score"]:
            return 1 if (before["score"] - candidate["score"]) * candidate["drop"] > 0 else -1
    return 1


def _curve(tuning: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any] | None:
    """Score against size: every candidate, the front, the limits."""
    found = [(i, c) for i, c in enumerate(tuning["candidates"]) if c["score"] is not None and c["bytes"] > 0]
    if not found or before["score"] is None or before["bytes"] <= 0:
        return None
    limits = tuning["limits"]
    better = _better(tuning, before)
    floor = before["score"] - better * limits["max_drop"] if limits.get("max_drop") is not None else None
    sizes = [c["bytes"] for _, c in found] + [before["bytes"]]
    sizes += [limits["max_size"]] if (limits.get("max_size") or 0) > 0 else []
    x = Axis(min(sizes) / 1.12, max(sizes) * 1.12, 64, 800, log=True)
    near = [before["score"], *([floor] if floor is not None else [])]
    near += [c["score"] for _, c in found if c["chosen"] or c["pareto"]]
    low, high = around(min(near), max(near), _FAR)
    scores = [*near, *(c["score"] for _, c in found)]
    low, high = around(max(low, min(scores)), min(high, max(scores)), 0.06)
    y = Axis(low, high, 316, 16)
    points = [_point(i, c, x, y, low, high) for i, c in found]
    front = sorted((c["bytes"], better * c["score"]) for _, c in found if c["pareto"])
    steps = [f"{x.at(b):g} {y.at(better * s):g}" for b, s in front]
    line = f"M{steps[0]}" + "".join(f"H{s.split()[0]}V{s.split()[1]}" for s in steps[1:]) if steps else ""
    return {
        "points": sorted(points, key=lambda p: (p["chosen"], p["pareto"])),
        "float": {"x": x.at(before["bytes"]), "y": y.at(before["score"])},
        "line": line,
        "sizes": [{"x": x.at(t), "text": size(t).replace(".0 ", " ")} for t in x.ticks()],
        "scores": [{"y": y.at(t), "text": text} for t, text in y.labels()],
        "floor": y.at(floor) if floor is not None else None,
        "ceiling": x.at(limits["max_size"]) if (limits.get("max_size") or 0) > 0 else None,
        "off": sum(p["off"] != "" for p in points),
    }


def _point(index: int, candidate: Mapping[str, Any], x: Axis, y: Axis, low: float, high: float) -> dict[str, Any]:
    at, over = x.at(candidate["bytes"]), y.at(candidate["score"])
    off = "below" if candidate["score"] < low else "above" if candidate["score"] > high else ""
    said = [figures.name(candidate["label"]), size(candidate["bytes"]), f"score {figures.plain(candidate['score'])}"]
    said += [word for word, holds in (("chosen", candidate["chosen"]), ("on the front", candidate["pareto"])) if holds]
    said += [f"{off} the chart"] if off else []
    return {
        "index": index,
        "x": at,
        "y": over,
        "chosen": candidate["chosen"],
        "pareto": candidate["pareto"],
        "off": off,
        "said": ", ".join(said),
    }


def _sensitivity(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Layers by schemes."""
    if not entries:
        return None
    schemes = list(dict.fromkeys(e["scheme"] for e in entries))
    layers: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for entry in entries:
        layers.setdefault((entry["layer"], entry["native"]), {})[entry["scheme"]] = entry
    rows = [
        {
            "name": short_name(figures.name(name)),
            "native": native,
            "cells": [_cell(found.get(scheme)) for scheme in schemes],
        }
        for (name, native), found in layers.items()
    ]
    return {"schemes": schemes, "rows": rows}


def _cell(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    # Null in JSON: the output did not change at all.
    db = float("inf") if entry["db"] is None else entry["db"]
    return {"db": db, "band": figures.band(db), "size": size(entry["bytes"])}


__all__ = ["tune_section"]
