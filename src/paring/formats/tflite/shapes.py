"""Whether the shapes in a file follow from each other: one row per operator whose rule is simple.

A file whose shapes contradict each other is refused before anything runs it: one flipped dimension could otherwise
ask for gigabytes of activations. Operators without a row are left to the runtime, in its child process. A dimension of
-1 is dynamic and fits everything; None stands for a shape that the file does not give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from paring.formats.tflite import shape_rules as rules
from paring.formats.tflite.flatbuffer import Malformed
from paring.formats.tflite.shape_site import Found, Shape, Site, fits, listed, shown


def check_shapes(site: Site, native: str) -> None:
    """Raises Malformed where the outputs of an operator do not follow from its inputs."""
    rule = RULES.get(native)
    if rule is None:
        return
    try:
        expected = rule(site)
    except (IndexError, ZeroDivisionError) as error:
        raise Malformed(f"has {len(site.ins)} inputs of shapes {shown(site.ins)}, which it cannot take") from error
    for got, want in zip(site.outs, expected, strict=False):
        if got is not None and want is not None and not fits(got, want):
            raise Malformed(f"gives shape {listed(want)}, its output says {listed(got)}")


def _rows(names: str, rule: Callable[[Site], Found]) -> dict[str, Callable[[Site], Found]]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Callable[[Site], Found]] = MappingProxyType(
    _rows("CONV_2D", rules.conv("Conv2DOptions", "hw"))
    | _rows("CONV_3D", rules.conv("Conv3DOptions", "dhw"))
    | _rows("DEPTHWISE_CONV_2D", rules.depthwise)
    | _rows("TRANSPOSE_CONV", rules.transpose_conv)
    | _rows("AVERAGE_POOL_2D MAX_POOL_2D L2_POOL_2D", rules.pool)
    | _rows("FULLY_CONNECTED", rules.dense)
    | _rows("BATCH_MATMUL", rules.matmul)
    | _rows(
        "ADD SUB MUL DIV MINIMUM MAXIMUM SQUARED_DIFFERENCE POW FLOOR_DIV FLOOR_MOD PRELU SELECT_V2", rules.broadcast
    )
    | _rows("EQUAL NOT_EQUAL GREATER GREATER_EQUAL LESS LESS_EQUAL LOGICAL_AND LOGICAL_OR", rules.broadcast)
    | _rows(
        "RELU RELU6 RELU_N1_TO_1 RELU_0_TO_1 LEAKY_RELU ELU HARD_SWISH GELU LOGISTIC TANH SOFTMAX LOG_SOFTMAX",
        rules.same,
    )
    | _rows("EXP LOG SQRT RSQRT SQUARE ABS NEG SIN COS FLOOR CEIL ROUND SIGN LOGICAL_NOT L2_NORMALIZATION", rules.same)
    | _rows("CAST QUANTIZE DEQUANTIZE DENSIFY FAKE_QUANT CUMSUM REVERSE_V2 REVERSE_SEQUENCE ZEROS_LIKE", rules.same)
    | _rows("LOCAL_RESPONSE_NORMALIZATION MATRIX_SET_DIAG DYNAMIC_UPDATE_SLICE", rules.same)
    | _rows("CONCATENATION", rules.concatenation)
    | _rows("RESHAPE", rules.reshape)
    | _rows("SQUEEZE EXPAND_DIMS", rules.recount)
    | _rows("MEAN SUM REDUCE_MAX REDUCE_MIN REDUCE_PROD REDUCE_ANY REDUCE_ALL", rules.reduce)
    | _rows("TRANSPOSE", rules.transpose)
    | _rows("PAD PADV2", rules.pad)
    | _rows("RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR", rules.resize)
    | _rows("SPLIT", rules.split)
    | _rows("SPLIT_V", rules.split_v)
    | _rows("PACK", rules.pack)
    | _rows("UNPACK", rules.unpack)
    | _rows("GATHER", rules.gather)
    | _rows("GATHER_ND", rules.gather_nd)
    | _rows("EMBEDDING_LOOKUP", rules.embedding)
    | _rows("SLICE STRIDED_SLICE", rules.part)
    | _rows("TILE", rules.tile)
    | _rows("FILL", rules.stated(0))
    | _rows("BROADCAST_TO", rules.stated(1))
    | _rows("DEPTH_TO_SPACE", rules.depth_to_space)
    | _rows("SPACE_TO_DEPTH", rules.space_to_depth)
    | _rows("SPACE_TO_BATCH_ND", lambda site: rules.blocks(site, 1))
    | _rows("BATCH_TO_SPACE_ND", lambda site: rules.blocks(site, -1))
    | _rows("ONE_HOT", rules.one_hot)
    | _rows("ARG_MAX ARG_MIN", rules.arg)
    | _rows("TOPK_V2", rules.top_k)
    | _rows("UNIDIRECTIONAL_SEQUENCE_LSTM", rules.sequence(6, 1))
    | _rows("UNIDIRECTIONAL_SEQUENCE_RNN", rules.sequence(2, 0))
    | _rows("SVDF", rules.svdf)
)

__all__ = ["RULES", "Shape", "Site", "check_shapes"]
