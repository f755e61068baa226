"""The HTML page: one file, made from the data of a results.json, that opens offline and asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from paring.errors import InputError
from paring.report import figures
from paring.report.algorithms import algorithms_section, spread
from paring.report.debug import debug_section
from paring.report.terminal import size
from paring.report.tune import tune_section

SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "comparison": ("debug.html", debug_section),
    "tuning": ("tune.html", tune_section),
    "algorithms": ("algorithms.html", algorithms_section),
}
"""What a results.json may hold: its key, the template, and what makes the data ready for it. A section is one row."""

_SCRIPTS = ("page.js", "debug.js")
_STYLE = "page.css"
_FOR_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}


def render(results: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
      results: The data of a results.json: `paring`, `command`, `environment`, and one of `comparison`
        (`measure.result.Comparison` as data), `tuning` (`measure.result.Tuning`) and `algorithms`
        (`measure.result.AlgorithmBench`); floats that are not finite as None.

    Raises:
      InputError: There is nothing in it that a page can show.

    >>> render({"paring": "1.0"})
    Traceback (most recent call last):
    ...
    paring.errors.InputError: cannot make a page: expected comparison or tuning or algorithms in the results, got paring.
    """
    results = figures.clean(results)
    found = [(template, make(results[key])) for key, (template, make) in SECTIONS.items() if results.get(key)]
    if not found:
        expected = f"{' or '.join(SECTIONS)} in the results"
        raise InputError("cannot make a page", expected=expected, got=", ".join(results) or "none")
    style, script = _asset(_STYLE), "\n".join(map(_asset, _SCRIPTS))
    data: dict[str, Any] = {}
    for _, section in found:
        data |= section.pop("data")
    return _environment().get_template("page.html").render(
        sections=found,
        title=found[0][1]["title"],
        version=str(results.get("paring", "")),
        command=str(results.get("command", "")),
        environment={k: _said(v) for k, v in (results.get("environment") or {}).items()},
        style=Markup(style),
        script=Markup(script),
        policy=(
            "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
            f"style-src {_hash(style)}; script-src {_hash(script)}"
        ),
        # No character that means something to HTML is left; JSON's own escapes say the same.
        data=Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_FOR_SCRIPT)),
    )  # fmt: skip


def write_page(path: str | Path, results: Mapping[str, Any]) -> None:
    """Writes the page, whole or not at all.

    Args:
      path: The file to write; one that exists is replaced.
      results: As in `render`.

    Raises:
      InputError: The results hold nothing to show, or the file cannot be written.
    """
    target = Path(path)
    text = render(results)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, target)
    except OSError as error:
        raise InputError("cannot write the page", where=str(target), got=error.strerror or str(error)) from error
    finally:
        part.unlink(missing_ok=True)


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _hash(text: str) -> str:
    """How a content security policy names the only inline text it lets in."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return resources.files("paring.report").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("paring.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        decibel=figures.decibel,
        share=figures.share,
        plain=figures.plain,
        key=figures.key,
        band=figures.band,
        size=size,
        spread=spread,
    )
    return made


__all__ = ["SECTIONS", "render", "write_page"]
