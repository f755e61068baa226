"""`paring inspect MODEL`: every operator with shapes, type, parameters, bytes, multiply-adds and zeros."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from paring.cli.quantize import JSON, MODEL
from paring.formats import load
from paring.formats.tflite.view import entries, view
from paring.graph import Graph, Op
from paring.measure.cost import cost
from paring.report import console, short_name, size


def inspect(
    model: str = MODEL,
    as_json: bool = JSON,
    zeros: bool = typer.Option(True, help="Read all weights to count zeros."),
) -> None:
    """Show every operator of a model: shapes, type, parameters, bytes, multiply-adds, zeros."""
    opened = load(model)
    graph = view(opened, densify=True)
    rows = [_row(graph, op, zeros) for op in graph.ops]
    if as_json:
        facts = {"model": model, "bytes": len(opened.data), "signatures": list(entries(opened)), "operators": rows}
        print(json.dumps(facts, indent=1))
        return
    table = Table(pad_edge=False)
    for column in ("operator", "kind", "output", "type", "parameters", "bytes", "MACs", "zeros"):
        table.add_column(column, justify="right" if column in ("parameters", "bytes", "MACs", "zeros") else "left")
    for row in rows:
        share = row["zeros"]
        table.add_row(
            escape(short_name(row["name"], 40)), row["native"], "x".join(str(d) for d in row["shape"]), row["dtype"],
            f"{row['parameters']:,}", size(row["stored_bytes"]), f"{row['macs']:,}", "" if share is None else f"{share:.0%}",
        )  # fmt: skip
    out = console()
    out.print(table)
    own = [
        row for op, row in zip(graph.ops, rows, strict=True) if not op.constant
    ]  # others only unpack what these read
    total = {k: sum(row[k] for row in own) for k in ("parameters", "macs")}
    out.print(
        f"{len(rows)} operators in {len(opened.subgraphs)} subgraphs, {size(len(opened.data))}, "
        f"{total['parameters']:,} parameters, {total['macs']:,} multiply-adds"
    )
    for key, (_, inputs, outputs) in entries(opened).items():
        out.print(escape(f"signature {key or '(none)'}: {', '.join(inputs)} -> {', '.join(outputs)}"))


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
    }


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("inspect")(inspect)
