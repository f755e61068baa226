"""`paring inspect MODEL`: every operator with shapes, type, parameters, bytes, multiply-adds and zeros; what zeros gain."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from paring.cli.quantize import JSON, MODEL
from paring.formats import load
from paring.formats.saved_model.model import SavedModel, is_saved_model
from paring.formats.saved_model.view import view as folder_view
from paring.formats.tflite.view import entries, view
from paring.graph import Graph, Op
from paring.measure.cost import cost
from paring.measure.gains import Gain, gains, together
from paring.measure.store import finite
from paring.report import console, short_name, size
from paring.targets import TARGETS, USUAL, Target, find


def inspect(
    model: str = MODEL,
    as_json: bool = JSON,
    zeros: bool = typer.Option(True, help="Read all weights to count zeros."),
    target: str = typer.Option(
        None, "--target", "-t", help=f"Show instead what zeros in the weights gain there: {', '.join(TARGETS)}."
    ),
) -> None:
    """Show every operator of a model: shapes, type, parameters, bytes, multiply-adds, zeros; or what zeros gain."""
    chosen = find(target) if target is not None else None
    if chosen is not None:
        _show_gains(model, chosen, gains(view(load(model), densify=True), chosen.name), as_json)
        return
    graph, held, parts, signatures = _opened(model)
    rows = [_row(graph, op, zeros) for op in graph.ops]
    if as_json:
        facts = {"model": model, "bytes": held, "signatures": list(signatures), "operators": rows}
        print(json.dumps(facts, indent=1))
        return
    table = Table(pad_edge=False)
    for column in ("operator", "kind", "output", "type", "parameters", "bytes", "MACs", "zeros"):
        table.add_column(column, justify="right" if column in ("parameters", "bytes", "MACs", "zeros") else "left")
    for row in rows:
        share = row["zeros"]
        table.add_row(
            escape(short_name(row["name"], 40)), row["native"], "x".join(str(d) for d in row["shape"]), row["dtype"],
            f"{row['parameters']:,}", size(row["stored_bytes"]), "?" if row["macs"] is None else f"{row['macs']:,}",
            "" if share is None else f"{share:.0%}",
        )  # fmt: skip
    out = console()
    out.print(table)
    own = [
        row for op, row in zip(graph.ops, rows, strict=True) if not op.constant
    ]  # others only unpack what these read
    total = {k: sum(row[k] or 0 for row in own) for k in ("parameters", "macs")}
    out.print(
        f"{len(rows)} operators in {parts}, {size(held)}, "
        f"{total['parameters']:,} parameters, {total['macs']:,} multiply-adds"
    )
    for key, (inputs, outputs) in signatures.items():
        out.print(escape(f"signature {key or '(none)'}: {', '.join(inputs)} -> {', '.join(outputs)}"))


def _opened(model: str) -> tuple[Graph, int, str, dict[str, tuple[list[str], list[str]]]]:
    """The graph, its bytes, what it is made of, and inputs and outputs by signature."""
    if is_saved_model(model):
        folder = SavedModel.open(model)
        ends = {key: ([p.name for p in i], [p.name for p in o]) for key, (i, o) in folder.signatures().items()}
        return folder_view(folder).graph, folder.bytes, f"{len(folder.flow.scopes) - 1} functions", ends
    opened = load(model)
    ends = {key: ([*inputs], [*outputs]) for key, (_, inputs, outputs) in entries(opened).items()}
    return view(opened, densify=True), len(opened.data), f"{len(opened.subgraphs)} subgraphs", ends


def _show_gains(model: str, target: Target, rows: list[Gain], as_json: bool) -> None:
    now, then = together(rows)
    if as_json:
        facts = {
            "model": model, "target": target.name, "summary": target.summary, "layers": [asdict(row) for row in rows],
            "together": {"now": now, "then": then, "zeros": USUAL},
        }  # fmt: skip
        print(json.dumps(finite(facts), indent=1))
        return
    table = Table(pad_edge=False)
    for column in ("layer", "kind", "type", "zeros", "pattern", f"for {target.name}", "now", f"at {USUAL:.0%}", "why"):
        table.add_column(column, justify="right" if column in ("zeros", "now", f"at {USUAL:.0%}") else "left")
    for row in rows:
        share = "" if row.covered > 0.995 else f" ({row.covered:.0%})"
        table.add_row(
            escape(short_name(row.name, 36)), row.kind, row.dtype, f"{row.zeros:.0%}", row.found + share, row.pattern or "-",
            _times(row.now), _times(row.then), "" if row.pattern and row.then else row.why,
        )  # fmt: skip
    out = console()
    out.print(table)
    out.print(f"{target.name}: {target.summary}")
    if now is not None and then is not None:
        out.print(
            f"these layers together, predicted for one thread: {_times(now)} as they are, {_times(then)} at {USUAL:.0%} zeros"
        )


def _times(factor: float | None) -> str:
    return "?" if factor is None else f"{factor:.1f}x"


def _row(graph: Graph, op: Op, zeros: bool) -> dict[str, Any]:
    result = graph.tensors[op.outputs[0]] if op.outputs else None
    weights = {t.weight.stored for _, t in graph.weights_of(op) if t.weight}
    dtype = result.dtype if result is not None else ""
    return {
        "name": op.name,
        "kind": op.kind,
        "native": op.native,
        "version": op.version,
        "shape": list(result.shape) if result is not None else [],
        "dtype": f"{dtype} x {'/'.join(sorted(weights))}" if weights and weights != {dtype} else dtype,
        **asdict(cost(graph, op, read=zeros)),
        **({"macs": None} if weights and result is not None and not result.shape else {}),  # a shape that no file says
    }


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("inspect")(inspect)
