"""`paring sparsify MODEL -o OUT --target T --sparsity S`: zeros where they pay, after training."""

from __future__ import annotations

from pathlib import Path

import typer

from paring.cli import quantize as common
from paring.formats.saved_model.model import writes_folder
from paring.sparsify import TARGET, recipe


def sparsify(
    model: str = common.MODEL,
    output: Path = common.OUT,
    target: str = typer.Option(
        TARGET,
        "--target",
        "-t",
        help="The runtime that has to gain: which layers are pruned, and how. Empty: all layers.",
    ),
    sparsity: float | None = typer.Option(
        None, "--sparsity", "-s", help="Share of zeros over all pruned layers, above 0, below 1."
    ),
    pattern: str = typer.Option(
        "", "--pattern", help="Instead of the target's own: unstructured, 4x1, 8x1, 16x1, 4x4, 8x4, 16x4, 2:4, ..."
    ),
    data: str | None = common.DATA,
    skip: list[str] = common.SKIP,
    only: list[str] = common.ONLY,
    min_size: int = common.MIN_SIZE,
    storage: str = typer.Option("dense", "--storage", help="dense, or sparse where stock runtimes read it right."),
    allocation: str = typer.Option(
        "",
        "--allocation",
        help="uniform: the same share everywhere; error: where it costs least (default with --data).",
    ),
    image_range: str | None = common.IMAGES,
    limit: int | None = common.LIMIT,
    verify: bool = common.VERIFY,
    max_error: float | None = common.ERROR,
    runtime: str | None = common.RUNTIME,
    overwrite: bool = common.OVERWRITE,
    as_json: bool = common.JSON,
    every: bool = common.EVERY,
) -> None:
    """Prune a model once, after training, in the pattern that a target gains from, and verify what was written."""
    given = data is not None and not writes_folder(model, output)
    chosen = recipe(target, sparsity, pattern, storage, allocation, min_size, given=given)
    common.run(
        model, output, chosen, data, as_json=as_json, every=every, skip=skip, only=only, verified=verify,
        max_error=max_error, overwrite=overwrite, limit=limit, image_range=image_range, runtime=runtime,
    )  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("sparsify")(sparsify)
