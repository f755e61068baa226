"""One row per LiteRT operator: what quantized execution demands. Nothing about operators is written anywhere else.

An operator without a row stays float between quantize and dequantize, and the report says so. Every fact below was
measured on ai-edge-litert 2.3.0, on the builtin kernels and on XNNPACK; `versions` were read in LiteRT's own tables.
A kernel that runs but answers wrongly has no entry in `versions`, so nothing ever asks for it; the note says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

Ports = tuple[int, ...] | slice

ALL = slice(0, None)
NONE: tuple[int, ...] = ()
EIGHTH = MappingProxyType({"int8": (1 / 256, -128), "int16": (1 / 32768, 0)})  # softmax and logistic: [0, 1]
UNIT = MappingProxyType({"int8": (1 / 128, 0), "int16": (1 / 32768, 0)})  # tanh and l2 normalization: [-1, 1]
LOG = MappingProxyType({"int8": (16 / 256, 127)})  # log softmax: [-16, 0]


@dataclass(frozen=True)
class WeightInput:
    """An input that holds weights: `axis` carries the channels, `reduced` are the dimensions summed over.

    `axis` None means that every kernel reads one scale for the whole tensor. Negative dimensions count from the last.
    `bias`, `meets` and `dtype` are those of `paring.graph.WeightUse`; the row's bias belongs to its only weights.
    """

    input: int
    axis: int | None
    reduced: tuple[int, ...]
    bias: int | None = None
    meets: int | None = None
    dtype: str = "int8"


@dataclass(frozen=True)
class Rescale:
    """Ratios of scales within which both the builtin kernel and XNNPACK are right, or load at all.

    Attributes:
      of: What is divided by the output's scale: `each` input's scale, the `product` of the inputs' (with weights:
        in every channel), or the `quotient` of the first by the second. `input`: no ratio, the scale of the inputs
        itself, in int8.
      low: Smallest ratio that is right.
      high: The ratio must stay below this.
    """

    of: str
    low: float = 0.0
    high: float = float("inf")


@dataclass(frozen=True)
class Row:
    """What one builtin operator demands.

    Attributes:
      op: LiteRT's name, e.g. CONV_2D.
      kind: The canonical kind that recipes select by, e.g. conv2d.
      data: Inputs that carry real-valued activations (not indices, shapes, paddings, conditions; not weights or bias).
      out: Outputs that carry real values (not indices or booleans).
      weights: Inputs that hold weights, when constant.
      bias: Input index of the bias.
      same: True where all real-valued inputs and outputs must share one grid.
      fixed: Grid that the kernel demands of its outputs, by activation type: {"int8": (scale, zero_point), ...}.
      symmetric: Inputs that need zero point 0 in int8 too (int16 always does); with `same` the outputs follow.
      versions: Operator version that each form needs; a missing form has no right kernel. Forms: `float`, `int8`,
        `int16` (static activations with int8 weights where there are weights), `dynamic-int8`, `dynamic-int4`,
        `dynamic-int4-block` (float activations, quantized weights, hybrid kernel), `codes-int8` (what it gives are
        codes of its weights, converted behind it), `int8-int4`, `int16-int4` (static with int4 weights).
      quanta: How many output quanta a right int8 kernel may differ from the arithmetic.
      quanta16: The same for int16.
      rescale: Limits on the ratio of scales.
      since: TensorFlow release of the first runtime that is right, by form, where older ones take the same version and
        fail or answer wrongly.
      state: Grids of what the operator keeps for itself in static forms, as (input or None, rule of `StateUse`).
      only: Options without which no static kernel is right, by name: the value it takes.
      without: By form, inputs that its kernel is not known to take rightly.
      computes: False for operators that only move, reshape or fill.
    """

    op: str
    kind: str
    data: Ports = field(default_factory=lambda: ALL)  # Python 3.11 takes a slice for a mutable default
    out: Ports = field(default_factory=lambda: ALL)
    weights: tuple[WeightInput, ...] = ()
    bias: int | None = None
    same: bool = False
    fixed: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    symmetric: tuple[int, ...] = NONE
    versions: Mapping[str, int] = field(default_factory=dict)
    quanta: int = 1
    quanta16: int = 1
    rescale: Rescale | None = None
    since: Mapping[str, str] = field(default_factory=dict)
    state: tuple[tuple[int | None, str], ...] = ()
    only: Mapping[str, int] = field(default_factory=dict)
    without: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    computes: bool = True
    note: str = ""

    def difference(self, form: str) -> float:
        """How much a form may change a model's output, where operands and weights fill their ranges.

        Args:
          form: One of `versions`, or `weight-only-int8` and `weight-only-int4`.

        Returns:
          A bound on |changed - float| / |float| (Frobenius) that adds up along a chain.

        >>> TABLE["CONV_2D"].difference("int8")
        0.02
        """
        quantum = 0.01  # one of int8, against values whose mean square is that of half the range
        activations = {"int8": self.quanta, "int16": self.quanta16 / 256, "dynamic": 1.0}
        change = activations.get(form.partition("-")[0], 0.0)
        if self.weights and form != "float":
            change += 127 / 7 if "int4" in form else 1.0
        return quantum * change


def _versions(float_: int, int8: int | None, int16: int | None = None, **forms: int) -> dict[str, int]:
    """`_versions(1, 2, 3, dynamic_int8=5)` for `{"float": 1, "int8": 2, "int16": 3, "dynamic-int8": 5}`."""
    static = {"float": float_, "int8": int8, "int16": int16}
    named = {form.replace("_", "-"): version for form, version in forms.items()}
    return {form: version for form, version in static.items() if version is not None} | named


_V = _versions

# XNNPACK refuses to prepare, and with it the whole model, at 256 and above in any channel.
_PACKED = Rescale("product", high=256)

_WEIGHTED = (
    Row(
        "CONV_2D",
        "conv2d",
        data=(0,),
        weights=(WeightInput(1, 0, (1, 2, 3)),),
        bias=2,
        versions=_V(1, 3, 4, dynamic_int8=5, dynamic_int4=7, int8_int4=7, int16_int4=7),
        quanta16=2,
        rescale=_PACKED,
        note="int4 runs on the builtin kernel only; grouped convolutions need version 6 and per-channel scales",
    ),
    Row(
        "DEPTHWISE_CONV_2D",
        "depthwise_conv2d",
        data=(0,),
        weights=(WeightInput(1, 3, (0, 1, 2)),),
        bias=2,
        versions=_V(2, 3, 5, int8_int4=7),
        quanta16=2,
        rescale=_PACKED,
        note="a hybrid kernel (version 6) exists, but never reaches XNNPACK: int8 weights behind DEQUANTIZE run 1.4 times "
        "as fast and more exactly; int16 with int4 is silently wrong",
    ),
    Row(
        "FULLY_CONNECTED",
        "dense",
        data=(0,),
        weights=(WeightInput(1, 0, (1,)),),
        bias=2,
        versions=_V(1, 4, 7, dynamic_int8=12, dynamic_int4=10, dynamic_int4_block=12, int8_int4=10, int16_int4=13),
        rescale=_PACKED,
        since={"dynamic-int4-block": "2.20.0"},
        note="without bias at least 6, sparse exactly 8; blocks of 32 or 64, where builtin ignores a fused activation",
    ),
    Row(
        "TRANSPOSE_CONV",
        "conv2d_transpose",
        data=(2,),
        weights=(WeightInput(1, 0, (1, 2, 3)),),
        bias=3,
        versions=_V(3, 3, 3, dynamic_int8=3),
        quanta16=2,
        rescale=_PACKED,
        since={"dynamic-int8": "2.19.0"},
        note="a fused activation needs version 4",
    ),
    Row(
        "BATCH_MATMUL",
        "matmul",
        data=(0, 1),
        weights=(WeightInput(1, None, (-2,)),),
        symmetric=(1,),
        versions=_V(1, 2, 3, dynamic_int8=4),
        quanta16=2,
        note="XNNPACK of 2.20 and 2.21 forgets the right zero point; adj_y sums over -1; static per channel is wrong",
    ),
    Row(
        "EMBEDDING_LOOKUP",
        "embedding",
        data=NONE,
        weights=(WeightInput(1, 0, ()),),
        same=True,
        versions=_V(1, 3, 3, dynamic_int8=4, dynamic_int4=4),
        since={"int16": "2.21.0"},
        computes=False,
        note="int8 out needs one scale for the table",
    ),
    Row(
        "GATHER",
        "gather",
        data=(0,),
        weights=(WeightInput(0, None, ()),),
        same=True,
        versions=_V(1, 2, 4, codes_int8=2),
        computes=False,
        note="int8 in with float out is accepted and garbage",
    ),
)

# Four gates (input, forget, cell, output): weights of the input at 1, of the output state at 5, biases at 12. The
# projection at 16 meets the hidden state, the last of what only the kernel sees; those before it serve layer
# normalization alone.
_GATES = (
    *(WeightInput(1 + gate, None, (1,), bias=12 + gate) for gate in range(4)),
    *(WeightInput(5 + gate, None, (1,)) for gate in range(4)),
    WeightInput(16, None, (1,), bias=17, meets=6),
    *(WeightInput(port, None, ()) for port in (9, 10, 11)),  # peepholes: as the other weights in hybrid kernels
)
_LSTM = Row(
    "LSTM",
    "lstm_cell",
    data=(0,),
    weights=_GATES,
    versions=_V(1, 3, dynamic_int8=4),
    quanta=3,
    state=((18, "result"), (19, "cell"), *((None, "unused"),) * 4, (None, "hidden")),
    only={"fused_activation_function": 4, "kernel_type": 0, "diagonal_recurrent_tensors": 0},
    without={"int8": (9, 10, 11, 20, 21, 22, 23)},
    note="the kernels are wrong for other cell scales than powers of two in [2**-15, 2**-9], and per channel; peephole "
    "weights and layer normalization were not measured; the basic kernel (kernel_type 1) has no int8",
)

_RECURRENT = (
    replace(_LSTM, op="UNIDIRECTIONAL_SEQUENCE_LSTM", kind="lstm", versions=_V(1, 3, dynamic_int8=3)),
    _LSTM,
    Row(
        "SVDF",
        "svdf",
        data=(0,),
        weights=(WeightInput(1, None, (1,)), WeightInput(2, None, (1,), bias=3, meets=0, dtype="int16")),
        bias=3,
        versions=_V(1, 3, dynamic_int8=4),
        state=((4, "range"),),
        only={"fused_activation_function": 1},
        note="the int8 kernel is wrong with int8 time weights, and refuses any other activation when it runs",
    ),
)

# Recurrent operators without an integer kernel: only their hybrid kernels read quantized weights.
_HYBRID = tuple(
    Row(
        op,
        kind,
        data=(0,),
        weights=tuple(WeightInput(i, None, (1,)) for i in ports),
        versions=_V(1, None, dynamic_int8=3),
        without={"dynamic-int8": (9,)} if op == "BIDIRECTIONAL_SEQUENCE_RNN" else {},  # the auxiliary input: garbage
    )
    for op, kind, ports in (
        ("RNN", "rnn_cell", (1, 2)),
        ("UNIDIRECTIONAL_SEQUENCE_RNN", "rnn", (1, 2)),
        ("BIDIRECTIONAL_SEQUENCE_RNN", "bidirectional_rnn", (1, 2, 5, 6, 10, 11)),
        ("BIDIRECTIONAL_SEQUENCE_LSTM", "bidirectional_lstm", (*range(1, 12), 16, *range(18, 29), 33, *range(40, 48))),
    )
)

_PAIRWISE = (
    Row("ADD", "add", versions=_V(1, 2, 3), rescale=Rescale("each", high=64), note="above the ratio int8 wraps round"),
    Row("SUB", "subtract", versions=_V(1, 2, 5)),
    Row(
        "MUL",
        "multiply",
        versions=_V(1, 2, 4),
        rescale=Rescale("product", high=0.5),
        note="above the ratio the builtin kernel wraps round instead of saturating (int16: above 2)",
    ),
    Row(
        "DIV",
        "divide",
        versions=_V(1, 1),
        rescale=Rescale("quotient", low=64),
        since={"int8": "2.20.0"},
        note="below the ratio, quotients near zero come out as the extreme codes; a divisor that rounds to zero raises",
    ),
    Row("MINIMUM", "minimum", same=True, versions=_V(1, 2, 4)),
    Row("MAXIMUM", "maximum", same=True, versions=_V(1, 2, 4)),
    Row("SQUARED_DIFFERENCE", "squared_difference", versions=_V(1, 2)),
    Row("STABLEHLO_MINIMUM", "minimum", same=True, versions=_V(1, 1, 1)),
    Row("STABLEHLO_MAXIMUM", "maximum", same=True, versions=_V(1, 1, 1)),
)

_ACTIVATIONS = (
    Row("RELU", "relu", versions=_V(1, 2, 3)),
    Row("RELU6", "relu6", versions=_V(1, 2, 3)),
    Row("RELU_N1_TO_1", "relu_n1_to_1", versions=_V(1, 1)),
    Row("RELU_0_TO_1", "relu_0_to_1", versions=_V(1, 1)),
    Row("LEAKY_RELU", "leaky_relu", versions=_V(1, 1, 2)),
    Row("PRELU", "prelu", versions=_V(1, 1), note="int16 is accepted and wrong"),
    Row("ELU", "elu", versions=_V(1, 1)),
    Row("HARD_SWISH", "hard_swish", versions=_V(1, 1), rescale=Rescale("each", high=64), note="from 128 on: refused"),
    Row("LOGISTIC", "sigmoid", fixed=EIGHTH, versions=_V(1, 2, 3), quanta16=8),
    Row("TANH", "tanh", fixed=UNIT, versions=_V(1, 2, 3), quanta16=12),
    Row("SOFTMAX", "softmax", fixed=EIGHTH, versions=_V(1, 2, 3), quanta=2, quanta16=8),
    Row("LOG_SOFTMAX", "log_softmax", fixed=LOG, versions=_V(1, 2)),
    Row("L2_NORMALIZATION", "l2_normalization", fixed=UNIT, versions=_V(1, 2)),
    Row("GELU", "gelu", versions=_V(1, 2, 1), quanta16=16, since={"int16": "2.20.0"}),
)

# In int16, EXP, LOG, RSQRT and GELU interpolate a table of 512 intervals over the whole input range.
_ELEMENTWISE = (
    Row("EXP", "exp", versions=_V(1, 2, 2), quanta16=16),
    Row("LOG", "log", versions=_V(1, 2), note="int16 is up to 300 quanta wrong near zero"),
    Row("SQRT", "sqrt", versions=_V(1, 2, 2)),
    Row("RSQRT", "rsqrt", versions=_V(1, 2), note="int16 is up to 120 quanta wrong near zero"),
    Row("ABS", "abs", versions=_V(1, 2, 3)),
    Row(
        "NEG",
        "negative",
        same=True,
        symmetric=(0,),
        versions=_V(1, 1, 1),
        since={"int8": "2.20.0", "int16": "2.20.0"},
        note="negates codes as they are: code -128 stays -128",
    ),
)

_REDUCTIONS = (
    Row("MEAN", "mean", data=(0,), versions=_V(1, 2, 3), quanta=2),
    Row("SUM", "sum", data=(0,), versions=_V(1, 2, 2), since={"int16": "2.20.0"}),
    Row("REDUCE_MAX", "reduce_max", data=(0,), same=True, versions=_V(1, 2, 3)),
    Row("REDUCE_MIN", "reduce_min", data=(0,), same=True, versions=_V(1, 2, 3)),
    Row("REDUCE_PROD", "reduce_prod", data=(0,), versions=_V(1, 2), quanta=3, note="int16 rounds at every factor"),
    Row("AVERAGE_POOL_2D", "average_pool2d", same=True, versions=_V(1, 2, 3)),
    Row("MAX_POOL_2D", "max_pool2d", same=True, versions=_V(1, 2, 3)),
    Row(
        "RESIZE_BILINEAR",
        "resize_bilinear",
        data=(0,),
        same=True,
        versions=_V(3, 3),
        quanta=2,
        note="builtin counts in 1/1024 pixel and drifts unless the factor divides it (64 to 129: 15 quanta); int16 too",
    ),
)

# Comparisons shift codes by 8 bits, multiply them by their scale and round: below, unlike codes become equal (int8: up
# to 84 % of close pairs are wrong). In int16 only EQUAL and NOT_EQUAL suffer, at every scale that occurs.
_EXACT = Rescale("input", low=1 / 256)

# Indices and booleans have no grid. Comparing int16 on unlike grids is up to 18 % wrong, so comparisons share one.
_CHOICES = (
    Row("ARG_MAX", "argmax", data=(0,), out=NONE, versions=_V(1, 2)),
    Row("ARG_MIN", "argmin", data=(0,), out=NONE, versions=_V(1, 2)),
    Row("TOPK_V2", "top_k", data=(0,), out=(0,), same=True, versions=_V(1, 2, 3)),
    Row("UNIQUE", "unique", data=(0,), out=(0,), same=True, versions=_V(1, 1, 1)),
    Row("EQUAL", "equal", out=NONE, same=True, versions=_V(1, 2), rescale=_EXACT),
    Row("NOT_EQUAL", "not_equal", out=NONE, same=True, versions=_V(1, 2), rescale=_EXACT),
    Row("GREATER", "greater", out=NONE, same=True, versions=_V(1, 2, 2), since={"int16": "2.19.0"}, rescale=_EXACT),
    Row("GREATER_EQUAL", "greater_equal", out=NONE, same=True, versions=_V(1, 2, 3), rescale=_EXACT),
    Row("LESS", "less", out=NONE, same=True, versions=_V(1, 2, 3), rescale=_EXACT),
    Row(
        "LESS_EQUAL", "less_equal", out=NONE, same=True, versions=_V(1, 2, 2), since={"int16": "2.19.0"}, rescale=_EXACT
    ),
)


def _move(
    op: str, kind: str, versions: Mapping[str, int], data: Ports = (0,), zero_fill: tuple[int, ...] = NONE
) -> Row:
    note = "fills with code 0, whatever the zero point" if zero_fill else ""
    return Row(op, kind, data=data, same=True, symmetric=zero_fill, versions=versions, computes=False, note=note)


_MOVES = (
    _move("RESHAPE", "reshape", _V(1, 1, 1)),
    _move("SQUEEZE", "squeeze", _V(1, 1, 1)),
    _move("EXPAND_DIMS", "expand_dims", _V(1, 1, 1)),
    _move("TRANSPOSE", "transpose", _V(1, 2, 5)),
    _move("CONCATENATION", "concatenate", _V(1, 2, 3), ALL),
    _move("SPLIT", "split", _V(1, 2, 4), (1,)),
    _move("SPLIT_V", "split_v", _V(1, 2, 2)),
    _move("PACK", "stack", _V(1, 2, 3), ALL),
    _move("UNPACK", "unstack", _V(1, 2, 4)),
    _move("SLICE", "slice", _V(1, 2, 4)),
    _move("STRIDED_SLICE", "strided_slice", _V(1, 2, 4)),
    _move("DYNAMIC_UPDATE_SLICE", "dynamic_update_slice", _V(1, 1, 4), (0, 1)),
    _move("GATHER_ND", "gather_nd", _V(1, 1, 3)),
    _move("SCATTER_ND", "scatter_nd", _V(1, 1), (1,), zero_fill=(1,)),
    replace(_move("TILE", "tile", _V(1, 3, 3)), since={"int16": "2.22.0"}),
    _move("BROADCAST_TO", "broadcast_to", _V(2, 3, 3)),
    _move("REVERSE_V2", "reverse", _V(1, 3, 3)),
    _move("REVERSE_SEQUENCE", "reverse_sequence", _V(1, None, 1)),
    _move("PAD", "pad", _V(1, 2, 3)),
    _move("PADV2", "pad_v2", _V(1, 2, 3), (0, 2)),
    _move("MIRROR_PAD", "mirror_pad", _V(1, 2, 3)),
    _move("SPACE_TO_DEPTH", "space_to_depth", _V(1, 2)),
    _move("DEPTH_TO_SPACE", "depth_to_space", _V(1, 2)),
    _move("SPACE_TO_BATCH_ND", "space_to_batch", _V(1, 2, 4)),
    _move("BATCH_TO_SPACE_ND", "batch_to_space", _V(1, 2, 4)),
    _move("RESIZE_NEAREST_NEIGHBOR", "resize_nearest", _V(3, 3, 4)),
    _move("SELECT", "select", _V(1, 2, 2), (1, 2)),
    _move("SELECT_V2", "where", _V(1, 1, 1), (1, 2)),
    _move("FILL", "fill", _V(1, 3, 3), (1,)),
    _move("ONE_HOT", "one_hot", _V(1, 1), (2, 3)),
    _move("SPARSE_TO_DENSE", "sparse_to_dense", _V(1, 3), (2, 3)),
    _move("MATRIX_DIAG", "matrix_diag", _V(1, 1, 1), zero_fill=(0,)),
    _move("MATRIX_SET_DIAG", "matrix_set_diag", _V(1, 1, 1), (0, 1)),
    _move("DILATE", "dilate", _V(1, 1, 1), (0, 2)),
    _move("STABLEHLO_PAD", "pad_v2", _V(1, 1, 1), (0, 1)),
    _move("STABLEHLO_GATHER", "gather", _V(1, 1, 1)),
    Row("HASHTABLE_LOOKUP", "lookup", data=(2,), out=(0,), same=True, versions=_V(1, 1, 1), computes=False),
    Row("SHAPE", "shape", data=(0,), out=NONE, versions=_V(1, 1, 1), computes=False),
    Row("RANK", "rank", data=(0,), out=NONE, versions=_V(1, 1, 1), computes=False),
)

_GRIDS = (
    Row("QUANTIZE", "quantize", versions=_V(1, 1, 2), computes=False, note="int8 or int16 in: changes the grid"),
    Row("DEQUANTIZE", "dequantize", out=NONE, versions=_V(1, 2, 3), computes=False, note="per channel 5, int4 6"),
)

ROWS: tuple[Row, ...] = (
    _WEIGHTED
    + _RECURRENT
    + _HYBRID
    + _PAIRWISE
    + _ACTIVATIONS
    + _ELEMENTWISE
    + _REDUCTIONS
    + _CHOICES
    + _MOVES
    + _GRIDS
)

TABLE: Mapping[str, Row] = MappingProxyType({row.op: row for row in ROWS})
