"""Small models with zeros in their weights, in every form in which a `.tflite` file may hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from models import Net, Options

from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.schema import ENUMS
from paring.graph import Quantization

FC: Options = ("FullyConnectedOptions", {"fused_activation_function": 1})
ADD: Options = ("AddOptions", {"fused_activation_function": 1})
RESHAPE: Options = ("ReshapeOptions", {})


def conv(stride: int = 1, dilation: int = 1, valid: bool = False, activation: int = 0) -> Options:
    """Options of a CONV_2D."""
    return "Conv2DOptions", {
        "padding": int(valid), "stride_h": stride, "stride_w": stride, "fused_activation_function": activation,
        "dilation_h_factor": dilation, "dilation_w_factor": dilation,
    }  # fmt: skip


def depthwise(stride: int = 1, valid: bool = False) -> Options:
    """Options of a DEPTHWISE_CONV_2D with RELU6."""
    return "DepthwiseConv2DOptions", {
        "padding": int(valid), "stride_h": stride, "stride_w": stride, "depth_multiplier": 1,
        "fused_activation_function": 3, "dilation_h_factor": 1, "dilation_w_factor": 1,
    }  # fmt: skip


def sparse(*shape: int, rows: int = 16, zeros: float = 0.94, seed: int = 0) -> np.ndarray:
    """Random float32 weights whose zeros come in blocks of `rows` neighbours along the first dimension."""
    rng = np.random.default_rng([seed, *shape])
    groups = -(-shape[0] // rows)
    keep = np.repeat(rng.random((groups, *shape[1:])) >= zeros, rows, axis=0)[: shape[0]]
    return (rng.standard_normal(shape) * keep / np.sqrt(np.prod(shape[1:]) * (1 - zeros))).astype(np.float32)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    """Random float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integers(weights: np.ndarray, per_channel: bool) -> tuple[np.ndarray, Quantization]:
    """Symmetric int8 codes along the first dimension, and their grid."""
    axes = tuple(range(1, weights.ndim)) if per_channel else None
    scale = np.maximum(np.abs(weights).max(axes), 1e-3).reshape(-1).astype(np.float32) / 127
    codes = np.round(weights / scale.reshape((-1,) + (1,) * (weights.ndim - 1))).astype(np.int8)
    return codes, Quantization(scale, np.zeros(scale.shape, np.int64), "int8", 0 if per_channel else None)


def on_grid(net: Net, values: np.ndarray, grid: Quantization | None) -> int:
    """A constant on a grid."""
    return net.tensor(values.shape, str(values.dtype), grid=grid, buffer=net.draft.buffer(values))


def grid(scale: float, zero: int = 0) -> Quantization:
    """An int8 grid of a whole tensor."""
    return Quantization(np.array([scale], np.float32), np.array([zero], np.int64), "int8")


def encoded(net: Net, values: np.ndarray, block: int = 1, quantization: Quantization | None = None) -> int:
    """A constant in LiteRT's sparse encoding: all dimensions dense but the last, compressed in blocks."""
    shape = values.shape
    flat = values.reshape(-1, shape[-1] // block, block)
    there = (flat != 0).any(2)
    segments = np.concatenate([[0], there.sum(1).cumsum()]).astype(np.int32)
    indices = np.nonzero(there)[1].astype(np.int32)
    kind = ENUMS["SparseIndexVector"]["Int32Vector"]
    levels = [Table("DimensionMetadata", format=0, dense_size=size) for size in shape[:-1]]
    levels.append(
        Table("DimensionMetadata", format=1, dense_size=0, array_segments_type=kind, array_indices_type=kind,
              array_segments=Table("Int32Vector", values=segments), array_indices=Table("Int32Vector", values=indices))
    )  # fmt: skip
    order = list(range(len(shape)))
    if block > 1:
        levels.append(Table("DimensionMetadata", format=0, dense_size=block))
        order.append(len(shape))
    tensor = net.tensor(shape, str(values.dtype), grid=quantization, buffer=net.draft.buffer(flat[there]))
    net.graph.tensors[tensor].sparsity = Table(
        "SparsityParameters", traversal_order=np.array(order, np.int32), dim_metadata=levels,
        block_map=np.array([len(shape) - 1] if block > 1 else [], np.int32),
    )  # fmt: skip
    return tensor


def behind(net: Net, native: str, tensor: int, dtype: str) -> int:
    """The result of a DENSIFY or DEQUANTIZE."""
    result = net.tensor(net.graph.tensors[tensor].shape, dtype)
    net.op(native, [tensor], [result], (("DequantizeOptions" if native == "DEQUANTIZE" else "DensifyOptions"), {}))
    return result


# -- models with one product -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model whose products all have zeros.

    Attributes:
      name: Says what is special.
      build: Fills an empty net.
      exact: Integers, or floats computed from them: equal to XNNPACK bit for bit.
    """

    name: str
    build: Callable[[Net], None]
    exact: bool = False

    def bytes(self) -> bytes:
        """The model."""
        net = Net()
        self.build(net)
        return net.finish().to_bytes()


def _dense(
    shape: tuple[int, ...],
    options: Options = FC,
    bias: bool = True,
    weights: Callable[[Net], int] | None = None,
    version: int = 1,
) -> Callable[[Net], None]:
    def build(net: Net) -> None:
        x = net.input(shape)
        w = weights(net) if weights else net.constant(sparse(1024, 512))
        out = (*shape[:-1], 1024) if options[1].get("keep_num_dims") else (int(np.prod(shape)) // 512, 1024)
        y = net.tensor(out)
        net.op("FULLY_CONNECTED", [x, w, net.constant(normal(1024)) if bias else -1], [y], options, version)
        net.outputs = [y]

    return build


def _image(
    kernel: int, options: Options, side: int, after: int, channels: tuple[int, int] = (64, 96), batch: int = 1
) -> Callable[[Net], None]:
    def build(net: Net) -> None:
        x = net.input((batch, side, side, channels[0]))
        w = net.constant(sparse(channels[1], kernel, kernel, channels[0]))
        net.outputs = [
            net.then("CONV_2D", [x, w, net.constant(normal(channels[1]))], (batch, after, after, channels[1]), options)
        ]

    return build


def _matmul(x: tuple[int, ...], weights: tuple[int, ...], adj_y: bool) -> Callable[[Net], None]:
    def build(net: Net) -> None:
        k, n = weights[-2:]
        batch = int(np.prod(weights[:-2]))
        w = np.stack([sparse(n, k, seed=i).T for i in range(batch)]).reshape(weights)
        w = np.swapaxes(w, -1, -2) if adj_y else w
        options = ("BatchMatMulOptions", {"adj_x": False, "adj_y": adj_y})
        net.outputs = [
            net.then("BATCH_MATMUL", [net.input(x), net.constant(np.ascontiguousarray(w))], (*x[:-1], n), options)
        ]

    return build


def _static(kernel: int | None, per_channel: bool, activation: int = 0) -> Callable[[Net], None]:
    def build(net: Net) -> None:
        codes, scales = integers(sparse(1024, 512) if kernel is None else sparse(96, kernel, kernel, 64), per_channel)
        x_grid, y_grid = grid(0.03, 4), grid(0.04, -9)
        x = net.tensor((3, 512) if kernel is None else (1, 20, 20, 64), "int8", grid=x_grid)
        y = net.tensor((3, 1024) if kernel is None else (1, 20, 20, 96), "int8", grid=y_grid)
        bias = np.round(normal(len(codes)) * 300).astype(np.int32)
        bias_scale = (x_grid.scale * scales.scale).astype(np.float32)
        b = on_grid(net, bias, Quantization(bias_scale, np.zeros(bias_scale.shape, np.int64), "int32", scales.axis))
        inputs, native = [x, on_grid(net, codes, scales), b], "FULLY_CONNECTED" if kernel is None else "CONV_2D"
        options = (
            ("FullyConnectedOptions", {"fused_activation_function": activation})
            if kernel is None
            else conv(activation=activation)
        )
        net.op(native, inputs, [y], options, 4 if kernel is None else 3)
        net.inputs, net.outputs = [x], [y]

    return build


def _dynamic(kernel: int | None, batch: int) -> Callable[[Net], None]:
    def build(net: Net) -> None:
        codes, scales = integers(sparse(1024, 512) if kernel is None else sparse(96, kernel, kernel, 64), True)
        x = net.input((batch, 512) if kernel is None else (batch, 20, 20, 64))
        y = net.tensor((batch, 1024) if kernel is None else (batch, 20, 20, 96))
        inputs = [x, on_grid(net, codes, scales), net.constant(normal(len(codes)))]
        options = ("FullyConnectedOptions", {"asymmetric_quantize_inputs": True}) if kernel is None else conv()
        net.op("FULLY_CONNECTED" if kernel is None else "CONV_2D", inputs, [y], options, 12 if kernel is None else 5)
        net.outputs = [y]

    return build


def _dynamic_matmul(adj_y: bool, per_channel: bool) -> Callable[[Net], None]:
    def build(net: Net) -> None:
        codes, scales = integers(sparse(768, 512), per_channel)
        axis = None if not per_channel else 0 if adj_y else 1
        w = codes if adj_y else np.ascontiguousarray(codes.T)
        y, x = net.tensor((2, 6, 768)), net.input((2, 6, 512))
        options = ("BatchMatMulOptions", {"adj_x": False, "adj_y": adj_y})
        net.op("BATCH_MATMUL", [x, on_grid(net, w, replace(scales, axis=axis))], [y], options, 4)
        net.outputs = [y]

    return build


def _half(net: Net) -> int:
    return behind(net, "DEQUANTIZE", net.constant(sparse(1024, 512).astype(np.float16)), "float32")


def _encoded(net: Net) -> int:
    return encoded(net, np.repeat(sparse(1024, 128), 4, axis=1), 4)


def _densified(net: Net) -> int:
    return behind(net, "DENSIFY", encoded(net, sparse(1024, 512)), "float32")


def _densified_half(net: Net) -> int:
    return behind(
        net,
        "DEQUANTIZE",
        behind(net, "DENSIFY", encoded(net, sparse(1024, 512).astype(np.float16)), "float16"),
        "float32",
    )


def _weight_only(net: Net) -> int:
    codes, scales = integers(sparse(1024, 512), True)
    return behind(net, "DEQUANTIZE", on_grid(net, codes, scales), "float32")


KEEP: Options = ("FullyConnectedOptions", {"keep_num_dims": True})
CASES = [
    Case("dense", _dense((1, 512))),
    Case("dense-rows", _dense((7, 512), bias=False)),
    Case("dense-rank-3", _dense((2, 3, 512), KEEP)),
    Case("dense-flattened", _dense((2, 2, 256))),
    Case("dense-float16", _dense((1, 512), weights=_half)),
    Case("dense-densify", _dense((1, 512), weights=_densified)),
    Case("dense-densify-float16", _dense((1, 512), weights=_densified_half)),
    Case("dense-weight-only-int8", _dense((1, 512), weights=_weight_only)),
    Case("dense-encoded", _dense((1, 512), weights=_encoded, version=8)),
    Case("conv-1x1", _image(1, conv(activation=1), 28, 28)),
    Case("conv-1x1-stride", _image(1, conv(2, activation=3), 29, 15)),
    Case("conv-3x3", _image(3, conv(activation=2), 17, 17)),
    Case("conv-3x3-stride", _image(3, conv(2), 20, 10, batch=2)),
    Case("conv-3x3-dilation-valid", _image(3, conv(1, 2, valid=True), 18, 14, (48, 40))),
    Case("matmul", _matmul((1, 6, 512), (512, 768), False)),
    Case("matmul-transposed", _matmul((2, 5, 512), (1, 512, 768), True)),
    Case("matmul-several", _matmul((2, 3, 512), (2, 512, 768), False)),
    Case("int8-dense", _static(None, False), exact=True),
    Case("int8-dense-relu", _static(None, True, 1), exact=True),
    Case("int8-conv-1x1", _static(1, True, 1), exact=True),
    Case("int8-conv-3x3", _static(3, True), exact=True),
    Case("dynamic-dense", _dynamic(None, 1), exact=True),
    Case("dynamic-dense-rows", _dynamic(None, 5), exact=True),
    Case("dynamic-matmul", _dynamic_matmul(False, True), exact=True),
    Case("dynamic-matmul-transposed", _dynamic_matmul(True, False), exact=True),
    Case("dynamic-conv-1x1", _dynamic(1, 1), exact=True),
    Case("dynamic-conv-3x3", _dynamic(3, 2), exact=True),
]  # fmt: skip


def mobile(net: Net, pad: bool = True) -> None:
    """Pointwise and depthwise convolutions with a residual: what stays in planes between its sparse products."""
    x = net.input((1, 24, 24, 32))
    a = net.then(
        "CONV_2D",
        [x, net.constant(sparse(96, 1, 1, 32, rows=4)), net.constant(normal(96))],
        (1, 24, 24, 96),
        conv(activation=3),
    )
    if pad:
        wide = net.then(
            "PAD",
            [a, net.constant(np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))],
            (1, 26, 26, 96),
            ("PadOptions", {}),
        )
    d = net.then(
        "DEPTHWISE_CONV_2D",
        [wide if pad else a, net.constant(normal(1, 3, 3, 96)), net.constant(normal(96))],
        (1, 24, 24, 96),
        depthwise(valid=pad),
    )
    p = net.then(
        "CONV_2D", [d, net.constant(sparse(96, 1, 1, 96, rows=1)), net.constant(normal(96))], (1, 24, 24, 96), conv()
    )
    r = net.then("ADD", [p, a], (1, 24, 24, 96), ADD, name="residual")
    y = net.then(
        "CONV_2D",
        [r, net.constant(sparse(64, 3, 3, 96, rows=1)), net.constant(normal(64))],
        (1, 12, 12, 64),
        conv(2, activation=1),
    )
    net.outputs = [y, r]
