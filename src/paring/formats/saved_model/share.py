"""Variables that are stored twice, as Keras 3 exports them: one of each pair goes, and whoever knew it knows the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paring.formats.saved_model.bundle import OBJECTS
from paring.formats.saved_model.flow import Flow
from paring.formats.saved_model.model import SavedModel


def share(
    model: SavedModel,
    flow: Flow,
    twins: Mapping[tuple[str, str], tuple[str, str]],
    values: dict[str, Callable[[], Any]],
) -> list[str]:
    """Stores twins once: restores read one key, and both object graphs know one object. Gives the keys that go."""
    pairs = [(flow.sources[a], flow.sources[b]) for a, b in twins.items()]
    keys = {str(twin.key): str(kept.key) for twin, kept in pairs}
    if not keys:
        return []
    from tensorflow import make_tensor_proto

    renamed = {twin.encode(): kept.encode() for twin, kept in keys.items()}
    for scope in flow.scopes.values():
        for node in scope.nodes:
            if node.op == "RestoreV2" and (old := scope.constant(node.input[1])) is not None:
                names, _ = scope.source(node.input[1])
                found = [renamed.get(name, name) for name in old.reshape(-1)]
                names.attr["value"].tensor.CopyFrom(make_tensor_proto(found))
    saved, checkpoint = model.meta.object_graph_def, model.object_graph()
    for twin, kept in pairs:
        assert twin.object is not None and kept.object is not None
        for graph in (saved, checkpoint):
            for parent in graph.nodes:
                for child in parent.children:
                    if child.node_id == twin.object:
                        child.node_id = kept.object
        for function in saved.concrete_functions.values():
            for place, number in enumerate(function.bound_inputs):
                if number == twin.object:
                    function.bound_inputs[place] = kept.object
        checkpoint.nodes[twin.object].Clear()
        empty = saved.nodes[twin.object]
        empty.Clear()
        empty.user_object.identifier = "_generic_user_object"
        empty.user_object.version.producer = empty.user_object.version.min_consumer = 1
    values[OBJECTS] = checkpoint.SerializeToString
    for key in keys:
        values.pop(key, None)
    return list(keys)
