"""Figures of a results.json as the text that the page shows: short, aligned, and never by colour alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from paring.errors import ParingError
from paring.recipe import Recipe

BANDS = (40.0, 30.0, 20.0, 10.0)
"""Lower bounds, in dB, of the classes that a colour stands for, the best first; below the last is the worst class."""

NONE = "–"
EXACT = "exact"
LONGEST = 1000  # characters of a name; converters join the names of all they fused
_EXACT_COSINE = 1 - 1e-6


def clean(value: Any) -> Any:
    """Data as the page may hold it: printable text of bounded length, floats finite, None for not-a-number.

    Infinity stays: it says that two tensors are equal.

    >>> clean({"name": "a\\u202eb", "db": float("nan"), "shape": (1, 2)})
    {'name': 'a\ufffdb', 'db': None, 'shape': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, str):
        return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in value)
    return None if isinstance(value, float) and math.isnan(value) else value


def name(text: str) -> str:
    """A name as a whole, but of bounded length."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def snr(error: Mapping[str, Any] | None, key: str = "snr_db") -> float | None:
    """Signal to noise in dB; infinite where both tensors are equal, which JSON can only say as null."""
    if error is None:
        return None
    found = error[key]
    equal = found is None and error["cosine"] is not None and error["cosine"] >= _EXACT_COSINE
    return math.inf if equal else found


def band(db: float | None) -> int | None:
    """The class of a signal-to-noise ratio, 0 (best) to 4; None for none.

    >>> band(42.0), band(12.5), band(-3.0), band(None)
    (0, 3, 4, None)
    """
    return None if db is None else sum(db < bound for bound in BANDS)


def decibel(db: float | None) -> str:
    """A ratio in dB, without the unit.

    >>> decibel(-3.14), decibel(float("inf")), decibel(None)
    ('−3.1', 'exact', '–')
    """
    if db is None:
        return NONE
    return EXACT if db == math.inf else f"{db:.1f}".replace("-", "−")


def share(part: float | None) -> str:
    """A share in percent.

    >>> share(0.5), share(0.00123), share(0.0)
    ('50 %', '0.12 %', '0 %')
    """
    if part is None:
        return NONE
    percent = 100 * part
    text = f"{percent:.2f}".rstrip("0").rstrip(".")
    return "< 0.01 %" if text == "0" and percent > 0 else f"{text} %"


def plain(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits."""
    return NONE if value is None else f"{value:.{digits}g}".replace("-", "−")


def key(value: Any) -> str:
    """What a column of numbers is sorted by; empty for none."""
    if value is None or isinstance(value, str):
        return ""
    return "Infinity" if value == math.inf else "-Infinity" if value == -math.inf else f"{value:.7g}"


def seconds(value: float) -> str:
    """A span of time for people.

    >>> seconds(4.21), seconds(75)
    ('4.2 s', '1 min 15 s')
    """
    return f"{value:.1f} s" if value < 60 else f"{value // 60:.0f} min {value % 60:.0f} s"


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML; as JSON, which YAML reads too, where a newer version wrote what this one does not know."""
    try:
        return Recipe.load(recipe).to_yaml()
    except (ParingError, TypeError, AttributeError, ValueError):
        return json.dumps(recipe, indent=2)


def rule_texts(recipe: Mapping[str, Any]) -> list[str]:
    """Each rule of a recipe, as YAML."""
    rules = recipe.get("rules")
    texts = []
    for rule in rules if isinstance(rules, list) else []:
        text = recipe_text({"version": 1, "rules": [rule]})
        texts.append(text.partition("rules:\n")[2] or json.dumps(rule, indent=2))
    return texts


__all__ = [
    "BANDS", "EXACT", "NONE", "band", "clean", "decibel", "key", "name", "plain", "recipe_text", "rule_texts", "seconds",
    "share", "snr",
]  # fmt: skip
