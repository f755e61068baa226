"""Runs a SavedModel in TensorFlow, as its users do: by a signature."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from paring.errors import InputError, UnsupportedError
from paring.formats.saved_model.litert import first_line
from paring.formats.saved_model.native import register

_FREE = ("Const", "Placeholder", "NoOp", "Identity", "IdentityN", "ReadVariableOp", "VarHandleOp", "_Arg", "_Retval")


def start() -> None:
    """Imports TensorFlow."""
    import tensorflow  # noqa: F401


class Session:
    """One signature of a SavedModel: `serving_default` or its first, unless one is named."""

    def __init__(self, folder: Path, signature: str = "", loaded: Any = None) -> None:
        """Loads the folder, unless it is `loaded` already.

        Raises:
          InputError: The folder is broken, or it has no such signature.
        """
        self.folder = folder
        self.model = _loaded(folder) if loaded is None else loaded
        keys = list(self.model.signatures)
        if not keys:
            todo = "Export it with one, as model.export(folder) of Keras does"
            raise InputError("cannot run the SavedModel", where=folder.name, expected="a signature", todo=todo)
        chosen = signature or ("serving_default" if "serving_default" in keys else keys[0])
        if chosen not in keys:
            expected = f"one of its signatures: {', '.join(sorted(keys))}"
            raise InputError("no such signature", where=folder.name, expected=expected, got=chosen)
        self.signature = self.model.signatures[chosen]
        specs = self.signature.structured_input_signature[1]
        self.specs = {name: specs[name] for name in sorted(specs)}
        self.outputs = sorted(self.signature.structured_outputs)
        self.inputs = list(self.specs)
        self._latest: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """Inputs and outputs, as `paring.runtime.Worker.describe` gives them.

        Raises:
          UnsupportedError: An input has a shape of unknown rank.
        """
        for name, spec in self.specs.items():
            if spec.shape.rank is None:
                raise UnsupportedError(
                    "cannot run the SavedModel",
                    where=f"{self.folder.name}, input {name}",
                    expected="a shape of known rank",
                )
        found = [
            (name, [-1 if d is None else int(d) for d in spec.shape], spec.dtype.name)
            for name, spec in self.specs.items()
        ]
        return {"inputs": found, "outputs": self.outputs}

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Runs one sample, inputs in the order of `describe`, and returns the outputs in that order."""
        import tensorflow as tf

        named = zip(self.specs.items(), arrays, strict=True)
        self._latest = {name: tf.constant(array, spec.dtype) for (name, spec), array in named}
        found = self.again()
        return [_plain(found[name].numpy()) for name in self.outputs]

    def enter(self, signature: str) -> Session:
        """Another signature of the same model in memory."""
        return Session(self.folder, signature, self.model)

    @property
    def again(self) -> Callable[[], Any]:
        """Runs the latest sample again; nothing is copied in or out."""
        return lambda: self.signature(**self._latest)

    def paths(self) -> dict[str, list[str]]:
        """The operators of the signature's graph, functions that it calls included."""
        graph = self.signature.graph.as_graph_def()
        functions = {function.signature.name: function.node_def for function in graph.library.function}
        return {"TensorFlow": [op for op in _operators(graph.node, functions) if op not in _FREE]}


def seal(folder: Path) -> None:
    """Writes the fingerprint of what a folder holds; a TensorFlow that knows none reads folders without one.

    For a child: TensorFlow ends the process where it does not like a graph. The fingerprint's `uuid` is random, which is no use
    in a file that the same input makes again: it is made of the checksums.
    """
    try:
        from tensorflow.core.protobuf.fingerprint_pb2 import FingerprintDef
        from tensorflow.python.saved_model.fingerprinting_utils import write_fingerprint
    except ImportError:
        return
    write_fingerprint(str(folder))
    file = folder / "fingerprint.pb"
    found = FingerprintDef.FromString(file.read_bytes())
    if found.uuid:
        found.uuid = str(UUID(int=found.saved_model_checksum << 64 | found.checkpoint_hash % 2**64, version=4).int)
        file.write_bytes(found.SerializeToString(deterministic=True))


def _loaded(folder: Path) -> Any:
    import tensorflow as tf

    register(folder)
    try:
        return tf.saved_model.load(str(folder))
    except Exception as error:
        try:
            return _Graph(folder)  # some of TensorFlow 1 load there only
        except Exception:
            raise InputError(
                "cannot load the SavedModel", where=folder.name, expected="saved_model.pb with a `serve` graph",
                got=first_line(str(error)), todo="Export it again",
            ) from error  # fmt: skip


class _Graph:
    """A SavedModel in a session of TensorFlow 1; `signatures` are called as those of `tf.saved_model.load`."""

    def __init__(self, folder: Path) -> None:
        import tensorflow as tf

        self.graph = tf.Graph()
        with self.graph.as_default():
            self.session = tf.compat.v1.Session(graph=self.graph)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that there is a newer loader
                meta = tf.compat.v1.saved_model.load(self.session, ["serve"], str(folder))
        found = {key: s for key, s in meta.signature_def.items() if not key.startswith("__saved_model")}
        self.signatures = {key: _GraphSignature(self, signature) for key, signature in found.items()}


class _GraphSignature:
    """One signature of a `_Graph`."""

    def __init__(self, model: _Graph, signature: Any) -> None:
        import tensorflow as tf

        self.graph, self._session = model.graph, model.session
        named = model.graph.get_tensor_by_name
        self._inputs = {name: named(info.name) for name, info in signature.inputs.items()}
        self.structured_outputs = {name: named(info.name) for name, info in signature.outputs.items()}
        specs = {name: tf.TensorSpec(t.shape, t.dtype, name) for name, t in self._inputs.items()}
        self.structured_input_signature = ((), specs)

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        import tensorflow as tf

        feed = {self._inputs[name]: value.numpy() for name, value in inputs.items()}
        found = self._session.run(self.structured_outputs, feed)
        return {name: tf.constant(value) for name, value in found.items()}


def _plain(value: Any) -> np.ndarray:
    """An output as an array of a type that NumPy itself has: text as bytes, bfloat16 as float32."""
    array = np.asarray(value)
    if array.dtype.kind == "O":
        return array.astype("S")
    return array.astype(np.float32) if array.dtype.kind == "V" or "float8" in array.dtype.name else array


def _operators(nodes: Any, functions: dict[str, Any], depth: int = 0) -> Iterator[str]:
    """What nodes do; a node that calls a function stands for what is in it, once."""
    for node in nodes:
        called = [value.func.name for value in node.attr.values() if value.WhichOneof("value") == "func"]
        inner = [name for name in called if name in functions]
        for name in inner if depth < 50 else ():
            yield from _operators(functions[name], functions, depth + 1)
        if not inner or not node.op.endswith("PartitionedCall"):
            yield node.op


__all__ = ["Session", "seal", "start"]
