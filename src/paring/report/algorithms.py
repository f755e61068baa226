"""The section about `paring bench-algorithms`: a `measure.result.AlgorithmBench`, as data, made ready for its template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from paring.report import figures
from paring.report.chart import Axis, around
from paring.report.terminal import size

COLUMNS = (
    ("Algorithm", "ascending", "what was trained", False),
    ("Top-1", "descending", "share of test samples whose class is right, mean over the seeds", True),
    ("Points", "descending", "over the float twin of the same seed, mean", True),
    ("File", "ascending", "mean size of the .tflite files", True),
    ("zstd", "ascending", "the same after zstd, level 9", True),
    ("Smaller", "descending", "float size after zstd over this one's", True),
    ("Zeros", "descending", "least share of zeros among the weights", True),
    ("Values", "ascending", "most different values in one channel", True),
    ("Step", "ascending", "processor time of a training step over the float twin's", True),
)
"""Of each column of a table: heading, order of the first click, explanation, whether numeric."""

_WIDE, _HIGH = 816, 364
_LEFT, _RIGHT, _TOP, _FOOT = 64, 800, 16, 316


def algorithms_section(bench: Mapping[str, Any]) -> dict[str, Any]:
    """What the template `algorithms.html` shows.

    Args:
      bench: An `AlgorithmBench` as data that went through `figures.clean`.

    Returns:
      Names for the template.
    """
    return {
        "title": f"Compression algorithms on {', '.join(dict.fromkeys(t['data'] for t in bench['tables']))}",
        "heading": "Compression algorithms",
        "bench": bench,
        "took": figures.seconds(bench["seconds"]),
        "columns": COLUMNS,
        "tables": [_table(number, table) for number, table in enumerate(bench["tables"])],
        "data": {},
    }


def _table(number: int, table: Mapping[str, Any]) -> dict[str, Any]:
    before = table["rows"][0]
    rows = [_row(f"algorithm-{number}-{place}", row, before) for place, row in enumerate(table["rows"])]
    return {
        "id": f"table-{number}",
        "name": f"{table['model']} on {table['data']}",
        "parameters": f"{table['parameters']:,}",
        "samples": table["samples"],
        "rows": rows,
        "curve": _curve(rows),
        "notes": [f"{row['label']}: {note}" for row in rows for note in row["notes"]],
    }


def _row(anchor: str, row: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    known = row["zstd"] and before["zstd"]
    step = row["step"]
    return {
        **row,
        "id": anchor,
        "label": figures.name(row["label"]),
        "text": _recipe(row["apply"]) if row["apply"] else "",
        "smaller": before["zstd"] / row["zstd"] if known else None,
        "step_text": figures.NONE if step is None else f"{step:.2f} ({row['step_low']:.2f}–{row['step_high']:.2f})",
    }


def _recipe(stages: list[Any]) -> str:
    """The recipe as YAML, of which JSON is a part; nothing that it names is imported."""
    return "\n".join(
        ["version: 1", "rules:", "  - kind: '*'", "    apply:", *(f"      - {json.dumps(s)}" for s in stages), ""]
    )


def spread(mean: float | None, deviation: float | None, digits: int = 2, unit: float = 1.0) -> str:
    """A mean with its standard deviation.

    >>> spread(0.955, 0.0123, 1, 100), spread(-1.0, None), spread(None, None)
    ('95.5 ± 1.2', '−1.00', '–')
    """
    if mean is None:
        return figures.NONE
    said = f"{mean * unit:.{digits}f}" + ("" if deviation is None else f" ± {deviation * unit:.{digits}f}")
    return said.replace("-", "−")


def _curve(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Accuracy, with its spread, against size after zstd."""
    found = [row for row in rows if row["zstd"] and row["score"] is not None]
    if not found:
        return None
    sizes = [row["zstd"] for row in found]
    ends = [100 * (row["score"] + sign * (row["score_sd"] or 0.0)) for row in found for sign in (-1, 1)]
    x = Axis(min(sizes) / 1.2, max(sizes) * 1.2, _LEFT, _RIGHT, log=True)
    y = Axis(*around(min(ends), max(ends), 0.08), _FOOT, _TOP)
    points = [
        {
            "id": row["id"],
            "x": x.at(row["zstd"]),
            "y": y.at(100 * row["score"]),
            "low": y.at(100 * (row["score"] - (row["score_sd"] or 0.0))),
            "high": y.at(100 * (row["score"] + (row["score_sd"] or 0.0))),
            "float": row is rows[0],
            "said": f"{row['label']}: top-1 {spread(row['score'], row['score_sd'], 2, 100)} %, {size(row['zstd'])}",
        }
        for row in found
    ]
    return {
        "points": points,
        "sizes": [{"x": x.at(t), "text": size(t).replace(".0 ", " ")} for t in x.ticks()],
        "scores": [{"y": y.at(t), "text": text} for t, text in y.labels()],
    }


__all__ = ["algorithms_section", "spread"]
