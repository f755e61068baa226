"""`paring debug FLOAT OPTIMIZED`: the error of every layer, the worst first, and what to exempt."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from paring.cli import quantize as common
from paring.errors import InputError
from paring.measure.compare import compare
from paring.measure.noise import EXACT
from paring.measure.result import Comparison, Error, Layer
from paring.measure.store import as_data, check_target, environment
from paring.report import console, short_name

WORST = 10
FLOAT = typer.Argument(..., help="The float model: .tflite, .keras or .h5 file, or a SavedModel folder.")
OPTIMIZED = typer.Argument(..., help="What was made of it, by whatever tool.")
DATA = typer.Option(None, "--data", "-d", help="Samples: .npz, .npy, a folder of images, or module:function.")
LABELS = typer.Option(None, "--labels", help="Classes (.npy), for the accuracy of both.")
HTML = typer.Option(None, "--html", help="Write the report as one page that opens offline.")
RESULTS = typer.Option(None, "--results", help="Write all figures as JSON.")
JSON = typer.Option(False, "--json", help="Print all figures as JSON.")
EVERY = typer.Option(False, "--all", help="List every layer, not the ten worst.")


def debug(
    source: str = FLOAT,
    optimized: str = OPTIMIZED,
    data: str | None = DATA,
    labels: str | None = LABELS,
    limit: int | None = common.LIMIT,
    image_range: str | None = common.IMAGES,
    html: Path | None = HTML,
    results_file: Path | None = RESULTS,
    as_json: bool = JSON,
    every: bool = EVERY,
) -> None:
    """Show where an optimized model differs from its float model: the error of every layer, ranked, and the culprit.

    Without --data the samples are made up.
    """
    if results_file is not None:
        check_target(results_file, "debug")
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        got = "a folder" if html.is_dir() else f"no folder {html.parent}"
        raise InputError("cannot write the page", where=str(html), expected="a file in an existing folder", got=got)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("comparing", total=None)
        found = compare(
            source, optimized, data, labels=labels, limit=limit, image_range=image_range,
            histograms=html is not None or results_file is not None or as_json,
            progress=lambda done: progress.update(task, completed=done),
        )  # fmt: skip
    facts = as_data("debug", {"environment": environment(), "comparison": asdict(found)})
    if common.deliver(facts, results_file, html, as_json=as_json):
        return
    out = console()
    show(found, out, every=every)
    for path in (results_file, html):
        if path is not None:
            out.print(f"wrote {path}", soft_wrap=True)


def show(found: Comparison, out: Console, *, every: bool = False) -> None:
    """Prints the worst layers, the outputs' error, the culprits and the lines that exempt them."""
    shown = found.ranking if every else found.ranking[:WORST]
    rest = f"; {len(found.ranking) - len(shown)} more with --all" if len(shown) < len(found.ranking) else ""
    title = f"what each layer adds, the worst first{rest}"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in ("layer", "kind", "became"):
        table.add_column(column, overflow="fold")
    for column in ("adds", "own SNR", "channel", "mse/scale2", "cosine", "clipped", "accumulated"):
        table.add_column(column, justify="right")
    for number in shown:
        table.add_row(*_cells(found.layers[number], number in found.culprits))
    out.print(table)
    out.print(
        "[dim]dB: the smaller, the worse. adds: the layer alone, its input's rounding not counted; own: fed with the "
        "float input; channel: of the median channel; accumulated: inside the whole model.[/]"
    )
    if every:
        for layer in found.layers:
            if layer.blame is None:
                out.print(
                    f"[dim]not ranked: {escape(short_name(layer.name))} ({layer.native}): {escape(layer.note)}[/]"
                )
    for name, error in found.outputs.items():
        same = f", same top-1 on {found.agreement[name]:.1%}" if name in found.agreement else ""
        out.print(f"output {escape(short_name(name))}: {_db(error.snr_db)} dB, cosine {error.cosine:.5f}{same} "
                  f"on {found.samples} samples")  # fmt: skip
    if found.unmatched:
        names = ", ".join(short_name(name) for name in found.unmatched[:5])
        more = f" and {len(found.unmatched) - 5} more" if len(found.unmatched) > 5 else ""
        out.print(f"without a counterpart in the float model: {escape(names)}{more}")
    for note in found.notes:
        out.print(f"note: {escape(note)}")
    for number in found.culprits:
        layer = found.layers[number]
        why = f": {escape(layer.note)}" if layer.note else ""
        out.print(f"[red]culprit[/]: {escape(short_name(layer.name))} ({layer.native}, {layer.became}){why}")
    if found.exempt:
        out.print("add these lines to the recipe's rules to leave float what it takes:")
        out.print(escape(found.exempt), soft_wrap=True)
    else:
        out.print("no layer stands out")


def _cells(layer: Layer, culprit: bool) -> list[str]:
    own, whole = layer.own, layer.accumulated
    name = escape(short_name(layer.name, 40))
    return [
        f"[red]{name}[/]" if culprit else name, layer.native, layer.became, _db(layer.blame),
        _db(own.snr_db if own else None), _db(own.channel_db if own else None),
        _number(own, "mse", "{:.3g}"), _number(own, "cosine", "{:.4f}"), _number(own, "clipped", "{:.2%}"),
        _db(whole.snr_db if whole else None),
    ]  # fmt: skip


def _number(error: Error | None, part: str, form: str) -> str:
    value = getattr(error, part) if error is not None else None
    return "" if value is None else form.format(value)


def _db(value: float | None) -> str:
    return "" if value is None else "exact" if value >= EXACT else f"{value:.1f}"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("debug")(debug)


__all__ = ["debug", "register", "show"]
