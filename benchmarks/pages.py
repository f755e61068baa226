"""Makes docs/performance.md, and a table of docs/comparison.md, from docs/figures: `python benchmarks/pages.py`."""

from __future__ import annotations

import json
from typing import Any

from figures import REPOSITORY

FIGURES = REPOSITORY / "docs" / "figures"
PAGE = REPOSITORY / "docs" / "performance.md"
COMPARISON = REPOSITORY / "docs" / "comparison.md"
SCRIPTS = {"tfmot": "tfmot_twin"}  # where the script is not called as its results
START, END = "<!-- made by benchmarks/pages.py: training -->", "<!-- end -->"
HEAD = """# Performance, measured

Made by `benchmarks/pages.py` from `docs/figures/*.json`, which the scripts in `benchmarks/` write
(`--write`). Peers are measured beside us in the same run. Times on a shared two-core machine: read the ratios.
"""


def shown(value: Any) -> str:
    """A figure for a table cell."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(shown(v) for v in value) if isinstance(value, list) else str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a markdown table; columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(row.get(c, "")).replace("|", "\\|") for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def section(found: dict[str, Any]) -> str:
    """One benchmark: what was measured, on what, its tables, bars and notes."""
    machine = ", ".join(f"{k} {v}" for k, v in found["environment"].items() if k != "commit")
    parts = [
        f"## {found['benchmark']}",
        f"`python benchmarks/{SCRIPTS.get(found['benchmark'], found['benchmark'])}.py`: {found['about']}",
        machine,
    ]
    for name, rows in found["tables"].items():
        parts += [f"### {name}", table(rows)]
    if found["bars"]:
        bars = [
            {
                "bar": b["what"],
                "measured": float(b["value"]),
                "asked": f"{'at least' if b['sense'] == 'least' else 'at most'} {b['bar']:g}",
                "met": "yes" if b["met"] else "**no**",
            }
            for b in found["bars"]
        ]
        parts += ["### bars", table(bars)]
    parts += [f"- {note}" for note in found["notes"]]
    return "\n\n".join(parts)


def training(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Fine-tuned models and the cost of a step, paring beside tfmot."""
    means, costs = "ResNet8, mean of the seeds", "cost of a training step over float, "
    rows = [
        {
            "tool": tool, "technique": row["technique"], "top-1": f"{row['top1']:.3f} +- {row['sd']:.3f}",
            "points over its float twin": f"{row['points_over_float']:+.2f}", "zeros": f"{100 * row['zeros']:.0f} %",
            "distinct integers per channel": row["distinct"] if row["technique"] != "float" else "",
            "bytes": row["bytes"], "zstd": row["zstd"],
        }
        for tool, found in (("paring", ours), ("tfmot", theirs)) for row in found["tables"].get(means, [])
    ]  # fmt: skip
    steps = [
        {"tool": tool, "technique": row["technique"]}
        | {
            mode: f"{other['ratio']:.2f} ({other['low']:.2f} to {other['high']:.2f})"
            for mode in ("graph mode", "jit_compile=True")
            for other in found["tables"].get(costs + mode, [])
            if other["technique"] == row["technique"]
        }
        for tool, found in (("paring", ours), ("tfmot", theirs))
        for row in found["tables"].get(costs + "graph mode", [])
        if row["technique"] != "float"
    ]
    notes = [f"- tfmot: {note}" for note in theirs["notes"] if "not possible" in note]
    return "\n\n".join([ours["about"], table(rows), "Cost of a training step over float:", table(steps), *notes])


def main() -> None:
    """Writes the pages."""
    results = {path.stem: path for path in FIGURES.glob("*.json")}
    if {"training", "tfmot"} <= results.keys():
        ours, theirs = (json.loads(results[name].read_text(encoding="utf-8")) for name in ("training", "tfmot"))
        text = COMPARISON.read_text(encoding="utf-8")
        head, _, rest = text.partition(START)
        COMPARISON.write_text(
            f"{head}{START}\n\n{training(ours, theirs)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8"
        )
    pages = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FIGURES.glob("*.json"))]
    PAGE.write_text(HEAD + "\n" + "\n\n".join(section(found) for found in pages) + "\n", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(REPOSITORY)} from {len(pages)} files")


if __name__ == "__main__":
    main()
