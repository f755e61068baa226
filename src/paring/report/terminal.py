"""What was done, as a table in the terminal and as plain data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paring.decision import CONSTANT, DYNAMIC, FLOAT, KEPT, STATIC, WEIGHT_ONLY
from paring.measure.store import finite
from paring.outcome import Report, Row
from paring.verify import PATH_NAMES, PATHS, Verification

ALL_ROWS = 120
QUANTIZED = (STATIC, DYNAMIC, WEIGHT_ONLY, KEPT)
LARGE = 0.5  # relative difference of an output that no user should overlook
_STYLES = {
    "other": "dim",
    "static": "green",
    "dynamic": "green",
    "weight-only": "cyan",
    "float": "yellow",
    "kept": "dim",
}


_TENSORFLOW = {"portable": "runs in stock TensorFlow", "native": "runs in TensorFlow behind `import paring.tensorflow`"}


def to_data(report: Report) -> dict[str, Any]:
    """The report as data that JSON can hold."""
    return asdict(report)


def to_json(report: Report) -> str:
    """The report as JSON text."""
    return json.dumps(finite(to_data(report)), indent=1, default=float, allow_nan=False)


def short_name(name: str, width: int = 46) -> str:
    """A layer name that fits: converters join the names of all they fused with `;`."""
    name = name.split(";")[0] or name
    return name if len(name) <= width else "..." + name[3 - width :]


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; piped output gets room enough for a table."""
    out = Console(stderr=stderr, highlight=False)
    return out if out.is_terminal else Console(stderr=stderr, highlight=False, width=140)


def show(report: Report, out: Console, *, every: bool = False) -> None:
    """Prints the report: every operator with what it became and why, then size, verification and what to do next."""
    rows = [r for r in report.rows if r.mode != CONSTANT]
    if any(r.pruning for r in rows):
        show_pruning(report, out)
    more = any(r.mode in QUANTIZED or len(r.stages) > (r.sparsity is not None) for r in rows)
    if more or not any(r.pruning for r in rows):
        show_rows(report, rows, out, every=every)
    counts = Counter(r.mode for r in rows)
    said = ", ".join(f"{n} {mode}" for mode, n in counts.most_common())
    folded = sum(r.mode == CONSTANT for r in report.rows)
    out.print(f"{len(rows)} operators: {said}" + (f" ({folded} more only unpack weights)" if folded else ""))
    runs = f"runs on TensorFlow Lite {report.runtime or 'newer than all that are known here'} and later"
    out.print(
        f"[bold]{size(report.source_bytes)} -> {size(report.output_bytes)}[/] ({report.ratio:.2f}x, "
        f"{report.source_bytes / max(1, report.output_bytes):.1f} times smaller), "
        f"{runs if report.kind == 'tflite' else _TENSORFLOW.get(report.runtime or '', '')}"
    )
    if report.verification is not None:
        show_verification(report.verification, out)
    else:
        out.print("[yellow]not verified (--no-verify)[/]")
    for note in report.notes:
        out.print(f"note: {escape(note)}")
    show_advice(report, out)
    took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items() if seconds >= 0.005)
    out.print(f"[dim]{took}[/]")


def show_pruning(report: Report, out: Console) -> None:
    """Prints which layers were pruned, and why others were not."""
    rows = [r for r in report.rows if r.pruning]
    table = Table(title="pruned layers", title_justify="left", pad_edge=False)
    for column in ("operator", "kind", "zeros", "pattern", "output error", "why"):
        right = column in ("zeros", "output error")
        table.add_column(column, overflow="fold", justify="right" if right else "left")
    for row in (r for r in rows if r.sparsity is not None):
        lost = "" if row.lost is None else f"{row.lost:.3f}"
        table.add_row(
            escape(short_name(row.name)),
            row.native,
            f"[green]{row.sparsity:.1%}[/]",
            row.pattern,
            lost,
            escape(row.pruning),
        )
    out.print(table)
    for (native, why), count in Counter((r.native, r.pruning) for r in rows if r.sparsity is None).most_common():
        out.print(f"not pruned: {count} {native}: {escape(why)}")


def show_rows(report: Report, rows: Sequence[Row], out: Console, *, every: bool) -> None:
    """Prints what each operator became and why."""
    table = Table(title=f"{report.recipe}: what each operator became", title_justify="left", pad_edge=False)
    table.add_column("operator", overflow="fold")
    table.add_column("kind")
    table.add_column("became")
    table.add_column("why", overflow="fold")
    if len(rows) <= ALL_ROWS or every:
        for row in rows:
            style = _STYLES.get(row.mode, "")
            name = f"{row.scope}: {row.name}" if row.scope else row.name
            table.add_row(escape(short_name(name)), row.native, f"[{style}]{escape(row.became)}[/]", escape(row.reason))
    else:
        groups = Counter((r.native, r.mode, r.became, r.reason) for r in rows)
        for (native, mode, became, reason), count in groups.most_common():
            table.add_row(
                f"{count} operator{'s' if count > 1 else ''}",
                native,
                f"[{_STYLES.get(mode, '')}]{escape(became)}[/]",
                escape(reason),
            )
    out.print(table)


def show_verification(found: Verification, out: Console) -> None:
    """Prints what running the result showed."""
    for path in PATHS:
        name = PATH_NAMES[path]
        if path in found.skipped:
            out.print(f"[yellow]not verified on {name}[/]: {escape(found.skipped[path])}")
        elif path in found.failed:
            out.print(f"[red]{name} does not run the result[/]: {escape(found.failed[path])}")
        elif path in found.findings:
            wrong = found.wrong(path)
            total = len(found.findings[path])
            if not wrong:
                said = f"{total} quantized operators within their bound of the arithmetic"
                out.print(f"verified on {name}: {said if total else 'it runs; no operator is quantized'}")
            for finding in wrong:
                out.print(
                    f"[red]wrong on {name}[/]: {escape(short_name(finding.name))} ({finding.native}) is off by "
                    f"{finding.quanta:.3g}, allowed {finding.allowed:g}; do not use this path, or --skip it"
                )
    for output, error in found.difference.items():
        agreement = f", same top-1 on {found.agreement[output]:.1%}" if output in found.agreement else ""
        made_up = "" if found.given else " (made-up samples: give --data for real ones)"
        out.print(
            f"output {escape(short_name(output))}: relative difference {_weighed(error)}{agreement} "
            f"on {found.samples} samples{made_up}"
        )


def _weighed(error: float) -> str:
    return f"{error:.4f}" if error < LARGE else f"[red]{error:.4f} (large)[/]"


def show_advice(report: Report, out: Console) -> None:
    """Names the layers that hurt, and prints the lines that exempt them."""
    for culprit in report.culprits[:5]:
        out.print(
            f"[red]culprit[/]: {escape(short_name(culprit.tensor))} spans [{culprit.low:.4g}, {culprit.high:.4g}]; one int8 "
            f"grid leaves its median channel {culprit.channel_db:.0f} dB above rounding noise"
        )
    names = list(dict.fromkeys(name for c in report.culprits[:5] for name in c.operators))
    if names:
        flags = " ".join(f"--skip '^{_pattern(name)}$'" for name in names)
        out.print(f"  exempt: [bold]{escape(flags)}[/]")
    left = [r for r in report.rows if r.mode == FLOAT and "no quantized kernel" in r.reason]
    if left:
        out.print(
            f"{len(left)} operators have no quantized kernel and stay float: "
            f"{escape(', '.join(sorted({r.native for r in left})))}"
        )


def _pattern(name: str) -> str:
    import re

    return re.escape(name)


__all__ = ["console", "short_name", "show", "show_verification", "size", "to_data", "to_json"]
