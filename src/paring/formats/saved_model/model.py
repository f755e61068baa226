"""A SavedModel folder: opened and checked without running it, edited in place, written back.

Nothing is traced or exported again: signatures, functions, assets and Python's view of the objects stay as they are.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as new
from functools import cached_property
from pathlib import Path
from typing import Any

from paring.errors import InputError, UnsupportedError
from paring.formats import SUFFIXES
from paring.formats.saved_model.bundle import OBJECTS, Bundle, train_size, write
from paring.formats.saved_model.flow import Flow
from paring.formats.saved_model.native import register
from paring.formats.saved_model.scope import NAMES, Scope, definition, scopes

PROTO, CHUNKED, FINGERPRINT = "saved_model.pb", "saved_model.cpb", "fingerprint.pb"
RECORD = Path("assets.extra") / "paring.json"
_VARIABLES = Path("variables") / "variables"


@dataclass(frozen=True)
class Port:
    """An input or output of a signature: `shape` holds -1 where it is dynamic and is None where its rank is unknown."""

    name: str
    shape: tuple[int, ...] | None
    dtype: str


@dataclass
class SavedModel:
    """A SavedModel in memory; variables stay in their files.

    Attributes:
      path: Its folder.
      proto: TensorFlow's `SavedModel` message, not to be changed but by `formats.saved_model`.
      bundle: The variables as the folder has them.
      values: For keys of the checkpoint that are written anew, what gives their values.
      sizes: Bytes of those.
      dropped: Keys that are not written.
      record: What made it, as JSON, kept in `assets.extra/paring.json`; empty for nothing.
    """

    path: Path
    proto: Any = new(repr=False)
    bundle: Bundle = new(repr=False)
    values: Mapping[str, Callable[[], Any]] = new(default_factory=dict, repr=False)
    sizes: Mapping[str, int] = new(default_factory=dict, repr=False)
    dropped: frozenset[str] = frozenset()
    record: str = ""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SavedModel:
        """Opens a folder.

        Raises:
          InputError: It is no SavedModel, or a broken one.
          UnsupportedError: It has operators that this TensorFlow lacks, is stored in chunks, or holds several graphs.
        """
        folder = Path(path)
        from paring.formats.convert import check_file, check_installed

        if not folder.is_dir():
            raise InputError("not a SavedModel", where=str(folder), expected="a folder with saved_model.pb")
        if (folder / CHUNKED).exists():
            raise UnsupportedError(
                "cannot read the SavedModel", where=str(folder), expected="one saved_model.pb",
                got="saved_model.cpb, a graph stored in chunks",
                todo="Export it without experimental_image_format",
            )  # fmt: skip
        check_file(folder)
        check_installed("tensorflow", purpose=f"reading {folder.name}")
        if not (folder / PROTO).is_file():
            raise UnsupportedError(
                "cannot read the SavedModel", where=str(folder), expected="saved_model.pb", got="saved_model.pbtxt"
            )
        _import_quietly()
        register(folder)
        from google.protobuf.message import DecodeError
        from tensorflow.core.protobuf import saved_model_pb2

        try:
            proto = saved_model_pb2.SavedModel.FromString((folder / PROTO).read_bytes())
        except DecodeError as error:
            raise InputError(
                "cannot read the SavedModel", where=str(folder / PROTO), expected="TensorFlow's SavedModel message",
                got=f"something else ({error})", todo="Is the copy complete? Export the model again",
            ) from error  # fmt: skip
        if len(proto.meta_graphs) != 1:
            tags = "; ".join(", ".join(sorted(meta.meta_info_def.tags)) for meta in proto.meta_graphs)
            raise UnsupportedError(
                "cannot read the SavedModel", where=str(folder), expected="one graph",
                got=f"{len(proto.meta_graphs)} ({tags})" if tags else "none", todo="Export it for serving only",
            )  # fmt: skip
        model = cls(folder, proto, Bundle(folder / _VARIABLES, str(folder)))
        model._check_operators()
        bodies = scopes(model.meta.graph_def)
        for scope in bodies.values():
            model._check_wires(scope)
        for key, signature in model.meta.signature_def.items():
            for info in (*signature.inputs.values(), *signature.outputs.values()):
                if info.name and not bodies[""].has(info.name):
                    raise InputError(
                        "cannot read the SavedModel", where=f"{folder}, signature {key}",
                        expected="values of its graph", got=f"no {info.name}", todo="Export the model again",
                    )  # fmt: skip
        return model

    @property
    def meta(self) -> Any:
        """The graph with all that belongs to it."""
        return self.proto.meta_graphs[0]

    @cached_property
    def flow(self) -> Flow:
        """Which operator reads which weight."""
        return Flow(self.meta, self.objects, self.bundle)

    @cached_property
    def objects(self) -> dict[str, int]:
        """By key of the checkpoint, the number of its object; empty in TensorFlow 1."""
        if OBJECTS not in self.bundle or not self.meta.object_graph_def.nodes:
            return {}
        found = self.object_graph()
        return {a.checkpoint_key: number for number, node in enumerate(found.nodes) for a in node.attributes}

    def object_graph(self) -> Any:
        """The object graph as the checkpoint has it (the graph has another, and both must agree)."""
        from tensorflow.core.protobuf import trackable_object_graph_pb2

        return trackable_object_graph_pb2.TrackableObjectGraph.FromString(self.bundle.read(OBJECTS))

    def signatures(self) -> dict[str, tuple[list[Port], list[Port]]]:
        """Inputs and outputs of each signature, by name in order."""
        found = {}
        for key, signature in sorted(self.meta.signature_def.items()):
            if not key.startswith("__saved_model"):
                found[key] = (_ports(signature.inputs), _ports(signature.outputs))
        return found

    @property
    def bytes(self) -> int:
        """Of all files in the folder."""
        return folder_bytes(self.path)

    def changed(self) -> SavedModel:
        """A copy whose message may be edited."""
        proto = type(self.proto)()
        proto.CopyFrom(self.proto)
        return replace(self, proto=proto)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model into a new folder, with whatever else its own has: assets, and files that other tools put there.

        Memory holds one shard of the variables at a time. The fingerprint is not written: see `session.seal`.

        Raises:
          InputError: There is such a folder or file.
        """
        target = Path(folder)
        if target.exists():
            raise InputError("the output exists", where=str(target), todo="Choose another name")
        shutil.copytree(self.path, target, ignore=self._left)
        (target / PROTO).write_bytes(self.proto.SerializeToString(deterministic=True))
        keys = {key: self.values.get(key) or _reading(self.bundle, key) for key in self.bundle.shapes}
        keys = {key: read for key, read in keys.items() if key not in self.dropped}
        if keys:
            sizes = {key: self.sizes.get(key, _size(self.bundle, key)) for key in keys}
            prefix = target / _VARIABLES
            prefix.parent.mkdir(exist_ok=True)
            write(prefix, keys, sizes)
        if self.record:
            (target / RECORD).parent.mkdir(exist_ok=True)
            (target / RECORD).write_text(self.record, encoding="utf-8")

    def _left(self, folder: str, names: Sequence[str]) -> set[str]:
        """What is not copied because it is written anew."""
        if Path(folder) == self.path:
            return {name for name in names if name in (PROTO, FINGERPRINT)}
        inside = Path(folder) == self.path / _VARIABLES.parent
        return {name for name in names if inside and name.startswith(f"{_VARIABLES.name}.")}

    def _check_operators(self) -> None:
        graph = self.meta.graph_def
        functions = {function.signature.name for function in graph.library.function}
        used = {node.op for node in graph.node}
        used |= {node.op for function in graph.library.function for node in function.node_def}
        unknown = sorted(op for op in used - functions if definition(op) is None)
        if unknown:
            raise UnsupportedError(
                "the SavedModel uses operators that are not registered", where=str(self.path),
                expected="operators of the TensorFlow that is installed", got=", ".join(unknown[:10]),
                todo="Import the library that brings them first (in Python), or use TensorFlow of the version that wrote it",
            )  # fmt: skip

    def _check_wires(self, scope: Scope) -> None:
        """Every node has the inputs that its operator takes, and they are there, as is what a function returns."""
        if gone := [value for value in scope.returned() if not scope.has(value)]:
            raise InputError(
                "cannot read the SavedModel", where=f"{self.path}, function {scope.name}",
                expected="what it returns", got=f"no {gone[0]}", todo="Export the model again",
            )  # fmt: skip
        for node in scope.nodes:
            taken = definition(node.op)
            least = sum(not (a.number_attr or a.type_list_attr) for a in taken.input_arg) if taken is not None else 0
            lost = [value for value in node.input if not scope.has(value)]
            if lost or len(scope.inputs(node)) < least:
                got = f"no {lost[0]}" if lost else f"{len(scope.inputs(node))} of {least}"
                raise InputError(
                    "cannot read the SavedModel", where=f"{self.path}, node {node.name} in {scope.name or 'the graph'}",
                    expected="the values that it reads", got=got, todo="Export the model again",
                )  # fmt: skip


def is_saved_model(source: Any) -> bool:
    """True for the path of a folder."""
    return isinstance(source, (str, os.PathLike)) and Path(source).is_dir()


def writes_folder(source: Any, output: Any) -> bool:
    """True where a SavedModel becomes a SavedModel: what is written has no suffix of a file.

    >>> writes_folder(".", "small"), writes_folder(".", "small.tflite"), writes_folder("m.keras", "small")
    (True, False, False)
    """
    return output is not None and is_saved_model(source) and Path(output).suffix not in SUFFIXES


def folder_bytes(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _import_quietly() -> None:
    """Imports TensorFlow without what it writes to standard error about the processor, which no setting of its own stops."""
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            import tensorflow  # noqa: F401
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _ports(entries: Mapping[str, Any]) -> list[Port]:
    found = []
    for name, info in sorted(entries.items()):
        dims = info.tensor_shape
        shape = None if dims.unknown_rank else tuple(int(d.size) for d in dims.dim)
        found.append(Port(name, shape, NAMES.get(info.dtype % 100, str(info.dtype))))  # 101 is a reference to 1
    return found


def _reading(bundle: Bundle, key: str) -> Callable[[], Any]:
    return lambda: bundle.read(key)


def _size(bundle: Bundle, key: str) -> int:
    count = train_size(bundle.dtypes[key])
    for d in bundle.shapes[key]:
        count *= d
    return count


__all__ = ["Port", "SavedModel", "folder_bytes", "is_saved_model", "writes_folder"]
