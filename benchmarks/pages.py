"""Makes docs/performance.md, docs/coverage.md and tables of docs/comparison.md from the results in docs/figures."""

from __future__ import annotations

import json
import re
from typing import Any

import families
import hub
from figures import REPOSITORY

FIGURES = REPOSITORY / "docs" / "figures"
PAGE = REPOSITORY / "docs" / "performance.md"
COMPARISON = REPOSITORY / "docs" / "comparison.md"
SCRIPTS = {"tfmot": "tfmot_twin"}  # where the script is not called as its results
START, END = "<!-- made by benchmarks/pages.py: {} -->", "<!-- end -->"
COVERED, COVERED_SAVED = FIGURES / "coverage.json", FIGURES / "saved_model_coverage.json"
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


SAVED_HEAD = """# Which SavedModels work

Made by `benchmarks/pages.py` from `docs/figures/saved_model_coverage.json`, which `benchmarks/saved_model_coverage.py`
writes. One small model per family as Keras exports it, with random weights and random data: `inspect`, `bf16-int8` for stock
TensorFlow (run beside the float model by every signature) and `debug`. **int8**: operators that multiply int8 weights;
**worst**: signal to noise, in dB, of the worst of them fed with its float input, which has to be 20; **error**: of the worst
output over its norm, which in deep networks with random weights says little; **bytes**: of the folder over the float one's,
which Keras writes with every variable twice.
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


def saved_models(found: dict[str, Any], accuracy: dict[str, Any]) -> str:
    """SavedModels: what paring writes beside TensorFlow's own tool and a cast by hand; over float unless it says otherwise."""
    tables = found["tables"]
    questions: dict[str, dict[str, str]] = {}

    def add(question: str, rows: list[dict[str, Any]], value: str) -> None:
        cells = {row["version"]: f"{row[value]:.2f}" for row in rows if row["version"] != "float"}
        questions.update({question: cells} if cells else {})

    size = [row for row in tables.get("size", []) if row["network"] == "all of them"]
    add("bytes, Dense, Conv2D, Embedding and LSTM (float, stored once: 1)", size, "both_over_float_once")
    memory = tables.get("memory", [])
    for model in dict.fromkeys(row["model"] for row in memory):
        add(
            f"memory after a call, {model.partition(': ')[2]}", [r for r in memory if r["model"] == model], "over_float"
        )
    speed = tables.get("speed", [])
    for threads, batch in dict.fromkeys((row["threads"], row["batch"]) for row in speed):
        own = [row for row in speed if (row["threads"], row["batch"]) == (threads, batch)]
        add(f"time, 4 MatMul 4096^2, batch {batch}, {threads} thread{'s' * (threads > 1)}", own, "over_float")
    for row in tables.get("errors", []):
        cells = {key: f"{value:.4f}" for key, value in row.items() if isinstance(value, float)}
        questions[f"error, {row['model']}, {row['signature']}"] = cells
    for network in dict.fromkeys(row["network"] for row in accuracy.get("networks", [])):
        cells = {row["version"]: f"{row['error']:.4f}" for row in accuracy["networks"] if row["network"] == network}
        best = "paring bf16-int8, mse, bias correction"
        questions[f"error, {network}"] = {"portable bf16-int8": cells.pop(best, ""), **cells}
    columns = [
        "portable weight-only-int8", "portable bf16-int8", "native bf16-int8", "native weight-only-int4",
        "native 90 % blocks, float32", "native 90 % blocks, int8", "TensorFlow weight-only int8", "TensorFlow dynamic int8",
        "naive cast",
    ]  # fmt: skip
    columns = [column for column in columns if any(column in cells for cells in questions.values())]
    rows = [{"": name, **{c: cells.get(c, "-") for c in columns}} for name, cells in questions.items()]
    return "\n\n".join([found["about"], table(rows)])


def saved_coverage(found: dict[str, Any]) -> str:
    """The part of the coverage page that is about SavedModels."""
    rows: list[dict[str, Any]] = found["rows"]
    parts = [SAVED_HEAD, ", ".join(f"{k} {v}" for k, v in found["environment"].items() if k != "commit")]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines = [
            {
                "": row["family"].partition("/")[2] or row["family"], "parameters": row.get("parameters", ""),
                "works": "yes" if row["result"] == "works" else "**no**", "int8": row.get("int8", ""),
                "worst": f"{row['least_db']:.0f}" if "least_db" in row else "",
                "error": row.get("error", ""), "bytes": row.get("bytes_over_float", ""), "seconds": row.get("seconds", ""),
            }
            for row in rows if row["group"] == group
        ]  # fmt: skip
        parts += [f"## SavedModels of {group}", table(lines)]
    worked = sum(row["result"] == "works" for row in rows)
    parts += [f"{worked} of {len(rows)} work."]
    parts += [f"- {row['family']}: {row['result']}" for row in rows if row["result"] != "works"]
    every = [name for name in families.FAMILIES if families.group(name) == "keras.applications"]
    every += [f"KerasHub/{name}" for name in hub.FAMILIES]
    missing = [name for name in every if name not in {row["family"] for row in rows}]
    parts += [f"Not run yet: {', '.join(missing)}."] if missing else []
    parts += [f"No small model was made of KerasHub's {', '.join(hub.LEFT_OUT)}."]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for entry in row.get("float", ()):
            reasons.setdefault(f"{entry['operator']}: {entry['why']}", []).append(row["family"])
        if any("no operator known here reads" in note for note in row.get("notes", ())):
            reasons.setdefault("variables that no operator known here reads", []).append(row["family"])
    parts += ["## Why operators with weights stay float"]
    parts += [f"- {why} ({', '.join(dict.fromkeys(told))})" for why, told in sorted(reasons.items())]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"


def filled(text: str, name: str, content: str) -> str:
    """A page with what stands between the marks of a name replaced."""
    start = START.format(name)
    head, found, rest = text.partition(start)
    return f"{head}{start}\n\n{content}\n\n{END}{rest.partition(END)[2]}" if found else text


def main() -> None:
    """Writes the pages."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FIGURES.glob("*.json")}
    text = COMPARISON.read_text(encoding="utf-8")
    if {"training", "tfmot"} <= results.keys():
        text = filled(text, "training", training(results["training"], results["tfmot"]))
    if "saved_models" in results:
        accuracy = results.get("saved_model_accuracy", {}).get("tables", {})
        text = filled(text, "saved models", saved_models(results["saved_models"], accuracy))
    COMPARISON.write_text(text, encoding="utf-8")
    paths = [path for path in sorted(FIGURES.glob("*.json")) if path not in (COVERED, COVERED_SAVED)]
    pages = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    PAGE.write_text(HEAD + "\n" + "\n\n".join(section(found) for found in pages) + "\n", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(REPOSITORY)} from {len(pages)} files")
    covered = [coverage(results[COVERED.stem])] if COVERED.stem in results else []
    covered += [saved_coverage(results[COVERED_SAVED.stem])] if COVERED_SAVED.stem in results else []
    if covered:
        COVERAGE.write_text("\n".join(covered), encoding="utf-8")
        print(f"wrote {COVERAGE.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
