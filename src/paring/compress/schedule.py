"""When something happens in training, and how far along it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from paring.errors import InputError

UNITS = ("steps", "epochs", "fraction")
SCHEDULES = ("constant", "polynomial", "cosine")


def check_time(value: Any, unit: str, where: str) -> None:
    """Raises InputError unless `value` is a time in `unit`."""
    most = 1.0 if unit == "fraction" else np.inf
    if type(value) not in (int, float) or not 0 <= value <= most or (unit == "steps" and value != int(value)):
        expected = {"steps": "a whole number of steps", "epochs": "epochs, 0 or more", "fraction": "0 to 1"}[unit]
        raise InputError("bad setting", where=where, expected=expected, got=repr(value))


def in_steps(value: float, unit: str, steps_per_epoch: int | None, epochs: float | None, where: str) -> int:
    """A time in steps.

    Raises:
      InputError: The unit needs the length of an epoch or of training, and it is not known.

    >>> in_steps(0.5, "fraction", 100, 4, "sparsify.end")
    200
    """
    if unit == "steps" or value == 0:
        return int(value)
    missing = [] if steps_per_epoch else ["steps_per_epoch"]
    missing += ["epochs"] if unit == "fraction" and not epochs else []
    if missing:
        raise InputError(
            "cannot place a schedule", where=where, expected=f"{' and '.join(missing)}, to turn {unit} into steps",
            got=f"{value:g} {unit}", todo=f"Pass {' and '.join(f'{m}=...' for m in missing)} to `attach`",
        )  # fmt: skip
    assert steps_per_epoch
    return round(value * steps_per_epoch * (epochs or 1 if unit == "fraction" else 1))


def must_be_steps(unit: str, where: str) -> None:
    """Raises InputError where a schedule was not `resolved`."""
    if unit != "steps":
        todo = "Use what `resolved(steps_per_epoch, epochs)` gives"
        raise InputError("cannot follow a schedule", where=where, expected="steps", got=unit, todo=todo)


def progress(xp: Any, schedule: str, initial: float, final: float, done: Any) -> Any:
    """From `initial` to `final` as `done` goes from 0 to 1.

    `polynomial` is the cubic of Zhu and Gupta (To prune, or not to prune, 2017): fast while there is much to spare.

    Args:
      xp: `keras.ops`, or NumPy.
      schedule: One of `SCHEDULES`; `constant` is at its end from the first.
      initial: Where it starts.
      final: Where it ends.
      done: Scalar from 0 to 1.

    >>> [round(float(progress(np, name, 0.0, 0.8, 0.5)), 3) for name in SCHEDULES]
    [0.8, 0.7, 0.4]
    """
    if schedule == "polynomial":
        return final + (initial - final) * (1.0 - done) ** 3
    if schedule == "cosine":
        return final + (initial - final) * (1.0 + xp.cos(np.float32(np.pi) * done)) / 2
    return final + 0.0 * done
