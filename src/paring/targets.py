"""What each runtime gains from zeros: by operator, data type and pattern, as data; and how much, as a small model of time.

Only one kind of runtime skips zeros on x86: LiteRT with paring's delegate (`paring.delegate_path`). The others are here
so that nobody prunes for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from paring.errors import InputError
from paring.graph import Op
from paring.layer import Layer, layer_of
from paring.patterns import UNSTRUCTURED

KINDS = ("dense", "conv2d", "matmul")
"""Kinds of operators whose zeros some runtime skips."""

WORTH = 1.15
"""Predicted speed-up at 90 % zeros below which a layer is not worth pruning."""

NEAR = 0.85
"""Share of the fastest pattern's speed-up that is good enough for a finer pattern, which costs less accuracy."""

LEAST = 1024
"""Weights below which a layer is left alone: calling a kernel takes as long as running it."""

THRESHOLD = 0.6
"""Share of zeros below which the delegate does not look at a layer, unless told otherwise (`sparsity_threshold`)."""

LARGE = 8e6
"""Bytes of one layer's weights from which on a network of them no longer fits the third-level cache of a core's share."""

USUAL = 0.9
"""Share of zeros at which patterns are compared, and for which a layer's possible gain is told."""


@dataclass(frozen=True)
class Kernel:
    """What one sparse kernel reaches on one thread. Cycles are those of the machine that the rates were measured on.

    Attributes:
      dtype: `float32`, `int8` (activations too) or `dynamic-int8` (float activations).
      pattern: The zeros that it skips: `16x1` (outputs x inputs) and the like, or `unstructured`.
      macs: Multiply-adds per cycle on the weights it reads (zeros inside of blocks included), 0 where we have not measured.
      fixed: Cycles per output element beside these: its share of layout changes, bias, activation, rounding.
      bandwidth: Bytes of packed weights per cycle that it reads from beyond the L2 cache.
      bytes: Of one stored weight, with its share of the index.
      start: Cycles to begin.
      kinds: Of operators.
      pointwise: Only layers whose kernel is 1x1 with stride 1.
      positions: Least and most output pixels (or rows) that it is meant for.
    """

    dtype: str
    pattern: str
    macs: float = 0.0
    fixed: float = 0.0
    bandwidth: float = 1.0
    bytes: float = 4.0
    start: float = 0.0
    kinds: tuple[str, ...] = KINDS
    pointwise: bool = False
    positions: tuple[int, int] = (1, 2**40)

    def serves(self, layer: Layer) -> bool:
        """Whether it runs such a layer."""
        low, high = self.positions
        able = self.dtype == layer.dtype and layer.kind in self.kinds and low <= layer.positions <= high
        return able and (layer.pointwise or not self.pointwise)

    def cycles(self, layer: Layer, stored: float) -> float:
        """Cycles of one run where it reads the share `stored` of the weights."""
        work = layer.results * (layer.depth * stored / self.macs + self.fixed)
        return self.start + max(work, layer.weights * stored * self.bytes / self.bandwidth)


@dataclass(frozen=True)
class Dense:
    """What XNNPACK reaches with every weight, in the same cycles.

    Attributes:
      macs: Multiply-adds per cycle.
      spatial: The same where the kernel is larger than 1x1.
      bandwidth: Bytes of weights per cycle from beyond the L2 cache.
      fixed: Cycles per output element.
      start: Cycles to begin.
      bytes: Of one weight.
      memory: Bytes of weights per cycle of layers that are `LARGE`.
    """

    macs: float
    spatial: float
    bandwidth: float
    fixed: float = 0.0
    start: float = 0.0
    bytes: float = 4.0
    memory: float = 8.2

    def cycles(self, layer: Layer) -> float:
        """Cycles of one run."""
        work = layer.results * (layer.depth / (self.macs if layer.taps == 1 else self.spatial) + self.fixed)
        size = layer.weights * self.bytes
        return self.start + max(work, size / (self.memory if size > LARGE else self.bandwidth))


@dataclass(frozen=True)
class Target:
    """A runtime on a kind of machine.

    Attributes:
      name: What `--target` takes.
      summary: What it gains, a sentence.
      nothing: Why no layer gains; empty where some do.
      kernels: Its sparse kernels.
      dense: What they are compared with, by dtype.
    """

    name: str
    summary: str
    nothing: str = ""
    kernels: tuple[Kernel, ...] = ()
    dense: Mapping[str, Dense] = field(default_factory=dict)


def find(name: str) -> Target:
    """The target of that name.

    Raises:
      InputError: There is none; the message lists them.

    >>> find("edge-tpu").kernels
    ()
    """
    if name not in TARGETS:
        raise InputError("unknown target", where=name, expected=f"one of {', '.join(TARGETS)}")
    return TARGETS[name]


def sparse_choice(
    target: str, op: Op, weight_shape: Sequence[int], positions: int, dtype: str
) -> tuple[str | None, str]:
    """The pattern of zeros that pays for an operator on a target.

    Args:
      target: A name of `TARGETS`.
      op: The operator.
      weight_shape: Of its weights, outputs first: OHWI or [outputs, inputs].
      positions: Output pixels, or rows, of one run.
      dtype: As the model will run: `float32`, `int8` (activations too) or `dynamic-int8` (float activations).

    Returns:
      The pattern and what to expect of it; or None and why no pattern pays.

    Raises:
      InputError: Unknown target.

    >>> op = Op((0, 0), "fc", "dense", "FULLY_CONNECTED", (), ())
    >>> sparse_choice("x86-avx512", op, (1024, 1024), 1, "float32")[0] in ("16x1", "8x1")
    True
    >>> sparse_choice("litert-x86", op, (1024, 1024), 1, "float32")[1]
    'XNNPACK turns its sparse kernels off on every x86 with AVX'
    """
    return choose(find(target), layer_of(op, weight_shape, positions, dtype))


def choose(target: Target, layer: Layer) -> tuple[str | None, str]:
    """As `sparse_choice`, for a layer."""
    if reason := _refusal(target, layer):
        return None, reason
    able = [kernel for kernel in target.kernels if kernel.serves(layer)]
    if not able:
        return None, f"no sparse kernel for {layer.kind} of this shape"
    found = {kernel.pattern: speed_up(target, layer, {kernel.pattern: 1 - USUAL}) for kernel in able}
    gains = {pattern: gain for pattern, gain in found.items() if gain is not None}
    if not gains:
        return able[0].pattern, "how much it gains is not measured"
    best = max(gains.values())
    if best < WORTH:
        return None, f"little work: {best:.1f} times as fast at {USUAL:.0%} zeros"
    pattern = next(p for p in sorted(gains, key=_fineness) if gains[p] >= NEAR * best)
    return pattern, f"{gains[pattern]:.1f} times as fast at {USUAL:.0%} zeros"


def predict(
    target: str, op: Op, weight_shape: Sequence[int], positions: int, dtype: str, pattern: str, sparsity: float
) -> float | None:
    """How many times as fast an operator is expected to run as the same one on the runtime's dense kernels.

    One thread, weights that come from beyond the L2 cache, as in a model with several layers.

    Args:
      target: A name of `TARGETS`.
      op: The operator.
      weight_shape: Of its weights, outputs first: OHWI or [outputs, inputs].
      positions: Output pixels, or rows, of one run.
      dtype: See `sparse_choice`.
      pattern: The pattern that the zeros form.
      sparsity: Share of zeros.

    Returns:
      1.0 where nothing takes it (the layer then stays where it is); None where zeros help and we have not measured how much.

    Raises:
      InputError: Unknown target.

    >>> op = Op((0, 0), "fc", "dense", "FULLY_CONNECTED", (), ())
    >>> 6 < predict("x86-avx512", op, (1024, 1024), 1, "float32", "16x1", 0.9) < 12
    True
    >>> predict("litert-x86", op, (1024, 1024), 1, "float32", "16x1", 0.9)
    1.0
    """
    stored = {pattern: 1 - sparsity, UNSTRUCTURED: 1 - sparsity}
    return speed_up(find(target), layer_of(op, weight_shape, positions, dtype), stored)


def speed_up(target: Target, layer: Layer, stored: Mapping[str, float]) -> float | None:
    """How many times as fast the best kernel is expected to be: 1.0 where dense is better, None where not measured.

    Args:
      target: The target.
      layer: The layer.
      stored: By pattern: the share of the weights that a kernel of this pattern has to read (`patterns.Found.stored`).
        Kernels of other patterns are not considered.
    """
    if _refusal(target, layer) or min(stored.values(), default=1.0) > 1 - THRESHOLD:
        return 1.0
    able = [kernel for kernel in target.kernels if kernel.serves(layer) and kernel.pattern in stored]
    if not all(kernel.macs for kernel in able):
        return None
    return max([1.0, *(target.dense[layer.dtype].cycles(layer) / k.cycles(layer, stored[k.pattern]) for k in able)])


def _refusal(target: Target, layer: Layer) -> str:
    """Why a layer gains nothing whatever its zeros; empty where it may."""
    if target.nothing:
        return target.nothing
    if layer.kind == "depthwise_conv2d":
        return "depthwise: a handful of weights per channel"
    if layer.kind not in KINDS:
        return f"no sparse kernel for {layer.kind}"
    if layer.groups > 1:
        return "grouped: its channels do not see each other"
    if not any(kernel.dtype == layer.dtype for kernel in target.kernels):
        served = sorted({kernel.dtype for kernel in target.kernels})
        return f"no sparse kernel for {layer.dtype}, only for {', '.join(served)}"
    if layer.inputs < 4:
        return f"few input channels ({layer.inputs})"
    if layer.weights < LEAST:
        return f"few weights ({layer.weights})"
    return ""


def _fineness(pattern: str) -> tuple[int, str]:
    """Sorts patterns from fine to coarse."""
    return (1 if pattern == UNSTRUCTURED else prod(int(n) for n in pattern.split("x")), pattern)


# -- the table ---------------------------------------------------------------------------------------------------------

# Fitted to chains of four layers in stock LiteRT, with the delegate and without, run by run in turns on one thread of a Zen 4
# server core (shapes of docs/performance.md and as many others; 64 to 2048 channels, 1 to 3136 positions, 70 to 90 % zeros):
# benchmarks/sparse.py says how far off they are. Least sure is where few rows meet weights from a cache that others use, too.
# Where the delegate takes another kernel than the pattern's own, the row says what it makes of the pattern. Cycles are
# 1 / 3.5 ns. The core's peak is 16 float32 and 64 int8 multiply-adds per cycle, with AVX2 as with AVX-512; Intel's AVX-512
# cores have twice that, dense and sparse alike.
_ANY = 2**40
_WHERE: dict[str, dict[str, Any]] = {
    "few": {"positions": (1, 32)},
    "rows": {"positions": (33, _ANY), "kinds": ("dense", "matmul")},
    "images": {"positions": (33, _ANY), "kinds": ("conv2d",)},
}


def _kernel(
    dtype: str, where: str, pattern: str, macs: float, fixed: float, bandwidth: float, start: float = 2000
) -> Kernel:
    area = 1 if pattern == UNSTRUCTURED else prod(int(n) for n in pattern.split("x"))
    size = (4.0 if dtype == "float32" else 1.0) + 2 / area  # an index of two bytes for each block
    return Kernel(dtype, pattern, macs, fixed, bandwidth, size, start, **_WHERE[where])


_AVX512 = tuple(
    _kernel("float32", *row)
    for row in (
        ("few", "16x1", 12.4, 1.1, 10.7, 7200),
        ("few", "8x1", 10.6, 3.3, 9.9, 9500),
        ("few", "4x1", 6.8, 0.3, 9.1, 24000),
        ("few", UNSTRUCTURED, 2.2, 1.0, 4.9, 88000),
        ("rows", "16x1", 16.2, 0.6, 1.0),
        ("rows", "8x1", 13.8, 1.2, 0.8),
        ("rows", "4x1", 6.5, 0.4, 1.0),
        ("rows", UNSTRUCTURED, 2.0, 1.6, 1.0),
        ("images", "16x1", 14.0, 0.3, 0.9),
        ("images", "8x1", 14.2, 0.4, 0.7),
        ("images", "4x1", 14.1, 0.3, 1.0),
        ("images", UNSTRUCTURED, 9.3, 0.15, 0.9),
    )
)
_AVX2 = tuple(
    _kernel("float32", *row)
    for row in (
        ("few", "16x1", 10.2, 0.1, 12.2, 5400),
        ("few", "8x1", 10.1, 2.3, 10.7, 10000),
        ("few", "4x1", 5.6, 3.2, 8.5, 20000),
        ("few", UNSTRUCTURED, 1.9, 1.0, 5.1, 73000),
        ("rows", "16x1", 15.0, 0.5, 1.0),
        ("rows", "8x1", 12.6, 1.0, 1.0),
        ("rows", "4x1", 6.6, 1.2, 1.0),
        ("rows", UNSTRUCTURED, 1.8, 1.0, 1.0),
        ("images", "16x1", 13.2, 0.4, 0.7),
        ("images", "8x1", 12.1, 0.9, 0.8),
        ("images", "4x1", 12.3, 0.9, 0.8),
        ("images", UNSTRUCTURED, 8.5, 0.8, 0.7),
    )
)
_VNNI = tuple(
    _kernel(*row)
    for row in (
        ("int8", "few", "16x4", 86.0, 0.3, 12.1, 1600),
        ("int8", "few", "4x4", 38.0, 1.5, 8.7, 7400),
        ("int8", "rows", "16x4", 70.0, 0.4, 8.0),
        ("int8", "rows", "4x4", 31.7, 1.1, 8.0),
        ("int8", "images", "16x4", 65.6, 0.4, 8.0),
        ("int8", "images", "4x4", 24.7, 0.7, 8.0),
        ("dynamic-int8", "few", "16x4", 75.5, 0.6, 11.5, 7000),
        ("dynamic-int8", "few", "4x4", 32.6, 1.2, 8.5, 18000),
        ("dynamic-int8", "rows", "16x4", 69.7, 1.2, 8.0),
        ("dynamic-int8", "rows", "4x4", 31.2, 1.9, 8.0),
    )
)
# Without VNNI our kernels were measured, but what they are compared with was not: XNNPACK takes VNNI where it is. Its rate
# is taken to be that of our own kernel, which is the same instructions without zeros.
_NO_VNNI = tuple(
    _kernel(*row)
    for row in (
        ("int8", "few", "16x4", 23.0, 0.1, 14.3, 9000),
        ("int8", "rows", "16x4", 20.0, 1.0, 8.0),
        ("int8", "images", "16x4", 20.5, 1.6, 8.0),
        ("dynamic-int8", "few", "16x4", 20.5, 0.1, 11.9, 16000),
        ("dynamic-int8", "rows", "16x4", 20.2, 1.6, 8.0),
    )
)
_FLOAT = Dense(macs=15.5, spatial=15.0, bandwidth=12.0)
_INT8 = Dense(macs=62.4, spatial=63.9, bandwidth=12.0, fixed=0.4, bytes=1.0)
_DYNAMIC = Dense(macs=60.0, spatial=62.0, bandwidth=12.0, fixed=0.3, start=350, bytes=1.0)
_SLOW = {name: replace(dense, macs=20.0, spatial=20.0) for name, dense in (("int8", _INT8), ("dynamic-int8", _DYNAMIC))}
_DENSE_VNNI = {"float32": _FLOAT, "int8": _INT8, "dynamic-int8": _DYNAMIC}
_DENSE = {"float32": _FLOAT, **_SLOW}

_OURS = "LiteRT with paring's delegate, "

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("x86-avx512vnni", _OURS + "AVX-512 with VNNI", "", _AVX512 + _VNNI, _DENSE_VNNI),
        Target("x86-avx512", _OURS + "AVX-512", "", _AVX512 + _NO_VNNI, _DENSE),
        Target("x86-avx2vnni", _OURS + "AVX2 with VNNI", "", _AVX2 + _VNNI, _DENSE_VNNI),
        Target("x86-avx2", _OURS + "AVX2", "", _AVX2 + _NO_VNNI, _DENSE),
        # XNNPACK, "Disable sparse graph rewriting on x86 with AVX+" (2020), and measured: 90 % zeros run as fast as none.
        Target(
            "litert-x86",
            "LiteRT as it is, on x86: nothing",
            "XNNPACK turns its sparse kernels off on every x86 with AVX",
        ),
        # tensorflow/lite/delegates/xnnpack/README.md, "Sparse Inference"; its kernels f32-spmm 32x1, 32x2 and 32x4.
        # Whole networks ran 1.2 to 2.4 times as fast (Google, "Accelerating Neural Networks on Mobile and Web", 2021).
        Target(
            "litert-arm",
            "LiteRT as it is, on Arm: 1x1 convolutions with two thirds zeros at least, stored sparse (--storage sparse), in a "
            "network that begins with a 3x3 convolution of stride 2 over 3 channels and ends with a mean over the image; not "
            "measured by us, 1.2 to 2.4 times for whole networks as published",
            kernels=(
                Kernel("float32", "4x1", kinds=("conv2d",), pointwise=True),
                Kernel("float32", UNSTRUCTURED, kinds=("conv2d",), pointwise=True),
            ),
        ),
        # TensorFlow's MatMul and Conv2D have dense weights only.
        Target(
            "savedmodel",
            "a SavedModel in stock TensorFlow: nothing; with --runtime native its kernels are those of the x86 targets",
            "stock TensorFlow multiplies with every weight",
        ),
        # coral.ai/docs/edgetpu/models-intro: fully int8 models, compiled; DENSIFY is not among the operators it lists.
        Target(
            "edge-tpu",
            "the Edge TPU: nothing",
            "the Edge TPU multiplies with every weight, and takes neither float nor sparse-encoded weights",
        ),
        # ai.google.dev/edge/litert/performance/gpu, "Supported ops": dense kernels; no DENSIFY.
        Target(
            "gpu-delegate",
            "LiteRT's GPU delegate: nothing",
            "the GPU delegate multiplies with every weight, and does not take sparse-encoded ones",
        ),
        # github.com/tensorflow/tflite-micro: no DENSIFY (issue 491), static tensors have no field for sparsity (2944);
        # tensorflow/lite/micro/docs/compression.md: tables of few values save storage, and decoding takes time.
        Target(
            "microcontroller",
            "LiteRT for Microcontrollers: no speed; a smaller file where updates are compressed",
            "LiteRT for Microcontrollers multiplies with every weight, and does not run sparse-encoded ones",
        ),
    )
}
