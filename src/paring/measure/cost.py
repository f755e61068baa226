"""What an operator costs: parameters, bytes, multiply-adds, zeros; read from the graph, nothing is run."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from paring.graph import Graph, Op


@dataclass(frozen=True)
class Cost:
    """The cost of one operator.

    Attributes:
      parameters: Elements of its constants, bias included.
      stored_bytes: Bytes they take in the file.
      macs: Multiply-adds for one run at the smallest dynamic shape; 0 where there are no weights.
      zeros: Share of weight elements that are 0, None without weights or where they were not read.
    """

    parameters: int
    stored_bytes: int
    macs: int
    zeros: float | None


def cost(graph: Graph, op: Op, *, read: bool = True) -> Cost:
    """The cost of one operator; `read` touches its weights to count zeros."""
    constants = {t: graph.tensors[t].weight for t in op.inputs if t is not None}
    found = [w for w in constants.values() if w is not None and w.dtype not in ("int32", "int64")]
    macs, zeros, elements = 0, 0, 0
    for use, tensor in graph.weights_of(op):
        if tensor.weight is None:
            continue
        reduced = prod(tensor.weight.shape[d] for d in use.reduced)
        results = prod(max(1, d) for d in graph.tensors[op.outputs[0]].shape)
        if op.kind == "conv2d_transpose" and op.demands is not None and op.demands.data:
            # Every input element meets each kernel position of each output channel.
            source = graph.tensors[op.inputs[op.demands.data[0]]]  # type: ignore[index]
            channels = source.shape[-1] if source.shape else 1
            results, reduced = prod(max(1, d) for d in source.shape), tensor.weight.size // max(1, channels)
        macs += results * reduced if use.reduced else 0
        if read:
            values = tensor.weight.read()
            zeros += values.size - int(np.count_nonzero(values))
            elements += values.size
            tensor.weight.release()
    return Cost(
        sum(w.size for w in found), sum(w.stored_bytes for w in found), macs, zeros / elements if elements else None
    )
