"""Model formats behind one door: `load` opens whatever the user has as the model that paring works on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from paring.errors import InputError
from paring.formats.tflite.model import TfliteModel

SUFFIXES = (".tflite", ".keras", ".h5", ".hdf5")


def load(source: str | os.PathLike[str] | bytes | Any) -> TfliteModel:
    """Opens a model.

    Args:
      source: A `.tflite` path or its bytes; a `.keras` or `.h5` file, a SavedModel folder or a live Keras model, which are
        converted to float .tflite first (needs the extra `tf`).

    Raises:
      InputError: The source is no model, or a broken one.

    >>> from paring.demo import model_path
    >>> load(model_path()).kind
    'tflite'
    """
    if isinstance(source, TfliteModel):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return TfliteModel.parse(memoryview(source))
    if isinstance(source, (str, os.PathLike)):
        check_there(source)
        path = Path(source)
        if path.is_file() and path.suffix not in SUFFIXES[1:]:
            return TfliteModel.open(path)
    return _converted(source)


def check_there(source: Any) -> None:
    """Says that a path leads nowhere, before anything else about it is judged.

    Raises:
      InputError: There is no such file or folder.
    """
    if isinstance(source, (str, os.PathLike)) and not Path(source).exists():
        raise InputError("no such model", where=str(source))


def _converted(source: Any) -> TfliteModel:
    from paring.formats.convert import to_tflite

    folder = tempfile.TemporaryDirectory(prefix="paring-")
    out = Path(folder.name) / "converted.tflite"
    try:
        notes = to_tflite(source, out)
    except BaseException:
        folder.cleanup()
        raise
    model = TfliteModel.open(out)
    model.path = str(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
    model.notes = tuple(notes or ())
    model.folder = folder  # the mapped file lives as long as the model
    return model
