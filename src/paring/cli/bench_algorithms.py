"""`paring bench-algorithms`: compression algorithms side by side, trained on fixed models and data with equal budgets."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from paring.cli import quantize as common
from paring.errors import InputError, UnsupportedError
from paring.formats.convert import check_installed
from paring.measure.algorithms import DIGITS
from paring.measure.result import AlgorithmBench, AlgorithmRow, AlgorithmTable
from paring.measure.store import as_data, check_target, environment
from paring.report import console, size

ALGORITHMS = typer.Option(
    [], "--algorithm", "-a",
    help="module:Class{settings}, or a stage's name; several joined by + make a chain. Repeat for more.",
)  # fmt: skip
DATA = typer.Option(
    [DIGITS],
    "--data",
    "-d",
    help="digits (embedded), or a .npz with x_train, y_train, x_test, y_test. Repeat for more.",
)
MODELS = typer.Option(
    ["cnn", "mlp"], "--model", "-m", help="cnn, mlp, or module:function of (shape, classes). Repeat for more."
)
SEEDS = typer.Option(3, "--seeds", min=1, help="Trainings of each.")
STEPS = typer.Option(200, "--steps", min=1, help="Of training in float, and of each algorithm after it.")
BATCH = typer.Option(32, "--batch", min=1, help="Samples in a step.")
BUILT_IN = typer.Option(True, help="Run the built-in algorithms beside.")
RESULTS = typer.Option(None, "--results", "-o", help="Write all that was measured as JSON.")
HTML = typer.Option(None, "--html", help="Write tables and charts as one HTML page.")


def bench_algorithms(
    algorithm: list[str] = ALGORITHMS,
    data: list[str] = DATA,
    model: list[str] = MODELS,
    seeds: int = SEEDS,
    steps: int = STEPS,
    batch: int = BATCH,
    built_in: bool = BUILT_IN,
    results: Path | None = RESULTS,
    html: Path | None = HTML,
    as_json: bool = common.JSON,
) -> None:
    """Train compression algorithms, yours beside the built-in ones, with equal budgets: accuracy, size, time of a step."""
    if results is not None:
        check_target(results, "bench-algorithms")
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise InputError("cannot write the page", where=str(html), expected="a file in an existing folder")
    check_installed("keras", purpose="training")
    if "keras" not in sys.modules:
        # One thread: processor time is then that of the work, not of threads that wait for each other.
        for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
            os.environ.setdefault(name, "1")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("starting", total=None)
        try:
            from paring.training import bench_algorithms as measure
        except ImportError as error:
            raise UnsupportedError(
                "Keras finds no backend",
                got=str(error),
                todo="Install TensorFlow, JAX or PyTorch, and name it in KERAS_BACKEND",
            ) from error
        found = measure(
            algorithm, data=data, models=model, seeds=seeds, steps=steps, batch=batch, built_in=built_in,
            progress=lambda what: progress.update(task, description=escape(what)),
        )  # fmt: skip
    told = as_data("bench-algorithms", {"environment": environment(), "algorithms": asdict(found)})
    if common.deliver(told, results, html, as_json=as_json):
        return
    out = console()
    show(found, out)
    if written := [str(path) for path in (results, html) if path is not None]:
        out.print(f"wrote {escape(' and '.join(written))}")


def show(found: AlgorithmBench, out: Console) -> None:
    """Prints a table for each data set and model, and what has to be said below."""
    for table in found.tables:
        _show_table(table, out)
    seeds = f"{found.seeds} seeds, +- is their standard deviation" if found.seeds > 1 else "1 seed"
    out.print(
        f"[dim]{found.steps} steps of {found.batch} samples in float, then as many of each, in turns, on {found.backend}; "
        f"{seeds}. Points: over the float twin. Step: processor time over the float twin's, "
        f"median and middle half of the rounds. {found.seconds:.0f} s[/]"
    )
    for note in found.notes:
        out.print(f"note: {escape(note)}")


def _show_table(found: AlgorithmTable, out: Console) -> None:
    title = (
        f"{found.model} ({found.parameters:,} parameters) on {found.data}, tested on {found.samples[1]} samples a seed"
    )
    table = Table(title=escape(title), title_justify="left", pad_edge=False)
    for column in ("algorithm", "top-1 (%)", "points", "file", "zstd", "smaller", "zeros", "values", "step"):
        table.add_column(column, justify="left" if column == "algorithm" else "right", overflow="fold")
    for row in found.rows:
        table.add_row(*_cells(row, found.rows[0]))
    out.print(table)
    for row in found.rows:
        for note in row.notes:
            out.print(f"note: {escape(row.label)}: {escape(note)}")


def _cells(row: AlgorithmRow, before: AlgorithmRow) -> list[str]:
    step = "?" if row.step is None else f"{row.step:.2f} ({row.step_low:.2f}-{row.step_high:.2f})"
    deviation = None if row.score_sd is None else 100 * row.score_sd
    sizes = ["?" if count is None else size(count) for count in (row.bytes, row.zstd)]
    return [
        escape(row.label), _spread(100 * row.score, deviation), _spread(row.change, row.change_sd) if row.apply else "", *sizes,
        f"{before.zstd / row.zstd:.1f}x" if row.zstd and before.zstd else "?",
        "?" if row.zeros is None else f"{row.zeros:.0%}", "?" if row.distinct is None else str(row.distinct),
        step if row.apply else "1",
    ]  # fmt: skip


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.2f}" + ("" if deviation is None else f" +- {deviation:.2f}")


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("bench-algorithms")(bench_algorithms)
