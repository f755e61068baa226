"""The oldest runtime that knows an operator in a given version.

Releases are TensorFlow's, as in a model's `min_runtime_version` metadata. LiteRT's wheels count anew. Asked for every
pair below, tflite-runtime 2.14.0 takes exactly those up to 2.14.0, ai-edge-litert 1.2 those up to 2.19.0, tensorflow
2.21.0 those up to 2.21.0 (QUANTIZE 5 and 6 apart), ai-edge-litert 2.1 those up to 2.22.0, and 2.3 all of them.

A release says that the runtime takes the operator, not that its kernel is right: see `Row.since` in `operators.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

# Operator, then the release that brought version 1, version 2, ...; "-" for a version that no runtime takes.
_VERSIONED = """
    ABS 1.13 2.4 2.5 2.6 2.12
    ADD 1.5 1.14 2.4 2.6 2.13 2.23
    ARG_MAX 1.9 1.14 2.9
    ARG_MIN 1.9 1.14 2.9
    AVERAGE_POOL_2D 1.5 1.14 2.3
    BATCH_MATMUL 2.3 2.3 2.4 2.5
    BATCH_TO_SPACE_ND 1.6 1.14 2.3 2.12
    BIDIRECTIONAL_SEQUENCE_LSTM 1.14 1.14 1.14
    BIDIRECTIONAL_SEQUENCE_RNN 1.14 1.14 2.3
    BROADCAST_TO - 2.5 2.5 2.23
    CAST 1.5 2.7 2.8 2.9 2.12 2.15 2.17 2.21 2.23
    CONCATENATION 1.5 1.14 2.3 2.14 2.21 2.23 2.23
    CONV_2D 1.5 1.14 1.14 2.3 2.4 2.9 2.11 2.15
    COS 1.14 2.23
    DEPTHWISE_CONV_2D 1.5 1.12 1.14 2.2 2.3 2.3 2.11
    DEPTH_TO_SPACE 2.1 2.5
    DEQUANTIZE 1.13.1 1.14 1.15 2.2 2.7 2.18 2.21 2.22 2.23
    DIV 1.6 2.3
    DYNAMIC_UPDATE_SLICE 2.9 2.17 2.19 2.20 2.21 2.22
    EMBEDDING_LOOKUP 1.13 1.14 1.14 2.18 2.21
    EQUAL 1.14 1.14 2.3 2.13 2.21
    EXP 1.7 2.12
    FAKE_QUANT 1.5 1.10
    FILL 1.13 2.3 2.5 2.12 2.23
    FLOOR_DIV 1.14 1.14 2.13
    FLOOR_MOD 1.13 2.13
    FULLY_CONNECTED 1.5 1.10 1.14 1.14 2.0 2.1 2.3 2.3 2.3 2.11 2.15 2.17 2.18 2.21
    GATHER 1.6 1.14 1.15 2.4 2.5 2.13 2.15 2.23
    GATHER_ND 1.14 2.3 2.5 2.13 2.16 2.23
    GELU 2.9 2.9 2.23
    GREATER 1.14 1.14
    GREATER_EQUAL 1.14 1.14 2.13
    L2_NORMALIZATION 1.5 1.14
    LEAKY_RELU 1.13.1 2.3
    LESS 1.14 1.14 2.13
    LESS_EQUAL 1.14 1.14
    LOG 1.14 2.15
    LOGISTIC 1.14 1.14 2.3
    LOG_SOFTMAX 1.14 1.14
    LSTM 1.7 1.10 1.14 2.3
    MAXIMUM 1.14 1.14 2.3 2.3
    MAX_POOL_2D 1.5 1.14 2.3
    MEAN 1.6 1.14 2.4
    MINIMUM 1.14 1.14 2.3 2.3
    MIRROR_PAD 1.13.1 2.3 2.12
    MUL 1.5 1.14 1.15 2.3 2.6 2.11 2.13 2.23
    NOT_EQUAL 1.14 1.14 2.3 2.21
    PACK 1.11 1.14 2.3 2.13 2.23
    PAD 1.5 1.14 2.4 2.6 2.20 2.23
    PADV2 1.9 1.14 2.4 2.6 2.20 2.23
    QUANTIZE 1.14 1.15 2.7 2.21 2.21 2.21
    RANGE 1.13 2.14
    REDUCE_MAX 1.11 1.14 2.5
    REDUCE_MIN 1.11 1.14 2.5
    REDUCE_PROD 1.11 2.6
    RELU 1.5 2.1 2.5
    RELU6 1.5 1.14 2.5
    RESIZE_BILINEAR 1.7 1.14 2.2 2.5
    RESIZE_NEAREST_NEIGHBOR 1.13.1 1.14 2.3 2.4
    REVERSE_V2 1.14 2.2 2.5 2.23
    RNN 1.5 1.14 2.3
    RSQRT 1.10 2.5 2.15
    SELECT 1.14 1.14 2.12 2.12
    SELECT_V2 2.2 2.12
    SIGN 2.11 2.12
    SIN 1.9 2.23
    SLICE 1.14 1.14 1.14 2.4 2.5 2.14 2.21 2.23
    SOFTMAX 1.5 1.14 2.3 2.23
    SPACE_TO_BATCH_ND 1.6 1.14 2.3 2.12
    SPACE_TO_DEPTH 1.5 1.14
    SPARSE_TO_DENSE 1.9 1.14 1.15
    SPLIT 1.5 1.14 1.14 2.3 2.23
    SPLIT_V 1.13.1 2.3 2.23
    SQRT 1.10 2.21
    SQUARED_DIFFERENCE 1.13.1 2.5
    SQUEEZE 1.6 2.5
    STRIDED_SLICE 1.6 1.14 2.1 2.2 2.5 2.6 2.14 2.14
    SUB 1.6 1.14 2.3 2.4 2.4
    SUM 1.10 1.15
    SVDF 1.5 1.14 2.2 2.3
    TANH 1.14 1.14 2.3
    TILE 1.10.1 2.2 2.8
    TOPK_V2 1.7 1.14 2.13
    TRANSPOSE 1.6 1.14 1.15 2.3 2.4 2.12 2.14.4 2.22 2.23
    TRANSPOSE_CONV 1.9 2.2 2.3 2.13 2.15
    UNIDIRECTIONAL_SEQUENCE_LSTM 1.13.1 1.14 2.3 2.12
    UNIDIRECTIONAL_SEQUENCE_RNN 1.14 1.14 2.3
    UNPACK 1.11 1.14 2.2 2.3 2.22 2.23
    WHERE 1.14 2.8
"""

# Operators that never had a second version, by release.
_SINGLE = """
    1.5: EMBEDDING_LOOKUP_SPARSE HASHTABLE_LOOKUP L2_POOL_2D LOCAL_RESPONSE_NORMALIZATION
    1.5: LSH_PROJECTION RELU_N1_TO_1 RESHAPE SKIP_GRAM
    1.8: PRELU
    1.9: FLOOR NEG
    1.10: EXPAND_DIMS POW SHAPE
    1.11: LOGICAL_AND LOGICAL_NOT LOGICAL_OR ONE_HOT REDUCE_ANY
    1.12: SQUARE ZEROS_LIKE
    1.14: ADD_N CEIL ELU MATRIX_DIAG MATRIX_SET_DIAG RANK REVERSE_SEQUENCE ROUND UNIQUE
    1.15: HARD_SWISH IF WHILE
    2.1: NON_MAX_SUPPRESSION_V4 NON_MAX_SUPPRESSION_V5 SCATTER_ND
    2.2: DENSIFY SEGMENT_SUM
    2.4: CUMSUM
    2.5: CALL_ONCE COMPLEX_ABS CONV_3D HASHTABLE HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_SIZE IMAG
    2.5: REAL RFFT2D
    2.6: ASSIGN_VARIABLE BROADCAST_ARGS CONV_3D_TRANSPOSE READ_VARIABLE REDUCE_ALL VAR_HANDLE
    2.8: BUCKETIZE MULTINOMIAL RANDOM_STANDARD_NORMAL RANDOM_UNIFORM
    2.10: ATAN2 RELU_0_TO_1 UNSORTED_SEGMENT_MAX UNSORTED_SEGMENT_PROD UNSORTED_SEGMENT_SUM
    2.11: UNSORTED_SEGMENT_MIN
    2.13: BITCAST BITWISE_XOR RIGHT_SHIFT
    2.15: DILATE REDUCE_WINDOW STABLEHLO_RNG_BIT_GENERATOR STABLEHLO_SCATTER
    2.16: STABLEHLO_ADD STABLEHLO_GATHER STABLEHLO_MAXIMUM STABLEHLO_MINIMUM STABLEHLO_MULTIPLY
    2.16: STABLEHLO_PAD STABLEHLO_REDUCE_WINDOW
    2.17: STABLEHLO_AND STABLEHLO_CASE STABLEHLO_COMPOSITE STABLEHLO_SHIFT_LEFT
"""


def _parse() -> dict[tuple[str, int], str]:
    pairs: dict[tuple[str, int], str] = {}
    for op, *releases in map(str.split, _VERSIONED.strip().splitlines()):
        pairs |= {(op, version): release for version, release in enumerate(releases, start=1) if release != "-"}
    for release, *ops in map(str.split, _SINGLE.strip().splitlines()):
        pairs |= {(op, 1): release.rstrip(":") for op in ops}
    return {pair: release if release.count(".") == 2 else f"{release}.0" for pair, release in pairs.items()}


def _order(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


RELEASES: Mapping[tuple[str, int], str] = MappingProxyType(_parse())
FIRST = min(RELEASES.values(), key=_order)
NEWEST = max(RELEASES.values(), key=_order)


def oldest_runtime(pairs: Iterable[tuple[str, int]], floors: Iterable[str] = ()) -> str | None:
    """Finds the oldest TensorFlow release whose runtime takes every operator, compared as numbers, not as text.

    Does not know custom operators: leave them out.

    Args:
      pairs: Operator names, e.g. CONV_2D, with their versions.
      floors: Releases needed for other reasons, such as `Row.since`.

    Returns:
      The release, e.g. `2.11.0`, the first of all without pairs; None when a pair is in no runtime up to `NEWEST`, so
      that a report can say "newer than" it.

    Example:
      >>> oldest_runtime([("CONV_2D", 3), ("FULLY_CONNECTED", 9), ("FULLY_CONNECTED", 10)])
      '2.11.0'
      >>> oldest_runtime([("NEG", 1)], floors=["2.20.0"])
      '2.20.0'
      >>> oldest_runtime([("CONV_2D", 99)]) or f"newer than {NEWEST}"
      'newer than 2.23.0'
    """
    found = [RELEASES.get(pair) for pair in pairs]
    known = [release for release in found if release is not None]
    return None if len(known) < len(found) else max([FIRST, *known, *floors], key=_order)
