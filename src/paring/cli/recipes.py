"""`paring recipes [NAME]`: lists the named recipes, or prints one."""

from __future__ import annotations

import typer
from rich.table import Table

from paring.recipe import ALIASES, Recipe, text_of
from paring.report import console


def recipes(
    name: str | None = typer.Argument(None, help="Print this recipe's file, to start one of your own."),
) -> None:
    """List the named recipes, or print one as YAML."""
    if name is not None:
        Recipe.named(name)
        print(text_of(ALIASES.get(name, name)), end="")
        return
    table = Table(pad_edge=False)
    for column in ("recipe", "data", "what it does"):
        table.add_column(column, no_wrap=column == "recipe")
    for known in Recipe.names():
        recipe = Recipe.named(known)
        table.add_row(known, "needed" if recipe.static else "helps" if recipe.needs_data else "no", recipe.description)
    console().print(table)
    print("The official quantizer's names work too: " + ", ".join(f"{old} = {new}" for old, new in ALIASES.items()))


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("recipes")(recipes)
