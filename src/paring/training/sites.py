"""Where activations are quantized: one site for every value that an integer kernel writes, after what the kernel fuses.

The rules are those of the writer and of the kernels (docs/design.md): relu fuses into what makes its input; batch normalization
folds into the layer before it; what only moves values keeps their grid; pooling and resizing write on their input's grid;
concatenation has one grid for all; softmax, sigmoid and tanh have fixed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from paring.training.layouts import name_of

LINEAR = (
    "Dense", "EinsumDense", "Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D",
    "SeparableConv2D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose",
)  # fmt: skip
FLOAT = ("Conv3D", "Conv3DTranspose")  # LiteRT has only float kernels
_KEEP = {
    "InputLayer", "Reshape", "Flatten", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianNoise",
    "GaussianDropout", "AlphaDropout", "ActivityRegularization", "StochasticDepth", "ZeroPadding1D", "ZeroPadding2D",
    "ZeroPadding3D", "Cropping1D", "Cropping2D", "Cropping3D", "Permute", "RepeatVector", "MaxPooling1D", "MaxPooling2D",
    "MaxPooling3D", "GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalMaxPooling3D", "Identity", "ExpandDims", "Squeeze",
    "Transpose", "GetItem", "Split", "Slice", "Pad", "BroadcastTo", "Repeat", "Tile", "Flip", "Roll", "Swapaxes", "Moveaxis",
    "StopGradient", "MaxPool", "Ravel", "Unstack", "DropPath", "Cast", "Copy", "Take", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
_SAME = {
    "AveragePooling1D", "AveragePooling2D", "AveragePooling3D", "AveragePool", "UpSampling1D", "UpSampling2D", "UpSampling3D",
    "Resizing", "Resize",
}  # fmt: skip
SUMS = ("Add", "Multiply")  # of more than two inputs: the file has them one behind the other
_JOINED = {"Concatenate", "Stack", "Hstack", "Vstack"}
_TRANSPOSED = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")  # the converter leaves their relu alone
_FUSES = {*LINEAR, "BatchNormalization", "Add", "Subtract", "Multiply"} - {"SeparableConv1D", *_TRANSPOSED}
_FIXED = {"softmax": (0.0, 255 / 256), "sigmoid": (0.0, 255 / 256), "tanh": (-1.0, 127 / 128)}
_FIXED_16 = (-32767 / 32768, 32767 / 32768)
_PLAIN = ("linear", "relu", "relu6")
_OPERATIONS = {
    "Relu": "relu", "Relu6": "relu6", "Sigmoid": "sigmoid", "Softmax": "softmax", "Tanh": "tanh", "Silu": "silu",
    "HardSigmoid": "hard_sigmoid", "HardSilu": "hard_silu",
}  # fmt: skip
_INNER = {"SeparableConv1D": 1, "SeparableConv2D": 1, "attention": 3}
_AFFINE = ("Rescaling", "Normalization")
ATTENTION = ("MultiHeadAttention", "GroupedQueryAttention")
ACTIVE = ("Activation", *_OPERATIONS, "ReLU")


@dataclass(eq=False)
class Site:
    """A range that one or more values share.

    Attributes:
      name: For messages and files: the path of the operation.
      bits: 8 or 16.
      fixed: The range where the kernel has one of its own.
      symmetric: Whether zero is the middle of 8 bits, as products of two activations want it of the second.
      follows: Whether it only takes over the range of the site that it was joined to, whatever it sees itself.
    """

    name: str
    bits: int
    fixed: tuple[float, float] | None = None
    symmetric: bool = False
    follows: bool = False
    joined: Site | None = field(default=None, repr=False)

    def root(self) -> Site:
        """The site that stands for all that were joined."""
        return self if self.joined is None else self.joined.root()


@dataclass(eq=False)
class Sites:
    """Where values are quantized.

    Attributes:
      inputs: By number of the model's input.
      outputs: Of an operation, one per output; None where nothing is to be done.
      before: In front of a layer's own activation.
      inside: Between the steps of an operation that the file has as several.
      source: The grid on which a linear operation reads its input.
      folded: The batch normalization that folds into a linear operation.
      alone: Batch normalizations that fold into nothing, with the grid that they read.
      entries: What a layer reads that no graph shows.
      then: The operation that fuses into another one.
      reads: The grids of what a sum, a product or a gate reads.
    """

    inputs: dict[int, Site] = field(default_factory=dict)
    outputs: dict[Any, list[Site | None]] = field(default_factory=dict)
    before: dict[Any, Site] = field(default_factory=dict)
    inside: dict[Any, list[Site]] = field(default_factory=dict)
    source: dict[Any, Site | None] = field(default_factory=dict)
    folded: dict[Any, Any] = field(default_factory=dict)
    alone: dict[Any, Site | None] = field(default_factory=dict)
    entries: dict[Any, Site] = field(default_factory=dict)
    then: dict[Any, Any] = field(default_factory=dict)
    reads: dict[Any, tuple[Site, ...]] = field(default_factory=dict)

    def sink(self, op: Any) -> Site | None:
        """The grid that the kernel of an operation writes, behind all that fuses into it."""
        while op in self.then:
            op = self.then[op]
        found = self.outputs.get(op)
        return found[0] if found and op not in self.before and activation_of(op) in _PLAIN else None

    def all(self) -> list[Site]:
        """Every site that has a range of its own, once, in a fixed order."""
        found: dict[int, Site] = {}
        lists = [[*g.values()] for g in (self.inputs, self.entries, self.before)]
        lists += [*self.outputs.values(), *self.inside.values()]
        for site in (s.root() for sites in lists for s in sites if s is not None):
            if site.fixed is None:
                found.setdefault(id(site), site)
        return list(found.values())


def activation_of(op: Any) -> str:
    """The name of an operation's activation; `linear` where it has none.

    >>> activation_of(object())
    'linear'
    """
    name = type(op).__name__
    if name == "ReLU":
        plain = not op.negative_slope and not op.threshold
        return {None: "relu", 6: "relu6"}.get(op.max_value, "other") if plain else "other"
    if name in _OPERATIONS:
        return _OPERATIONS[name]
    if name in ("LeakyReLU", "PReLU", "ELU"):
        return "other"
    if hasattr(op, "cell"):  # inside the loop, not behind it
        return "linear"
    found = getattr(op, "activation", None)
    return str(getattr(found, "__name__", "other")) if callable(found) else "linear"


def place(
    nodes: Sequence[Any], inputs: Sequence[int], outputs: Sequence[int], reals: set[int], bits: Callable[[Any], int]
) -> Sites:
    """Places sites in a traced graph.

    Args:
      nodes: In the order of execution.
      inputs: Numbers of the model's inputs.
      outputs: Numbers of its outputs.
      reals: Numbers of the values that are real.
      bits: Of an operation's activations: 8, 16, or 0 where they stay float.
    """
    return _Placer(nodes, inputs, outputs, reals, bits).run()


class _Placer:
    def __init__(
        self,
        nodes: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        reals: set[int],
        bits: Callable[[Any], int],
    ) -> None:
        self.nodes, self.entries, self.exits, self.reals, self.bits = nodes, inputs, set(outputs), reals, bits
        self.users: dict[int, list[Any]] = {}
        self.times: dict[Any, int] = {}
        for node in nodes:
            self.times[node.op] = self.times.get(node.op, 0) + 1
            for value in node.inputs:
                self.users.setdefault(value, []).append(node)
        self.at: dict[int, Site | None] = {}
        self.found = Sites()
        self.alike: dict[Any, list[Site | None]] = {}
        self.taken: dict[Any, str] = {}  # batch normalizations that were folded, and into what

    def run(self) -> Sites:
        for number, value in enumerate(self.entries):
            wide = self.width(value, None)
            if wide and value in self.reals:
                self.at[value] = self.found.inputs[number] = Site(f"input{number}", wide)
        for node in self.nodes:
            self.node(node)
        return self.found

    def width(self, value: int, op: Any) -> int:
        """Bits of a value: as its maker wants, else as the first of its users does."""
        wanted = [self.bits(op)] if op is not None else []
        wanted += [self.bits(user.op) for user in self.users.get(value, ())]
        return next((b for b in wanted if b), 0)

    def node(self, node: Any) -> None:
        op, name = node.op, name_of(node.op)
        first = next((self.at[v] for v in node.inputs if self.at.get(v) is not None), None)
        if name in LINEAR:
            self.found.source[op] = self.at.get(node.inputs[0])
        activation = activation_of(op)
        read = [self.at.get(v) for v in node.inputs]
        nothing = (name == "Activation" and activation == "linear") or (name in _AFFINE and not affine(op))
        if name in _KEEP or nothing or _of_one(node):
            self.at.update(dict.fromkeys(node.outputs, first))
            return
        whole = name in _AFFINE or (name in SUMS and len(read) <= 2)
        whole = whole or (type(op).__name__ in ACTIVE and activation in ("silu", "hard_silu"))
        if whole and self.times[op] == 1 and all(read):
            self.found.reads[op] = tuple(s for s in read if s is not None)
        if name in ("Matmul", "Einsum") and len(read) == 2 and read[1] is not None:
            read[1].root().symmetric = True
        value = node.outputs[0]
        self.steps(node)
        follower = self.follower(node)
        if name == "BatchNormalization" and op not in self.taken:
            self.found.alone[op] = first
        if name in LINEAR and activation == "linear" and follower is not None and _normalizes(follower, op):
            self.found.folded[op] = self.found.then[op] = follower
            self.taken[follower] = name
            return
        if self.taken.get(op, name) in _FUSES and activation == "linear" and follower is not None and _fused(follower):
            self.found.then[op] = follower
            return
        wide = self.width(value, op)
        if not wide or value not in self.reals:
            return
        if name in _SAME and first is not None:
            self.put(node, [Site(node.path, wide, follows=True, joined=first) for _ in node.outputs])
            return
        if self.bits(op):
            if activation == "silu" or activation == "hard_sigmoid":
                fixed = fixed_range("sigmoid", wide) if activation == "silu" else (0.0, 6.0)
                self.found.inside.setdefault(op, []).append(Site(f"{node.path}/gate", wide, fixed))
            if name not in ACTIVE and (activation not in _PLAIN or (name in _TRANSPOSED and activation != "linear")):
                self.found.before.setdefault(op, Site(f"{node.path}/before", wide))
        known = self.found.outputs.get(op)
        twin = (activation, node.inputs) if type(op).__name__ in ACTIVE else None  # the converter makes them one
        known = known or self.alike.get(twin)
        if known is None:
            fixed = fixed_range(activation, wide) if self.bits(op) else None
            known = [Site(f"{node.path}/{k}" if k else node.path, wide, fixed if k == 0 else None) if v in self.reals else None
                     for k, v in enumerate(node.outputs)]  # fmt: skip
        if twin is not None:
            self.alike[twin] = known
        if name in _JOINED and known[0] is not None:
            for other in (self.at.get(v) for v in node.inputs):
                if other is not None and other.fixed is None and other.root() is not known[0].root():
                    other.root().joined = known[0].root()
        self.put(node, known)
        if name in ATTENTION and self.bits(op):
            self.attention(node, known[0])

    def attention(self, node: Any, result: Site | None) -> None:
        """The projections of an attention layer, which no node shows: they read what it reads, and its output is theirs."""
        op, read = node.op, [v for v in node.inputs if v in self.reals]
        if self.times[op] > 1 or not 2 <= len(read) <= 3:
            return
        query, value, key = read[0], read[1], read[-1]
        for name, source in (("query", query), ("key", key), ("value", value)):
            layer = getattr(op, f"_{name}_dense", None)
            if layer is not None and self.at.get(source) is not None:
                self.found.source[layer] = self.at[source]
                self.found.outputs[layer] = [Site(f"{node.path}/{name}", self.bits(op), symmetric=name != "query")]
        last = getattr(op, "_output_dense", None)
        if last is not None:
            self.found.source[last], self.found.outputs[last] = self.found.inside[op][2], [result]

    def steps(self, node: Any) -> None:
        """Sites between the steps of an operation that the file has as several, whatever follows it."""
        op, name, wide = node.op, name_of(node.op), self.bits(node.op)
        count = _INNER.get("attention" if name in ATTENTION else name, 0)
        if name in SUMS:
            count = max(0, len(node.inputs) - 2)
        elif name in _AFFINE:
            count = len(affine(op)) - 1
        if not wide or node.outputs[0] not in self.reals:
            return
        for step in range(len(self.found.inside.get(op, ())), count):
            self.found.inside.setdefault(op, []).append(Site(f"{node.path}/{step}", wide))

    def put(self, node: Any, sites: list[Site | None]) -> None:
        self.found.outputs.setdefault(node.op, sites)
        self.at.update(zip(node.outputs, sites, strict=True))

    def follower(self, node: Any) -> Any:
        """The only operation that reads this one's result, where both are used once."""
        users = self.users.get(node.outputs[0], ())
        if len(node.outputs) != 1 or len(users) != 1 or node.outputs[0] in self.exits:
            return None
        once = self.times[node.op] == 1 and self.times[users[0].op] == 1
        return users[0].op if once else None


def _of_one(node: Any) -> bool:
    """True for an average of single values that leaves the shape as it is, which the converter drops."""
    if not name_of(node.op).startswith("GlobalAveragePooling") or not node.op.keepdims:
        return False
    spatial = node.tensors[0].shape[1:-1] if node.op.data_format == "channels_last" else node.tensors[0].shape[2:]
    return all(size == 1 for size in spatial)


def affine(layer: Any) -> list[tuple[str, np.ndarray]]:
    """The steps of a rescaling or a normalization in the file, which has none for a factor of 1 or a shift of 0.

    Returns:
      Names of the operations, and float32 numbers that they take.
    """

    def numbers(value: Any) -> np.ndarray:
        return np.asarray(keras.ops.convert_to_numpy(value), np.float32)

    if name_of(layer) == "Rescaling":
        steps = [("multiply", numbers(layer.scale)), ("add", numbers(layer.offset))]
    else:
        mean = numbers(layer.mean)
        deviation = np.maximum(np.sqrt(numbers(layer.variance)), np.float32(keras.config.epsilon()))
        inverse = [("multiply", deviation), ("add", mean)]
        steps = inverse if layer.invert else [("subtract", mean), ("multiply", 1 / deviation)]
    return [(name, values) for name, values in steps if (values != (1 if name == "multiply" else 0)).any()]


def _normalizes(follower: Any, op: Any) -> bool:
    if name_of(follower) != "BatchNormalization" or getattr(op, "lora_enabled", False):
        return False
    return follower.axis in (-1, getattr(op, "rank", 0) + 1) or name_of(op) == "Dense"


def _fused(follower: Any) -> bool:
    return type(follower).__name__ in ACTIVE and activation_of(follower) in ("relu", "relu6")


def fixed_range(activation: str, bits: int) -> tuple[float, float] | None:
    """The range on which the kernel of an activation writes, None where the values decide."""
    return None if activation not in _FIXED else _FIXED[activation] if bits == 8 else _FIXED_16
