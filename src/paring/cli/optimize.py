"""`paring optimize MODEL -o OUT --recipe FILE`: applies a recipe as it is written."""

from __future__ import annotations

from pathlib import Path

import typer

from paring.cli import quantize as common
from paring.recipe import Recipe


def optimize(
    model: str = common.MODEL,
    output: Path = common.OUT,
    recipe: str = common.RECIPE,
    data: str | None = common.DATA,
    skip: list[str] = common.SKIP,
    only: list[str] = common.ONLY,
    image_range: str | None = common.IMAGES,
    limit: int | None = common.LIMIT,
    statistics: Path | None = common.USE,
    strict: bool = common.STRICT,
    verify: bool = common.VERIFY,
    max_error: float | None = common.ERROR,
    overwrite: bool = common.OVERWRITE,
    as_json: bool = common.JSON,
    every: bool = common.EVERY,
) -> None:
    """Apply a recipe to a model, and verify what was written."""
    common.run(
        model, output, Recipe.load(recipe), data, as_json=as_json, every=every, skip=skip, only=only,
        statistics=statistics, strict=strict, verified=verify, max_error=max_error, overwrite=overwrite, limit=limit,
        image_range=image_range,
    )  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("optimize")(optimize)
