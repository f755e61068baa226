"""What every benchmark here ends with: tables, bars that are met or not, the environment, and a file with all of it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PARING_SHARED", REPOSITORY.parent / "shared"))
_PACKAGES = ("numpy", "ai-edge-litert", "litert-quantizer", "tensorflow-cpu", "tensorflow", "keras")


@dataclass(frozen=True)
class Bar:
    """A bound that a figure has to keep."""

    what: str
    value: float
    limit: float
    least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def line(self) -> str:
        sign = ">=" if self.least else "<="
        return f"{'met    ' if self.met else 'NOT MET'}  {self.what}: {self.value:.4g} (bar {sign} {self.limit:.4g})"


@dataclass
class Figures:
    """Results of one benchmark run, printed as they come and written at the end.

    Attributes:
      name: The script.
      about: What was measured and how, in a sentence or two.
    """

    name: str
    about: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        print(f"# {self.name}: {self.about}")
        print(", ".join(f"{key} {value}" for key, value in environment().items()), flush=True)

    def row(self, table: str, **values: Any) -> None:
        """Adds and prints one row of a table."""
        rows = self.tables.setdefault(table, [])
        if not rows:
            print(f"\n## {table}")
        rows.append(values)
        print("  " + "  ".join(f"{key}={_shown(value)}" for key, value in values.items()), flush=True)

    def at_least(self, what: str, value: float, limit: float) -> None:
        """A figure that has to reach a limit."""
        self.bars.append(Bar(what, float(value), float(limit), least=True))

    def at_most(self, what: str, value: float, limit: float) -> None:
        """A figure that must not pass a limit."""
        self.bars.append(Bar(what, float(value), float(limit), least=False))

    def note(self, text: str) -> None:
        """Says something that a reader of the figures has to know."""
        self.notes.append(text)
        print(f"  note: {text}", flush=True)

    def finish(self, write: str | None) -> int:
        """Prints the tables and the bars, writes the file; 0 where every bar is met."""
        for table, rows in self.tables.items():
            print(f"\n## {table}\n{_markdown(rows)}")
        print("\n## bars")
        for bar in self.bars:
            print(bar.line())
        if write:
            found = {
                "benchmark": self.name,
                "about": self.about,
                "environment": environment(),
                "tables": self.tables,
                "bars": [
                    {
                        "what": b.what,
                        "value": b.value,
                        "bar": b.limit,
                        "sense": "least" if b.least else "most",
                        "met": b.met,
                    }
                    for b in self.bars
                ],
                "notes": self.notes,
            }
            Path(write).parent.mkdir(parents=True, exist_ok=True)
            Path(write).write_text(json.dumps(found, indent=1, default=float) + "\n", encoding="utf-8")
            print(f"wrote {write}")
        return 0 if all(bar.met for bar in self.bars) else 1


def arguments(about: str | None, **options: Any) -> argparse.Namespace:
    """The command line every benchmark has (`--write FILE`), and its own options by name and default."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--write", metavar="FILE", help="write the figures as JSON")
    for name, default in options.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    return parser.parse_args()


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit that figures belong to."""
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpu": _cpu(), "cores": os.cpu_count()}
    found["load"] = round(os.getloadavg()[0], 1)
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["commit"] = _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else "")
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [
        f for f in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if f in found.get("flags", "").split()
    ]
    return f"{found.get('model name', platform.processor())} ({' '.join(flags)})"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit("this is a helper of the benchmarks beside it")
