"""Makes docs/performance.md, docs/coverage.md and a table of docs/comparison.md from the results in docs/figures."""

from __future__ import annotations

import json
import re
from typing import Any

import families
from figures import REPOSITORY

FIGURES = REPOSITORY / "docs" / "figures"
PAGE = REPOSITORY / "docs" / "performance.md"
COMPARISON = REPOSITORY / "docs" / "comparison.md"
SCRIPTS = {"tfmot": "tfmot_twin"}  # where the script is not called as its results
START, END = "<!-- made by benchmarks/pages.py: training -->", "<!-- end -->"
COVERED = FIGURES / "coverage.json"
COVERAGE = REPOSITORY / "docs" / "coverage.md"
HEAD = """# Performance, measured

Made by `benchmarks/pages.py` from `docs/figures/*.json`, which the scripts in `benchmarks/` write
(`--write`). Peers are measured beside us in the same run. Times on a shared two-core machine: read the ratios.
"""

COVERAGE_HEAD = """# Which models train compressed

Made by `benchmarks/pages.py` from `docs/figures/coverage.json`, which `benchmarks/coverage.py` writes. One small model per
family, with random weights and random data: what is shown is that every step works, not how accurate the result is.

Every technique works on a fresh model: `attach`, three training steps, saving, loading and training on, `export`, and int8
inference on default kernels. **QAT** is int8 in training; **pruning** (half of the weights zero) and **clustering** (16 values
per output channel) are exported as float and then quantized to int8; the **chain** is all three in one recipe. Zeros and
distinct values are counted in the written int8 file. The file must compute what the deployed Keras model does: float files to a
thousandth of the output's spread (root mean square), QAT and chain to a tenth of it, one step of the output's grid, or twice
what LiteRT's builtin kernels make of the same file or Keras itself of inputs moved by a millionth, whichever is more (deep
random networks carry single roundings far). Cells say which share of the values is within one step where the output has a
grid, and the seconds, on a machine that was busy otherwise.
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


def coverage(found: dict[str, Any]) -> str:
    """The page of families and techniques."""
    rows: list[dict[str, Any]] = found["rows"]
    techniques = ("qat", "pruning", "clustering", "chain")
    parts = [COVERAGE_HEAD, ", ".join(f"{k} {v}" for k, v in found["environment"].items() if k != "commit")]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines = []
        for family in dict.fromkeys(row["family"] for row in rows if row["group"] == group):
            own = {row["technique"]: row for row in rows if row["family"] == family and row["group"] == group}
            cells = {t: _cell(own.get(t)) for t in techniques}
            whole = own.get("qat") or next(iter(own.values()))
            floats = ", ".join(f"{count} {name}" for name, count in _floats(whole).items())
            lines.append(
                {"": family, "parameters": whole.get("parameters", ""), **cells, "integer operators": whole.get("integer", ""),
                 "float operators": floats or ("none" if "float" in whole else "")}
            )  # fmt: skip
        parts += [f"## {group}", table(lines)]
    worked = sum(row["result"] == "worked" for row in rows)
    parts += ["## What did not work", f"{worked} of {len(rows)} worked."]
    missing = [name for name in families.FAMILIES if name not in {row["family"] for row in rows}]
    parts += [f"Not run yet: {', '.join(missing)}."] if missing else []
    parts += [f"- {r['family']}, {r['technique']}: {r['result']}" for r in rows if r["result"] != "worked"]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for entry in row.get("float", ()):
            why = re.sub(r"ratio [\d.e+-]+, ", "", entry["why"])
            told = reasons.setdefault(f"{entry['operator']}: {why}", [])
            told += [row["family"]] if row["family"] not in told else []
    parts += ["## Why operators stay float", *(f"- {why} ({', '.join(told)})" for why, told in sorted(reasons.items()))]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    if row["result"] != "worked":
        return "**no**"
    near = f"{100 * row['within']:.0f} %, " if "within" in row else ""
    return f"{near}{row['seconds']} s"


def _floats(row: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in row.get("float", ()):
        found[entry["operator"]] = found.get(entry["operator"], 0) + entry["count"]
    return found


def training(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Fine-tuned models and the cost of a step, paring beside tfmot."""
    means, costs = "ResNet8, mean of the seeds", "cost of a training step over float, "
    rows = [
        {
            "tool": tool, "technique": row["technique"], "seeds": row["seeds"],
            "top-1": f"{row['top1']:.3f}" + (f" +- {row['sd']:.3f}" if row["seeds"] > 1 else ""),
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
    notes = [f"- paring: {note}" for note in ours["notes"] if "seeds" in note or "one seed" in note] + notes
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
    paths = [path for path in sorted(FIGURES.glob("*.json")) if path != COVERED]
    pages = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    PAGE.write_text(HEAD + "\n" + "\n\n".join(section(found) for found in pages) + "\n", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(REPOSITORY)} from {len(pages)} files")
    if COVERED.is_file():
        COVERAGE.write_text(coverage(json.loads(COVERED.read_text(encoding="utf-8"))), encoding="utf-8")
        print(f"wrote {COVERAGE.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
