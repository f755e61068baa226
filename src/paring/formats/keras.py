"""The only importer of Keras outside training: loads a model and exports it as a SavedModel.

Keras is imported when a function is called, never when this module is: `.keras` files are read in a child process
(`paring.formats.convert_child`), a live model in the process that owns it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from paring.errors import InputError, UnsupportedError


def load(path: Path) -> Any:
    """Loads a `.keras` or `.h5` file without its optimizer; never runs Python code stored in the file.

    Args:
      path: The file.

    Raises:
      UnsupportedError: The model holds Python lambdas, or classes that cannot be imported here.
      InputError: The file is broken or no Keras model.
    """
    import keras

    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        text = str(error)
        unknown = re.search(r"Could not locate (?:class|function) '([^']+)'", text)
        if unknown or "Unknown layer" in text:
            name = unknown.group(1) if unknown else reason(error)
            raise UnsupportedError(
                f"cannot load the custom class {name}",
                where=path.name,
                todo="Put its module on PYTHONPATH (registered with keras.saving.register_keras_serializable), "
                "or pass the live model from Python, or a SavedModel from model.export(folder)",
            ) from error
        if "safe_mode" in text or "enable_unsafe_deserialization" in text:
            raise UnsupportedError(
                "cannot load Python code stored in the model (a Lambda layer)",
                where=path.name,
                todo="If you trust the file, load it yourself with safe_mode=False and pass the live model, "
                "or a SavedModel from model.export(folder)",
            ) from error
        raise InputError(
            "cannot load the model",
            where=path.name,
            expected="a whole Keras model (architecture and weights)",
            got=reason(error),
            todo="Save it again with model.save()",
        ) from error


def start() -> None:
    """Imports Keras and its backend."""
    import keras  # noqa: F401


class Session:
    """A Keras model to run as its users do: `predict_on_batch`, compiled on its first run."""

    def __init__(self, path: Path) -> None:
        """Loads the file.

        Raises:
          UnsupportedError: The model does not say what its inputs are.
        """
        self.model = load(path)
        inputs, outputs = (getattr(self.model, side, None) for side in ("inputs", "outputs"))
        if not inputs or not outputs:
            raise UnsupportedError(
                "cannot run the model", where=path.name, expected="a Sequential or functional model, which has inputs",
                got=type(self.model).__name__, todo="Export it as a SavedModel: model.export(folder)",
            )  # fmt: skip
        # As the model was called: a list, or a dict whose order of names need not be that of the list.
        structure, order = getattr(self.model, "_inputs_struct", inputs), {id(t): n for n, t in enumerate(inputs)}
        self._keys = {order[id(t)]: key for key, t in structure.items()} if isinstance(structure, dict) else None
        self.names = [
            str(self._keys[n] if self._keys else getattr(tensor, "name", f"input{n}"))
            for n, tensor in enumerate(inputs)
        ]
        self.inputs = list(inputs)
        self.output_names = [str(name) for name in getattr(self.model, "output_names", None) or _names(outputs)]
        self._latest: Any = None

    def describe(self) -> dict[str, Any]:
        """Inputs and outputs, as `paring.runtime.Worker.describe` gives them."""
        shapes = [[-1 if d is None else int(d) for d in tensor.shape] for tensor in self.inputs]
        types = [str(tensor.dtype) for tensor in self.inputs]
        return {"inputs": list(zip(self.names, shapes, types, strict=True)), "outputs": self.output_names}

    def run(self, arrays: list[Any]) -> list[Any]:
        """Runs one sample, inputs in the order of `describe`, and returns the outputs in that order."""
        import keras
        import numpy as np

        if self._keys is not None:
            self._latest = {self._keys[n]: array for n, array in enumerate(arrays)}
        else:
            self._latest = arrays if len(arrays) > 1 else arrays[0]
        return [np.asarray(value) for value in keras.tree.flatten(self.again())]

    def again(self) -> Any:
        """Runs the latest sample again."""
        return self.model.predict_on_batch(self._latest)

    def paths(self) -> dict[str, list[str]]:
        """The layers, which the backend runs."""
        import keras

        layers = getattr(self.model, "_flatten_layers", None)
        found = layers(include_self=False) if layers is not None else self.model.layers
        return {f"Keras ({keras.backend.backend()})": [type(layer).__name__ for layer in found]}


def _names(outputs: Any) -> list[str]:
    return [str(getattr(tensor, "name", f"output{n}")) for n, tensor in enumerate(outputs)]


def reason(error: BaseException) -> str:
    """The innermost cause that Keras gives, as one short line.

    >>> reason(ValueError("Layer could not be deserialized. Exception encountered: bad shape\\nconfig={...}"))
    'bad shape'
    """
    text = str(error).rsplit("Exception encountered:", 1)[-1].strip()
    line = text.splitlines()[0].strip() if text else ""
    return (line or type(error).__name__)[:240]


def export_saved_model(model: Any, folder: Path, *, static_batch: bool = False) -> None:
    """Writes the forward pass of a Keras model as a SavedModel with the signature `serving_default`.

    Args:
      model: A built Keras 3 model.
      folder: Where to write.
      static_batch: Fix the batch to that of the model's inputs, or 1. Recurrent layers need it: with a dynamic
        batch their loop keeps its state in tensor lists that LiteRT has no operator for.

    Raises:
      InputError: The model was never called, or Keras cannot export it.
    """
    try:
        options = {"input_signature": _static_signature(model)} if static_batch else {}
        model.export(str(folder), verbose=False, **options)
    except Exception as error:
        raise InputError(
            "cannot export the model",
            where=str(getattr(model, "name", type(model).__name__)),
            expected="a built Keras model that can be traced",
            got=reason(error),
            todo="Call it once on real data, and try model.export(folder) on its own",
        ) from error


def _static_signature(model: Any) -> Any:
    import keras
    from keras.src.export.export_utils import get_input_signature

    inputs = [] if getattr(model, "inputs", None) is None else list(model.inputs)
    batch = next((tensor.shape[0] for tensor in inputs if len(tensor.shape) and tensor.shape[0]), 1)

    def fix(spec: Any) -> Any:
        shape = tuple(spec.shape)
        return keras.InputSpec(shape=(batch, *shape[1:]) if shape else shape, dtype=spec.dtype, name=spec.name)

    return keras.tree.map_structure(fix, get_input_signature(model))
