"""Makes docs/performance.md from the result files in docs/figures: `python benchmarks/pages.py`."""

from __future__ import annotations

import json
from typing import Any

from figures import REPOSITORY

FIGURES = REPOSITORY / "docs" / "figures"
PAGE = REPOSITORY / "docs" / "performance.md"
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
    parts = [f"## {found['benchmark']}", f"`python benchmarks/{found['benchmark']}.py`: {found['about']}", machine]
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


def main() -> None:
    """Writes the page."""
    pages = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FIGURES.glob("*.json"))]
    PAGE.write_text(HEAD + "\n" + "\n\n".join(section(found) for found in pages) + "\n", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(REPOSITORY)} from {len(pages)} files")


if __name__ == "__main__":
    main()
