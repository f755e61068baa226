"""`paring cluster MODEL -o OUT --clusters N`: few distinct weights, after training."""

from __future__ import annotations

from pathlib import Path

import typer

from paring.cli import quantize as common
from paring.cluster import recipe


def cluster(
    model: str = common.MODEL,
    output: Path = common.OUT,
    clusters: int = typer.Option(16, "--clusters", "-c", help="Distinct weights, 2 to 256."),
    granularity: str = typer.Option(
        "channel",
        "--granularity",
        help="Of every output channel, or of a whole tensor: smaller archives, larger errors.",
    ),
    data: str | None = common.DATA,
    skip: list[str] = common.SKIP,
    only: list[str] = common.ONLY,
    min_size: int = common.MIN_SIZE,
    image_range: str | None = common.IMAGES,
    limit: int | None = common.LIMIT,
    verify: bool = common.VERIFY,
    max_error: float | None = common.ERROR,
    runtime: str | None = common.RUNTIME,
    overwrite: bool = common.OVERWRITE,
    as_json: bool = common.JSON,
    every: bool = common.EVERY,
) -> None:
    """Give weights few distinct values once, after training, so that the file compresses, and verify what was written."""
    common.run(
        model, output, recipe(clusters, granularity, min_size), data, as_json=as_json, every=every, skip=skip, only=only,
        verified=verify, max_error=max_error, overwrite=overwrite, limit=limit, image_range=image_range, runtime=runtime,
    )  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("cluster")(cluster)
