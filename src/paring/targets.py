"""What a runtime gains from zeros, by operator, as data."""

from __future__ import annotations

from paring.errors import InputError
from paring.graph import Op

X86 = ("x86", "x86-avx2", "x86-avx512", "x86-avx512-vnni")
LEAST = 4096  # weights: below, a layer is done before its zeros are told apart


def sparse_choice(
    target: str, op: Op, weight_shape: tuple[int, ...], positions: int, dtype: str
) -> tuple[str | None, str]:
    """The pattern that a target gains most from in one operator; None where it gains nothing, and why in words.

    Args:
      target: A runtime on a processor, one of `X86`.
      op: The operator.
      weight_shape: Of its weights, outputs first.
      positions: Output positions per run: each meets all weights.
      dtype: Of the weights when it runs: `float32`, `int8` (static) or `dynamic-int8`.

    Raises:
      InputError: An unknown target.
    """
    if target not in X86:
        raise InputError("unknown target", where=target, expected=", ".join(X86))
    if op.kind not in ("dense", "conv2d"):
        return None, f"no sparse kernel for {op.native} on {target}"
    outputs, inputs = weight_shape[0], weight_shape[-1]
    size = 1
    for extent in weight_shape:
        size *= extent
    if inputs < 16 or outputs < 16:
        return None, f"{inputs} inputs and {outputs} outputs are too few to skip any (16 pay)"
    if size < LEAST:
        return None, f"{size} weights are too few to pay ({LEAST} do)"
    return "16x1", f"blocks of 16 outputs fill a vector on {target}"
