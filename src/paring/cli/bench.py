"""`paring bench A B C --data D`: size, latency, memory and accuracy of models side by side."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from paring.cli.quantize import IMAGES, JSON, LIMIT
from paring.measure.bench import bench as measure
from paring.measure.result import Bench, BenchModel, Figure, Timing
from paring.measure.store import as_data, check_target, write
from paring.report import console, size

MODELS = typer.Argument(..., help="Models: .tflite, .keras or .h5 files, SavedModel folders. Ratios are to the first.")
DATA = typer.Option(None, "--data", "-d", help="Samples: .npz, .npy, a folder of images, or module:function.")
METRIC = typer.Option(
    None, "--metric", "-m", help="top1, top5, mse, cosine, auc or module:function. Default: top1 with labels, else mse."
)
LABELS = typer.Option(None, "--labels", help="A .npy file with one label per sample; wins over labels in the data.")
SCORED = typer.Option(None, "--score-output", help="The output that the metric looks at. Default: the first.")
THREADS = typer.Option(None, "--threads", min=1, help="Time with so many threads, beside one. Default: one per core.")
ROUNDS = typer.Option(100, "--rounds", min=1, help="Rounds of timing in each launch.")
LAUNCHES = typer.Option(30, "--launches", min=1, help="Start each model anew at most so many times.")
SECONDS = typer.Option(60.0, "--seconds", min=0.0, help="Begin no launch after so many seconds, but the first three.")
SPARSE = typer.Option(False, "--sparse-kernels", help="Run all .tflite models but the first with paring's delegate.")
RESULTS = typer.Option(Path("results.json"), "--results", help="Where the figures go as JSON.")


def bench(
    models: list[str] = MODELS,
    data: str | None = DATA,
    metric: str | None = METRIC,
    labels: str | None = LABELS,
    score_output: str | None = SCORED,
    threads: int | None = THREADS,
    rounds: int = ROUNDS,
    launches: int = LAUNCHES,
    seconds: float = SECONDS,
    limit: int | None = LIMIT,
    image_range: str | None = IMAGES,
    sparse_kernels: bool = SPARSE,
    results: Path = RESULTS,
    as_json: bool = JSON,
) -> None:
    """Measure models side by side: size, latency, memory, accuracy, and what runs their operators."""
    check_target(results, "bench")
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("starting", total=None)
        found = measure(
            models, data, metric=metric, labels=labels, output=score_output, threads=threads, rounds=rounds,
            launches=launches, seconds=seconds, limit=limit, image_range=image_range, sparse_kernels=sparse_kernels,
            progress=lambda what: progress.update(task, description=escape(what)),
        )  # fmt: skip
    facts = as_data("bench", found)
    write(results, facts)
    if as_json:
        print(json.dumps(facts, indent=1, default=float))
        return
    out = console()
    show(found, out)
    out.print(f"wrote {escape(str(results))}")


def show(found: Bench, out: Console) -> None:
    """Prints the table: in each cell the figure, and below it what it is times the first model's."""
    table = Table(pad_edge=False, row_styles=("", ""))
    threads = [timing.threads for timing in found.models[0].latency]
    score = f"{found.metric} (%)" if found.unit == "points" else found.metric
    names = [f"{n} thread{'s' if n > 1 else ''}" for n in threads]
    for column in ("model", "size", "zip", "zstd", *names, "memory", score, "operators"):
        table.add_column(escape(column), justify="left" if column in ("model", "operators") else "right")
    for model in found.models:
        times = [_time(timing) for timing in model.latency]
        memory = model.memory.value
        table.add_row(
            escape(_name(model, found)), *(_cell(size(f.value or 0), f) for f in (model.bytes, model.zip, model.zstd)),
            *times, "?" if memory is None else _cell(f"{size(memory)} (+{size(model.added or 0)})", model.memory),
            _cell(f"{model.score.value:.4g}" if model.score.value is not None else "?", model.score), _paths(model),
        )  # fmt: skip
    out.print(table)
    for line in explain(found):
        out.print(line)


def explain(found: Bench) -> list[str]:
    """What has to be said below the table."""
    rows = "rows" if found.samples != 1 else "row"
    made_up = "" if found.given else " (made up: give --data for real ones)"
    lines = [
        f"Second lines: ratio to {escape(_name(found.models[0], found))}. {escape(found.metric)} on {found.samples} {rows}"
        f"{made_up}, against {found.against}; {'higher' if found.higher_is_better else 'lower'} is better."
    ]
    for model in found.models[1:]:
        lost = f"{abs(model.drop):.3g}{' ' + found.unit if found.unit else ''}"
        spread = "" if model.drop_error is None else f" +- {2 * model.drop_error:.2g} (two standard errors, paired)"
        how = f"{lost} worse" if model.drop > 0 else f"{lost} better" if model.drop < 0 else "the same score"
        how = how if math.isfinite(model.drop) else "[red]no number to compare[/]"
        lines.append(f"{escape(_name(model, found))}: {how}{spread}")
    for model in found.models:
        left = Counter({kind: n for path in ("builtin", "unseen") for kind, n in model.paths.get(path, {}).items()})
        if model.kind == "tflite" and left:
            named = ", ".join(f"{kind} {n}" if n > 1 else kind for kind, n in left.most_common(8))
            lines.append(f"{escape(_name(model, found))}: not in XNNPACK: {escape(named)}")
        lines += [f"note: {escape(_name(model, found))}: {escape(note)}" for note in model.notes]
    lines += [f"note: {escape(note)}" for note in found.notes]
    launches = max(timing.launches for timing in found.models[0].latency)
    wide = max((t.error or 0.0) for model in found.models for t in model.latency)
    known = (
        f"ratios of latency known to +-{wide:.3f} or better (95%)" if launches > 1 else "one launch: ratios may be off"
    )
    lines.append(
        f"[dim]Latency: median and interquartile range of {found.models[0].latency[0].rounds} rounds in {launches} "
        f"launches, models in turns; {known}. Memory: peak of a fresh process (of which the model's own).[/]"
    )
    return lines


def _name(model: BenchModel, found: Bench) -> str:
    """The file's name; the whole path where two models share it."""
    name = Path(model.path).name
    return model.path if sum(Path(other.path).name == name for other in found.models) > 1 else name


def _cell(text: str, figure: Figure) -> str:
    return f"{text}\n[dim]{'' if figure.ratio is None else f'{figure.ratio:.3f}'}[/]"


def _time(timing: Timing) -> str:
    unit, scale = ("us", 1e3) if timing.median_ms < 1 else ("ms", 1.0)
    median, spread = timing.median_ms * scale, timing.spread_ms * scale / 2
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    shown = f"{median:.{digits}f} +- {spread:.{digits}f} {unit}"
    error = "" if timing.error is None or timing.ratio == 1.0 else f" +-{timing.error:.3f}"
    return f"{shown}\n[dim]{timing.ratio:.3f}{error}[/]"


def _paths(model: BenchModel) -> str:
    counts = {path: sum(kinds.values()) for path, kinds in model.paths.items()}
    names = {"xnnpack": "XNNPACK", "sparse": "paring", "unseen": "not seen"}
    return escape("\n".join(f"{count} {names.get(path, path)}" for path, count in counts.items()))


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("bench")(bench)
