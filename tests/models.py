"""Small models on paring's own writer, without TensorFlow: `Net` builds one, `CASES` has one or more for each operator.

A case is one operator with real-valued operands, constants and results. `build` puts it between others: an ADD before
every real operand and a MUL behind every real result, so that grids have somewhere to come from and somewhere to go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from paring.compress.base import Encoded
from paring.formats.tflite.draft import Draft
from paring.formats.tflite.flatbuffer import Table
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.operators import TABLE
from paring.graph import Quantization

Options = tuple[str, dict[str, Any]]


class Net:
    """A model under construction, one subgraph; tensors are known by their index."""

    def __init__(self) -> None:
        none = np.zeros(0, np.int32)
        graph = Table("SubGraph", name="main", tensors=[], operators=[], inputs=none, outputs=none)
        root = Table(
            "Model", version=3, description="test", subgraphs=[graph], operator_codes=[], buffers=[Table("Buffer")]
        )
        self.draft = Draft(TfliteModel(root, memoryview(b""), "<test>"))
        self.graph = self.draft.subgraphs[0]
        self.inputs: list[int] = []
        self.outputs: list[int] = []

    def tensor(
        self,
        shape: Sequence[int],
        dtype: str = "float32",
        name: str = "",
        *,
        grid: Quantization | None = None,
        buffer: int = 0,
    ) -> int:
        like = Table("Tensor", shape=np.array(shape, np.int32))
        return self.draft.tensor(0, like, name or f"t{len(self.graph.tensors)}", dtype, grid, buffer)

    def input(self, shape: Sequence[int], dtype: str = "float32", name: str = "") -> int:
        self.inputs.append(self.tensor(shape, dtype, name))
        return self.inputs[-1]

    def constant(self, values: Any, name: str = "") -> int:
        values = np.asarray(values)
        return self.tensor(values.shape, str(values.dtype), name, buffer=self.draft.buffer(values))

    def encoded(self, encoded: Encoded, name: str = "") -> int:
        like = Table("Tensor", shape=np.array(encoded.values.shape, np.int32))
        return self.draft.constant(0, like, name or f"t{len(self.graph.tensors)}", encoded)

    def variable(self, shape: Sequence[int], name: str = "") -> int:
        index = self.tensor(shape, "float32", name)
        self.graph.tensors[index].is_variable = True
        return index

    def op(
        self,
        native: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: Options | None = None,
        version: int = 0,
    ) -> None:
        table = Table(options[0], **options[1]) if options is not None else None
        version = version or (TABLE[native].versions["float"] if native in TABLE else 1)
        self.graph.operators.append(self.draft.operator(native, version, list(inputs), list(outputs), table))

    def then(
        self, native: str, inputs: Sequence[int], shape: Sequence[int], options: Options | None = None, name: str = ""
    ) -> int:
        """One operator with one float result -> the result."""
        result = self.tensor(shape, name=name)
        self.op(native, inputs, [result], options)
        return result

    def stored(self, source: int, grid: Quantization, name: str = "") -> int:
        """A QUANTIZE onto `grid` -> its result."""
        result = self.tensor(self.graph.tensors[source].shape, grid.dtype, name, grid=grid)
        self.op("QUANTIZE", [source], [result], ("QuantizeOptions", {}))
        return result

    def finish(self) -> TfliteModel:
        self.graph.inputs = np.array(self.inputs, np.int32)
        self.graph.outputs = np.array(self.outputs, np.int32)
        return TfliteModel.parse(memoryview(self.draft.finish().to_bytes()), "<test>")


# -- cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Real:
    """A real-valued operand behind an ADD, uniform in [low, high].

    Attributes:
      whole: Draws integers, so that comparing is exact.
      stored: A QUANTIZE to this grid stands between.
    """

    shape: tuple[int, ...]
    low: float = -2.0
    high: float = 3.0
    whole: bool = False
    stored: Quantization | None = None


@dataclass(frozen=True)
class Const:
    """A constant: a float weight, bias or operand, or integers."""

    values: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Given:
    """A model input that carries no real numbers."""

    values: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class State:
    """A variable, zero at first."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One operator in a model.

    Attributes:
      op: LiteRT's name.
      inputs: Its operands; None for one left out.
      outputs: Shapes of its results; (shape, dtype) where one carries no real numbers, (shape, grid)
        where it is stored.
      variant: What is special about it.
      version: Its version, where it needs another one than the row's float form.
      bare: Its results are the model's: no MUL behind them.
    """

    op: str
    inputs: tuple[Real | Const | Given | State | None, ...]
    outputs: tuple[Any, ...]
    options: Options | None = None
    variant: str = ""
    version: int = 0
    bare: bool = False

    @property
    def name(self) -> str:
        """The operator's name in the model."""
        return f"{self.op}/{self.variant}" if self.variant else self.op


def build(cases: Iterable[Case], samples: int = 6, seed: int = 0) -> tuple[TfliteModel, dict[str, np.ndarray]]:
    """One model with a chain for each case, and data for its inputs [samples, ...] by name."""
    net, data = Net(), {}
    for number, case in enumerate(cases):
        data.update(_chain(net, case, np.random.default_rng([seed, number]), samples))
    return net.finish(), data


def _chain(net: Net, case: Case, rng: np.random.Generator, samples: int) -> dict[str, np.ndarray]:
    data, ids = {}, []
    for position, operand in enumerate(case.inputs):
        name = f"{case.name}:{position}"
        if operand is None:
            ids.append(-1)
        elif isinstance(operand, Const):
            ids.append(net.constant(operand.values, name))
        elif isinstance(operand, State):
            ids.append(net.variable(operand.shape, name))
        elif isinstance(operand, Given):
            data[name] = np.stack([operand.values] * samples)
            ids.append(net.input(operand.values.shape, str(operand.values.dtype), name))
        else:
            shift = np.float32(1.0) if operand.whole else rng.uniform(-0.3, 0.3, operand.shape[-1:]).astype(np.float32)
            values = rng.uniform(operand.low, operand.high, (samples, *operand.shape))
            values = np.rint(values) if operand.whole else values
            values.reshape(-1)[[0, -1]] = operand.low, operand.high
            data[name] = (values - shift).astype(np.float32)
            source = net.input(operand.shape, "float32", name)
            ids.append(net.then("ADD", [source, net.constant(shift)], operand.shape, ("AddOptions", {}), f"{name}+"))
            if operand.stored is not None:
                ids[-1] = net.stored(ids[-1], operand.stored, f"{name}:stored")
    results = []
    for position, output in enumerate(case.outputs):
        shape, kind = output if len(output) == 2 and isinstance(output[1], (str, Quantization)) else (output, "float32")
        dtype, grid = (kind.dtype, kind) if isinstance(kind, Quantization) else (kind, None)
        results.append(net.tensor(shape, dtype, f"{case.name}#{position}" if position else case.name, grid=grid))
    net.op(case.op, ids, results, case.options, case.version)
    for index in results:
        table = net.graph.tensors[index]
        if table.quantization is not None:
            index = net.then("DEQUANTIZE", [index], table.shape, ("DequantizeOptions", {}), f"{table.name}:real")
        if net.graph.tensors[index].type == 0 and not case.bare:
            factor = net.constant(rng.uniform(0.5, 1.5, table.shape[-1:]).astype(np.float32))
            index = net.then("MUL", [index, factor], table.shape, ("MulOptions", {}), f"{table.name}*")
        net.outputs.append(index)
    return data


def _cases() -> dict[str, tuple[Case, ...]]:
    rng = np.random.default_rng(7)
    found: dict[str, list[Case]] = {}

    def add(
        op: str,
        inputs: Sequence[Any],
        *outputs: Any,
        options: Any = None,
        variant: str = "",
        version: int = 0,
        bare: bool = False,
    ) -> None:
        name, fields = options if isinstance(options, tuple) else (options, {})
        found.setdefault(op, []).append(
            Case(op, tuple(inputs), outputs, None if name is None else (name, fields), variant, version, bare)
        )

    def normal(*shape: int, axis: int | None = None, size: float = 0.2) -> Const:
        spread = np.exp(rng.uniform(-1, 1, [n if i == axis else 1 for i, n in enumerate(shape)]))
        return Const((rng.standard_normal(shape) * spread * size).astype(np.float32))

    def uniform(low: float, high: float, *shape: int) -> Const:
        return Const(rng.uniform(low, high, shape).astype(np.float32))

    def ints(*values: Any, dtype: str = "int32") -> Const:
        return Const(np.array(values[0] if len(values) == 1 else values, dtype))

    image, wide = (1, 6, 5, 8), (1, 6, 5, 16)
    x = Real(image)

    conv = {"stride_w": 1, "stride_h": 1}
    kernel, bias = normal(16, 3, 3, 8, axis=0), normal(16, size=0.5)
    add("CONV_2D", [x, kernel, bias], wide, options=("Conv2DOptions", conv))
    relu6 = {**conv, "fused_activation_function": 3}
    add(
        "CONV_2D",
        [x, normal(32, 1, 1, 8, axis=0), normal(32)],
        (1, 6, 5, 32),
        options=("Conv2DOptions", relu6),
        variant="relu6",
    )
    add(
        "CONV_2D",
        [x, normal(16, 3, 3, 4, axis=0), bias],
        wide,
        options=("Conv2DOptions", conv),
        variant="grouped",
        version=6,
    )
    depthwise = {**conv, "depth_multiplier": 1}
    add(
        "DEPTHWISE_CONV_2D",
        [Real((1, 6, 5, 32)), normal(1, 3, 3, 32, axis=3), normal(32)],
        (1, 6, 5, 32),
        options=("DepthwiseConv2DOptions", depthwise),
    )
    add(
        "DEPTHWISE_CONV_2D",
        [Real(wide), normal(1, 3, 3, 32, axis=3), normal(32)],
        (1, 6, 5, 32),
        options=("DepthwiseConv2DOptions", {**depthwise, "depth_multiplier": 2}),
        variant="multiplier 2",
    )
    dense = ("FullyConnectedOptions", {})
    add("FULLY_CONNECTED", [Real((3, 256)), normal(16, 256, axis=0), normal(16)], (3, 16), options=dense)
    add(
        "FULLY_CONNECTED", [Real((3, 64)), normal(16, 64, axis=0)], (3, 16), options=dense, variant="no bias", version=6
    )
    add(
        "FULLY_CONNECTED",
        [Real((3, 64)), normal(16, 64, axis=0), None],
        (3, 16),
        options=dense,
        variant="bias left out",
        version=6,
    )
    add(
        "FULLY_CONNECTED",
        [Real((2, 3, 64)), normal(16, 64, axis=0), normal(16)],
        (2, 3, 16),
        variant="keeps dimensions, relu",
        options=("FullyConnectedOptions", {"keep_num_dims": True, "fused_activation_function": 1}),
        version=5,
    )
    stretch = {"stride_w": 2, "stride_h": 2}
    up = (1, 12, 10, 16)
    add("TRANSPOSE_CONV", [ints(up), kernel, x, bias], up, options=("TransposeConvOptions", stretch))
    add("TRANSPOSE_CONV", [ints(up), kernel, x], up, options=("TransposeConvOptions", stretch), variant="no bias")
    add(
        "TRANSPOSE_CONV",
        [ints(up), kernel, x, bias],
        up,
        variant="relu",
        version=4,
        options=("TransposeConvOptions", {**stretch, "fused_activation_function": 1}),
    )
    left = Real((2, 5, 32))
    product = "BatchMatMulOptions"
    add("BATCH_MATMUL", [left, Real((2, 32, 6))], (2, 5, 6), options=product)
    add("BATCH_MATMUL", [left, Real((2, 6, 32))], (2, 5, 6), options=(product, {"adj_y": True}), variant="adj_y")
    add("BATCH_MATMUL", [left, normal(2, 32, 16)], (2, 5, 16), options=product, variant="constant")
    add("BATCH_MATMUL", [left, normal(32, 16)], (2, 5, 16), options=product, variant="constant shared by the batch")
    add(
        "BATCH_MATMUL", [left, normal(16, 32)], (2, 5, 16), options=(product, {"adj_y": True}), variant="constant adj_y"
    )
    rows = Given(np.array([3, 0, 5], np.int32))
    add("EMBEDDING_LOOKUP", [rows, normal(16, 32, axis=0)], (3, 32))
    add("GATHER", [normal(16, 32), rows], (3, 32), options="GatherOptions")
    add("GATHER", [Real((10, 8)), rows], (3, 8), options="GatherOptions", variant="activation")

    units, features, steps = 16, 12, 20

    def gates(inputs: int, outputs: int, size: float, dropped: tuple[int, ...] = ()) -> list[Const | None]:
        return [None if k in dropped else uniform(-size, size, outputs, inputs) for k in range(4)]

    def lstm(batch: int, projected: int = 0, cifg: bool = False, extra: Mapping[int, Const] | None = None) -> list[Any]:
        left_out = (0,) if cifg else ()
        seen = projected or units
        ports = [*gates(features, units, 0.6, left_out), *gates(seen, units, 0.4, left_out), None, None, None]
        ports += [None if k in left_out else uniform(-0.3, 0.3, units) for k in range(4)]
        ports += [uniform(-0.5, 0.5, projected, units) if projected else None, None]
        ports += [State((batch, seen)), State((batch, units)), None, None, None, None]
        for port, value in (extra or {}).items():
            ports[port - 1] = value
        return ports

    sequence, sequenced = Real((2, steps, features), -1.5, 2.0), (2, steps, units)
    tanh = {"fused_activation_function": 4}
    unrolled = "UnidirectionalSequenceLSTMOptions"
    add("UNIDIRECTIONAL_SEQUENCE_LSTM", [sequence, *lstm(2)], sequenced, options=(unrolled, tanh))
    add(
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        [sequence, *lstm(2, 6)],
        (2, steps, 6),
        options=(unrolled, tanh),
        variant="projection",
    )
    add(
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        [sequence, *lstm(2, 6, extra={17: uniform(-0.3, 0.3, 6)})],
        (2, steps, 6),
        options=(unrolled, tanh),
        variant="projection, bias",
    )
    add(
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        [sequence, *lstm(2, cifg=True)],
        sequenced,
        options=(unrolled, tanh),
        variant="cifg",
    )
    add(
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        [Real((steps, 2, features)), *lstm(2)],
        (steps, 2, units),
        variant="time major, clipped",
        options=(unrolled, {**tanh, "time_major": True, "cell_clip": 3.0}),
    )
    add(
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        [sequence, *lstm(2, extra={k: uniform(-0.3, 0.3, units) for k in (9, 10, 11)})],
        sequenced,
        options=(unrolled, tanh),
        variant="peephole",
    )
    add("LSTM", [Real((2, features), -1.5, 2.0), *lstm(2)], (2, units), options=("LSTMOptions", tanh))
    rank, memory, filters = 2, 5, 32
    for activation in (1, 0):
        add(
            "SVDF",
            [
                Real((2, 24), -1.5, 2.0),
                uniform(-0.6, 0.6, filters, 24),
                uniform(-0.6, 0.6, filters, memory),
                uniform(-0.5, 0.5, filters // rank),
                State((2, filters * memory)),
            ],
            (2, filters // rank),
            options=("SVDFOptions", {"rank": rank, "fused_activation_function": activation}),
            variant="" if activation else "linear",
        )

    def rnn() -> list[Any]:
        return [
            uniform(-0.5, 0.5, units, features),
            uniform(-0.4, 0.4, units, units),
            uniform(-0.2, 0.2, units),
            State((2, units)),
        ]

    add("RNN", [Real((2, features)), *rnn()], (2, units), options=("RNNOptions", tanh))
    add("UNIDIRECTIONAL_SEQUENCE_RNN", [sequence, *rnn()], sequenced, options=("SequenceRNNOptions", tanh))
    add(
        "BIDIRECTIONAL_SEQUENCE_RNN",
        [sequence, *rnn(), *rnn(), None, None, None],
        (2, steps, 2 * units),
        options=("BidirectionalSequenceRNNOptions", {**tanh, "merge_outputs": True}),
    )
    other = Real((2, steps, 6))
    crossed = [uniform(-0.5, 0.5, units, 6), uniform(-0.5, 0.5, units, 6)]
    add(
        "BIDIRECTIONAL_SEQUENCE_RNN",
        [sequence, *rnn(), *rnn(), other, *crossed],
        (2, steps, 2 * units),
        variant="auxiliary",
        options=("BidirectionalSequenceRNNOptions", {**tanh, "merge_outputs": True}),
    )
    # Batch 1: the float kernel itself is wrong from the second sample on.
    way = [port for _ in range(2) for port in lstm(1)[:17]]
    states = [State((1, units)) for _ in range(4)]
    both = ("BidirectionalSequenceLSTMOptions", {**tanh, "merge_outputs": True, "time_major": False})
    given = (1, steps, 2 * units)
    add("BIDIRECTIONAL_SEQUENCE_LSTM", [Real((1, steps, features)), *way, *states, *[None] * 9], given, options=both)
    peeped = [uniform(-0.3, 0.3, units) if k % 17 in (8, 9, 10) else port for k, port in enumerate(way)]
    crossed = [uniform(-0.5, 0.5, units, 6) for _ in range(8)]
    add(
        "BIDIRECTIONAL_SEQUENCE_LSTM",
        [Real((1, steps, features)), *peeped, *states, Real((1, steps, 6)), *crossed],
        given,
        options=both,
        variant="peephole, auxiliary",
    )

    one = Real(image, -1.0, 2.0)
    row, positive = uniform(-1, 2, 8), Real(image, 0.5, 3.0)
    for op, name in (("ADD", "AddOptions"), ("SUB", "SubOptions"), ("MUL", "MulOptions")):
        add(op, [x, one], image, options=name)
        add(op, [x, row], image, options=(name, {"fused_activation_function": 1}), variant="constant, relu")
        add(op, [row, x], image, options=name, variant="constant first")
    add("DIV", [x, uniform(1, 2, 8)], image, options="DivOptions")
    add("DIV", [x, uniform(0.1, 3, 8)], image, options="DivOptions", variant="small divisor")
    add("MINIMUM", [x, one], image, options="MaximumMinimumOptions")
    add("MAXIMUM", [x, one], image, options="MaximumMinimumOptions")
    add("MAXIMUM", [x, row], image, options="MaximumMinimumOptions", variant="constant")
    add("SQUARED_DIFFERENCE", [x, one], image, options="SquaredDifferenceOptions")
    add("STABLEHLO_MINIMUM", [x, one], image)
    add("STABLEHLO_MAXIMUM", [x, one], image)

    for op in ("RELU", "RELU6", "RELU_N1_TO_1", "RELU_0_TO_1", "ELU"):
        add(op, [Real(image, -4, 8)], image)
    add("HARD_SWISH", [Real(image, -4, 8)], image, options="HardSwishOptions")
    add("LEAKY_RELU", [x], image, options=("LeakyReluOptions", {"alpha": 0.2}))
    add("PRELU", [x, uniform(-0.5, 0.5, 1, 1, 8)], image)
    add("LOGISTIC", [Real(image, -6, 8)], image)
    add("TANH", [x], image)
    add("SOFTMAX", [x], image, options=("SoftmaxOptions", {"beta": 1.0}))
    add("LOG_SOFTMAX", [x], image, options="LogSoftmaxOptions")
    add("L2_NORMALIZATION", [x], image, options="L2NormOptions")
    add("GELU", [x], image, options=("GeluOptions", {"approximate": True}))
    add("GELU", [x], image, options="GeluOptions", variant="exact")

    add("EXP", [x], image, options="ExpOptions")
    add("LOG", [positive], image)
    add("SQRT", [Real(image, 0.1, 3)], image)
    add("RSQRT", [positive], image)
    add("ABS", [x], image, options="AbsOptions")
    add("NEG", [x], image, options="NegOptions")

    for op, operand in (
        ("MEAN", x),
        ("SUM", x),
        ("REDUCE_MAX", x),
        ("REDUCE_MIN", x),
        ("REDUCE_PROD", Real(image, 0.5, 1.3)),
    ):
        add(op, [operand, ints(1, 2)], (1, 1, 1, 8), options=("ReducerOptions", {"keep_dims": True}))
        if op != "REDUCE_PROD":
            add(op, [operand, ints([3])], (1, 6, 5), options="ReducerOptions", variant="last")
    pool = {"padding": 1, "stride_w": 2, "stride_h": 2, "filter_width": 2, "filter_height": 2}
    for op in ("AVERAGE_POOL_2D", "MAX_POOL_2D"):
        add(op, [x], (1, 3, 2, 8), options=("Pool2DOptions", pool))
        add(op, [x], (1, 3, 2, 8), options=("Pool2DOptions", {**pool, "fused_activation_function": 3}), variant="relu6")
    add(
        "RESIZE_BILINEAR",
        [x, ints(12, 10)],
        (1, 12, 10, 8),
        options=("ResizeBilinearOptions", {"half_pixel_centers": True}),
    )

    whole = Real((4, 20), -9, 9, whole=True)
    add("ARG_MAX", [whole, ints(1)], ((4,), "int32"), options=("ArgMaxOptions", {"output_type": 2}))
    add("ARG_MIN", [whole, ints(1)], ((4,), "int32"), options=("ArgMinOptions", {"output_type": 2}))
    add("TOPK_V2", [whole, ints(3)], (4, 3), ((4, 3), "int32"), options="TopKV2Options")
    add(
        "UNIQUE",
        [Real((12,), -3, 3, whole=True)],
        (12,),
        ((12,), "int32"),
        bare=True,
        options=("UniqueOptions", {"idx_out_type": 2}),
    )
    for op in ("EQUAL", "NOT_EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL"):
        options = "".join(part.capitalize() for part in op.split("_")) + "Options"
        # Every integer has a code of its own in int8: 32 steps of 1/32 away from the next.
        small = Real(image, -32767 / 8192, 127 / 32, whole=True)
        add(op, [small, small], (image, "bool"), options=options)
        add(op, [small, Const(np.array([1.5], np.float32))], (image, "bool"), options=options, variant="constant")

    add("RESHAPE", [x, ints(30, 8)], (30, 8), options=("ReshapeOptions", {"new_shape": np.array([30, 8], np.int32)}))
    add("SQUEEZE", [x], (6, 5, 8), options=("SqueezeOptions", {"squeeze_dims": np.array([0], np.int32)}))
    add("EXPAND_DIMS", [Real((6, 5, 8)), ints(1)], (6, 1, 5, 8), options="ExpandDimsOptions")
    add("TRANSPOSE", [x, ints(0, 3, 1, 2)], (1, 8, 6, 5), options="TransposeOptions")
    add("CONCATENATION", [x, one], wide, options=("ConcatenationOptions", {"axis": 3}))
    add(
        "CONCATENATION",
        [x, uniform(-1, 1, *image)],
        wide,
        options=("ConcatenationOptions", {"axis": 3}),
        variant="constant",
    )
    add("SPLIT", [ints(3), x], (1, 6, 5, 4), (1, 6, 5, 4), options=("SplitOptions", {"num_splits": 2}))
    add("SPLIT_V", [x, ints(3, 5), ints(3)], (1, 6, 5, 3), (1, 6, 5, 5), options=("SplitVOptions", {"num_splits": 2}))
    add(
        "PACK",
        [Real((6, 5, 8)), Real((6, 5, 8), -1, 2)],
        (6, 2, 5, 8),
        options=("PackOptions", {"values_count": 2, "axis": 1}),
    )
    add("UNPACK", [Real((3, 4, 5))], (4, 5), (4, 5), (4, 5), options=("UnpackOptions", {"num": 3, "axis": 0}))
    add("SLICE", [x, ints(0, 1, 1, 2), ints(1, 3, 3, 4)], (1, 3, 3, 4), options="SliceOptions")
    add(
        "STRIDED_SLICE",
        [x, ints(0, 1, 1, 2), ints(1, 5, 4, 8), ints(1, 2, 1, 2)],
        (1, 2, 3, 3),
        options="StridedSliceOptions",
    )
    add(
        "DYNAMIC_UPDATE_SLICE",
        [Real((1, 6, 8)), Real((1, 1, 8), -1, 2), Given(np.array([0, 2, 0], np.int32))],
        (1, 6, 8),
        options="DynamicUpdateSliceOptions",
    )
    add("GATHER_ND", [Real((5, 4, 8)), ints([[1, 2], [0, 3]])], (2, 8), options="GatherNdOptions")
    add("SCATTER_ND", [ints([[1], [3]]), Real((2, 4)), ints(5, 4)], (5, 4), options="ScatterNdOptions")
    add("TILE", [Real((3, 4)), ints(2, 3)], (6, 12), options="TileOptions")
    add("BROADCAST_TO", [Real((1, 5, 1)), ints(4, 5, 3)], (4, 5, 3), options="BroadcastToOptions")
    add("REVERSE_V2", [x, ints([2])], image, options="ReverseV2Options")
    add(
        "REVERSE_SEQUENCE",
        [Real((4, 5, 3)), ints(2, 3, 1, 5)],
        (4, 5, 3),
        options=("ReverseSequenceOptions", {"seq_dim": 1}),
    )
    padding = ints([[0, 0], [1, 2], [2, 1], [0, 0]])
    add("PAD", [x, padding], (1, 9, 8, 8), options="PadOptions")
    add("PADV2", [x, padding, uniform(1, 2, 1)], (1, 9, 8, 8), options="PadV2Options")
    add("MIRROR_PAD", [x, padding], (1, 9, 8, 8), options="MirrorPadOptions")
    add("SPACE_TO_DEPTH", [Real((1, 6, 6, 4))], (1, 3, 3, 16), options=("SpaceToDepthOptions", {"block_size": 2}))
    add("DEPTH_TO_SPACE", [Real((1, 6, 6, 8))], (1, 12, 12, 2), options=("DepthToSpaceOptions", {"block_size": 2}))
    block, crops = ints(2, 2), ints([[0, 0], [0, 0]])
    add("SPACE_TO_BATCH_ND", [Real((1, 6, 6, 4)), block, crops], (4, 3, 3, 4), options="SpaceToBatchNDOptions")
    add("BATCH_TO_SPACE_ND", [Real((4, 3, 3, 4)), block, crops], (1, 6, 6, 4), options="BatchToSpaceNDOptions")
    add("RESIZE_NEAREST_NEIGHBOR", [x, ints(12, 10)], (1, 12, 10, 8), options="ResizeNearestNeighborOptions")
    chosen = Given(rng.random(image) > 0.5)
    add("SELECT", [chosen, x, one], image, options="SelectOptions")
    add("SELECT_V2", [chosen, x, Real((8,), -1, 1)], image, options="SelectV2Options")
    add("SELECT_V2", [chosen, x, uniform(-1, 1, 8)], image, options="SelectV2Options", variant="constant")
    add("FILL", [ints(3, 4), Real(())], (3, 4), options="FillOptions")
    add(
        "ONE_HOT",
        [Given(np.array([1, 2, 0], np.int32)), ints(4), Real((1,), 1, 2), uniform(-0.5, 0, 1)],
        (3, 4),
        options=("OneHotOptions", {"axis": -1}),
    )
    add(
        "SPARSE_TO_DENSE",
        [ints([[0, 1], [2, 2]]), ints(3, 4), Real((2,)), Const(np.float32(-0.3))],
        (3, 4),
        options="SparseToDenseOptions",
    )
    add("MATRIX_DIAG", [Real((3, 4))], (3, 4, 4), options="MatrixDiagOptions")
    add("MATRIX_SET_DIAG", [Real((3, 4, 4)), Real((3, 4), -1, 2)], (3, 4, 4), options="MatrixSetDiagOptions")
    add("DILATE", [Real((4, 4)), ints(2, 2), Const(np.float32(0.1))], (7, 7), options="DilateOptions")
    fields = {"edge_padding_low": [1, 0], "edge_padding_high": [0, 2], "interior_padding": [0, 1]}
    add(
        "STABLEHLO_PAD",
        [Real((4, 5)), Const(np.float32(0.1))],
        (5, 11),
        options=("StablehloPadOptions", {k: np.array(v, np.int64) for k, v in fields.items()}),
    )
    fields = {"offset_dims": [1], "collapsed_slice_dims": [0], "start_index_map": [0], "slice_sizes": [1, 4]}
    add(
        "STABLEHLO_GATHER",
        [Real((5, 4)), Given(np.array([[1], [3]], np.int64))],
        (2, 4),
        options=(
            "StablehloGatherOptions",
            {k: np.array(v, np.int64) for k, v in fields.items()} | {"index_vector_dim": 1},
        ),
    )
    add("HASHTABLE_LOOKUP", [Given(np.array([3, 1], np.int32)), ints(1, 2, 3), Real((3, 4))], (2, 4), ((2,), "uint8"))
    add("SHAPE", [x], ((4,), "int32"), options=("ShapeOptions", {"out_type": 2}))
    add("RANK", [x], ((), "int32"), options="RankOptions")
    grid = Quantization(np.array([5 / 255], np.float32), np.array([-26]), "int8")
    add("QUANTIZE", [x], (image, grid), options="QuantizeOptions")
    add("DEQUANTIZE", [replace(x, stored=grid)], image, options="DequantizeOptions")
    return {op: tuple(cases) for op, cases in found.items()}


CASES: Mapping[str, tuple[Case, ...]] = _cases()

__all__ = ["CASES", "Case", "Const", "Given", "Net", "Real", "State", "build", "replace"]
