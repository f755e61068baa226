"""Weights that a loop reads in every turn become floats once, before it: recurrent layers read theirs in the loop's body."""

from __future__ import annotations

from collections import Counter
from typing import Any

from paring.formats.saved_model.flow import Flow
from paring.formats.saved_model.scope import FLOAT32, Scope, called, field


class Loops:
    """The `While` operators whose functions nobody else calls, so that these can take one argument more."""

    def __init__(self, flow: Flow) -> None:
        self._scopes = flow.scopes
        places = [(scope, node) for scope in flow.scopes.values() for node in scope.nodes]
        callers = Counter(name for _, node in places for name, _ in called(node, flow.scopes))
        self._loops: dict[str, tuple[Scope, Any, Scope]] = {}
        for scope, node in places:
            if node.op in ("While", "StatelessWhile"):
                test, body = (field(node, name).func.name for name in ("cond", "body"))
                if callers[test] == callers[body] == 1:
                    self._loops[body] = (scope, node, flow.scopes[test])

    def around(self, body: Scope, value: str) -> tuple[Scope, Any, str] | None:
        """The loop whose body reads a variable as `value`, and the variable's handle there.

        None where there is no such loop, or where it might take another variable in its next turn.
        """
        loop, (read, _) = self._loops.get(body.name), body.maker(value)
        if loop is None or read is None or read.op != "ReadVariableOp" or read.input[0] not in body.arguments:
            return None
        place = body.arguments.index(read.input[0])
        result = body.function.signature.output_arg[place].name
        if body.source(body.function.ret[result]) != (None, place):
            return None
        outer, node, _ = loop
        return outer, node, outer.inputs(node)[place]

    def carry(self, body: Scope, value: str, shape: tuple[int, ...]) -> str:
        """Hands a value from outside into every turn; gives its name in the body."""
        outer, node, test = self._loops[body.name]
        place = len(outer.inputs(node))
        node.input.insert(place, value)  # in front of control edges
        outer.users[outer.canonical(value)].append((node, place))
        node.attr["T"].list.type.append(FLOAT32)
        for name in ("output_shapes", "_output_shapes"):
            _append(node, name, shape)
        for scope in (test, body):
            _append(scope.function, "_input_shapes", shape)
            argument = scope.free("carried_weight")
            scope.function.signature.input_arg.add(name=argument, type=FLOAT32)
            scope.arguments.append(argument)
        taken = {result.name for result in body.function.signature.output_arg}
        result = next(name for n in range(len(taken) + 1) if (name := f"carried_weight_out_{n}") not in taken)
        body.function.signature.output_arg.add(name=result, type=FLOAT32)
        body.function.ret[result] = argument
        return argument


def _append(holder: Any, name: str, shape: tuple[int, ...]) -> None:
    """One shape more, where a node or function has a list of them."""
    if field(holder, name).list.shape:
        added = holder.attr[name].list.shape.add()
        for size in shape:
            added.dim.add(size=size)
