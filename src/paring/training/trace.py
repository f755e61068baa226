"""The graph of a live Keras model: its operations in order and the values between them, through nested models.

A model or layer that is made of other layers is opened. Where its `call` is Python code (a subclassed model, a block of one's
own), it is traced once into a functional view over the same layers, which from then on runs in its place. What cannot be opened
(loops, masks, code that depends on values or on the training phase) stays whole, and says why.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import keras
from keras.src.models.functional import Functional  # it has no public name

_WHOLE = ("RNN", "Wrapper", "StackedRNNCells", "MultiHeadAttention", "GroupedQueryAttention", "Attention")


@dataclass(eq=False)
class Node:
    """One use of an operation: `inputs` and `outputs` are numbers of values."""

    op: Any
    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tensors: tuple[Any, ...] = field(repr=False, default=())


@dataclass(eq=False)
class Trace:
    """What was found.

    Attributes:
      nodes: In the order of execution.
      inputs: Numbers of the model's inputs.
      outputs: Numbers of its outputs.
      reals: Numbers of the values that are real numbers.
      views: Functional views that are to run in place of a layer's or model's `call`.
      whole: Why a layer that is made of others was not opened, by layer.
    """

    nodes: list[Node] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    reals: set[int] = field(default_factory=set)
    views: dict[Any, View] = field(default_factory=dict)
    whole: dict[Any, str] = field(default_factory=dict)
    _count: int = 0

    def value(self, tensor: Any) -> int:
        """A number for a new value."""
        self._count += 1
        if keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)):
            self.reals.add(self._count)
        return self._count


class View:
    """A functional graph over the sublayers of one layer, called as the layer's `call` is."""

    def __init__(self, layer: Any, inputs: list[Any], outputs: Any, structure: Any) -> None:
        """Remembers how the traced call looked: its tensors, and its arguments with True in their places."""
        self.graph = keras.Model(inputs, outputs)
        self.original = layer.call
        self.structure = structure

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph where the call looks like the traced one, else the layer's own code."""
        training = kwargs.get("training")
        tensors, structure = _taken_apart(args, kwargs)
        if structure != self.structure:
            return self.original(*args, **kwargs)
        return self.graph.call(tensors, training=training)


def trace(model: Any, sample: Any = None) -> Trace:
    """Opens a model.

    Args:
      model: A built Keras 3 model.
      sample: One batch of its inputs, for a subclassed model that was never called.

    Returns:
      Its operations; without nodes where the model's own code cannot be followed (`whole` says why).
    """
    found = Trace()
    graph = _functional(model)
    if graph is None:
        graph = _top_view(found, model, sample)
    if graph is not None:
        values: dict[int, int] = {}
        for tensor in graph.inputs:
            values[id(tensor)] = found.value(tensor)
            found.inputs.append(values[id(tensor)])
        _walk(found, graph, values, "")
        found.outputs = [values[id(t)] for t in graph.outputs]
    return found


def _functional(layer: Any) -> Any:
    """The functional graph that a layer runs, None for other layers."""
    if isinstance(layer, keras.Sequential):
        return getattr(layer, "_functional", None)
    return layer if hasattr(layer, "_nodes_by_depth") and type(layer).call is Functional.call else None


def _walk(found: Trace, graph: Any, values: dict[int, int], prefix: str) -> None:
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input or not node.operation or any(id(t) not in values for t in node.input_tensors):
                continue
            op, path = node.operation, f"{prefix}{node.operation.name}"
            inner = _functional(op) if isinstance(op, keras.layers.Layer) else None
            if inner is None and (_composite(op) or _custom(op)):
                view = found.views.get(op) or _view(found, op, node.arguments.args, node.arguments.kwargs)
                inner = view.graph if view is not None else None
            if inner is not None:
                tensors = keras.tree.flatten(inner._inputs)
                if len(tensors) == len(node.input_tensors):
                    inside = {id(t): values[id(given)] for t, given in zip(tensors, node.input_tensors, strict=True)}
                    _walk(found, inner, inside, f"{path}/")
                    for own, made in zip(node.outputs, inner.outputs, strict=True):
                        values[id(own)] = inside[id(made)]
                    continue
            for tensor in node.outputs:
                values[id(tensor)] = found.value(tensor)
            found.nodes.append(
                Node(
                    op, path, tuple(values[id(t)] for t in node.input_tensors), tuple(values[id(t)] for t in node.outputs),
                    tuple(node.input_tensors),
                )
            )  # fmt: skip


def _composite(op: Any) -> bool:
    """True for a layer whose work is all done by other layers, called from Python code."""
    if not isinstance(op, keras.layers.Layer) or not op._layers:
        return False
    if any(c.__name__ in _WHOLE for c in type(op).__mro__):
        return False
    return not (op._trainable_variables or op._non_trainable_variables)


def _custom(op: Any) -> bool:
    """True for a layer of a user's own that has weights and no layers; it is opened where it only adds or multiplies them."""
    if not isinstance(op, keras.layers.Layer) or op._layers or not op._trainable_variables:
        return False
    if op._non_trainable_variables:  # to trace its code might write them
        return False
    return not type(op).__module__.startswith("keras.")


def _top_view(found: Trace, model: Any, sample: Any) -> Any:
    if sample is not None:
        symbols = keras.tree.map_structure(
            lambda x: keras.KerasTensor((None, *x.shape[1:]), dtype=keras.backend.standardize_dtype(x.dtype)), sample
        )
    else:
        shapes = getattr(model, "_build_shapes_dict", None)
        if not shapes or len(shapes) != 1:
            found.whole[model] = "the shape of its inputs is not known (call the model once, or give attach data)"
            return None
        symbols = keras.tree.map_shape_structure(
            lambda shape: keras.KerasTensor((None, *shape[1:]), dtype=model.input_dtype), next(iter(shapes.values()))
        )
    view = _view(found, model, (symbols,), {})
    return view.graph if view is not None else None


def _view(found: Trace, layer: Any, args: Any, kwargs: Any) -> View | None:
    """A functional view of a layer's own code, None where that code cannot be followed."""
    if layer in found.whole:
        return None
    tensors = [t for t in keras.tree.flatten((args, kwargs)) if isinstance(t, keras.KerasTensor)]
    if any(getattr(t, "_keras_mask", None) is not None for t in tensors):
        found.whole[layer] = "masks flow through it"
        return None
    try:
        view, other = (_traced(layer, args, kwargs, training) for training in (False, True))
        kinds = [
            [type(n.operation).__name__ for nodes in v.graph._nodes_by_depth.values() for n in nodes]
            for v in (view, other)
        ]
        if sorted(kinds[0]) != sorted(kinds[1]):
            raise ValueError("its code depends on the training phase")
        if _custom(layer):
            if not set(kinds[0]) <= {"InputLayer", "Add", "Multiply"} or len(kinds[0]) > 3:
                return None  # its own code runs, and its weights are its operators'
            found.views[layer] = view
            return view
        inside = {id(v) for v in view.graph.variables}
        if any(id(v) not in inside for v in layer.trainable_variables):
            raise ValueError("it reads weights of its layers directly")
    except Exception as error:
        if _custom(layer):
            return None
        text = str(error).strip().splitlines()
        found.whole[layer] = (text[0] if text else type(error).__name__)[:160]
        return None
    found.views[layer] = view
    return view


def _traced(layer: Any, args: Any, kwargs: Any, training: bool) -> View:
    fresh: list[Any] = []

    def renew(value: Any) -> Any:
        if not isinstance(value, keras.KerasTensor):
            return value
        fresh.append(keras.Input(batch_shape=value.shape, dtype=value.dtype))
        return fresh[-1]

    args, kwargs = keras.tree.map_structure(renew, (tuple(args), dict(kwargs)))
    _, structure = _taken_apart(args, kwargs)
    if "training" in inspect.signature(layer.call).parameters:
        kwargs = {**kwargs, "training": training}
    outputs = layer.call(*args, **kwargs)
    if any(not isinstance(t, keras.KerasTensor) for t in keras.tree.flatten(outputs)):
        raise ValueError("it gives something that is no tensor")
    return View(layer, fresh, outputs, structure)


def _taken_apart(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """The tensors of a call, and the call with True in their places; absent and None are the same, `training` is no matter."""
    tensors: list[Any] = []

    def mark(value: Any) -> Any:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            tensors.append(value)
            return True
        return value

    kwargs = {k: v for k, v in sorted(kwargs.items()) if k != "training" and v is not None}
    marked = keras.tree.map_structure(mark, (list(args), kwargs))
    return tensors, marked
