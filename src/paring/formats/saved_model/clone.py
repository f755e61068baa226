"""Function bodies that serve several variables: one whose variables are stored differently gets a copy per caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paring.errors import UnsupportedError
from paring.formats.saved_model.flow import Flow
from paring.formats.saved_model.scope import CALLS, Scope, called

_MOST = 1000  # copies: a model needs a handful


def separate(model: Any, fate: Callable[[tuple[str, str]], Any]) -> dict[str, str]:
    """Copies bodies until each argument is one variable, or several that are stored alike.

    Args:
      model: A `SavedModel` whose message may be edited.
      fate: What becomes of a variable; compared by identity.

    Returns:
      For each copy, the function that it is of.

    Raises:
      UnsupportedError: A function calls itself with several variables.
    """
    made: dict[str, str] = {}
    while True:
        flow: Flow = model.flow
        bodies = [s for s in flow.scopes.values() if s.name and any(_mixed(flow, s, a, fate) for a in s.arguments)]
        if not bodies:
            return made
        if len(made) > _MOST or not any(_split(model, flow, scope, fate, made) for scope in bodies):
            raise UnsupportedError(
                "cannot store the weights", where=f"function {bodies[0].name}", expected="one variable for each argument",
                got="several, because it calls itself", todo="Leave its operators float (--skip)",
            )  # fmt: skip
        vars(model).pop("flow")


def _mixed(flow: Flow, scope: Scope, argument: str, fate: Callable[[tuple[str, str]], Any]) -> bool:
    return len({id(fate(source)) for source in flow.handles.get((scope.name, argument), ())}) > 1


def _split(model: Any, flow: Flow, scope: Scope, fate: Callable[[tuple[str, str]], Any], made: dict[str, str]) -> bool:
    """Gives callers of one function copies of their own; False where its callers are mixed themselves, and come first."""
    groups: dict[tuple[Any, ...], list[tuple[Scope, Any]]] = {}
    first: tuple[Any, ...] | None = None
    for caller in flow.scopes.values():
        for node in caller.nodes:
            for name, skipped in called(node, flow.scopes):
                if name != scope.name:
                    continue
                handed = [flow.handles.get((caller.name, v), set()) for v in caller.inputs(node)[skipped:]]
                fates = [{id(fate(source)) for source in handles} for handles in handed]
                if any(len(found) > 1 for found in fates):
                    return False
                groups.setdefault(tuple(tuple(found) for found in fates), []).append((caller, node))
    concrete = model.meta.object_graph_def.concrete_functions
    if scope.name in concrete:
        bound = [flow.bound.get(number) for number in concrete[scope.name].bound_inputs]
        own = [() if source is None else (id(fate(source.id)),) for source in bound]
        first = tuple([()] * (len(scope.arguments) - len(own)) + own)
    rest = [key for key in groups if key != first]
    if first is None:
        rest = rest[1:]
    for key in rest:
        copy = model.meta.graph_def.library.function.add()
        copy.CopyFrom(scope.function)
        number = sum(original == made.get(scope.name, scope.name) for original in made.values()) + 1
        copy.signature.name = f"{made.get(scope.name, scope.name)}_copy{number}"
        made[copy.signature.name] = made.get(scope.name, scope.name)
        for _, node in groups[key]:
            _redirect(node, scope.name, copy.signature.name)
    return bool(rest)


def _redirect(node: Any, old: str, new: str) -> None:
    if node.op == old:
        node.op = new
    for name in CALLS.get(node.op, ((), 0))[0]:
        if name in node.attr:
            value = node.attr[name]
            for function in value.list.func or [value.func]:
                if function.name == old:
                    function.name = new
