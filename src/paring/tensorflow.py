"""Paring's TensorFlow operators: after `import paring.tensorflow`, SavedModels written for the native runtime load and run.

They multiply with int8, int4 and sparse weights as these are stored. Whoever has no paring can load the library by itself:
`tf.load_op_library` with the file that `library_path` names, which needs nothing but TensorFlow 2.16 or later.
"""

from __future__ import annotations

import ctypes
from typing import Any

from paring.errors import UnsupportedError
from paring.runtime.native import NativeError
from paring.runtime.native import operators_path as library_path

try:
    import tensorflow as tf
    from tensorflow.python.framework import op_def_registry
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "tensorflow":
        raise
    raise UnsupportedError(
        "cannot register the TensorFlow operators",
        expected="TensorFlow",
        got="none",
        todo="`pip install tensorflow-cpu`, or `tensorflow`, 2.16 or later",
    ) from error

__all__ = ["library_path"]

_NAMES = tuple(f"ImportParingTensorflow>{name}" for name in ("MatMul", "Conv2D", "PackedMatMul", "PackedConv2D"))


def _missing() -> list[str]:
    return [name for name in _NAMES if op_def_registry.get(name) is None]


def _load() -> None:
    """Registers the operators, unless something has: a second copy of the library would register every kernel twice."""
    if not _missing():
        return
    path = library_path()
    try:
        tf.load_op_library(path)
    except (tf.errors.OpError, RuntimeError) as error:
        raise _failure(path, str(error)) from error
    if _missing():
        tell = getattr(ctypes.CDLL(path), "paring_tensorflow_failure", None)
        if tell is None:
            raise _failure(path, "one without the operators")
        tell.restype = ctypes.c_char_p
        raise _failure(path, tell().decode())


def _failure(path: str, why: str) -> NativeError:
    return NativeError(
        "cannot register the TensorFlow operators",
        where=path,
        expected=f"a library of operators for TensorFlow {tf.__version__}",
        got=why,
        todo="Use TensorFlow 2.16 or later, and install paring again",
    )


def _refuse(operator: Any, *_: Any) -> None:
    """Stands in for the gradient: integers have none, and activations are not worth one without their weights."""
    raise UnsupportedError(
        "cannot differentiate",
        where=f"{operator.type} {getattr(operator, 'name', '')}".strip(),
        expected="a model that is only run",
        got="a gradient through quantized weights",
        todo="Train the float model, with `paring.attach` to train it quantized, and write the folder again",
    )


_load()
for _name in _NAMES:
    try:
        tf.RegisterGradient(_name)(_refuse)
    except KeyError:  # this module was loaded before, under another name or again
        break
