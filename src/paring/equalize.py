"""Cross-layer equalization: scales channels between two layers so that both use their grids evenly; the function stays.

Where layer 1 feeds only layer 2 through something that commutes with positive scaling (nothing, ReLU, pooling), channel i of
layer 1 may be divided by any s_i and the inputs i of layer 2 multiplied by it. With s_i = sqrt(r1_i / r2_i) the ranges
r1_i and r2_i become equal, which is the choice that leaves both the most levels.
Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from paring.graph import Graph, Op, TensorId, WeightUse

KINDS = ("conv2d", "depthwise_conv2d", "dense", "conv2d_transpose")
THROUGH = ("relu", "leaky_relu", "prelu", "max_pool2d", "average_pool2d")
_FUSED = (0, 1)  # no activation, ReLU
SWEEPS, SETTLED = 30, 1e-3  # chains of layers: again and again until no scale moves by more
BIASED = 100.0  # times its largest weight: a channel with more bias than that says little but its bias


@dataclass(frozen=True)
class Equalized:
    """New constants of a graph.

    Attributes:
      constants: Values by tensor, float32, in the shapes they had.
      pairs: Names of the layers that were equalized with each other.
      left: Why other layers were not, with how many.
    """

    constants: Mapping[TensorId, np.ndarray] = field(repr=False)
    pairs: tuple[tuple[str, str], ...]
    left: Mapping[str, int]


@dataclass(frozen=True)
class _Side:
    """One layer of a pair: its weights, and how channel i of the value between lies in them."""

    op: Op
    use: WeightUse
    weight: TensorId
    bias: TensorId | None


def equalize(graph: Graph) -> Equalized:
    """Equalizes every pair of layers that allows it; the model's function stays the same up to float rounding.

    Weights that several operators share, or that are stored as integers, are left alone; so is what a ReLU6 or another
    activation with a fixed point stands between.

    >>> from paring.demo import model_path
    >>> from paring.formats import load
    >>> found = equalize(load(model_path()).graph)
    >>> len(found.pairs) > 0
    True
    """
    users, left = graph.consumers(), Counter[str]()
    pairs = []
    for op in graph.ops:
        if op.kind in KINDS:
            found = _partner(graph, op, users)
            if isinstance(found, str):
                left[found] += 1
            else:
                pairs.append(found)
    values: dict[TensorId, np.ndarray] = {}
    for side in (side for pair in pairs for side in pair):
        for tensor in (side.weight, side.bias):
            if tensor is not None and tensor not in values:
                weight = graph.tensors[tensor].weight
                assert weight is not None
                values[tensor] = np.array(weight.read(), np.float64)
    for _ in range(SWEEPS):
        if max((_balance(*pair, values) for pair in pairs), default=0.0) < SETTLED:
            break
    names = tuple((a.op.name, b.op.name) for a, b in pairs)
    return Equalized({t: v.astype(np.float32) for t, v in values.items()}, names, dict(left))


def _balance(first: _Side, second: _Side, values: dict[TensorId, np.ndarray]) -> float:
    """Equalizes one pair in place -> the largest logarithm of a scale.

    A channel that is nearly dead would get a bias that fills the grid of all activations, so that its bias counts too.
    """
    out = np.moveaxis(values[first.weight], first.use.axis or 0, 0)
    into = _inputs(second, values[second.weight])
    reach_out = np.abs(out).reshape(len(out), -1).max(axis=1)
    if first.bias is not None:
        reach_out = np.where(reach_out > 0, np.maximum(reach_out, np.abs(values[first.bias]) / BIASED), 0.0)
    reach_in = np.abs(into).reshape(len(out), -1).max(axis=1)
    alive = (reach_out > 0) & (reach_in > 0) & np.isfinite(reach_out) & np.isfinite(reach_in)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = np.where(alive, np.sqrt(reach_out / reach_in), 1.0)
    along = scale.reshape(-1, *[1] * (out.ndim - 1))
    out /= along  # views: they write through
    into *= scale.reshape(-1, *[1] * (into.ndim - 1))
    if first.bias is not None:
        values[first.bias] /= scale
    return float(np.abs(np.log(scale)).max(initial=0.0))


def _inputs(side: _Side, weight: np.ndarray) -> np.ndarray:
    """A view of the weights with the input channel first."""
    return np.moveaxis(weight, side.use.axis if side.op.kind == "depthwise_conv2d" and side.use.axis else -1, 0)


def _partner(graph: Graph, op: Op, users: Mapping[TensorId, list[tuple[Op, int]]]) -> tuple[_Side, _Side] | str:
    """The pair that begins with `op`, or why there is none."""
    first = _side(graph, op, users)
    if isinstance(first, str):
        return first
    if int(op.params.get("fused_activation_function", 0) or 0) not in _FUSED:
        return "an activation with a fixed point follows"
    tensor = op.outputs[0]
    while True:
        readers = users.get(tensor, [])
        if len(readers) != 1 or tensor in graph.outputs:
            return "several operators read it" if readers else "it ends the model"
        reader, port = readers[0]
        if reader.kind in KINDS and reader.demands is not None and port in reader.demands.data:
            break
        if reader.kind not in THROUGH or port:
            return f"{reader.native} follows"
        if int(reader.params.get("fused_activation_function", 0) or 0) not in _FUSED:
            return "an activation with a fixed point follows"
        tensor = reader.outputs[0]
    second = _side(graph, reader, users, last=True)
    if isinstance(second, str):
        return second
    channels = graph.tensors[first.weight].shape[first.use.axis or 0]
    shape = graph.tensors[second.weight].shape
    taken = shape[second.use.axis or 0] if reader.kind == "depthwise_conv2d" else shape[-1]
    if channels != taken or graph.tensors[tensor].shape[-1:] != (channels,):
        return "channels do not meet one by one"
    return first, second


def _side(graph: Graph, op: Op, users: Mapping[TensorId, list[tuple[Op, int]]], *, last: bool = False) -> _Side | str:
    """One layer's constants, or why they cannot be scaled; the `last` of a pair keeps its bias."""
    found = list(graph.weights_of(op))
    if len(found) != 1 or found[0][0].axis is None:
        return "its weights are computed at run time or stored otherwise"
    use, tensor = found[0]
    bias = op.inputs[use.bias] if use.bias is not None and use.bias < len(op.inputs) and not last else None
    for constant in (tensor.id, bias):
        weight = graph.tensors[constant].weight if constant is not None else None
        if constant is not None and (weight is None or graph.tensors[constant].quantization is not None):
            return "its weights are computed at run time or stored otherwise"
        if constant is not None and (weight is None or weight.dtype != "float32" or len(users[constant]) > 1):
            return "its weights are shared or integers"
    return _Side(op, use, tensor.id, bias)
