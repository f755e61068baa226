"""One graph or function body of a SavedModel: its nodes, how they name each other's values, and how they are edited.

In a graph a value is called `node` or `node:1`; in a function body `node:output:0`, where `output` is the operator's own word,
or by an argument's name. Nodes are TensorFlow's own messages: what is edited here is what the file will hold.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

FLOAT32, FLOAT64, INT32, INT8, STRING, BFLOAT16, FLOAT16 = 1, 2, 3, 6, 7, 14, 19
NAMES = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 7: "string", 9: "int64", 10: "bool",
    14: "bfloat16", 17: "uint16", 19: "float16", 20: "resource", 21: "variant", 22: "uint32", 23: "uint64",
}  # fmt: skip
"""TensorFlow's numbers for types (its `DataType`) and what they are called."""
NATIVE = "ImportParingTensorflow>"
"""How the names of paring's own operators begin: where nobody has registered them, TensorFlow's error says what to import."""
CALLS = {
    "PartitionedCall": (("f",), 0), "StatefulPartitionedCall": (("f",), 0),
    "While": (("cond", "body"), 0), "StatelessWhile": (("cond", "body"), 0),
    "If": (("then_branch", "else_branch"), 1), "StatelessIf": (("then_branch", "else_branch"), 1),
    "Case": (("branches",), 1), "StatelessCase": (("branches",), 1),
}  # fmt: skip
"""Operators that call functions: the attributes that name them, and how many leading inputs these do not get."""


def field(node: Any, name: str) -> Any:
    """An attribute, an empty one where it is missing. Subscribing would create it, which the TF1 loader takes amiss."""
    if name in node.attr:
        return node.attr[name]
    from tensorflow.core.framework.attr_value_pb2 import AttrValue

    return AttrValue()


def definition(op: str) -> Any:
    """What TensorFlow knows of an operator, None where it is not registered."""
    from tensorflow.python.framework import op_def_registry

    return op_def_registry.get(op)


def result_type(node: Any, index: int) -> int:
    """TensorFlow's number of a result's type, 0 where nobody says."""
    known = definition(node.op)
    results = list(known.output_arg) if known is not None else []
    if not results:
        return 0
    result = results[min(index, len(results) - 1)]
    if result.type_list_attr:
        types = field(node, result.type_list_attr).list.type
        return int(types[index]) if index < len(types) else 0
    return int(result.type or field(node, result.type_attr).type)


def input_type(node: Any, index: int) -> int:
    """TensorFlow's number of the type that a node reads as one of its inputs."""
    for argument in definition(node.op).input_arg:
        types = field(node, argument.type_list_attr).list.type if argument.type_list_attr else []
        count = len(types) if argument.type_list_attr else 1
        if argument.number_attr:
            count = int(field(node, argument.number_attr).i)
        if index < count:
            return int(types[index] if types else argument.type or field(node, argument.type_attr).type)
        index -= count
    return 0


def output_shape(node: Any, index: int) -> Any:
    """The shape of a result as the file says it, as TensorFlow's message; None where it does not."""
    known = field(node, "_output_shapes").list.shape
    return known[index] if index < len(known) and not known[index].unknown_rank else None


def _results(op: str) -> list[str]:
    """What an operator calls its results. Ours are known without their library: who writes a model need not run it."""
    known = definition(op)
    if known is None:
        return ["product"] if op.startswith(NATIVE) else []
    return [result.name for result in known.output_arg]


def called(node: Any, functions: Any) -> list[tuple[str, int]]:
    """The functions that a node calls, each with the number of the node's inputs before those it gets."""
    if node.op in functions:  # TensorFlow 1: the operator is the function
        return [(node.op, 0)]
    names, skipped = CALLS.get(node.op, ((), 0))
    found = []
    for name in names:
        value = field(node, name)
        found += [f.name for f in value.list.func] if value.list.func else [value.func.name]
    return [(name, skipped) for name in found if name and name in functions]


class Scope:
    """A graph or a function body.

    Attributes:
      name: Of the function; empty for the graph.
      arguments: Names of the function's arguments.
      by_name: The nodes.
      users: For each value the nodes that read it, and as which of their inputs.
      waited: For each node, how many wait for it by a control edge.
    """

    def __init__(self, name: str, nodes: Any, function: Any = None) -> None:
        self.name, self.nodes, self.function = name, nodes, function
        self.arguments = [a.name for a in function.signature.input_arg] if function is not None else []
        self.by_name: dict[str, Any] = {node.name: node for node in nodes}
        self.users: dict[str, list[tuple[Any, int]]] = defaultdict(list)
        self.waited: Counter[str] = Counter()
        self._scales: dict[tuple[tuple[int, ...], bytes, bool], tuple[Any, str]] = {}
        for node in nodes:
            self._reads(node)

    def canonical(self, value: str) -> str:
        """One name for each value."""
        return value.removesuffix(":0") if self.function is None else value

    def value(self, node: Any, index: int = 0) -> str:
        """What the result of a node is called here."""
        if self.function is None:
            return node.name if not index else f"{node.name}:{index}"
        results = _results(node.op)
        if len(results) > 1:
            return f"{node.name}:{results[index]}:0"
        return f"{node.name}:{results[0] if results else 'output'}:{index}"

    def maker(self, value: str) -> tuple[Any, int]:
        """The node that makes a value, and as which of its results; (None, which argument) for an argument."""
        parts = value.split(":")
        if parts[0] in self.by_name and (self.function is None or len(parts) > 1):
            node = self.by_name[parts[0]]
            if len(parts) < 3:
                return node, int(parts[1]) if len(parts) > 1 else 0
            results = _results(node.op)
            return node, results.index(parts[1]) if len(results) > 1 else int(parts[2])
        return None, self.arguments.index(parts[0]) if parts[0] in self.arguments else -1

    def has(self, value: str) -> bool:
        """True where there is such a value, or such a node for a control edge."""
        if value.startswith("^"):
            return value[1:] in self.by_name or value[1:] in self.arguments
        try:
            node, index = self.maker(value)
        except ValueError:  # it is not named as values are
            return False
        return node is not None or index >= 0

    def holds(self, node: Any) -> bool:
        """True while a node is in the graph."""
        return self.by_name.get(node.name) is node

    def source(self, value: str) -> tuple[Any, int]:
        """As `maker`, looking through Identity."""
        node, index = self.maker(value)
        while node is not None and node.op == "Identity":
            node, index = self.maker(node.input[0])
        return node, index

    def constant(self, value: str) -> np.ndarray | None:
        """A constant's values, None where they are not known beforehand."""
        node, _ = self.source(value)
        if (
            node is not None
            and node.op == "Cast"
            and (field(node, "SrcT").type, field(node, "DstT").type) == (BFLOAT16, FLOAT32)
        ):
            short = self.constant(node.input[0])
            return None if short is None else short.astype(np.float32)
        if node is None or node.op != "Const":
            return None
        from tensorflow import make_ndarray

        try:
            return np.asarray(make_ndarray(node.attr["value"].tensor))
        except (TypeError, ValueError):  # shape and bytes do not fit
            return None

    def inputs(self, node: Any) -> list[str]:
        """A node's inputs, without control edges."""
        return [self.canonical(value) for value in node.input if not value.startswith("^")]

    def returned(self) -> list[str]:
        """What the function returns."""
        return list(self.function.ret.values()) if self.function is not None else []

    # -- editing ---------------------------------------------------------------------------------------------------

    def free(self, name: str) -> str:
        """A name like this one that no node has."""
        found, number = name, 0
        while found in self.by_name or found in self.arguments:
            number += 1
            found = f"{name}_{number}"
        return found

    def add(self, name: str, op: str, inputs: Sequence[str], **attributes: Any) -> Any:
        """A new node; attributes are types (numbers of `NAMES`) or constant arrays."""
        node = self.nodes.add(name=self.free(name), op=op, input=list(inputs))
        for key, value in attributes.items():
            if isinstance(value, int):
                node.attr[key].type = value
            else:
                node.attr[key].tensor.CopyFrom(_tensor(value))
        return self._known(node)

    def copy(self, original: Any, name: str) -> Any:
        """A node that does what another does."""
        node = self.nodes.add()
        node.CopyFrom(original)
        node.name = self.free(name)
        return self._known(node)

    def _known(self, node: Any) -> Any:
        self.by_name[node.name] = node
        self._reads(node)
        return node

    def constant_node(self, name: str, values: np.ndarray, after: Any) -> str:
        """A new constant, in the same loop frame as the node `after`; control edges keep it out of folding."""
        number = {"float32": FLOAT32, "int32": INT32}[values.dtype.name]
        return self.value(self.add(name, "Const", [f"^{after.name}"], dtype=number, value=values))

    def scale_node(self, name: str, values: np.ndarray, after: Any, *, cast: bool = True) -> str:
        """A new constant of scales, as `constant_node`, in as few bytes as hold them; in a function the same ones are one.

        Args:
          name: For the constant.
          values: float32.
          after: The node that it waits for. What several read waits for nothing: a function body is no loop frame.
          cast: As float32; else as the constant's own type.
        """
        values = np.ascontiguousarray(values, np.float32)
        key = values.shape, values.tobytes(), cast
        if key in self._scales:
            node, found = self._scales[key]
            if node.input:
                self._forgets(node)
                node.ClearField("input")
            return found
        if values.size < _SHORT or (values == values.flat[0]).all() or (values.view(np.uint32) & 0xFFFF).any():
            node = self.add(name, "Const", [f"^{after.name}"], dtype=FLOAT32, value=values)
            found = self.value(node)
        else:
            from tensorflow import bfloat16

            short = (values.view(np.uint32) >> 16).astype(np.uint16).view(bfloat16.as_numpy_dtype)
            node = self.add(f"{name}/short", "Const", [f"^{after.name}"], dtype=BFLOAT16, value=short)
            found = self.value(node)
            if cast:
                found = self.value(self.add(name, "Cast", [found], SrcT=BFLOAT16, DstT=FLOAT32))
        if self.function is not None:
            self._scales[key] = node, found
        return found

    def connect(self, node: Any, index: int, value: str) -> None:
        """Makes a node read another value."""
        old = self.canonical(node.input[index])
        self.users[old] = [use for use in self.users[old] if not (use[0] is node and use[1] == index)]
        node.input[index] = value
        self.users[self.canonical(value)].append((node, index))

    def _reads(self, node: Any) -> None:
        for index, value in enumerate(node.input):
            if value.startswith("^"):
                self.waited[value[1:]] += 1
            else:
                self.users[self.canonical(value)].append((node, index))

    def _forgets(self, node: Any) -> None:
        for value in node.input:
            if value.startswith("^"):
                self.waited[value[1:]] -= 1
            else:
                name = self.canonical(value)
                self.users[name] = [use for use in self.users[name] if use[0] is not node]

    def retyped(self, node: Any, op: str, inputs: Sequence[str], attributes: Mapping[str, Any]) -> Any:
        """Makes a node another operator with one result, for the readers that it had; attributes are TensorFlow's messages."""
        old = self.value(node)
        self._forgets(node)
        node.ClearField("input")
        node.input.extend(inputs)
        self._reads(node)
        node.op = op
        node.ClearField("attr")
        for key, value in attributes.items():
            node.attr[key].CopyFrom(value)
        made = self.value(node)
        if made != old:
            for reader, index in self.users.pop(self.canonical(old), []):
                reader.input[index] = made
                self.users[self.canonical(made)].append((reader, index))
            self.rename_returned(old, made)
        return node

    def dropped(self, nodes: Iterable[Any]) -> None:
        """Takes nodes with one result out, as far as nobody reads them or waits for them."""
        for node in nodes:
            value = self.value(node)
            if self.users[self.canonical(value)] or self.waited[node.name] or value in self.returned():
                continue
            self._forgets(node)
            del self.by_name[node.name]
            self.nodes.remove(node)

    def follow(self, node: Any, suffix: str) -> tuple[str, Any]:
        """Renames a node so that one behind it can take over its name.

        Signatures of TensorFlow 1 name values, so whoever makes the result must be called as before.

        Returns:
          The free name, and a function that is called with the new node: it gets all readers of the old one.
        """
        name, old = node.name, self.value(node)
        readers = self.users.pop(self.canonical(old), [])
        node.name = self.free(f"{name}/{suffix}")
        del self.by_name[name]
        self.by_name[node.name] = node

        def take(new: Any) -> None:
            made = self.value(new)
            if "_output_shapes" in node.attr:
                new.attr["_output_shapes"].CopyFrom(node.attr["_output_shapes"])
            for reader, index in readers:
                reader.input[index] = made
                self.users[self.canonical(made)].append((reader, index))
            self.rename_returned(old, made)

        return name, take

    def rename_returned(self, old: str, new: str) -> None:
        """Makes the function return another value."""
        for key, value in self.function.ret.items() if self.function is not None else ():
            if value == old:
                self.function.ret[key] = new

    def held(self, node: Any, index: int | None = None) -> list[str]:
        """Control edges that let a weight's conversion for this node begin when the node's other inputs are there.

        Without them the executor converts all weights of the model at once, and all copies are in memory together.
        """
        makers = [self.maker(value)[0] for place, value in enumerate(self.inputs(node)) if place != index]
        return list(
            dict.fromkeys(f"^{maker.name}" for maker in makers if maker is not None and maker.op not in _AT_ONCE)
        )

    def ordered(self) -> Iterator[Any]:
        """The nodes, each behind what it reads; loops of TensorFlow 1 are cut open at NextIteration."""
        seen: set[str] = set()
        for first in self.nodes:
            stack = [(first, False)]
            while stack:
                node, done = stack.pop()
                if done:
                    yield node
                elif node.name not in seen:
                    seen.add(node.name)
                    stack.append((node, True))
                    if node.op != "NextIteration":
                        stack += [(m, False) for m in reversed(self._before(node)) if m.name not in seen]

    def _before(self, node: Any) -> list[Any]:
        names = (value.removeprefix("^").split(":")[0] for value in node.input)
        return [self.by_name[name] for name in names if name in self.by_name]

    def ancestors(self, values: Iterable[str]) -> set[str]:
        """Names of all nodes that these values hang on."""
        stack = [value.removeprefix("^").split(":")[0] for value in values]
        found: set[str] = set()
        while stack:
            name = stack.pop()
            if name in self.by_name and name not in found:
                found.add(name)
                stack += [value.removeprefix("^").split(":")[0] for value in self.by_name[name].input]
        return found


def scopes(graph: Any) -> dict[str, Scope]:
    """The graph, under the empty name, and its functions."""
    found = {"": Scope("", graph.node)}
    for function in graph.library.function:
        found[function.signature.name] = Scope(function.signature.name, function.node_def, function)
    return found


def _tensor(values: np.ndarray) -> Any:
    """A constant as TensorFlow's message: one number where all are the same, else their bytes."""
    from tensorflow import make_tensor_proto

    if values.size > 1 and values.dtype.kind == "f" and (values == values.flat[0]).all():
        return make_tensor_proto(values.flat[0], shape=values.shape)
    made = make_tensor_proto(values.view(np.int16) if values.dtype.name == "bfloat16" else values)
    if values.dtype.name == "bfloat16":  # as such it would be a list of varints, which is longer
        made.dtype = BFLOAT16
    return made


_SHORT = 64  # scales: below, a Cast takes more room than bfloat16 saves
_AT_ONCE = ("Const", "VarHandleOp", "ReadVariableOp", "VariableV2", "Variable", "Placeholder", "Identity")
"""Nodes whose results are there from the start: to wait for them is to wait for nothing."""
