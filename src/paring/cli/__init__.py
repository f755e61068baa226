"""The command line: one file per command, each thin over the Python API."""

from __future__ import annotations

import sys

import typer

from paring.errors import ParingError

app = typer.Typer(
    name="paring",
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
    """Entry point: 0 done, 1 a bound was missed, 2 bad input or usage."""
    from paring.cli import demo, inspect, optimize, quantize, recipes

    for command in (quantize, optimize, inspect, recipes, demo):
        command.register(app)
    try:
        app()
    except ParingError as error:
        print(f"paring: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("paring: interrupted, nothing was written", file=sys.stderr)
        sys.exit(130)


__all__ = ["app", "main"]
