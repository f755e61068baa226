"""What solving hands to a format: solved edits, plain data. Inserting conversions between them is the format's business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paring.compress.base import Encoded
from paring.graph import OpId, Quantization


@dataclass(frozen=True)
class Port:
    """How an operator reads an input or writes an output from now on.

    Attributes:
      grid: The integer grid; None for float32.
      encoded: New values, for a constant.
      unpack: The constant is stored as encoded and converted back to float32 before the operator reads it.
      state: It is a variable of the operator's own, which takes the grid itself: nothing is converted.
    """

    grid: Quantization | None = None
    encoded: Encoded | None = None
    unpack: bool = False
    state: bool = False


@dataclass(frozen=True)
class Edit:
    """One operator's new form.

    Attributes:
      op: Which operator.
      form: The row of its versions.
      version: Operator version of that form.
      inputs: Changed inputs by index; the others stay as they are (float32 activations stay float32).
      outputs: Changed outputs by index.
      params: Changed options.
      inner: Grids of the tensors that only the kernel sees, in its order.
      unfuse: Take the fused activation out into an operator of its own (a kernel is known to ignore it).
    """

    op: OpId
    form: str
    version: int
    inputs: Mapping[int, Port] = field(default_factory=dict)
    outputs: Mapping[int, Port] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    inner: tuple[Quantization, ...] = ()
    unfuse: bool = False
