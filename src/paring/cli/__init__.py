"""The command line: one file per command, each thin over the Python API."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from paring.errors import ParingError


class _Group(TyperGroup):
    """Says that the user stopped the work; typer itself ends without a word, older ones with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            print("paring: interrupted, nothing was written", file=sys.stderr)
            raise typer.Exit(130) from stop


app = typer.Typer(
    name="paring",
    cls=_Group,
    help="Make TensorFlow, Keras and LiteRT models smaller and faster, keep them right, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        from paring import __version__

        typer.echo(f"paring {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Entry point: 0 done, 1 a bound was missed, 2 bad input or usage, 130 interrupted."""
    from paring.cli import (
        bench,
        bench_algorithms,
        cluster,
        debug,
        demo,
        inspect,
        optimize,
        quantize,
        recipes,
        sparsify,
        tune,
    )

    for command in (
        quantize,
        sparsify,
        cluster,
        optimize,
        inspect,
        debug,
        bench,
        bench_algorithms,
        tune,
        recipes,
        demo,
    ):
        command.register(app)
    try:
        app(prog_name="paring")
    except ParingError as error:
        print(error.detail, end="", file=sys.stderr)
        print(f"paring: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


__all__ = ["app", "main"]
