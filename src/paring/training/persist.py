"""load_model: a `.keras` file that was saved in the middle of training, attached again."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from paring.errors import InputError
from paring.training.attaching import attach
from paring.training.state import ASSET


def load_model(
    path: str | os.PathLike[str],
    custom_objects: Mapping[str, Any] | None = None,
    *,
    compile: bool = True,
    safe_mode: bool = True,
) -> Any:
    """Loads a `.keras` file and puts its recipe to work again: training goes on exactly where it was.

    Args:
      path: A file that `model.save` wrote behind `paring.attach`.
      custom_objects: Classes and functions of one's own by name, as `keras.models.load_model` takes them.
      compile: Also bring back optimizer, loss and metrics.
      safe_mode: Refuse Python code stored in the file.

    Raises:
      InputError: The file is none of these, or its model is another than it was saved with.
    """
    settings = _settings(Path(path))
    model = keras.models.load_model(path, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode)
    attach(
        model, settings["recipe"], steps_per_epoch=settings["steps_per_epoch"], epochs=settings["epochs"],
        momentum=settings["momentum"], paths=settings["paths"],
    )  # fmt: skip
    try:
        model.load_weights(path)
    except ValueError as error:
        raise InputError(
            "cannot load what the recipe trained",
            where=str(path),
            expected="the model that was saved",
            got=str(error)[:300],
        ) from error
    return model


def _settings(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if Path(n).name == ASSET), None)
            found = json.loads(archive.read(name)) if name is not None else None
    except (OSError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise InputError("cannot load the model", where=str(path), expected="a .keras file", got=str(error)) from error
    if not isinstance(found, dict) or found.get("version") != 1:
        raise InputError(
            "no recipe is in the file", where=str(path), expected="a model that was saved behind paring.attach",
            todo="Load it with keras.models.load_model, and call paring.attach",
        )  # fmt: skip
    return found
