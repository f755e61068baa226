"""The child process of `paring.formats.convert`: TensorFlow lives and, if it must, dies here.

Usage: `python -m paring.formats.convert_child SRC OUT [SRC OUT ...]`. For each pair it writes `OUT`, or `OUT.json` with
the error; `OUT.json` also carries the notes of a success. The exit code is 0 unless the process itself broke.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from paring.errors import ParingError
from paring.formats import keras as keras_format
from paring.formats.saved_model import litert


def convert(source: Path, out: Path) -> list[str]:
    """Converts one model and returns notes for the user.

    Args:
      source: A `.keras` or `.h5` file or a SavedModel folder.
      out: Where the `.tflite` goes; a SavedModel may appear beside it for the time of the conversion.
    """
    if source.is_dir():
        out.write_bytes(litert.convert(source, source.name))
        return []
    model = keras_format.load(source)
    folder = out.with_name(out.name + ".saved_model")
    notes = []
    try:
        keras_format.export_saved_model(model, folder)
        try:
            data = litert.convert(folder, source.name)
        except litert.TensorListError:
            shutil.rmtree(folder)
            keras_format.export_saved_model(model, folder, static_batch=True)
            data = litert.convert(folder, source.name)
            notes.append(f"{source.name} has recurrent layers: its batch is fixed, because LiteRT loops need that")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    out.write_bytes(data)
    return notes


def main(arguments: list[str]) -> int:
    """Converts each SRC OUT pair; a failure of one does not stop the next."""
    for source, out in zip(arguments[::2], arguments[1::2], strict=True):
        try:
            result: dict[str, object] = {"notes": convert(Path(source), Path(out))}
        except ParingError as error:
            result = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:
            message = f"cannot convert to LiteRT for {Path(source).name}: got {type(error).__name__}: "
            result = {"error": "InputError", "message": message + keras_format.reason(error)}
        Path(out + ".json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
