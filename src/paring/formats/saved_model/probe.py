"""Sees inside a SavedModel: a copy whose layers hand what they read and give to Python, loaded and run.

Behind a layer stands PyFunc, in function bodies, branches and loops, so that every execution is seen; variables are linked,
not copied. In the optimized model a second copy of each layer, all that storing its weights added included, reads what the
layer read in the float model: its own error is that of the very arithmetic that was written.

So that the n-th execution in one model is the n-th in the other, loops take one turn after the other and calls follow each
other in the order of the float model.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from paring.formats.saved_model.model import FINGERPRINT, PROTO, SavedModel
from paring.formats.saved_model.scope import Scope, called, input_type, output_shape, result_type, scopes
from paring.formats.saved_model.session import Session

_COPY = re.compile(r"(.*)_copy\d+$")
_LOOPS = ("While", "StatelessWhile", "Enter", "RefEnter")


@dataclass(frozen=True)
class Point:
    """A layer that is looked at, as the float model has it.

    Attributes:
      scope: Name of the function.
      node: Name of the operator.
      inputs: Its inputs that are no weights.
    """

    scope: str
    node: str
    inputs: tuple[int, ...]


class Probe:
    """A model that is looked into; for the process that runs it."""

    def __init__(self, folder: Path, points: Sequence[Point], exact: Probe | None = None) -> None:
        """Loads the model.

        Args:
          folder: The SavedModel.
          points: Layers.
          exact: The float model's probe with the same points, where the folder is what was made of it; it is run on a sample
            first.

        Raises:
          InputError: The folder is broken.
        """
        import tensorflow as tf

        self.points, self.exact = tuple(points), exact
        self.model = SavedModel.open(folder)
        self.wanted: frozenset[int] = frozenset()
        self.given: dict[tuple[int, int], list[np.ndarray]] = {}
        self.results: dict[int, list[np.ndarray]] = {}
        self.alone: dict[int, list[np.ndarray]] = {}
        self.sizes: list[int] = []
        self._turns: dict[tuple[int, int], int] = {}
        self._functions = tf.Graph()  # Python functions live as long as the graph that names them
        changed = self.model.changed()
        _Writer(self, scopes(changed.meta.graph_def)).write()
        self._folder = tempfile.TemporaryDirectory(prefix="paring-")
        copy = Path(self._folder.name) / folder.resolve().name
        copy.mkdir()
        for entry in folder.iterdir():
            if entry.name not in (PROTO, FINGERPRINT):
                os.symlink(entry.resolve(), copy / entry.name)
        (copy / PROTO).write_bytes(changed.proto.SerializeToString())
        self._session = Session(copy)
        self._sessions: dict[str, Session] = {}

    def run(self, signature: str, arrays: list[np.ndarray], wanted: Iterable[int]) -> list[np.ndarray]:
        """Runs one sample -> the outputs; what the `wanted` points saw is there until the next one.

        `sizes` holds, for every point, the bytes that it saw.
        """
        self.wanted = frozenset(wanted)
        self.given, self._turns = {}, {}
        self.results = {number: [] for number in self.wanted}
        self.alone = {number: [] for number in self.wanted}
        self.sizes = [0] * len(self.points)
        if signature not in self._sessions:
            self._sessions[signature] = self._session.enter(signature)
        return self._sessions[signature].run(arrays)

    def read(self, point: int) -> list[np.ndarray]:
        """What a point read as its first input, execution by execution."""
        return [_plain(value) for value in self.given.get((point, self.points[point].inputs[0]), [])]

    # -- what PyFunc calls -----------------------------------------------------------------------------------------

    def token(self, function: Callable[..., np.ndarray], types: Sequence[int]) -> Any:
        """What a PyFunc node calls this function, which takes values of these types and gives the first one's."""
        import tensorflow as tf

        with self._functions.as_default():
            holders = [tf.compat.v1.placeholder(tf.as_dtype(number)) for number in types]
            return tf.numpy_function(function, holders, holders[0].dtype).op.node_def.attr["token"]

    def reads(self, point: int, index: int) -> Callable[[np.ndarray], np.ndarray]:
        """Sees an input of a layer."""

        def see(value: np.ndarray) -> np.ndarray:
            self.sizes[point] += value.nbytes
            if point in self.wanted:
                self.given.setdefault((point, index), []).append(np.array(value))
            return value

        return see

    def gives(self, point: int) -> Callable[[np.ndarray], np.ndarray]:
        """Sees a layer's result."""

        def see(value: np.ndarray) -> np.ndarray:
            self.sizes[point] += value.nbytes
            if point in self.wanted:
                self.results[point].append(_plain(value))
            return value

        return see

    def gives_both(self, point: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Sees a layer's result in the model, and alone."""

        def see(value: np.ndarray, alone: np.ndarray) -> np.ndarray:
            if point in self.wanted:
                self.results[point].append(_plain(value))
                if self.exact is not None and len(self.alone[point]) < len(self.exact.results[point]):
                    self.alone[point].append(_plain(alone))
            return value

        return see

    def feeds(self, point: int, index: int) -> Callable[[np.ndarray], np.ndarray]:
        """Gives what the layer read in the float model in the same execution, once there was one."""

        def give(value: np.ndarray) -> np.ndarray:
            turn = self._turns.get((point, index), 0)
            self._turns[point, index] = turn + 1
            known = self.exact.given.get((point, index), []) if self.exact is not None else []
            return known[turn] if turn < len(known) else value

        return give


def homes(exact: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Of each function of the float model those that became of it: itself, and copies for variables with other fates.

    >>> homes(["body", "a_copy1"], ["body", "body_copy2", "a_copy1"])
    {'body': ['body', 'body_copy2'], 'a_copy1': ['a_copy1']}
    """
    found: dict[str, list[str]] = {name: [] for name in exact}
    for name in names:
        copy = _COPY.fullmatch(name)
        origin = name if name in found else copy[1] if copy is not None else ""
        if origin in found:
            found[origin].append(name)
    return found


def island(scope: Scope, exact: Scope, node: Any) -> list[Any]:
    """An operator of an optimized function with all that storing its weights put before it, the operator last."""
    found: dict[str, Any] = {}
    stack = [(node, False)]
    while stack:
        at, done = stack.pop()
        if done:
            found[at.name] = at
        elif at.name not in found:
            stack.append((at, True))
            makers = (scope.maker(value)[0] for value in scope.inputs(at))
            stack += [(m, False) for m in makers if m is not None and m.name not in exact.by_name]
    return list(found.values())


def _plain(value: np.ndarray) -> np.ndarray:
    """A copy, of a type that NumPy itself has."""
    return np.array(value, np.float32) if value.dtype.kind == "V" or "float" in value.dtype.name else np.array(value)


class _Writer:
    """Edits a copy of the model."""

    def __init__(self, probe: Probe, bodies: dict[str, Scope]) -> None:
        self.probe, self.bodies = probe, bodies
        float_model = probe.model if probe.exact is None else probe.exact.model
        self.exact = scopes(float_model.meta.graph_def)
        self.homes = homes(self.exact, bodies)

    def write(self) -> None:
        for scope in self.bodies.values():
            for node in scope.nodes:
                if node.op in _LOOPS:
                    node.attr["parallel_iterations"].i = 1
                _uncompiled(node.attr)
            if scope.function is not None:
                _uncompiled(scope.function.attr)
        self._chain()
        found = [
            (number, point, scope, island(scope, self.exact[point.scope], scope.by_name[point.node]))
            for number, point in enumerate(self.probe.points)
            for scope in (self.bodies[name] for name in self.homes[point.scope])
            if point.node in scope.by_name
        ]  # before anything is put in
        for number, point, scope, nodes in found:
            if self.probe.exact is None:
                self._watch(number, point, scope, nodes[-1])
            else:
                self._double(number, point, scope, nodes)

    def _chain(self) -> None:
        """Lets calls of functions that are looked into follow each other, in the float model's order."""
        inside = self._holding()
        for name, exact in self.exact.items():
            if not name:
                continue  # signatures do not run each other, and TensorFlow 1 calls no functions
            calls = [n.name for n in exact.ordered() if any(f in inside for f, _ in called(n, self.exact))]
            for scope in (self.bodies[home] for home in self.homes[name]):
                here = [call for call in calls if call in scope.by_name]
                for before, after in pairwise(here):
                    if f"^{before}" not in scope.by_name[after].input:
                        scope.by_name[after].input.append(f"^{before}")

    def _holding(self) -> set[str]:
        """Functions of the float model that have a point in them, or call one that has."""
        found = {point.scope for point in self.probe.points}
        while True:
            more = {
                name
                for name, scope in self.exact.items()
                if name not in found
                and any(f in found for node in scope.nodes for f, _ in called(node, self.exact))
            }  # fmt: skip
            if not more:
                return found
            found |= more

    def _watch(self, number: int, point: Point, scope: Scope, node: Any) -> None:
        """The float model: what the layer reads, and what it gives."""
        for index in point.inputs:
            kind = input_type(node, index)
            seen = self._python(
                scope, f"{node.name}/read{index}", self.probe.reads(number, index), [node.input[index]], [kind]
            )
            scope.connect(node, index, self._shaped(scope, seen, node.input[index], kind))
        self._result(scope, node, self.probe.gives(number), [])

    def _double(self, number: int, point: Point, scope: Scope, nodes: list[Any]) -> None:
        """The optimized model: what the layer gives, there and alone."""
        inside = {node.name for node in nodes}
        exact = self.exact[point.scope]
        fed: dict[str, str] = {}
        for index in point.inputs:
            wanted = _named(exact, exact.by_name[point.node].input[index])
            places = [
                (node, place, value)
                for node in nodes
                for place, value in enumerate(scope.inputs(node))
                if _named(scope, value) == wanted
            ]
            if not places:
                self._result(scope, nodes[-1], self.probe.gives(number), [])  # it reads something else here
                return
            node, place, value = places[0]
            kind = input_type(node, place)
            name = f"{point.node}/fed{index}"
            made = self._python(scope, name, self.probe.feeds(number, index), [value], [kind])
            fed[scope.canonical(value)] = self._shaped(scope, made, value, kind)
        made_of: dict[str, Any] = {}
        for node in nodes:
            copy = scope.copy(node, f"{node.name}/alone")
            made_of[node.name] = copy
            for place, value in enumerate(scope.inputs(node)):
                maker, result = scope.maker(value)
                if value in fed:
                    scope.connect(copy, place, fed[value])
                elif maker is not None and maker.name in inside:
                    scope.connect(copy, place, scope.value(made_of[maker.name], result))
        self._result(scope, nodes[-1], self.probe.gives_both(number), [scope.value(made_of[nodes[-1].name])])

    def _result(self, scope: Scope, node: Any, function: Callable[..., np.ndarray], more: list[str]) -> None:
        """Puts Python behind a node, under the node's name."""
        kind = result_type(node, 0)
        shape = output_shape(node, 0)
        name, take = scope.follow(node, "probed")
        seen = self._python(scope, f"{name}/seen", function, [scope.value(node), *more], [kind] * (1 + len(more)))
        take(self._again(scope, name, seen, kind, shape))

    def _python(self, scope: Scope, name: str, function: Any, inputs: list[str], types: list[int]) -> str:
        node = scope.add(name, "PyFunc", inputs)
        node.attr["token"].CopyFrom(self.probe.token(function, types))
        node.attr["Tin"].list.type.extend(types)
        node.attr["Tout"].list.type.append(types[0])
        return scope.value(node)

    def _shaped(self, scope: Scope, value: str, like: str, kind: int) -> str:
        """A value from Python with the shape that the file gives another."""
        maker, index = scope.maker(like)
        shape = output_shape(maker, index) if maker is not None else None
        return scope.value(self._again(scope, f"{value.split(':')[0]}/shaped", value, kind, shape))

    @staticmethod
    def _again(scope: Scope, name: str, value: str, kind: int, shape: Any) -> Any:
        """A node that gives what it gets, with a known shape where there is one: Python's results have none."""
        node = scope.add(name, "Identity" if shape is None else "EnsureShape", [value], T=kind)
        if shape is not None:
            node.attr["shape"].shape.CopyFrom(shape)
        return node


def _named(scope: Scope, value: str) -> tuple[str, int]:
    """What makes a value, and as which of its results; the value's own name where it is an argument."""
    node, index = scope.maker(value)
    return (value.split(":")[0], index) if node is None else (str(node.name), index)


def _uncompiled(attributes: Any) -> None:
    """XLA knows no Python."""
    if "_XlaMustCompile" in attributes:
        del attributes["_XlaMustCompile"]


__all__ = ["Point", "Probe", "homes", "island"]
