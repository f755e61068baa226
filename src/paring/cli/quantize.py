"""`paring quantize MODEL -o OUT`: integer weights and activations after training."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress

from paring.errors import InputError
from paring.measure.store import write
from paring.optimize import Result, optimize
from paring.recipe import IO_TYPES, Recipe
from paring.report import console, show, to_json

MODEL = typer.Argument(..., help=".tflite, .keras or .h5 file, or a SavedModel folder.")
OUT = typer.Option(..., "-o", "--output", help="The .tflite file to write; of a SavedModel also a folder.")
RECIPE = typer.Option(
    "dynamic-int8", "--recipe", "-r", help="A named recipe (`paring recipes`) or a YAML or JSON file."
)
DATA = typer.Option(
    None, "--data", "-d", help="Calibration samples: .npz, .npy, a folder of images, or module:function."
)
SKIP = typer.Option(
    [], "--skip", help="Leave operators float whose name (regular expression) or kind matches. Repeatable."
)
ONLY = typer.Option([], "--only", help="Touch only operators whose name or kind matches. Repeatable.")
MIN_SIZE = typer.Option(0, "--min-size", min=0, help="Leave layers with fewer weights alone.")
IO = typer.Option(None, "--io", help=f"Type of inputs and outputs: {', '.join(IO_TYPES)}.")
RANGE = typer.Option(None, "--range", help="Override in all rules: minmax, percentile or mse.")
ROUNDING = typer.Option(None, "--rounding", help="Override in all rules: nearest, gptq or adaround (with --data).")
EQUALIZE = typer.Option(None, "--equalize/--no-equalize", help="Scale channels between layers first (no data needed).")
BIAS = typer.Option(None, "--bias-correction/--no-bias-correction", help="Override in all rules.")
IMAGES = typer.Option(None, "--image-range", help="lo,hi: values of pixels 0 and 255, for a folder of images.")
LIMIT = typer.Option(None, "--limit", min=1, help="Use at most so many samples.")
USE = typer.Option(None, "--statistics", help="Use the statistics of an earlier run instead of --data.")
KEEP = typer.Option(None, "--save-statistics", help="Keep the calibration statistics in this .npz.")
DENSIFY = typer.Option(False, "--densify", help="Quantize sparse weights too, densely.")
STRICT = typer.Option(False, "--strict", help="Refuse to leave a float operator (microcontrollers, Edge TPU).")
VERIFY = typer.Option(True, "--verify/--no-verify", help="Run the result, operator by operator, before it is kept.")
ERROR = typer.Option(
    None, "--max-error", help="Bound on the relative difference of every output; exit code 1 beyond it."
)
RUNTIME = typer.Option(
    None,
    "--runtime",
    help="Of a SavedModel that is written: portable (stock operators, the default) or native (paring's own, faster).",
)
OVERWRITE = typer.Option(False, "--overwrite", help="Replace an output that exists.")
JSON = typer.Option(False, "--json", help="Print the report as JSON.")
EVERY = typer.Option(False, "--all", help="List every operator, however many.")


def run(
    model: str,
    output: Path,
    recipe: Recipe,
    data: str | None,
    *,
    save_statistics: Path | None = None,
    as_json: bool = False,
    every: bool = False,
    **settings: Any,
) -> Result:
    """Optimizes with a progress bar on a terminal, prints the report."""
    if save_statistics is not None and data is None and settings.get("statistics") is None:
        raise InputError("there are no statistics to save", where=str(save_statistics), todo="Give --data")
    if save_statistics is not None and not save_statistics.parent.is_dir():
        got = f"no folder {save_statistics.parent}"
        raise InputError("cannot write the statistics", where=str(save_statistics), got=got)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        turns = max((len(rule.before) for rule in recipe.rules), default=0)
        counts = [*["compressing"] * turns, "calibrating", "rounding"]
        task = progress.add_task(counts[0], total=None if recipe.changes else settings.get("limit"), visible=False)

        def step(done: int) -> None:
            if done < progress.tasks[0].completed and len(counts) > 1:  # the next count begins
                counts.pop(0)
                total = settings.get("limit") if counts[0] == "calibrating" else None
                progress.update(task, description=counts[0], total=total)
            progress.update(task, completed=done, visible=True)

        result = optimize(model, recipe, data, output=output, progress=step, **settings)
    if save_statistics is not None and result.statistics is not None:
        result.statistics.save(save_statistics)
    elif save_statistics is not None:
        print(f"paring: the recipe asks for no statistics, so {save_statistics} was not written", file=sys.stderr)
    if as_json:
        print(to_json(result.report))
    else:
        out = console()
        show(result.report, out, every=every)
        out.print(f"wrote {output}")
    return result


def deliver(facts: dict[str, Any], results: Path | None, html: Path | None, *, as_json: bool) -> bool:
    """Writes what `as_data` gave as JSON and as a page where asked; prints it as JSON, and then says True."""
    if results is not None:
        write(results, facts)
    if html is not None:
        from paring.report.page import write_page

        write_page(html, facts)
    if as_json:
        print(json.dumps(facts, indent=1, allow_nan=False))
    return as_json


def quantize(
    model: str = MODEL,
    output: Path = OUT,
    recipe: str = RECIPE,
    data: str | None = DATA,
    skip: list[str] = SKIP,
    only: list[str] = ONLY,
    io: str | None = IO,
    range_: str | None = RANGE,
    rounding: str | None = ROUNDING,
    equalize: bool | None = EQUALIZE,
    bias_correction: bool | None = BIAS,
    image_range: str | None = IMAGES,
    limit: int | None = LIMIT,
    statistics: Path | None = USE,
    save_statistics: Path | None = KEEP,
    densify: bool = DENSIFY,
    strict: bool = STRICT,
    verify: bool = VERIFY,
    max_error: float | None = ERROR,
    runtime: str | None = RUNTIME,
    overwrite: bool = OVERWRITE,
    as_json: bool = JSON,
    every: bool = EVERY,
) -> None:
    """Quantize a model after training, selectively, and verify what was written.

    Without --recipe: dynamic-int8, which needs no data.
    """
    chosen = Recipe.load(recipe)
    said = {"range": range_, "rounding": rounding, "bias_correction": bias_correction}
    chosen = chosen.with_settings(**{k: v for k, v in said.items() if v is not None})
    if equalize is not None:
        chosen = replace(chosen, equalize=equalize)
    if io is not None:
        if io not in IO_TYPES:
            raise InputError("bad --io", expected=", ".join(IO_TYPES), got=io)
        chosen = replace(chosen, inputs=io, outputs=io)
    run(
        model, output, chosen, data, save_statistics=save_statistics, as_json=as_json, every=every, skip=skip, only=only,
        statistics=statistics, densify=densify, strict=strict, verified=verify, max_error=max_error, overwrite=overwrite,
        limit=limit, image_range=image_range, runtime=runtime,
    )  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("quantize")(quantize)


__all__ = ["quantize", "register", "run"]
