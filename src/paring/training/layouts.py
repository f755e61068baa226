"""Keras layers as planning sees them: their kind, and how each weight lies as a matrix [outputs, taps * inputs].

One table for the layers that Keras brings; a layer of a user's own falls under the general row, in which the last dimension
of a weight is the output channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

LEAST_RANK = 2  # vectors are biases, scales and the like


@dataclass(frozen=True)
class Layout:
    """How a weight lies as a matrix [outputs, taps * inputs], the order of a .tflite file.

    Attributes:
      order: The weight's dimensions, those of outputs first, then taps, then inputs.
      outputs: How many of `order` are outputs.
      inputs: How many of `order` are inputs; the others between are taps.
    """

    order: tuple[int, ...]
    outputs: int
    inputs: int

    def taps(self, shape: tuple[int, ...]) -> int:
        """Positions of a convolution's kernel.

        >>> Layout((3, 0, 1, 2), 1, 1).taps((3, 3, 8, 16))
        9
        """
        return prod(shape[d] for d in self.order[self.outputs : len(self.order) - self.inputs])

    def matrix(self, ops: Any, weight: Any) -> Any:
        """The weight as a matrix; `ops` is NumPy or `keras.ops`."""
        rows = prod(weight.shape[d] for d in self.order[: self.outputs])
        return ops.reshape(self._turned(ops, weight, self.order), (rows, -1))

    def weight(self, ops: Any, matrix: Any, shape: tuple[int, ...]) -> Any:
        """A matrix, or one value per output [outputs, 1], as the weight lies (or broadcasts over it)."""
        back = tuple(sorted(range(len(self.order)), key=self.order.__getitem__))
        wide = [shape[d] for d in self.order]
        if matrix.shape[-1] == 1 and prod(wide[self.outputs :]) != 1:
            wide[self.outputs :] = [1] * (len(wide) - self.outputs)
        return self._turned(ops, ops.reshape(matrix, wide), back)

    @staticmethod
    def _turned(ops: Any, weight: Any, order: tuple[int, ...]) -> Any:
        return weight if order == tuple(range(len(order))) else ops.transpose(weight, order)


@dataclass(frozen=True)
class Part:
    """A weight of a layer.

    Attributes:
      variable: The `keras.Variable`.
      layout: How it lies.
    """

    variable: Any
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """The variable's shape."""
        return tuple(int(d) for d in self.variable.shape)


KINDS: Mapping[str, str] = MappingProxyType(
    {
        "Dense": "dense", "EinsumDense": "dense", "Conv1D": "conv1d", "Conv2D": "conv2d", "Conv3D": "conv3d",
        "Conv1DTranspose": "transpose_conv", "Conv2DTranspose": "transpose_conv", "Conv3DTranspose": "transpose_conv",
        "DepthwiseConv1D": "depthwise_conv2d", "DepthwiseConv2D": "depthwise_conv2d", "SeparableConv1D": "conv2d",
        "SeparableConv2D": "conv2d", "Embedding": "embedding", "LSTMCell": "lstm", "GRUCell": "gru",
        "SimpleRNNCell": "rnn", "ConvLSTMCell": "lstm", "BatchNormalization": "batch_norm",
        "LayerNormalization": "layer_norm", "MultiHeadAttention": "attention", "GroupedQueryAttention": "attention",
    }
)  # fmt: skip
"""Canonical kinds by class name; other operations have their class name in lower case."""

_UNTOUCHED = ("PReLU", "BatchNormalization", "LayerNormalization", "GroupNormalization", "Normalization")
_FIXED: Mapping[str, Mapping[str, tuple[int, int]]] = MappingProxyType(
    {  # class: attribute: (outputs, inputs) as dimensions from the end, one each
        "Dense": {"kernel": (-1, -2)}, "Conv1D": {"kernel": (-1, -2)}, "Conv2D": {"kernel": (-1, -2)},
        "Conv3D": {"kernel": (-1, -2)}, "Conv1DTranspose": {"kernel": (-2, -1)}, "Conv2DTranspose": {"kernel": (-2, -1)},
        "Conv3DTranspose": {"kernel": (-2, -1)}, "Embedding": {"embeddings": (0, -1)},
        "LSTMCell": {"kernel": (-1, -2), "recurrent_kernel": (-1, -2)},
        "GRUCell": {"kernel": (-1, -2), "recurrent_kernel": (-1, -2)},
        "SimpleRNNCell": {"kernel": (-1, -2), "recurrent_kernel": (-1, -2)},
        "ConvLSTMCell": {"kernel": (-1, -2), "recurrent_kernel": (-1, -2)},
        "SeparableConv1D": {"pointwise_kernel": (-1, -2)}, "SeparableConv2D": {"pointwise_kernel": (-1, -2)},
    }
)  # fmt: skip
_DEPTHWISE = {
    "DepthwiseConv1D": "kernel", "DepthwiseConv2D": "kernel",
    "SeparableConv1D": "depthwise_kernel", "SeparableConv2D": "depthwise_kernel",
}  # fmt: skip


def name_of(layer: Any) -> str:
    """The class name that the tables know it by: its own, or that of the nearest base class in them."""
    known = (*KINDS, *_UNTOUCHED)
    return next((c.__name__ for c in type(layer).__mro__ if c.__name__ in known), type(layer).__name__)


def kind_of(layer: Any) -> str:
    """The canonical kind of an operation.

    >>> kind_of(3)
    'int'
    """
    name = name_of(layer)
    return KINDS.get(name, name.lower())


def parts_of(layer: Any) -> list[Part]:
    """The weights of a layer itself, without those of layers inside it, that can be compressed."""
    name = name_of(layer)
    if name in _UNTOUCHED:
        return []
    own = {
        id(v): v for v in getattr(layer, "_trainable_variables", ()) + getattr(layer, "_non_trainable_variables", ())
    }
    found: list[Part] = []

    def add(attribute: str, layout: Layout | None) -> None:
        variable = own.pop(id(getattr(layer, attribute, None)), None)
        if variable is not None and layout is not None:
            found.append(Part(variable, layout))

    if name in _DEPTHWISE:
        rank = len(getattr(layer, _DEPTHWISE[name]).shape) if layer.built else 0
        add(_DEPTHWISE[name], Layout((rank - 2, rank - 1, *range(rank - 2)), 2, 0))
    if name == "EinsumDense" and layer.built:
        add("kernel" if hasattr(layer, "kernel") else "_kernel", einsum_layout(layer.equation))
    for attribute, (out, inner) in _FIXED.get(name, {}).items():
        rank = len(getattr(layer, attribute).shape) if layer.built else 0
        add(attribute, _between(out, inner, rank))
    if name not in KINDS:
        for variable in list(own.values()):
            rank = len(variable.shape)
            if rank >= LEAST_RANK and variable.trainable:
                found.append(Part(variable, _between(-1, -2, rank)))
    return found


def einsum_layout(equation: str) -> Layout:
    """That of a kernel in `inputs,kernel->outputs`: its letters that the inputs lack are outputs, the others are summed over.

    >>> einsum_layout("abc,cde->abde")
    Layout(order=(1, 2, 0), outputs=2, inputs=1)
    >>> einsum_layout("abde,dec->abc")
    Layout(order=(2, 0, 1), outputs=1, inputs=2)
    """
    left, _ = equation.replace(" ", "").replace("...", "").split("->")
    inputs, kernel = left.split(",")
    out = [d for d, letter in enumerate(kernel) if letter not in inputs]
    summed = [d for d, letter in enumerate(kernel) if letter in inputs]
    return Layout((*out, *summed), len(out), len(summed))


def _between(out: int, inner: int, rank: int) -> Layout:
    out, inner = out % max(1, rank), inner % max(1, rank)
    return Layout((out, *(d for d in range(rank) if d not in (out, inner)), inner), 1, 1)
