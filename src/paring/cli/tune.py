"""`paring tune MODEL --data D --max-drop X -o OUT`: finds the recipe that fits, by measuring."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from paring.cli import quantize as common
from paring.errors import InputError, UnsupportedError
from paring.measure.result import Candidate, Tuning
from paring.measure.store import as_data, check_target, environment
from paring.report import console, show, size
from paring.tuning import tune as search

TOP = 12
DATA = typer.Option(..., "--data", "-d", help="Labelled samples; every fourth is calibrated on, the others measure.")
LABELS = typer.Option(None, "--labels", help="Labels, one per sample (.npy), if the data holds none.")
METRIC = typer.Option(None, "--metric", "-m", help="top1, top5, mse, cosine, auc, or module:function.")
DROP = typer.Option(
    None, "--max-drop", help="Largest loss: 0.5pt (points), 0.5% (relative), or a plain number for mse."
)
SIZE = typer.Option(None, "--max-size", help="Largest file: 60kB, 1.5MB.")
LATENCY = typer.Option(None, "--max-latency", help="Longest median latency with one thread here: 3ms, 800us.")
ACTIVATIONS = typer.Option(
    "dynamic", help="Of int8 and int4 layers: dynamic, or int8 for integer models (SavedModels: bfloat16)."
)
ROUNDING = typer.Option("adaround", help="Of int4 weights: adaround, gptq (quicker on wide layers) or nearest.")
WORKERS = typer.Option(None, "--workers", min=1, help="Trials under way at a time; one on each core by default.")
DASK = typer.Option(
    None, "--dask", help="Run trials on this Dask scheduler: tcp://host:port. Its workers must see --work."
)
WORK = typer.Option(None, "--work", help="Folder where measurements are kept until the search is done; OUTPUT.tune.")
RECIPE = typer.Option(None, "--save-recipe", help="Where the recipe goes; OUTPUT with .yaml by default.")
HTML = typer.Option(None, "--html", help="Write the Pareto curve and all candidates as one HTML page.")
RESULTS = typer.Option(None, "--results", help="Write all that was measured as JSON.")


def tune(
    model: str = common.MODEL,
    output: Path = common.OUT,
    data: str = DATA,
    metric: str | None = METRIC,
    max_drop: str | None = DROP,
    max_size: str | None = SIZE,
    max_latency: str | None = LATENCY,
    labels: Path | None = LABELS,
    activations: str = ACTIVATIONS,
    rounding: str = ROUNDING,
    skip: list[str] = common.SKIP,
    runtime: str | None = common.RUNTIME,
    image_range: str | None = common.IMAGES,
    limit: int | None = common.LIMIT,
    workers: int | None = WORKERS,
    dask: str | None = DASK,
    work: Path | None = WORK,
    save_recipe: Path | None = RECIPE,
    html: Path | None = HTML,
    results: Path | None = RESULTS,
    overwrite: bool = common.OVERWRITE,
    as_json: bool = common.JSON,
) -> None:
    """Find the smallest model within a bound on accuracy (and latency), or the best within a size. Can be interrupted."""
    recipe_file = save_recipe or output.with_suffix(".yaml")
    if results is not None:
        check_target(results, "tune")
    for path in (path for path in (recipe_file, html) if path is not None):
        if path.is_dir() or not path.absolute().parent.is_dir():
            got = "a folder" if path.is_dir() else f"no folder {path.parent}"
            raise InputError(
                "cannot write the output", where=str(path), expected="a file in an existing folder", got=got
            )
        if path.exists() and not overwrite:
            raise InputError("the output exists", where=str(path), todo="Say --overwrite to replace it")
    written = [path.absolute() for path in (output, recipe_file, html, results) if path is not None]
    if len(set(written)) < len(written):
        raise InputError("two outputs have one name", where=", ".join(str(path) for path in written))
    folder = work or Path(f"{output}.tune")
    try:
        with _executor(dask) as executor, Progress(
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        ) as progress:  # fmt: skip
            task = progress.add_task("preparing", total=None)

            def step(stage: str, done: int, total: int) -> None:
                progress.update(task, description=stage, completed=done, total=total)

            found = search(
                model, data, output=output, metric=metric, max_drop=max_drop, max_size=max_size, max_latency=max_latency,
                labels=labels, activations=activations, rounding=rounding, skip=skip, runtime=runtime,
                executor=executor, width=workers, folder=folder, overwrite=overwrite, limit=limit, image_range=image_range,
                progress=step,
            )  # fmt: skip
    except KeyboardInterrupt:
        if (folder / "journal.jsonl").exists():
            print(f"paring: measurements are kept in {folder}; the same command goes on from there", file=sys.stderr)
        raise
    recipe_file.write_text(found.recipe.to_yaml(), encoding="utf-8")
    told = as_data("tune", {"environment": environment(), "tuning": asdict(found.tuning)})
    if common.deliver(told, results, html, as_json=as_json):
        return
    out = console()
    show(found.result.report, out)
    show_tuning(found.tuning, out)
    out.print(f"wrote {output} and {recipe_file}" + "".join(f", {path}" for path in (html, results) if path))


@contextlib.contextmanager
def _executor(address: str | None) -> Iterator[Executor | None]:
    """The executor of a Dask cluster, or None."""
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise UnsupportedError("--dask needs Dask", todo="Install it: pip install distributed") from error
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise InputError("cannot reach the Dask scheduler", where=address, got=str(error)) from error
    with client:
        yield client.get_executor()


def show_tuning(found: Tuning, out: Console) -> None:
    """Prints the front, what was chosen, and what the layers that hurt most are."""
    table = Table(title=f"measured on {found.samples[1]} samples", title_justify="left", pad_edge=False)
    for column in ("model", "size", "smaller", found.metric, "drop", "latency", ""):
        table.add_column(column, justify="left" if column in ("model", "") else "right")
    ordered = sorted((c for c in found.candidates if c.pareto or c.chosen), key=lambda c: c.bytes)
    for candidate in [*ordered[:TOP], found.before]:
        table.add_row(*_row(candidate, found.before), "chosen" if candidate.chosen else "")
    out.print(table)
    worst = sorted(found.sensitivity, key=lambda s: s.db)[:3]
    if worst:
        said = ", ".join(f"{escape(s.layer.split(';')[0])} under {s.scheme} ({s.db:.0f} dB)" for s in worst)
        out.print(f"most sensitive alone: {said}")
    for note in found.notes:
        out.print(f"note: {escape(note)}")
    again = f", {found.reused} of them from an earlier run" if found.reused else ""
    count = len(found.candidates) + len(found.sensitivity)
    out.print(f"[dim]{count} trials{again}, {found.seconds:.0f} s[/]")


def _row(candidate: Candidate, before: Candidate) -> list[str]:
    latency = "" if candidate.latency_ms is None else f"{candidate.latency_ms:.3g} ms"
    return [
        escape(candidate.label), size(candidate.bytes), f"{before.bytes / max(1, candidate.bytes):.1f}x",
        f"{candidate.score:.4g}", f"{candidate.drop:.3g}", latency,
    ]  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("tune")(tune)
