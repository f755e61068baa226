"""SavedModel to LiteRT with TensorFlow's own converter, float32, builtin operators only."""

from __future__ import annotations

import re
from pathlib import Path

from paring.errors import InputError, UnsupportedError
from paring.formats.saved_model.scope import NATIVE


class TensorListError(UnsupportedError):
    """A loop over a dynamic batch keeps its state in tensor lists; a static batch makes it convertible."""


def convert(folder: Path, name: str) -> bytes:
    """Converts every signature of a SavedModel; a dynamic batch stays dynamic.

    Args:
      folder: The SavedModel.
      name: What errors call the model.

    Returns:
      The `.tflite` file.

    Raises:
      TensorListError: A recurrent loop over a dynamic batch.
      UnsupportedError: Operators that LiteRT lacks; they are named.
      InputError: The folder is broken.
    """
    import tensorflow as tf

    try:
        converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
    except Exception as error:
        if NATIVE in str(error):
            raise UnsupportedError(
                "cannot convert to LiteRT", where=name, expected="TensorFlow's operators", got="paring's own",
                todo="Take the float model, or one written with --runtime portable",
            ) from error  # fmt: skip
        raise InputError(
            "cannot load the SavedModel",
            where=name,
            expected="saved_model.pb with a `serve` graph, and its variables",
            got=first_line(str(error)),
            todo="Export it again",
        ) from error
    try:
        return bytes(converter.convert())
    except Exception as error:
        raise explain(str(error), name) from error


def explain(text: str, name: str) -> InputError:
    """Turns the converter's message into one of ours, naming the operators at fault.

    >>> print(explain("<unknown>:0: error: 'tf.Svd' op is neither a custom op nor a flex op", "m.keras"))
    cannot convert to LiteRT for m.keras: expected builtin operators, got Svd (TensorFlow only; it would need Flex). \
Replace the operator in the model, or optimize the SavedModel itself.
    """
    lists = sorted(set(re.findall(r"'tf\.(TensorList\w+)'", text)))
    flex = sorted(set(re.findall(r"'tf\.(\w+)' op is neither a custom op nor a flex op", text)))
    if lists and not flex:
        return TensorListError(
            "cannot convert to LiteRT",
            where=name,
            expected="recurrent loops with a static batch",
            got=f"a dynamic batch (FlexTensorList: {', '.join(lists)})",
            todo="Export the model with batch size 1: model.export(folder, input_signature=[keras.InputSpec("
            "shape=(1, ...), dtype=...)]), or give paring the .keras file, which it converts so",
        )
    if flex:
        return UnsupportedError(
            "cannot convert to LiteRT",
            where=name,
            expected="builtin operators",
            got=f"{', '.join(flex)} (TensorFlow only; it would need Flex)",
            todo="Replace the operator in the model, or optimize the SavedModel itself",
        )
    return InputError(
        "cannot convert to LiteRT", where=name, got=first_line(text), todo="Check the model in TensorFlow itself"
    )


def first_line(text: str) -> str:
    """The first line of a converter message that says something, without its `loc(...)` chain.

    >>> first_line('<unknown>:0: error: loc(fused["Svd:", "f@g"]): operator failed\\nmore')
    'operator failed'
    """
    for line in text.splitlines():
        line = re.sub(r"^.*?\berror: ", "", line.strip())
        line = re.sub(r"^loc\(.*\)\): |^loc\(.*\): ", "", line)
        if line:
            return line[:300]
    return "no message"
